"""Lower precision with its accuracy measured: int8 and fp16 graphs, and the gate that they must pass."""

from edgemuse.engines.privacy import switch_off

switch_off()
