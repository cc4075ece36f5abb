"""ONNX Runtime, which runs wherever its wheel can be installed. edgemuse uses its CPU provider."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgemuse.engines.errors import BackendError
from edgemuse.engines.hardware import cpu_identity, cpu_name
from edgemuse.engines.protocol import Batch, EngineOptions, TileShape

ort.disable_telemetry_events()  # of a process that imported it before edgemuse, and of its builds for Windows
PROVIDERS = {"CPU": "CPUExecutionProvider"}
PRECISIONS = ["fp32", "fp16", "int8"]
"""The precisions of the CPU provider. It has no fp16 convolution: it computes in fp32 and rounds, which is correct but
not fast."""
FATAL = 4
"""ONNX Runtime's log level: below it, it would warn about options that edgemuse chose on purpose."""


def probe() -> dict[str, list[str]]:
    """The devices of this machine and the precisions that each of them offers."""
    offered = ort.get_available_providers()
    return {device: list(PRECISIONS) for device, provider in PROVIDERS.items() if provider in offered}


def processor(device: str) -> str:
    """What computes for `device`."""
    return cpu_identity()


class ONNXRuntimeEngine:
    """One inference session."""

    backend = "onnxruntime"
    lighter_from_cache = False
    version = str(ort.__version__)

    def __init__(self, options: EngineOptions, shape: TileShape) -> None:
        self.device, self.precision = options.device, options.precision
        self._shape, self._threads = shape, options.threads
        self._session: Any = None

    def facts(self) -> dict[str, object]:
        """What a compiled model depends on besides the graph."""
        return {"processor": cpu_name(), "threads": self._threads}

    def build(self, graph: bytes, keep: bool) -> bytes:
        """Optimise the ONNX `graph` for this processor; return it as ONNX if it is to be kept, else nothing."""
        options = self._session_options()
        if not keep:
            self._start(graph, options)
            return b""
        with tempfile.TemporaryDirectory(prefix="edgemuse-") as folder:
            path = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(path)
            self._start(graph, options)
            return path.read_bytes()

    def load(self, blob: memoryview) -> bool:
        """Take an optimised graph back; False if ONNX Runtime does not accept it."""
        options = self._session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._start(bytes(blob), options)
        except BackendError:
            return False
        return True

    def _session_options(self) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        # The arena keeps freed blocks, and the memory plan counts on their being given back between tiles.
        options.enable_cpu_mem_arena = False
        for axis, name in zip(self._shape[2:], ("depth", "height", "width"), strict=True):
            options.add_free_dimension_override_by_name(name, axis)
        if self._threads:
            options.intra_op_num_threads = self._threads
        return options

    def _start(self, graph: bytes, options: Any) -> None:
        try:
            self._session = ort.InferenceSession(graph, options, providers=[PROVIDERS[self.device]])
        except Exception as error:  # its errors share no base class but Exception
            raise BackendError(f"ONNX Runtime cannot load the network: {error}".splitlines()[0]) from error

    def infer(self, batch: Batch) -> Batch:
        """Run the network once into a fresh array."""
        try:
            name = self._session.get_inputs()[0].name
            features: Batch = self._session.run(None, {name: batch})[0]
            return np.require(features, requirements=["C", "W"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed while running the network: {error}".splitlines()[0]) from error

    def close(self) -> None:
        """Drop the session."""
        self._session = None
