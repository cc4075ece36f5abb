"""One scan from file to files: the segmenter, the cascade of two networks, what is written."""
