"""Inference backends behind one protocol: OpenVINO and ONNX Runtime, chosen by an ordered registry."""
