"""What every engine promises, checked for each: a backend that is not usable here is skipped, and says why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundles import Tiny, tiny_graph, tiny_oracle
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from edgemuse.engines.errors import BackendError
from edgemuse.engines.fake import FunctionEngine
from edgemuse.engines.protocol import Batch, Engine, EngineOptions
from edgemuse.engines.registry import NAMES, open_engine, statuses

SHAPE = (1, 1, 12, 14, 10)
TINY = Tiny(features=5)
FP32_TOLERANCE = 1e-5
"""Relative to the largest value; bf16 misses it by two orders of magnitude."""
BF16_TOLERANCE = 2e-2


def oracle(batch: Batch) -> np.ndarray:
    return tiny_oracle(batch[0, 0], TINY)[None]


def random_batch(seed: int) -> Batch:
    return np.random.default_rng(seed).normal(0, 1, SHAPE).astype(np.float32)


def options_for(name: str, precision: str = "fp32", **changes: object) -> EngineOptions:
    """Options that name the backend; skips with the registry's reason where it does not work or lacks `precision`."""
    status = next(status for status in statuses() if status.backend.name == name)
    if status.reason:
        pytest.skip(status.reason)
    if precision not in (offered := [p for device in status.devices.values() for p in device]):
        pytest.skip(f"{name} offers only {', '.join(offered)} on this machine")
    return EngineOptions(backend=name, precision=precision, **changes)  # type: ignore[arg-type]


@pytest.fixture(params=[*NAMES, "function"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    opened: Engine
    if request.param == "function":
        opened = FunctionEngine(lambda batch: oracle(batch).astype(np.float32))
    else:
        opened = open_engine(tiny_graph(TINY), SHAPE, options_for(request.param))
    yield opened
    opened.close()


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_shape_type_and_layout(engine: Engine) -> None:
    features = engine.infer(random_batch(0))
    assert features.shape == (1, 5, 12, 14, 10)
    assert features.dtype == np.float32
    assert features.flags.writeable


def test_fp32_is_fp32(engine: Engine) -> None:
    """Against float64, so that a backend that silently computes in half precision is found out."""
    assert engine.precision == "fp32"
    batch = random_batch(1)
    assert_close(engine.infer(batch), oracle(batch), FP32_TOLERANCE)


def test_input_is_left_alone(engine: Engine) -> None:
    batch = random_batch(2)
    engine.infer(batch)
    np.testing.assert_array_equal(batch, random_batch(2))


def test_result_may_be_overwritten(engine: Engine) -> None:
    first, second = random_batch(3), random_batch(4)
    for batch in (first, second, first):
        features = engine.infer(batch)
        assert_close(features, oracle(batch), FP32_TOLERANCE)
        features[:] = np.nan


def test_result_is_the_same_each_time(engine: Engine) -> None:
    batch = random_batch(5)
    np.testing.assert_array_equal(engine.infer(batch).copy(), engine.infer(batch))


def test_it_says_what_it_is(engine: Engine) -> None:
    assert engine.backend in (*NAMES, "function")
    assert all((engine.version, engine.device, engine.precision))


def test_it_may_be_closed_twice(engine: Engine) -> None:
    engine.close()
    engine.close()


@pytest.mark.parametrize("shape", [(1, 1, 12, 14, 11), (2, 1, 12, 14, 10), (1, 2, 12, 14, 10)])
@pytest.mark.parametrize("name", NAMES)
def test_other_shape_is_an_error_of_the_backend(name: str, shape: tuple[int, ...]) -> None:
    opened = open_engine(tiny_graph(TINY), SHAPE, options_for(name))
    with pytest.raises(BackendError) as caught:
        opened.infer(np.zeros(shape, np.float32))
    assert "\n" not in str(caught.value)
    opened.close()


def test_function_engine_keeps_no_array_of_either_side() -> None:
    kept = np.ones((1, 1, 2, 2, 2), np.float64)
    engine = FunctionEngine(lambda batch: kept)
    engine.infer(kept.astype(np.float32))[:] = 5
    assert (kept == 1).all()
    assert engine.infer(kept.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_bf16(name: str) -> None:
    """Unlike fp32, and near it."""
    batch = random_batch(6)
    opened = open_engine(tiny_graph(TINY), SHAPE, options_for(name, "bf16"))
    assert opened.precision == "bf16"
    features = opened.infer(batch).copy()
    opened.close()
    assert features.dtype == np.float32
    assert_close(features, oracle(batch), BF16_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_close(features, oracle(batch), 10 * FP32_TOLERANCE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_threads_can_be_chosen(name: str, threads: int) -> None:
    opened = open_engine(tiny_graph(TINY), SHAPE, options_for(name, threads=threads))
    batch = random_batch(7)
    assert_close(opened.infer(batch), oracle(batch), FP32_TOLERANCE)
    opened.close()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("graph", [b"", b"no network at all" * 50, tiny_graph()[:300]], ids=["empty", "text", "cut"])
def test_graph_that_is_none(graph: bytes, name: str, keep: bool, tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        open_engine(graph, SHAPE, options_for(name, cache_dir=tmp_path if keep else None))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_two_engines_do_not_share_results(name: str) -> None:
    a, b = (open_engine(tiny_graph(TINY), SHAPE, options_for(name)) for _ in range(2))
    first = a.infer(random_batch(8))
    before = first.copy()
    b.infer(random_batch(9))
    np.testing.assert_array_equal(first, before)
    a.close()
    b.close()


def odd_graph(kind: str) -> bytes:
    """ONNX that a backend may take, or a file that it cannot; the network's own input, and outputs that are not."""
    sizes = ["depth", "height", "width"]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *sizes])

    def of(nodes: list[NodeProto], *outputs: ValueInfoProto, inputs: tuple[ValueInfoProto, ...] = (image,)) -> bytes:
        graph = helper.make_graph(nodes, "odd", list(inputs), list(outputs))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        data: bytes = model.SerializeToString()
        return data

    def output(name: str, type: int = TensorProto.FLOAT) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, type, None)

    twice = [helper.make_node("Relu", ["image"], [name]) for name in "ab"]
    made = {
        "two outputs": lambda: of(twice, output("a"), output("b")),
        "no output": lambda: of(twice),
        "no input": lambda: of([helper.make_node("Constant", [], ["a"], value_float=1.0)], output("a"), inputs=()),
        "a number": lambda: of([helper.make_node("ReduceSum", ["image"], ["a"], keepdims=0)], output("a")),
        "whole numbers": lambda: of(
            [helper.make_node("Cast", ["image"], ["a"], to=TensorProto.INT64)], output("a", TensorProto.INT64)
        ),
        "truth values": lambda: of(
            [helper.make_node("Cast", ["image"], ["a"], to=TensorProto.BOOL)], output("a", TensorProto.BOOL)
        ),
        "a sequence": lambda: of(
            [helper.make_node("SequenceConstruct", ["image"], ["a"])],
            helper.make_tensor_sequence_value_info("a", TensorProto.FLOAT, None),
        ),
        "a shape": lambda: of([helper.make_node("Shape", ["image"], ["a"])], output("a", TensorProto.INT64)),
        "an operator that nobody knows": lambda: of([helper.make_node("Foo", ["image"], ["a"])], output("a")),
        "nothing": lambda: b"",
        "no graph": lambda: b"\x08\x08" * 50,
    }
    return made[kind]()


ODD = ["two outputs", "no output", "no input", "a number", "whole numbers", "truth values", "a sequence", "a shape"]
ODD += ["an operator that nobody knows", "nothing", "no graph"]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_of_an_odd_graph_a_backend_raises_nothing_but_its_own_error(name: str, precision: str, kind: str) -> None:
    options = options_for(name, precision)
    with contextlib.suppress(BackendError):
        engine = open_engine(odd_graph(kind), SHAPE, options)
        engine.infer(random_batch(0))
