"""Turn a graph into int8 without calibration, to see whether and how fast a backend runs it; its numbers mean nothing.

The same operations are quantised as in a bundle: the convolutions, symmetric with zero points of 0 and one scale for
each channel of the weights. The rest stays in fp32, or in fp16 if the graph was converted to that before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgemuse.calibration.graphs import graph_bytes, read_graph, set_nodes, single_precision

ACTIVATION_SCALE = 1 / 16
SMALLEST_SCALE = 1e-4
"""The smallest scale, which fp16 still holds with three digits."""
HALF_SCALES = 19
"""The first opset whose QuantizeLinear takes scales in half precision."""


def to_int8(graph: bytes) -> bytes:
    """Put a pair of QuantizeLinear and DequantizeLinear before both operands of every convolution of `graph`."""
    model = read_graph(graph)
    single_precision(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kind = next(weights[node.input[1]].dtype for node in model.graph.node if node.op_type == "Conv")
    model.opset_import[0].version = max(model.opset_import[0].version, HALF_SCALES)
    nodes: list[onnx.NodeProto] = []
    added: dict[str, NDArray[Any]] = {
        "activation.scale": np.array(ACTIVATION_SCALE, kind),
        "activation.zero": np.array(0, np.int8),
    }
    for node in model.graph.node:
        if node.op_type == "Conv":
            data, weight = node.input[0], node.input[1]
            largest = np.abs(weights[weight]).max(axis=(1, 2, 3, 4))
            added[f"{weight}.scale"] = np.maximum(largest / 127, SMALLEST_SCALE).astype(kind)
            added[f"{weight}.zero"] = np.zeros(len(largest), np.int8)
            nodes += _quantised(data, "activation", node.output[0]) + _quantised(weight, weight, node.output[0], axis=0)
            node.input[0], node.input[1] = f"{data}.{node.output[0]}.dq", f"{weight}.{node.output[0]}.dq"
        nodes.append(node)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
    set_nodes(model, nodes)
    return graph_bytes(model)


def _quantised(name: str, scale: str, user: str, **axis: int) -> list[onnx.NodeProto]:
    stem, facts = f"{name}.{user}", [f"{scale}.scale", f"{scale}.zero"]
    return [
        helper.make_node("QuantizeLinear", [name, *facts], [f"{stem}.q"], name=f"{stem}.q", **axis),
        helper.make_node("DequantizeLinear", [f"{stem}.q", *facts], [f"{stem}.dq"], name=f"{stem}.dq", **axis),
    ]
