"""Rewrites of a backbone's ONNX graph that prepare it for a lower precision. None of them changes what it computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemuse.engines.errors import BundleError


def read_graph(graph: bytes) -> onnx.ModelProto:
    """Parse an ONNX graph; raises BundleError."""
    try:
        model = onnx.load_model_from_string(graph)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's errors and the checker's share no base class but Exception
        raise BundleError(f"the fp32 graph is not valid ONNX ({error}); export the bundle again") from error
    return model


def graph_bytes(model: onnx.ModelProto) -> bytes:
    """The model as a file, the same bytes every time."""
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Weights by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes of the graph, and drop weights that none of them uses."""
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, content in ((model.graph.node, nodes), (model.graph.initializer, kept)):
        copies = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(copies)


def single_precision(model: onnx.ModelProto) -> None:
    """Turn weights that are stored in half precision and cast into single precision ones."""
    stored, nodes = constants(model), []
    for node in model.graph.node:
        if node.op_type != "Cast" or node.input[0] not in stored:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(stored[node.input[0]])
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    set_nodes(model, nodes)


def split_joined_convolutions(model: onnx.ModelProto) -> None:
    """Replace a convolution of concatenated channels by a sum of convolutions of the parts.

    OpenVINO's CPU plugin gives wrong results for an int8 convolution whose input is a concatenation (seen with 2026.4):
    the parts have scales of their own. In separate convolutions every part also keeps a scale that fits it.
    """
    made, stored, sizes = producers(model), constants(model), channels(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        joined = made.get(node.input[0]) if node.op_type == "Conv" else None
        if joined is None or joined.op_type != "Concat" or _axis(joined) != 1 or _groups(node) != 1:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(stored[node.input[1]])
        parts = np.split(weight, np.cumsum([sizes[name] for name in joined.input])[:-1], axis=1)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(part), f"{node.input[1]}.{index}")
            for index, part in enumerate(parts)
        )
        nodes += _sum_of_convolutions(node, list(joined.input))
    set_nodes(model, needed(nodes, model))


def _sum_of_convolutions(node: onnx.NodeProto, inputs: list[str]) -> Iterator[onnx.NodeProto]:
    total = ""
    for index, source in enumerate(inputs):
        part = onnx.NodeProto()
        part.CopyFrom(node)
        part.name, part.output[0] = f"{node.name}.{index}", f"{node.output[0]}.{index}"
        part.input[0], part.input[1] = source, f"{node.input[1]}.{index}"
        if index:
            del part.input[2:]  # the bias counts once
        yield part
        if index:
            name = node.output[0] if index == len(inputs) - 1 else f"{node.output[0]}.sum{index}"
            yield helper.make_node("Add", [total, part.output[0]], [name], f"{node.name}.add{index}")
            total = name
        else:
            total = part.output[0]


def needed(nodes: list[onnx.NodeProto], model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those of `nodes`, in order of execution, that the output depends on."""
    wanted, kept = {value.name for value in model.graph.output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def channels(model: onnx.ModelProto) -> dict[str, int]:
    """Number of channels of every activation."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in (*graph.input, *graph.value_info, *graph.output)
        if len(value.type.tensor_type.shape.dim) > 1
    }


def _axis(concat: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in concat.attribute if attribute.name == "axis")


def _groups(conv: onnx.NodeProto) -> int:
    return next((int(attribute.i) for attribute in conv.attribute if attribute.name == "group"), 1)
