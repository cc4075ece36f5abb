"""Bundles: the manifest, the archive, the store of named models, precision and tuning."""
