"""Rewrites leave what the graph computes as it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from bundles import tiny_graph
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from unets import unet

from edgemuse.calibration.graphs import graph_bytes, read_graph, single_precision, split_joined_convolutions
from edgemuse.calibration.half import half_precision
from edgemuse.engines.errors import BundleError, VerificationError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import open_engine

SHAPE = (1, 1, 8, 10, 6)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def run(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    """By ONNX's own reference implementation."""
    result: np.ndarray = ReferenceEvaluator(model).run(None, {"image": batch})[0]
    return result


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("parts", [2, 3])
def test_split_convolution_computes_the_same(parts: int) -> None:
    model = unet(parts=parts)
    expected = run(model, image())
    split_joined_convolutions(model)
    onnx.checker.check_model(model, full_check=True)
    assert "Concat" not in kinds(model)
    assert kinds(model)["Conv"] == 2 + parts
    assert kinds(model)["Add"] == parts - 1
    np.testing.assert_allclose(run(model, image()), expected, atol=1e-5)


def test_every_part_has_weights_of_its_own_and_one_the_bias() -> None:
    model = unet()
    whole = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "last.w"))
    split_joined_convolutions(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    parts = [node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith("last")]
    np.testing.assert_array_equal(np.concatenate([stored[node.input[1]] for node in parts], axis=1), whole)
    assert [len(node.input) for node in parts] == [3, 2]
    assert "last.w" not in stored


def test_without_a_concatenation_nothing_changes() -> None:
    model = read_graph(tiny_graph())
    before = list(model.graph.node)
    split_joined_convolutions(model)
    assert list(model.graph.node) == before


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as the exporter stores weights that half precision holds exactly: each followed by a cast."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".w"):
            stored = f"{tensor.name}.half"
            casts.append(onnx.helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_stored_half_precision_becomes_single() -> None:
    model = halved(unet())
    expected = run(model, image())
    single_precision(model)
    assert "Cast" not in kinds(model)
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT}
    np.testing.assert_array_equal(run(model, image()), expected)


@pytest.mark.parametrize("model", [unet(), halved(unet())], ids=["single", "stored half"])
def test_half_precision_is_near_and_not_the_same(model: onnx.ModelProto) -> None:
    expected = run(model, image())
    half = read_graph(half_precision(graph_bytes(model)))
    onnx.checker.check_model(half, full_check=True)
    found = run(half, image())
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / expected.std()
    assert 1e-5 < error < 1e-2


def test_normalisation_stays_single_and_nothing_else_does() -> None:
    half = read_graph(half_precision(graph_bytes(unet())))
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(half, strict_mode=True).graph.value_info
    }
    stored = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for node in half.graph.node:
        wanted = TensorProto.FLOAT if node.op_type == "InstanceNormalization" else TensorProto.FLOAT16
        if node.op_type != "Cast":
            assert {(types | stored)[name] for name in (*node.input, *node.output)} == {wanted}, node.name


def test_sums_that_overflow_half_precision_do_not() -> None:
    """Values near 200 over 40 x 40 x 40 voxels: their sum and squares are far beyond 65504."""
    batch = 200 + np.random.default_rng(1).normal(size=(1, 1, 40, 40, 40)).astype(np.float32)
    options = EngineOptions(backend="onnxruntime", precision="fp16")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime, which runs fp16 graphs on any CPU, is not installed")
    engine = open_engine(half_precision(graph_bytes(unet())), batch.shape, options)
    found = engine.infer(batch)
    engine.close()
    assert np.isfinite(found).all()
    assert found.std() > 0.1


def test_weights_beyond_half_precision_are_refused() -> None:
    model = unet()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((4, 1, 3, 3, 3), 7e4, np.float32), "skip.w"))
    with pytest.raises(VerificationError, match=r"skip\.w holds weights beyond half precision"):
        half_precision(graph_bytes(model))


@pytest.mark.parametrize("graph", [b"no network", b"", graph_bytes(unet())[:900]], ids=["text", "empty", "cut"])
def test_graph_that_is_none(graph: bytes) -> None:
    with pytest.raises(BundleError, match="not valid ONNX"):
        read_graph(graph)
