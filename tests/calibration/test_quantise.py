"""int8 graphs: symmetric, run alike by every backend, and as exact as they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from unets import unet

pytest.importorskip("nncf", reason="NNCF is not installed: pip install '.[calibrate]'")

from edgemuse.calibration.graphs import graph_bytes
from edgemuse.calibration.quantise import Quantised, check_zero_points, make_signed, quantise, sensitivity
from edgemuse.engines.errors import VerificationError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import open_engine, statuses

SHAPE = (1, 1, 12, 16, 10)
UNEVEN = 30.0
"""Scale of the upsampled features: far larger than the skip connection beside them."""
ROUNDING = 0.05
"""Weights and activations of three layers, one after the other, are rounded by about 1 to 2 % each. A convolution over
the joined features instead of two gives 0.23 on OpenVINO 2026.4."""


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=SHAPE).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def graph() -> bytes:
    return graph_bytes(unet(scale=UNEVEN))


@pytest.fixture(scope="module")
def quantised(graph: bytes) -> Quantised:
    return quantise(graph, images(4))


def run(graph: bytes, backend: str, precision: str, batches: Sequence[np.ndarray]) -> np.ndarray:
    status = next(status for status in statuses() if status.backend.name == backend)
    if status.reason or not any(precision in precisions for precisions in status.devices.values()):
        pytest.skip(status.reason or f"{backend} has no {precision} on this machine")
    engine = open_engine(graph, SHAPE, EngineOptions(backend=backend, precision=precision))
    found = np.stack([engine.infer(batch).copy() for batch in batches])
    engine.close()
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square, in standard deviations."""
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


def test_convolutions_are_quantised_and_nothing_else(quantised: Quantised) -> None:
    model = onnx.load_model_from_string(quantised.graph())
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    quantised_inputs = Counter(
        node.op_type for node in model.graph.node if made.get(node.input[0]) == "DequantizeLinear"
    )
    assert quantised_inputs == {"Conv": 4}
    assert quantised.layers == ["skip.conv", "low.conv", "last.conv.0", "last.conv.1"]


def test_zero_points_are_0_and_weights_are_stored_as_int8(quantised: Quantised) -> None:
    model = onnx.load_model_from_string(quantised.graph())
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scales = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [stored[node.input[2]] for node in scales]
    assert len(zeros) == 3 + 3 + 4  # the skip connection has one for both that read it
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert sum(values.dtype == np.int8 and values.ndim == 5 for values in stored.values()) == 4


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_int8_is_near_fp32(backend: str, graph: bytes, quantised: Quantised) -> None:
    """A skip connection beside features that are far larger keeps its accuracy, on either backend."""
    batches = images(2, seed=9)
    found = run(quantised.graph(), backend, "int8", batches)
    exact = run(graph, "openvino", "fp32", batches)
    assert 1e-4 < error(found, exact) < ROUNDING


def test_openvino_convolves_in_int8(quantised: Quantised) -> None:
    """By what its compiled model says of itself: the results alone would not tell."""
    if not any("int8" in precisions for status in statuses("openvino") for precisions in status.devices.values()):
        pytest.skip("OpenVINO has no int8 on this machine")
    engine: Any = open_engine(quantised.graph(), SHAPE, EngineOptions(backend="openvino", precision="int8"))
    notes = [node.get_rt_info() for node in engine._request.get_compiled_model().get_runtime_model().get_ops()]
    engine.close()
    found = [str(note["runtimePrecision"].value) for note in notes if note["layerType"].value == "Convolution"]
    assert len(found) == 4
    assert set(found) <= {"i8", "u8"}


def test_openvino_returns_half_precision(quantised: Quantised) -> None:
    """Of the same values: at most half a unit in the last of its digits from ONNX Runtime's where both round alike."""
    half = run(quantised.graph(), "openvino", "int8", images(1))
    single = run(quantised.graph(), "onnxruntime", "int8", images(1))
    assert (half.dtype, single.dtype) == (np.float16, np.float32)
    assert np.median(np.abs(half - single) / np.maximum(np.abs(single), 1e-3)) < np.finfo(np.float16).eps / 2


def test_backends_agree(graph: bytes, quantised: Quantised) -> None:
    """More than either agrees with fp32: what differs is rounding at ties, not what is computed."""
    batches = images(2, seed=9)
    first, second = (run(quantised.graph(), name, "int8", batches) for name in ("openvino", "onnxruntime"))
    assert error(first, second) < 0.5 * error(first, run(graph, "openvino", "fp32", batches))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_engine_from_the_cache_is_the_same(backend: str, quantised: Quantised, tmp_path: Path) -> None:
    options = EngineOptions(backend=backend, precision="int8", cache_dir=tmp_path)
    results = []
    for _ in range(2):
        engine = open_engine(quantised.graph(), SHAPE, options)
        assert engine.precision == "int8"
        results.append(engine.infer(images(1)[0]).copy())
        engine.close()
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(*results)


def test_the_same_bytes_every_time(graph: bytes, quantised: Quantised) -> None:
    assert quantise(graph, images(4)).graph() == quantised.graph()


def test_left_out_layers_are_as_they_were(graph: bytes, quantised: Quantised) -> None:
    batches = images(2, seed=9)
    everything = quantised.graph(quantised.layers)
    kinds = Counter(node.op_type for node in onnx.load_model_from_string(everything).graph.node)
    assert not kinds["QuantizeLinear"]
    assert not kinds["DequantizeLinear"]
    exact = run(graph, "openvino", "fp32", batches)
    assert error(run(everything, "openvino", "fp32", batches), exact) < 1e-5
    one = onnx.load_model_from_string(quantised.graph(["low.conv"]))
    assert Counter(node.op_type for node in one.graph.node)["DequantizeLinear"] == 3 + 3


def test_sensitivity_finds_the_layer_that_costs_most(graph: bytes, quantised: Quantised) -> None:
    """One layer's scale is made a hundred times too coarse."""
    model = onnx.ModelProto()
    model.CopyFrom(quantised.int8)
    bad = next(node for node in model.graph.node if node.name == "last.conv.1")
    scale = next(n for n in model.graph.node if bad.input[1] in n.output).input[1]
    tensor = next(t for t in model.graph.initializer if t.name == scale)
    tensor.CopyFrom(numpy_helper.from_array(100 * numpy_helper.to_array(tensor), scale))
    heard: list[str] = []
    broken = Quantised(quantised.single, model)
    errors = sensitivity(broken, images(1), EngineOptions(backend="openvino", precision="int8"), heard.append)
    assert next(iter(errors)) == "last.conv.1"
    assert set(errors) == set(broken.layers)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert len(heard) == 4


def unsigned(model: onnx.ModelProto, zero: int) -> onnx.ModelProto:
    """A copy whose first activation is uint8 with the same step and the zero point `zero`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name = next(node.input[2] for node in copy.graph.node if node.op_type == "QuantizeLinear")
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(zero, np.uint8), name))
    return copy


def test_unsigned_activations_become_signed(quantised: Quantised) -> None:
    model = unsigned(quantised.int8, 0)
    with pytest.raises(VerificationError, match="zero point of uint8"):
        check_zero_points(model)
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    before = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[1])
    make_signed(model)
    check_zero_points(model)
    after = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == node.input[1])
    assert after * 127 == pytest.approx(before * 255)


def test_other_zero_points_are_refused(quantised: Quantised) -> None:
    model = unsigned(quantised.int8, 7)
    make_signed(model)
    with pytest.raises(VerificationError, match="expected 0"):
        check_zero_points(model)
