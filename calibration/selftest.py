"""A bundle's self-test, for the graphs that calibration adds."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemuse.calibration.graphs import constants, graph_bytes, read_graph, set_nodes
from edgemuse.export.selftest import new_selftest, run_fp32, selftest_bytes, with_features
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.selftest import read_selftest

LEAST, MOST = "int8.least", "int8.most"


def selftest_file(bundle: Bundle, int8: bytes | None) -> bytes:
    """The self-test of `bundle` with the graph `int8`: the tile and fp32 features that it has, or new ones."""
    selftest, graphs = read_selftest(bundle), dict[str, bytes]()
    if selftest is None:
        selftest, graphs["fp32"] = new_selftest(bundle.manifest.network), bundle.graph("fp32")
    if int8 is not None:
        graphs["int8"] = spelled_out(int8)
    outputs = {precision: run_fp32(graph, selftest.tile) for precision, graph in graphs.items()}
    return selftest_bytes(with_features(selftest, outputs))


def spelled_out(graph: bytes) -> bytes:
    """What the Q/DQ nodes of an int8 `graph` say, in fp32: no backend takes it for int8, so none computes it as such.

    Quantising becomes division, rounding and limits, dequantising a product, and weights become what they stand for.
    """
    model = read_graph(graph)
    limits = {LEAST: np.float32(-128), MOST: np.float32(127)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in limits.items())
    nodes = [new for node in model.graph.node for new in _spelled(node, model)]
    del model.graph.value_info[:]  # they name the old types
    set_nodes(model, nodes)
    return graph_bytes(model)


def _spelled(node: onnx.NodeProto, model: onnx.ModelProto) -> list[onnx.NodeProto]:
    if node.op_type == "QuantizeLinear":
        (source, scale, _), result = node.input, node.output[0]
        return [
            helper.make_node("Div", [source, scale], [f"{result}.quotient"]),
            helper.make_node("Round", [f"{result}.quotient"], [f"{result}.rounded"]),
            helper.make_node("Clip", [f"{result}.rounded", LEAST, MOST], [result]),
        ]
    if node.op_type != "DequantizeLinear":
        return [node]
    (source, scale, _), result = node.input, node.output[0]
    stored = constants(model)
    if source not in stored:
        return [helper.make_node("Mul", [source, scale], [result])]
    values, scales = (numpy_helper.to_array(stored[name]).astype(np.float32) for name in (source, scale))
    axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 1)
    if scales.size > 1:  # one a channel
        scales = scales.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    model.graph.initializer.append(numpy_helper.from_array(values * scales, result))
    return []
