"""Measurements against the PyTorch reference, each a command: `python -m edgemuse.bench.pages.parity --help`."""
