"""How many operations a second this processor reaches at best, and how many a network needs.

The peak is measured, not taken from a data sheet. OpenVINO runs matrix products in each precision on all cores; they
are so large that arithmetic, not memory, limits them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import onnx
import openvino as ov
import openvino.opset13 as ops
from onnx import helper

from edgemuse.calibration.graphs import constants, read_graph
from edgemuse.engines.openvino import HINTS, probe

SIDE, PRODUCTS = 1536, 8
"""Side of the square matrices, and how many products follow one another."""
LEVELS = 256


def peak(precision: str, seconds: float = 2.0) -> float:
    """The most operations a second reached by chained matrix products, a multiplication and an addition counted as two.

    The best of all repeats within `seconds`, because the rest of the machine can only make one slower.
    """
    core = ov.Core()
    config = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(_products(precision == "int8"), "CPU", config).create_infer_request()
    batch = ov.Tensor(np.ones((SIDE, SIDE), np.float32))
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        request.infer({0: batch})
        best = min(best, time.perf_counter() - start)
    return 2 * PRODUCTS * SIDE**3 / best


def peaks(seconds: float = 2.0) -> dict[str, float]:
    """Return the `peak` of every precision that OpenVINO offers on this processor."""
    return {precision: peak(precision, seconds) for precision in probe().get("CPU", [])}


def _products(quantised: bool) -> ov.Model:
    generator = np.random.default_rng(0)
    source = ops.parameter([SIDE, SIDE], np.float32)
    value = source
    for _ in range(PRODUCTS):
        weight = ops.constant(generator.normal(0, SIDE**-0.5, (SIDE, SIDE)).astype(np.float32))
        if quantised:
            value, weight = _int8(value, 4.0), _int8(weight, 0.2)
        value = ops.matmul(value, weight, False, False)
    return ov.Model([value], [source])


def _int8(value: ov.Node, largest: float) -> ov.Node:
    low, high = np.float32(-largest), np.float32(largest * (LEVELS / 2 - 1) / (LEVELS / 2))
    return ops.fake_quantize(value, low, high, low, high, LEVELS)


def operations(graph: bytes, tile: Sequence[int]) -> int:
    """Multiplications and additions of the convolutions of an ONNX `graph` for one tile (d, h, w), two for each pair.

    As the graph has them: where a backend merges layers it does fewer. Normalisations and activations are not counted;
    they are limited by memory, not by arithmetic.
    """
    model = _fixed(read_graph(graph), tile)
    weights = {name: tuple(tensor.dims) for name, tensor in constants(model).items()}
    for node in model.graph.node:  # weights that are stored in half precision, or as int8
        if node.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear") and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    shapes = _shapes(model)
    grids = {"Conv": "output", "ConvTranspose": "input"}  # at each of whose voxels the whole kernel is applied once
    return sum(
        2 * math.prod(weights[node.input[1]]) * math.prod(shapes[getattr(node, grids[node.op_type])[0]][2:])
        for node in model.graph.node
        if node.op_type in grids
    )


def _fixed(model: onnx.ModelProto, tile: Sequence[int]) -> onnx.ModelProto:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 1
    for axis, size in zip(dims[2:], tile, strict=True):
        axis.dim_value = size
    element = model.graph.output[0].type.tensor_type.elem_type
    name = model.graph.output[0].name
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, element, None))
    del model.graph.value_info[:]
    return model


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values}
