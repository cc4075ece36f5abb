"""Measurements against nnU-Net's own predictor: `edgemuse bench`, and the programs that write `docs/measured`."""

from edgemuse.engines.privacy import switch_off

switch_off()
