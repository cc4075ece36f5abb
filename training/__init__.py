"""How the built-in model was made. Needs PyTorch; not part of the installed package."""

from edgemuse.engines.privacy import switch_off

switch_off()
