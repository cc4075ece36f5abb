"""Peers that run the same network, in OpenVINO and ONNX Runtime used as their manuals show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemuse.engines.protocol import Batch, Engine
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.scan.types import Shape

LOGITS = "logits"


def logits_graph(bundle: Bundle) -> bytes:
    """Return the fp32 graph with its head as a last 1x1x1 convolution, (1, 1, D, H, W) to (1, C, D, H, W)."""
    import onnx
    from onnx import helper, numpy_helper

    graph = bundle.graph("fp32")
    head = bundle.head()
    if head is None:
        return graph
    model = onnx.load_model_from_string(graph)
    output = model.graph.output[0]
    weight = head.weight.reshape(*head.weight.shape, 1, 1, 1)
    model.graph.initializer.extend(
        [numpy_helper.from_array(weight, "head.weight"), numpy_helper.from_array(head.bias, "head.bias")]
    )
    model.graph.node.append(helper.make_node("Conv", [output.name, "head.weight", "head.bias"], [LOGITS]))
    output.name = LOGITS
    output.type.tensor_type.shape.dim[1].dim_value = len(head.bias)
    data: bytes = model.SerializeToString()
    return data


class PlainSegmenter(Segmenter):
    """edgemuse's steps around an engine that returns logits; they are those of `reference` in fp32."""

    def __init__(self, bundle: Bundle, engine: Engine, threads: int | None) -> None:
        options = Options("reference", engine.backend, "fp32", threads=threads, postprocess=False)
        super().__init__(bundle, options)
        self.network = replace(self.network, channels_out=self.network.classes, deferred_head=False)
        self.head = None
        self._given = engine

    def engine(self, tile: Shape) -> Engine:
        """Return the engine that was given, which takes tiles of the patch's shape."""
        return self._given


class PlainOpenVINO:
    """OpenVINO with no setting but fp32 and threads."""

    backend, device, precision = "openvino", "CPU", "fp32"

    def __init__(self, graph: bytes, patch: Shape, threads: int | None) -> None:
        import openvino as ov

        self.version = str(ov.__version__)
        core = ov.Core()
        model = core.read_model(graph)
        model.reshape([1, 1, *patch])
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._compiled = core.compile_model(model, self.device, settings)

    def infer(self, batch: Batch) -> Batch:
        """(1, 1, D, H, W) to (1, C, D, H, W)."""
        return np.array(self._compiled(batch)[0])

    def close(self) -> None:
        """Nothing that the end of the process does not free."""


class PlainONNXRuntime:
    """ONNX Runtime with no setting but threads."""

    backend, device, precision = "onnxruntime", "CPU", "fp32"

    def __init__(self, graph: bytes, patch: Shape, threads: int | None) -> None:
        import onnxruntime as ort

        self.version = str(ort.__version__)
        options = ort.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def infer(self, batch: Batch) -> Batch:
        """(1, 1, D, H, W) to (1, C, D, H, W)."""
        logits: Batch = self._session.run(None, {self._session.get_inputs()[0].name: batch})[0]
        return logits

    def close(self) -> None:
        """Nothing that the end of the process does not free."""


def open_plain(backend: str, graph: bytes, patch: Shape, threads: int | None) -> Engine:
    """Open a session of `backend` for `graph`, (1, 1, D, H, W) to (1, C, D, H, W), at the shape of `patch`."""
    engines: dict[str, type[PlainOpenVINO | PlainONNXRuntime]] = {
        "openvino": PlainOpenVINO,
        "onnxruntime": PlainONNXRuntime,
    }
    return engines[backend](graph, patch, threads)
