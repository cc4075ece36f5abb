"""A file becomes a checked volume with its grid."""
