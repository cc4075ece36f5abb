"""Calibration: makes int8 and fp16 graphs, and measures whether they pass the accuracy gate."""
