"""TensorRT without a GPU: the real code over fakes of its libraries and of CUDA, for each library and version."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import Tiny, cached, tiny_graph, tiny_oracle
from tensorrt_fakes import OWN_MODULES, FakeCUDA, Machine, Status, fake_tensorrt, install

from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.calibration.half import half_precision
from edgemuse.engines import cache, registry
from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import Batch, EngineOptions
from edgemuse.engines.registry import build_engine, choose, open_engine, statuses

SHAPE = (1, 1, 12, 14, 10)
TINY = Tiny(features=5)
INPUT_BYTES, OUTPUT_BYTES = 4 * 12 * 14 * 10, 4 * 5 * 12 * 14 * 10
LIBRARIES = (("tensorrt_rtx", "1.7.1"), ("tensorrt", "10.9.0.34"), ("tensorrt", "11.4.1"))
RTX = LIBRARIES[:1]
PLAIN = LIBRARIES[1:]
HIT = "engine from cache"
NAMED = EngineOptions("tensorrt")


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which the library of the test's parameter, or TensorRT-RTX, is the one installed."""
    return install(monkeypatch, *getattr(request, "param", RTX[0]))


every_library = pytest.mark.parametrize("machine", LIBRARIES, indirect=True, ids=" ".join)
rtx = pytest.mark.parametrize("machine", RTX, indirect=True, ids=" ".join)
plain = pytest.mark.parametrize("machine", PLAIN, indirect=True, ids=" ".join)


def batch(seed: int = 0) -> Batch:
    return np.random.default_rng(seed).normal(0, 1, SHAPE).astype(np.float32)


def wanted(image: Batch) -> np.ndarray:
    return tiny_oracle(image[0, 0], TINY)[None]


def opened(options: EngineOptions = NAMED, graph: bytes | None = None) -> Any:
    return open_engine(tiny_graph(TINY) if graph is None else graph, SHAPE, options)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(BackendError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_library
def test_it_computes_what_it_should(machine: Machine) -> None:
    engine = opened()
    for seed in (0, 1, 0):
        image = batch(seed)
        features = engine.infer(image)
        assert (features.shape, features.dtype) == ((1, 5, 12, 14, 10), np.float32)
        assert features.flags.c_contiguous
        assert features.flags.writeable
        assert np.abs(features - wanted(image)).max() < 1e-5
        np.testing.assert_array_equal(image, batch(seed))
        features[:] = np.nan
    engine.close()


@every_library
def test_each_step_waits_for_the_one_before(machine: Machine) -> None:
    """One stream: upload, run, download, and only then is the result read."""
    engine = opened()
    engine.infer(batch())
    taken = sorted(call for call in machine.calls if call[0] in ("malloc", "pin"))
    assert taken == [(what, size) for what in ("malloc", "pin") for size in (INPUT_BYTES, OUTPUT_BYTES)]
    machine.calls.clear()
    engine.infer(batch())
    assert machine.calls == [("upload", INPUT_BYTES), ("run",), ("download", OUTPUT_BYTES), ("wait",)]
    engine.close()


@every_library
def test_close_gives_everything_back(machine: Machine) -> None:
    engine = opened()
    features = engine.infer(batch())
    engine.close()
    engine.close()
    assert not machine.memory
    assert np.abs(features - wanted(batch())).max() < 1e-5  # the caller's array is still there
    del features
    gc.collect()
    assert machine.nothing_left()
    assert "closed" in refusal(lambda: engine.infer(batch()))


@every_library
def test_it_says_which_library_it_is(machine: Machine, request: pytest.FixtureRequest) -> None:
    engine = opened()
    library, version = request.node.callspec.params["machine"]
    assert (engine.backend, engine.version, engine.device) == ("tensorrt", f"{library} {version}", "GPU")
    engine.close()


def test_rtx_is_taken_where_both_are_installed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("tensorrt", "11.4.1", machine))
    assert opened().version.startswith("tensorrt_rtx ")


@pytest.mark.parametrize("shape", [(1, 1, 12, 14, 11), (2, 1, 12, 14, 10), (1, 2, 12, 14, 10)])
def test_other_shapes_are_refused(shape: tuple[int, ...], machine: Machine) -> None:
    engine = opened()
    machine.calls.clear()
    assert "(1, 1, 12, 14, 10)" in refusal(lambda: engine.infer(np.zeros(shape, np.float32)))
    assert machine.calls == []


def test_half_precision_input_and_output(machine: Machine) -> None:
    model = onnx.load_model_from_string(half_precision(tiny_graph(TINY)))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    engine = opened(EngineOptions("tensorrt", "fp16"), model.SerializeToString())
    features = engine.infer(batch())
    assert features.dtype == np.float32
    assert 1e-5 < np.abs(features - wanted(batch())).max() < 1e-2
    assert {call[1] for call in machine.calls if call[0] == "malloc"} == {INPUT_BYTES // 2, OUTPUT_BYTES // 2}
    engine.close()


GRAPHS = {"fp32": bytes, "fp16": half_precision, "int8": to_int8}


@pytest.mark.parametrize("asked", GRAPHS)
@pytest.mark.parametrize("stored", GRAPHS)
def test_precision_is_the_graphs(stored: str, asked: str, machine: Machine) -> None:
    graph = GRAPHS[stored](tiny_graph(TINY))
    options = EngineOptions("tensorrt", asked)
    if stored == asked:
        assert opened(options, graph).precision == asked
    else:
        assert f"this one is {stored}, {asked} was asked for" in refusal(lambda: opened(options, graph))


@every_library
def test_a_gpu_elsewhere(machine: Machine, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """TensorRT-RTX needs no GPU for it, TensorRT needs that GPU; neither runs what it built."""
    rtx = request.node.callspec.params["machine"][0] == "tensorrt_rtx"
    machine.driver = 0 if rtx else 13000
    build_engine(tiny_graph(TINY), SHAPE, EngineOptions(), tmp_path, "8.6")
    assert [call[0] for call in machine.calls] == ["build"]
    if not rtx:
        message = refusal(lambda: build_engine(tiny_graph(), SHAPE, EngineOptions(), tmp_path, "8.9"))
        assert "compute capability is 8.6, not 8.9" in message


@rtx
def test_engine_built_elsewhere_is_found(machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edgemuse")
    driver, machine.driver = machine.driver, 0
    for capability in ("8.6", "12.0"):
        build_engine(tiny_graph(TINY), SHAPE, EngineOptions(), tmp_path, capability)
    assert [call[1] for call in machine.calls] == [4, 6]  # what ComputeCapability calls them
    machine.driver, machine.capability = driver, "12.0"
    opened(EngineOptions("tensorrt", cache_dir=tmp_path)).close()
    assert HIT in caplog.text
    machine.capability = "8.9"
    caplog.clear()
    opened(EngineOptions("tensorrt", cache_dir=tmp_path)).close()
    assert HIT not in caplog.text


@pytest.mark.parametrize(
    ("change", "again"),
    [({}, True), ({"driver": 13010}, None), ({"name": "RTX 4090"}, None), ({"capability": "8.9"}, False)],
    ids=["same", "driver", "gpu", "capability"],
)
@every_library
def test_cache_knows_what_an_engine_is_bound_to(
    change: dict[str, Any],
    again: bool | None,
    machine: Machine,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Driver and model of the GPU matter to TensorRT and not to TensorRT-RTX."""
    options = EngineOptions("tensorrt", cache_dir=tmp_path)
    opened(options).close()
    for name, value in change.items():
        setattr(machine, name, value)
    opened(options).close()
    if again is None:
        again = request.node.callspec.params["machine"][0] == "tensorrt_rtx"
    assert [call[0] for call in machine.calls].count("build") == len(cached(tmp_path)) == (1 if again else 2)


@plain
def test_cache_knows_the_system(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions("tensorrt", cache_dir=tmp_path)
    opened(options).close()
    monkeypatch.setattr("platform.system", lambda: "Plan 9")
    opened(options).close()
    assert len(cached(tmp_path)) == 2


@rtx
def test_kernels_are_compiled_once(machine: Machine, tmp_path: Path) -> None:
    """The first run of a process takes what an earlier process compiled, unless the library refuses it."""

    def compiled(**changes: Any) -> int:
        machine.calls.clear()
        for name, value in changes.items():
            setattr(machine, name, value)
        engine = opened(EngineOptions("tensorrt", cache_dir=tmp_path))
        for seed in (0, 1):
            assert np.abs(engine.infer(batch(seed)) - wanted(batch(seed))).max() < 1e-5
        engine.close()
        return machine.calls.count(("compile",))

    assert [compiled(), compiled()] == [1, 0]
    assert [compiled(name="RTX 4090"), compiled()] == [1, 0]
    assert [compiled(driver=13010), compiled()] == [1, 0]
    assert compiled(stale=True) == 1
    assert len(cached(tmp_path)) == 1 + 3  # the engine, and kernels for each GPU and driver


def test_without_a_folder_no_kernels_are_kept(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        engine = opened()
        engine.infer(batch())
        engine.close()
    assert machine.calls.count(("compile",)) == 2


UNLOADABLE = {
    1: "another version of TensorRT-RTX built it",
    2: "it was built for another compute capability",
    4: "the NVIDIA driver is too old for it",
    8: "the CUDA runtime is too old for it",
    16: "the GPU has too little memory for it",
    32: "it is no engine of this version",
    64: "CUDA does not work here",
    3: "another version of TensorRT-RTX built it, it was built for another compute capability",
    128: "TensorRT-RTX calls it invalid",
}
COMPLAINTS = {
    "Serialization assertion plan->header.pad == expectedPlatformTag failed.Platform specific tag mismatch detected. "
    "TensorRT plan files are only supported on the target runtime platform they were created on.": "operating system",
    "The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 7.5, please "
    "rebuild.": "another GPU",
    "Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match.": "version",
    "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.9.0.34 got "
    "10.8.0.43, please rebuild.": "version",
    "something\n  new": "something new",
}


def rebuilt(machine: Machine, folder: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[], object]) -> str:
    """What is said when an engine from the cache does not load but a fresh one does."""
    options = EngineOptions("tensorrt", cache_dir=folder)
    opened(options).close()
    spoil()
    backend = sys.modules[OWN_MODULES[0]]
    load = backend.TensorRTEngine.load

    def load_and_mend(self: Any, blob: memoryview) -> Any:
        try:
            return load(self, blob)
        finally:
            machine.invalid, machine.complaint = 0, {}

    backend.TensorRTEngine.load = load_and_mend
    engine = opened(options)
    assert np.abs(engine.infer(batch()) - wanted(batch())).max() < 1e-5
    engine.close()
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert [call[0] for call in machine.calls].count("build") == 2
    return record.getMessage()


@pytest.mark.parametrize("flags", UNLOADABLE)
def test_engine_that_is_invalid_is_built_anew(
    flags: int, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = rebuilt(machine, tmp_path, caplog, lambda: setattr(machine, "invalid", flags))
    assert UNLOADABLE[flags] in said


@pytest.mark.parametrize("complaint", COMPLAINTS)
@every_library
def test_engine_that_does_not_load_is_built_anew(
    complaint: str, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = rebuilt(machine, tmp_path, caplog, lambda: machine.complaint.update(load=complaint))
    assert COMPLAINTS[complaint] in said
    assert "\n" not in said


@every_library
def test_file_that_is_no_engine_is_built_anew(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil() -> None:
        (entry,) = cached(tmp_path)
        cache.store(tmp_path, entry.stem, b"not an engine" * 10)

    assert "not usable" in rebuilt(machine, tmp_path, caplog, spoil)


def test_fresh_engine_that_does_not_load_is_an_error(machine: Machine) -> None:
    machine.invalid = 4
    assert "does not load the engine that it built: the NVIDIA driver is too old" in refusal(opened)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "no driver": ({"driver": 0}, "no NVIDIA driver is loaded"),
    "old driver": (
        {"driver": 12080, "failing": {"cudaGetDeviceCount": Status.cudaErrorInsufficientDriver}},
        "the NVIDIA driver supports CUDA 12.8, cuda-python needs 13.4; update the driver",
    ),
    "no GPU": ({"failing": {"cudaGetDeviceCount": Status.cudaErrorNoDevice}}, "finds no GPU"),
    "GPU memory": ({"failing": {"cudaMalloc": Status.cudaErrorMemoryAllocation}}, "out of memory while taking"),
    "locked memory": ({"failing": {"cudaMallocHost": Status.cudaErrorMemoryAllocation}}, "out of memory while locking"),
    "memory of the context": ({"complaint": {"context": "Error Code 2: OutOfMemory"}}, "the GPU is out of memory"),
    "stream": ({"failing": {"cudaStreamCreate": Status.cudaErrorIllegalAddress}}, "cudaErrorIllegalAddress (700)"),
    "build": ({"complaint": {"build": "Error Code 1:\n Myelin"}}, "cannot build for compute capability 8.6: Error Cod"),
}


@pytest.mark.parametrize("failure", FAILURES)
@every_library
def test_failure_to_open_is_one_line(failure: str, machine: Machine) -> None:
    changes, said = FAILURES[failure]
    for name, value in changes.items():
        setattr(machine, name, value)
    assert said in refusal(opened)
    gc.collect()
    assert machine.nothing_left()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"complaint": {"run": "Error Code 1: Cuda Runtime (out of memory)"}}, "the GPU is out of memory"),
        ({"failing": {"cudaMemcpyAsync": Status.cudaErrorIllegalAddress}}, "CUDA failed while copying"),
        ({"failing": {"cudaStreamSynchronize": Status.cudaErrorIllegalAddress}}, "CUDA failed while running the netw"),
    ],
    ids=["run", "copy", "wait"],
)
@every_library
def test_failure_to_run_is_one_line(changes: dict[str, Any], said: str, machine: Machine) -> None:
    engine = opened()
    for name, value in changes.items():
        setattr(machine, name, value)
    assert said in refusal(lambda: engine.infer(batch()))
    machine.failing = {}
    engine.close()


@pytest.mark.parametrize("graph", [b"", b"no network at all" * 50, tiny_graph()[:300]], ids=["empty", "text", "cut"])
@every_library
def test_graph_that_is_none(graph: bytes, machine: Machine) -> None:
    assert "cannot read the network" in refusal(lambda: opened(graph=graph))


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (("tensorrt", "9.3.0"), "tensorrt 9.3.0 is installed, edgemuse works with 10 and 11"),
        (("tensorrt", "12.0"), "tensorrt 12.0 is installed, edgemuse works with 10 and 11"),
        (("tensorrt_rtx", "2.0"), "tensorrt_rtx 2.0 is installed, edgemuse works with 1"),
    ],
    indirect=["machine"],
)
def test_version_that_is_not_supported(machine: Machine, said: str, tmp_path: Path) -> None:
    assert said in refusal(lambda: choose(NAMED))
    assert said in refusal(lambda: build_engine(tiny_graph(), SHAPE, EngineOptions(), tmp_path, "8.6"))


@rtx
@pytest.mark.parametrize("capability", ["9.0", "6.1", "CURREN.T"])
def test_gpu_that_rtx_does_not_know(capability: str, machine: Machine, tmp_path: Path) -> None:
    said = f"builds for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not {capability}"
    assert said in refusal(lambda: build_engine(tiny_graph(), SHAPE, EngineOptions(), tmp_path, capability))
    if capability != "CURREN.T":
        machine.capability = capability
        assert said in refusal(lambda: choose(NAMED))


@pytest.mark.parametrize(("capability", "lacking"), [("7.5", {"fp32"}), ("8.6", set()), ("12.0", set())])
@every_library
def test_precisions_of_a_gpu(
    capability: str, lacking: set[str], machine: Machine, request: pytest.FixtureRequest
) -> None:
    machine.capability = capability
    (status,) = statuses("tensorrt")
    rtx = request.node.callspec.params["machine"][0] == "tensorrt_rtx"
    assert set(status.devices["GPU"]) == {"fp32", "fp16", "int8"} - (lacking if rtx else set())


def test_auto_takes_the_gpu_only_if_it_is_named(machine: Machine) -> None:
    """How fast it is has not been measured; `edgemuse tune` does that."""
    assert choose(EngineOptions())[0].name == "openvino"
    assert choose(EngineOptions(device="gpu"))[0].name == "tensorrt"
    machine.driver = 0
    assert "tensorrt" in refusal(lambda: choose(EngineOptions(device="gpu")))


def test_progress_of_a_build(machine: Machine, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    build_engine(tiny_graph(), SHAPE, NAMED, tmp_path, progress=lambda *step: steps.append(step))
    assert steps == [("Building engine", done, 2) for done in range(3)]


def test_library_without_cuda_python(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings")
    assert refusal(lambda: choose(NAMED)).endswith("""run: pip install ".[tensorrt]" in edgemuse's source folder""")


NAMES = {
    "tensorrt_rtx": (
        *("Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor", "float16", "nptype", "BuilderFlag.TF32"),
        *("LayerType.CONVOLUTION", "LayerType.QUANTIZE", "TensorIOMode.INPUT", "ComputeCapability.SM86"),
        *("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "EngineValidity.INVALID", "ILogger.Severity.INTERNAL_ERROR"),
        *("EngineInvalidityDiagnostics.UNSUPPORTED_CC", "Runtime.get_engine_validity"),
        *("Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context", "ICudaEngine.get_tensor_mode"),
        *("ICudaEngine.get_tensor_dtype", "ICudaEngine.get_tensor_shape", "ICudaEngine.num_io_tensors"),
        *("IExecutionContext.execute_async_v3", "IExecutionContext.set_tensor_address"),
        *(
            "ICudaEngine.create_runtime_config",
            "IRuntimeConfig.create_runtime_cache",
            "IRuntimeConfig.set_runtime_cache",
        ),
        *("IRuntimeCache.serialize", "IRuntimeCache.deserialize"),
        *("IBuilderConfig.set_compute_capability", "IBuilderConfig.progress_monitor"),
    ),
    "cuda.bindings.runtime": tuple(name for name in vars(FakeCUDA) if name.startswith("cuda"))
    + tuple(f"cudaError_t.{status.name}" for status in Status)
    + ("cudaMemcpyKind.cudaMemcpyHostToDevice", "cudaMemcpyKind.cudaMemcpyDeviceToHost"),
}


@pytest.mark.parametrize("library", NAMES)
def test_fakes_offer_what_the_libraries_do(library: str) -> None:
    """A name that only the fakes have would be found out on a GPU and not before."""
    module = pytest.importorskip(library, reason=f"{library} is not installed: pip install '.[tensorrt]'")
    for name in NAMES[library]:
        found: Any = module
        for part in name.split("."):
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_registry_has_its_row() -> None:
    row = next(row for row in registry.BACKENDS if row.name == "tensorrt")
    assert row.install == ".[tensorrt]"
    assert importlib.util.find_spec(row.module) is not None
