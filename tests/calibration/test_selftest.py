"""What int8 must give is worked out in fp32, and faults of int8 arithmetic are told from roundings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import Tiny, add_selftest, edit_manifest, replace_file, replace_graph, tiny_bundle, tiny_oracle
from onnx import helper, numpy_helper
from unets import unet

pytest.importorskip("nncf", reason="NNCF is not installed: pip install 'edgemuse[calibrate]'")

from edgemuse.calibration.graphs import constants, graph_bytes, producers, read_graph, set_nodes
from edgemuse.calibration.quantise import quantise
from edgemuse.calibration.selftest import selftest_file, spelled_out
from edgemuse.engines.protocol import Batch, EngineOptions
from edgemuse.engines.registry import NAMES, statuses
from edgemuse.export.phantoms import synthetic_patches
from edgemuse.export.selftest import run_fp32
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.selftest import LIMITS, SELFTEST, deviation, measure, read_selftest, ways
from edgemuse.runtime.scan.types import Shape

SHAPE: Shape = (16, 16, 16)


def image(seed: int = 0) -> Batch:
    return next(synthetic_patches(SHAPE, 1, seed))


@pytest.fixture(scope="module")
def int8() -> bytes:
    return quantise(graph_bytes(unet()), [image(seed) for seed in range(1, 5)]).graph()


def flat(output: Batch) -> Batch:
    return output[0].reshape(output.shape[1], -1)


def test_spelled_out_it_gives_what_the_nodes_say(int8: bytes) -> None:
    """Of ONNX Runtime without its optimisations, but for roundings that fall to the other side."""
    ort = pytest.importorskip("onnxruntime", reason="it runs the nodes one by one: pip install onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"image": image()})[0]
    assert deviation(flat(run_fp32(spelled_out(int8), image())), flat(expected)) < 0.01


def test_no_backend_takes_it_for_int8(int8: bytes) -> None:
    kinds = {node.op_type for node in read_graph(spelled_out(int8)).graph.node}
    assert kinds >= {"Div", "Round", "Clip", "Mul"}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}


def taken_for_unsigned(model: onnx.ModelProto) -> None:
    """A negative byte is read as one above 127."""
    for name, value in (("zero", 0), ("range", 256)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Mul":
            name, byte = node.output[0], node.input[0]
            nodes.append(helper.make_node("Less", [byte, "zero"], [f"{name}.negative"]))
            nodes.append(helper.make_node("Add", [byte, "range"], [f"{name}.wrapped"]))
            nodes.append(helper.make_node("Where", [f"{name}.negative", f"{name}.wrapped", byte], [f"{name}.byte"]))
            node.input[0] = f"{name}.byte"
        nodes.append(node)
    set_nodes(model, nodes)


def sums_in_twelve_bits(model: onnx.ModelProto) -> None:
    """That saturate. The network is far narrower than one for which sixteen would be too few."""
    made, stored, nodes = producers(model), constants(model), []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Conv":
            result, node.output[0] = node.output[0], f"{node.output[0]}.sum"
            scale = numpy_helper.to_array(stored[made[node.input[0]].input[1]])
            weight = numpy_helper.to_array(stored[node.input[1]])
            step = scale * np.abs(weight).max(axis=(1, 2, 3, 4)).reshape(1, -1, 1, 1, 1) / 127
            limits = {f"{result}.most": 2047 * step, f"{result}.least": -2048 * step}
            model.graph.initializer.extend(numpy_helper.from_array(v.astype("f4"), name) for name, v in limits.items())
            nodes.append(helper.make_node("Min", [node.output[0], f"{result}.most"], [f"{result}.capped"]))
            nodes.append(helper.make_node("Max", [f"{result}.capped", f"{result}.least"], [result]))
    set_nodes(model, nodes)


def a_block_of_channels_lost(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Conv":
            tensor = constants(model)[node.input[1]]
            weight = numpy_helper.to_array(tensor).copy()
            weight[:, : weight.shape[1] // 2] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))


def seven_bit_weights(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Conv":
            tensor = constants(model)[node.input[1]]
            weight = numpy_helper.to_array(tensor)
            step = np.abs(weight).max(axis=(1, 2, 3, 4), keepdims=True) / 63
            tensor.CopyFrom(numpy_helper.from_array((np.rint(weight / step) * step).astype(np.float32), tensor.name))


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (seven_bit_weights, True),
        (taken_for_unsigned, False),
        (sums_in_twelve_bits, False),
        (a_block_of_channels_lost, False),
    ],
)
def test_faults_are_told_from_roundings(change: Callable[[onnx.ModelProto], None], passes: bool, int8: bytes) -> None:
    """Seven bits are what processors without VNNI leave of a weight, so that sums of products fit into sixteen."""
    plain = spelled_out(int8)
    model = read_graph(plain)
    change(model)
    error = deviation(flat(run_fp32(graph_bytes(model), image())), flat(run_fp32(plain, image())))
    assert (error <= LIMITS["int8"]) == passes, error


@pytest.mark.parametrize("backend", NAMES[:2])
def test_backends_pass_with_a_quantised_network(backend: str, int8: bytes, tmp_path: Path) -> None:
    if next(iter(statuses(backend))).reason:
        pytest.skip(f"{backend} is not here")
    folder = tiny_bundle(tmp_path / "unet.bundle", features=4, stride=(2, 2, 2), patch=SHAPE)
    replace_file(replace_graph(folder, graph_bytes(unet())), "int8.onnx", int8)
    bundle = open_bundle(edit_manifest(folder, graphs={"fp32": "fp32.onnx", "int8": "int8.onnx"}))
    bundle = open_bundle(replace_file(folder, SELFTEST, selftest_file(bundle, int8)))
    found = {way.precision: measure(bundle, way) for way in ways(bundle, EngineOptions()) if way.backend == backend}
    assert {"fp32", "int8"} <= found.keys()
    assert all(verdict is not None and verdict.passed for verdict in found.values()), found


def test_what_a_bundle_stores_is_kept(int8: bytes, tmp_path: Path) -> None:
    """The tile and the fp32 features come from the machine that exported it, and int8's are made for the new graph."""
    folder = add_selftest(tiny_bundle(tmp_path / "tiny.bundle"))
    before = read_selftest(open_bundle(folder))
    narrow = quantise(graph_bytes(unet()), [image(1)]).graph()
    after = read_selftest(open_bundle(replace_file(folder, SELFTEST, selftest_file(open_bundle(folder), narrow))))
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after.tile, before.tile)
    np.testing.assert_array_equal(after.features["fp32"], before.features["fp32"])
    expected = run_fp32(spelled_out(narrow), before.tile)
    np.testing.assert_array_equal(after.features["int8"], flat(expected)[:, before.places])


def test_an_old_bundle_gets_a_tile(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "old.bundle")
    found = read_selftest(open_bundle(replace_file(folder, SELFTEST, selftest_file(open_bundle(folder), None))))
    assert found is not None
    assert found.features.keys() == {"fp32"}
    expected = flat(tiny_oracle(found.tile[0, 0], Tiny())[None])[:, found.places]
    assert deviation(found.features["fp32"], expected.astype(np.float32)) < 1e-5
