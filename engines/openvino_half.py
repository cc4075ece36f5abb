"""Sums and quotients in half precision: NumPy converts float16 a number at a time, OpenVINO a register at a time.

Both round to the nearest, halves to even, and give infinity for what half precision cannot hold.
"""

from __future__ import annotations

import threading
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
        threads: that will call it at once.

    Returns:
        What takes total (n, C) float16, features (n, F) float32 and weights (n, 1) float32 and gives (n, C) float16.
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
    """A compiled operation that several threads may call at once, each with a request of its own."""

    def __init__(self, parameters: list[Any], result: Any, threads: int) -> None:
        config = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads}
        model = ov.Model([opset13.convert(result, "f16")], parameters)
        self._compiled = ov.Core().compile_model(model, "CPU", config)
        self._own = threading.local()

    def __call__(self, *arrays: NDArray[Any]) -> Half:
        """The result, valid until this thread's next call."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        shared = (np.require(array, requirements=["C", "W"]) for array in arrays)  # a tensor wants both
        tensors = [ov.Tensor(array, shared_memory=True) for array in shared]
        self._own.request.infer(tensors, share_outputs=True)
        result: Half = self._own.request.get_output_tensor(0).data
        return result
