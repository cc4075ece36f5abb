"""Inference backends behind one protocol: TensorRT, OpenVINO and ONNX Runtime, chosen by an ordered registry."""
