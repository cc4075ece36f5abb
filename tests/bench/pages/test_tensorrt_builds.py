"""Real engines of TensorRT-RTX, which needs no GPU to build them, and what is said where one cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CommandLine, Tiny, tiny_graph

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt]'", exc_type=ImportError
)
pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[tensorrt]'")

from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.bench.pages import tensorrt_builds
from edgemuse.bench.pages.tensorrt_builds import Network, build_one
from edgemuse.calibration.half import half_precision
from edgemuse.engines import cache

SHARED = Path(__file__).resolve().parents[4] / "shared"
CONVERT: dict[str, Callable[[bytes], bytes]] = {"fp32": bytes, "fp16": half_precision, "int8": to_int8}
DIAGNOSTICS = trt.EngineInvalidityDiagnostics
FOREIGN = int(DIAGNOSTICS.MALFORMED_ENGINE) | int(DIAGNOSTICS.VERSION_MISMATCH)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    if request.param == "built-in":
        return tensorrt_builds.built_in()
    pytest.importorskip("nnunetv2", reason="DLMUSE's network is made by nnunetv2: pip install '.[bench]'")
    if not (SHARED / "data" / "dlmuse").is_dir():
        pytest.skip(f"{SHARED} with DLMUSE's plans is absent")
    return tensorrt_builds.dlmuse(SHARED, tmp_path_factory.mktemp("dlmuse"))


@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
@pytest.mark.parametrize("network", ["built-in", "DLMUSE"], indirect=True)
def test_engines_are_built(network: Network, capability: str, tmp_path: Path) -> None:
    """In every precision: files that the library knows as its own, and half precision or int8 make them smaller."""
    sizes = {}
    for precision, convert in CONVERT.items():
        built = build_one(convert(network.graph), network.shape, precision, capability, tmp_path)
        assert "error" not in built
        stored = cache.load(tmp_path, Path(built["path"]).stem)
        assert stored is not None
        blob = bytes(stored)
        assert not _faults(blob) & FOREIGN
        assert _faults(blob[1:]) & FOREIGN
        sizes[precision] = len(blob)
    assert max(sizes, key=lambda precision: sizes[precision]) == "fp32"
    assert min(sizes.values()) > _weights(network)  # of a byte each


def _faults(blob: bytes) -> int:
    """What TensorRT-RTX finds wrong with an engine, besides that there may be no GPU."""
    return int(trt.Runtime(Quiet()).get_engine_validity(blob)[1])


class Quiet(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        pass


def _weights(network: Network) -> int:
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install '.[export]'")
    model = onnx.load_model_from_string(network.graph)
    return int(sum(np.prod(tensor.dims) for tensor in model.graph.initializer))


@pytest.mark.parametrize("network", ["built-in"], indirect=True)
def test_calibrated_graph_is_taken(network: Network, tmp_path: Path) -> None:
    """As 'edgemuse calibrate' makes it, on one small patch."""
    pytest.importorskip("nncf", reason="NNCF is not installed: pip install '.[calibrate]'")
    from edgemuse.calibration.quantise import quantise

    patch = np.random.default_rng(0).normal(0, 1, (1, 1, 64, 64, 64)).astype(np.float32)
    graph = quantise(network.graph, [patch]).graph()
    built = build_one(graph, network.shape, "int8", "8.6", tmp_path)
    assert "error" not in built


@pytest.mark.parametrize("network", ["built-in"], indirect=True)
def test_turing_takes_what_computes_in_half_precision(network: Network, tmp_path: Path) -> None:
    half = half_precision(network.graph)
    for precision, graph in (("fp32", network.graph), ("int8", to_int8(network.graph))):
        assert "need fp16" in build_one(graph, network.shape, precision, "7.5", tmp_path)["error"]
    for precision, graph in (("fp16", half), ("int8", to_int8(half))):
        assert "error" not in build_one(graph, network.shape, precision, "7.5", tmp_path)


def test_every_mismatch_is_one_line() -> None:
    said = dict(tensorrt_builds.mismatches(Network("tiny", tiny_graph(Tiny()), (8, 8, 8), "")))
    said.pop("tile that does not halve evenly")  # the tiny network halves nothing
    wanted = {
        "no GPU on this machine, `--backend tensorrt`": "no usable backend: tensorrt",
        "compute capability that TensorRT-RTX does not know": "not 9.0",
        "fp32 for compute capability 7.5": "FP32 3D convolution is not supported",
        "fp16 asked of an fp32 graph": "this one is fp32, fp16 was asked for",
        "int8 with zero points that are not 0": "Non-zero zero point is not supported",
        "file that is no ONNX": "Failed to parse the ONNX model",
        "empty file": "one input and one output",
        "operation that TensorRT lacks": "(node abacus, Abacus)",
        "library of another version": "tensorrt_rtx 2.0 is installed, edgemuse works with 1",
        "library not installed": "it is not installed; run: pip install ",
        "cuda-python not installed": "run: pip install ",
    }
    assert set(said) == set(wanted)
    for what, message in said.items():
        assert wanted[what] in message
        assert "\n" not in message


def test_command_writes_engines(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = CommandLine(capfd, tmp_path / "cache")(
        "build", "--compute-capability", "8.6", "--compute-capability", "12.0", "-o", tmp_path / "engines"
    )
    assert ran.code == 0, ran.err
    paths = [Path(line.split("\t")[0]) for line in ran.out.splitlines()]
    assert set(paths) == set((tmp_path / "engines").iterdir())
    assert all(path.stat().st_size > 10e6 for path in paths)
    assert "building fp32 for 12.0 (2 of 2)" in ran.err
