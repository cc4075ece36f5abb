"""Export, in PyTorch: an nnU-Net v2 model folder becomes a verified bundle."""

from edgemuse.engines.privacy import switch_off

switch_off()
