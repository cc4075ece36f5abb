"""Measurements against the PyTorch reference, each a command: `python -m edgemuse.bench.parity --help`."""
