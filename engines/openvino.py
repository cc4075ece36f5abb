"""OpenVINO, for CPUs (x86 and ARM): the fastest backend that was measured on them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import openvino as ov

from edgemuse.engines import cache
from edgemuse.engines.errors import BackendError
from edgemuse.engines.hardware import cpu_identity, cpu_name
from edgemuse.engines.openvino_rewrites import (
    fold_constants,
    halve_features,
    merge_upsampling,
    normalise_precisely,
    put_channels_last,
)
from edgemuse.engines.protocol import Batch, EngineOptions, Output, TileShape

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
"""The precision that OpenVINO is told to compute in: left to itself it may choose bf16 or fp16. An int8 graph says
where it is int8, and the rest of it is fp32."""


def probe() -> dict[str, list[str]]:
    """The devices of this machine and the precisions that each of them offers."""
    core = ov.Core()
    return {device: _precisions(core, device) for device in core.available_devices if device == "CPU"}


def processor(device: str) -> str:
    """What computes for `device`."""
    return cpu_identity()


def _precisions(core: ov.Core, device: str) -> list[str]:
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return ["fp32", *(precision for precision in ("bf16", "fp16", "int8") if precision.upper() in offered)]


class OpenVINOEngine:
    """One compiled model with one inference request."""

    backend = "openvino"
    version = str(ov.__version__)
    lighter_from_cache = True
    """A model that was loaded takes less memory than one that was just compiled."""

    def __init__(self, options: EngineOptions, shape: TileShape) -> None:
        self.device, self.precision = options.device, options.precision
        self._shape = shape
        self._core = ov.Core()
        self._config = {"INFERENCE_PRECISION_HINT": HINTS[options.precision], "PERFORMANCE_HINT": "LATENCY"}
        if options.precision == "int8":  # snippets keep the plugin from adding up convolutions in place
            self._config["SNIPPETS_MODE"] = "DISABLE"
        if options.threads:
            self._config["INFERENCE_NUM_THREADS"] = str(options.threads)
        self._request: Any = None
        self._blob: memoryview | None = None  # which the compiled model reads from

    def facts(self) -> dict[str, object]:
        """What a compiled model depends on besides the graph."""
        return {"processor": cpu_name(), "config": self._config}

    def build(self, graph: bytes, keep: bool) -> bytes:
        """Compile the ONNX `graph`; return it as OpenVINO stores it if it is to be kept, else nothing."""
        try:
            model = self._core.read_model(graph)
            model.reshape(list(self._shape))
            if self.precision == "fp32":  # of an int8 graph, folding would make fp32 weights
                fold_constants(model)
                merge_upsampling(model)
                normalise_precisely(model)
            put_channels_last(model)
            if self.precision == "int8":
                halve_features(model)
            compiled = self._core.compile_model(model, self.device, self._config)
            self._start(compiled)
            exported = compiled.export_model() if keep else b""
        except BackendError:
            raise
        except Exception as error:  # whatever a graph makes it or the rewrites above raise
            raise BackendError(f"OpenVINO cannot compile the network: {_first_line(error)}") from error
        return exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)

    def load(self, blob: memoryview) -> bool:
        """Take a compiled model back; False if OpenVINO does not accept it.

        OpenVINO keeps the weights twice: as they are stored, and packed for the processor. The stored ones need no
        memory where the file is mapped.
        """
        try:
            try:
                stored = ov.Tensor(np.frombuffer(blob, np.uint8), shared_memory=True)
                compiled = self._core.import_model(stored, self.device, self._config)
            except TypeError:  # before OpenVINO 2025.3
                compiled = self._core.import_model(bytes(blob), self.device, self._config)
            self._start(compiled)
        except Exception:  # then it is compiled again
            return False
        self._blob = blob
        cache.give_back(blob)
        return True

    def _start(self, compiled: ov.CompiledModel) -> None:
        given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if given != HINTS[self.precision]:
            raise BackendError(
                f"OpenVINO runs in {given} on this {self.device} although {self.precision} was asked for"
            )
        self._request = compiled.create_infer_request()

    def infer(self, batch: Batch) -> Output:
        """Run the network once; the result lies in the request's own buffer."""
        try:
            self._request.infer({0: ov.Tensor(batch, shared_memory=True)}, share_outputs=True)
            features: Output = np.moveaxis(self._request.get_output_tensor(0).data, -1, 1)
        except Exception as error:
            raise BackendError(f"OpenVINO failed while running the network: {_first_line(error)}") from error
        return features

    def close(self) -> None:
        """Drop the request and with it the compiled model."""
        self._request = self._blob = None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
