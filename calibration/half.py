"""Makes the fp16 graph of a backbone, in which normalisation stays in single precision.

A patch has over a million voxels, and sums over them overflow at half precision's 65504. So the instance normalisations
compute in single precision, and so do the image and the features at either end: engines take and give float32.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemuse.calibration.graphs import constants, graph_bytes, read_graph, set_nodes, single_precision
from edgemuse.engines.errors import VerificationError

SINGLE = "InstanceNormalization"


def half_precision(graph: bytes) -> bytes:
    """The fp32 `graph` in fp16; raises VerificationError if a weight is too large for it."""
    model = read_graph(graph)
    single_precision(model)
    _halve_weights(model)
    source, result = model.graph.input[0].name, model.graph.output[0].name
    nodes = [_cast(source, f"{source}.half", TensorProto.FLOAT16)]
    for node in model.graph.node:
        _rename(node, {source: f"{source}.half", result: f"{result}.half"})
        nodes += _around(node) if node.op_type == SINGLE else [node]
    nodes.append(_cast(f"{result}.half", result, TensorProto.FLOAT))
    set_nodes(model, nodes)
    return graph_bytes(model)


def _halve_weights(model: onnx.ModelProto) -> None:
    kept = {name for node in model.graph.node if node.op_type == SINGLE for name in node.input}
    for name, tensor in constants(model).items():
        if name in kept or tensor.data_type != TensorProto.FLOAT:
            continue
        with np.errstate(over="ignore"):
            halves = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(halves).all():
            raise VerificationError(f"{name} holds weights beyond half precision's 65504")
        tensor.CopyFrom(numpy_helper.from_array(halves, name))


def _around(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """`node` between casts to single precision and back."""
    source, result = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{result}.in", f"{result}.out"
    return [
        _cast(source, node.input[0], TensorProto.FLOAT),
        node,
        _cast(node.output[0], result, TensorProto.FLOAT16),
    ]


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], f"cast.{result}", to=to)


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for field in (node.input, node.output):
        for index, name in enumerate(field):
            field[index] = names.get(name, name)
