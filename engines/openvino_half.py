"""Sums and quotients in half precision. NumPy converts float16 one number at a time, OpenVINO one register at a time.

Both round to the nearest, halves to even, and give infinity for what half precision cannot hold.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13

Half = NDArray[np.float16]


def adder(head: tuple[NDArray[np.float32], NDArray[np.float32]] | None, threads: int) -> Operation:
    """Compile `total + weight * (head applied to features)`, computed in float32 and rounded once.

    Args:
        head: weight (C, F) and bias (C,); None where the features are added up themselves.
        threads: how many will call it at the same time.

    Returns:
        An operation on total (n, C) float16, features (n, F) float32 and weights (n, 1) float32 that returns (n, C)
        float16.
    """
    total = opset13.parameter([-1, -1], np.float16)
    features = opset13.parameter([-1, -1], np.float32)
    weights = opset13.parameter([-1, 1], np.float32)
    logits: Any = features
    if head is not None:
        weight, bias = (opset13.constant(np.ascontiguousarray(array)) for array in head)
        logits = opset13.add(opset13.matmul(features, weight, False, True), bias)
    summed = opset13.add(opset13.multiply(logits, weights), opset13.convert(total, "f32"))
    return Operation([total, features, weights], summed, threads)


def divider(threads: int) -> Operation:
    """Compile the quotient of (n, C) and (n, 1), both float16, computed in float32 and rounded once."""
    total = opset13.parameter([-1, -1], np.float16)
    weights = opset13.parameter([-1, 1], np.float16)
    quotient = opset13.divide(*(opset13.convert(array, "f32") for array in (total, weights)))
    return Operation([total, weights], quotient, threads)


class Operation:
    """A compiled operation that as many as `threads` threads may call at the same time."""

    def __init__(self, parameters: list[Any], result: Any, threads: int) -> None:
        config = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads}
        model = ov.Model([opset13.convert(result, "f16")], parameters)
        compiled = ov.Core().compile_model(model, "CPU", config)
        self._idle = SimpleQueue[ov.InferRequest]()  # requests of threads that have ended would keep their memory
        for _ in range(threads):
            self._idle.put(compiled.create_infer_request())

    def __call__(self, *arrays: NDArray[Any]) -> Half:
        """The result, an array of its own."""
        shared = (np.require(array, requirements=["C", "W"]) for array in arrays)  # a tensor wants both
        tensors = [ov.Tensor(array, shared_memory=True) for array in shared]
        request = self._idle.get()
        try:
            request.infer(tensors, share_outputs=True)
            result: Half = request.get_output_tensor(0).data.copy()
            return result
        finally:
            self._idle.put(request)
