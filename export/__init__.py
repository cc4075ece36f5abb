"""The PyTorch side: from an nnU-Net v2 model folder to a verified bundle."""

from edgemuse.engines.privacy import switch_off

switch_off()
