"""fp16 and int8 forms of a graph, to see whether a backend takes them: their numbers mean nothing.

The scales of int8 are one constant, not calibrated. Which operations are converted is what counts: in fp16 all but the
normalisations, in int8 the convolutions, symmetric with zero points of 0 and one scale a channel of the weights. What
int8 leaves alone stays as it is: fp32, or fp16 if the graph was converted to that before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WEIGHTED = ("Conv", "ConvTranspose")
ACTIVATION_SCALE = 1 / 16
SMALLEST_SCALE = 1e-4
"""fp16 holds it with three digits."""
HALF_SCALES = 19
"""The first opset whose QuantizeLinear takes scales in half precision."""


def to_fp16(graph: bytes) -> bytes:
    """`graph` in half precision, its input, output and normalisations in single."""
    model = _with_plain_weights(graph)
    graph_input, graph_output = model.graph.input[0].name, model.graph.output[0].name
    nodes = [_cast(graph_input, "fp16")]
    for node in model.graph.node:
        node.input[0] = "image.fp16" if node.input[0] == graph_input else node.input[0]
        if node.op_type != "InstanceNormalization":
            nodes.append(node)
            continue
        name, result = node.input[0], node.output[0]
        node.input[0], node.output[0] = f"{name}.fp32", f"{result}.fp32"
        nodes += [_cast(name, "fp32"), node, _cast(f"{result}.fp32", "fp16", result)]
    nodes[-1].output[0] = f"{graph_output}.half"
    nodes.append(_cast(f"{graph_output}.half", "fp32", graph_output))
    _halve(model, {name for node in nodes if node.op_type in WEIGHTED for name in node.input[1:]})
    return _with_nodes(model, nodes)


def to_int8(graph: bytes) -> bytes:
    """`graph` with a pair of QuantizeLinear and DequantizeLinear before both operands of every convolution."""
    model = _with_plain_weights(graph)
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
    return _with_nodes(model, nodes)


def _quantised(name: str, scale: str, user: str, **axis: int) -> list[onnx.NodeProto]:
    stem, facts = f"{name}.{user}", [f"{scale}.scale", f"{scale}.zero"]
    return [
        helper.make_node("QuantizeLinear", [name, *facts], [f"{stem}.q"], name=f"{stem}.q", **axis),
        helper.make_node("DequantizeLinear", [f"{stem}.q", *facts], [f"{stem}.dq"], name=f"{stem}.dq", **axis),
    ]


def _cast(name: str, precision: str, result: str | None = None) -> onnx.NodeProto:
    to = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    result = result or f"{name}.{precision}"
    return helper.make_node("Cast", [name], [result], name=f"cast.{result}", to=to)


def _with_plain_weights(graph: bytes) -> onnx.ModelProto:
    """Without the casts that follow weights stored in half precision."""
    model = onnx.load_model_from_string(graph)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    for node in casts:
        tensor = stored[node.input[0]]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        model.graph.node.remove(node)
    return model


def _halve(model: onnx.ModelProto, names: set[str]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> bytes:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
