"""Measurements against the PyTorch reference, each a command: `python -m edgemuse.bench.pages.parity --help`."""

from edgemuse.engines.privacy import switch_off

switch_off()
