"""TensorRT and CUDA as far as edgemuse uses them, without a GPU: GPU memory is memory, a stream is a list.

What is wrong on a real GPU fails here too: work runs when the stream is waited for and not before, copies must stay
inside what was allocated, and only page-locked memory is copied. Networks are one convolution, as `tiny_graph` makes.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
from bundles import SLOPE
from onnx import TensorProto, numpy_helper
from scipy import ndimage

Status = IntEnum(
    "Status",
    {
        "cudaSuccess": 0,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorNoDevice": 100,
        "cudaErrorIllegalAddress": 700,
    },
)
Kind = IntEnum("Kind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
OWN_MODULES = ("edgemuse.engines.tensorrt", "edgemuse.engines.tensorrt_cuda")
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass
class Machine:
    """One machine with a GPU.

    Attributes:
        capability, name, driver: of the GPU; driver 0 means that none is loaded.
        failing: functions of CUDA that fail, and with what.
        complaint: what TensorRT says while it fails to make, load or run an engine, by what it fails at.
        invalid: what TensorRT-RTX finds wrong with an engine before it loads it.
        stale: TensorRT-RTX refuses the kernels that were kept.
        calls: what was done, in order; for a piece of memory, its size too.
        memory, pinned: what is allocated now, by address.
    """

    capability: str = "8.6"
    name: str = "RTX A4000"
    driver: int = 13000
    failing: dict[str, Status] = field(default_factory=dict)
    complaint: dict[str, str] = field(default_factory=dict)
    invalid: int = 0
    stale: bool = False
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)
    pinned: dict[int, Any] = field(default_factory=dict)
    queue: list[Callable[[], None]] = field(default_factory=list)
    streams: set[int] = field(default_factory=set)

    def nothing_left(self) -> bool:
        """True if all that was taken was given back."""
        return not (self.memory or self.pinned or self.streams)


class FakeCUDA(ModuleType):
    """`cuda.bindings.runtime`: every function returns a tuple that starts with the error."""

    cudaError_t, cudaMemcpyKind = Status, Kind

    def __init__(self, machine: Machine) -> None:
        super().__init__("cuda.bindings.runtime")
        self._machine = machine

    def __getattribute__(self, name: str) -> Any:
        function = super().__getattribute__(name)
        if name in ("_machine", "cudaError_t", "cudaMemcpyKind") or not callable(function):
            return function
        error = self._machine.failing.get(name)
        return function if error is None else lambda *_: (error, None)

    def cudaGetErrorString(self, error: Status) -> Any:
        return Status.cudaSuccess, error.name.encode()

    def cudaDriverGetVersion(self) -> Any:
        return Status.cudaSuccess, self._machine.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return Status.cudaSuccess, 13040

    def cudaGetDeviceCount(self) -> Any:
        return Status.cudaSuccess, 1

    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = map(int, self._machine.capability.split("."))
        name = self._machine.name.encode().ljust(256, b"\0")
        return Status.cudaSuccess, SimpleNamespace(name=name, major=major, minor=minor)

    def cudaStreamCreate(self) -> Any:
        handle = max(self._machine.streams, default=6) + 1
        self._machine.streams.add(handle)
        return Status.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> Any:
        self._machine.streams.remove(stream)
        return (Status.cudaSuccess,)

    def cudaMalloc(self, size: int) -> Any:
        return Status.cudaSuccess, self._take(self._machine.memory, "malloc", size)

    def cudaMallocHost(self, size: int) -> Any:
        return Status.cudaSuccess, self._take(self._machine.pinned, "pin", size)

    def _take(self, pool: dict[int, Any], what: str, size: int) -> int:
        buffer = (ctypes.c_ubyte * size)()
        address = ctypes.addressof(buffer)
        pool[address] = buffer
        self._machine.calls.append((what, size))
        return address

    def cudaFree(self, address: int) -> Any:
        del self._machine.memory[address]
        return (Status.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> Any:
        del self._machine.pinned[address]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Kind, stream: int) -> Any:
        machine = self._machine
        assert stream in machine.streams
        upload = kind == Kind.cudaMemcpyHostToDevice
        assert len((machine.memory if upload else machine.pinned)[to]) == size
        assert len((machine.pinned if upload else machine.memory)[source]) == size
        machine.calls.append(("upload" if upload else "download", size))
        machine.queue.append(lambda: ctypes.memmove(to, source, size) and None)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert stream in self._machine.streams
        self._machine.calls.append(("wait",))
        for work in self._machine.queue:
            work()
        self._machine.queue.clear()
        return (Status.cudaSuccess,)


def install(monkeypatch: Any, name: str = "tensorrt_rtx", version: str = "1.7.1") -> Machine:
    """Pretend that the library `name` of `version` and cuda-python are what is installed, on the machine returned."""
    machine = Machine()
    package: Any = ModuleType("cuda.bindings")
    package.runtime = FakeCUDA(machine)
    modules = {"cuda": ModuleType("cuda"), "cuda.bindings": package, "cuda.bindings.runtime": package.runtime}
    modules |= dict.fromkeys(("tensorrt", "tensorrt_rtx")) | {name: fake_tensorrt(name, version, machine)}
    for key, module in (modules | dict.fromkeys(OWN_MODULES)).items():
        monkeypatch.setitem(sys.modules, key, module)
    for own in OWN_MODULES:  # imported anew, now and after the test
        del sys.modules[own]
    return machine


def fake_tensorrt(name: str, version: str, machine: Machine) -> ModuleType:
    """The module `name`, `tensorrt_rtx` or `tensorrt`, of `version` on `machine`. Its engines are JSON and ONNX."""
    library: Any = ModuleType(name)
    library.__version__ = version
    library.float16 = np.float16
    library.nptype = lambda dtype: dtype
    library.ILogger, library.IProgressMonitor = Logger, Monitor
    library.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    library.BuilderFlag = IntEnum("BuilderFlag", {"TF32": 7})
    library.LayerType = IntEnum("LayerType", {"CONVOLUTION": 0, "QUANTIZE": 1, "OTHER": 2})
    library.TensorIOMode = IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
    library.Builder = lambda logger: Builder(library, machine, logger)
    library.OnnxParser = lambda network, logger: Parser(library, network)
    library.Runtime = lambda logger: Runtime(library, machine, logger)
    if name == "tensorrt_rtx":
        numbers = {f"SM{capability.replace('.', '')}": n for n, capability in enumerate(CAPABILITIES, 2)}
        library.ComputeCapability = IntEnum("ComputeCapability", {"NONE": 0, "CURRENT": 1} | numbers)
        library.EngineValidity = IntEnum("EngineValidity", {"VALID": 0, "SUBOPTIMAL": 1, "INVALID": 2})
        flags = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME")
        flags += ("INSUFFICIENT_GPU_MEMORY", "MALFORMED_ENGINE", "CUDA_ERROR")
        library.EngineInvalidityDiagnostics = IntEnum("Diagnostics", {flag: 1 << n for n, flag in enumerate(flags)})
    return library  # type: ignore[no-any-return]


class Logger:
    """A base class that must be initialised, as pybind11's must."""

    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
    ready = False

    def __init__(self) -> None:
        self.ready = True


class Monitor:
    """As `Logger`."""

    ready = False

    def __init__(self) -> None:
        self.ready = True


class Builder:
    def __init__(self, library: Any, machine: Machine, logger: Any) -> None:
        assert logger.ready
        self._library, self._machine, self._logger = library, machine, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1 << self._library.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network(self._library)

    def create_builder_config(self) -> Any:
        return RTXConfig() if self._library.__name__ == "tensorrt_rtx" else Config()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert config.flags == set(), "TF32 is on unless it is cleared"
        if config.progress_monitor is not None:
            assert config.progress_monitor.ready
            config.progress_monitor.phase_start("Building engine", None, 2)
            assert all(config.progress_monitor.step_complete("Building engine", step) for step in range(2))
            config.progress_monitor.phase_finish("Building engine")
        if "build" in self._machine.complaint:
            self._logger.log(Logger.Severity.ERROR, self._machine.complaint["build"])
            return None
        self._machine.calls.append(("build", config.target))
        facts = {"version": self._library.__version__, "shape": network.image.shape, "target": config.target}
        return json.dumps(facts).encode() + b"\n" + network.graph


class Config:
    progress_monitor: Any = None
    target: int | None = None

    def __init__(self) -> None:
        self.flags = {7}

    def clear_flag(self, flag: int) -> None:
        self.flags.remove(flag)


class RTXConfig(Config):
    num_compute_capabilities = 0

    def set_compute_capability(self, value: int, index: int) -> bool:
        assert (self.num_compute_capabilities, index) == (1, 0)
        self.target = int(value)
        return True


class Network:
    """What the parser found."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.graph = b""
        self.layers: list[Any] = []
        self.num_inputs = self.num_outputs = 0
        self.image = SimpleNamespace(shape=(1, 1, -1, -1, -1))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]

    def get_input(self, index: int) -> Any:
        assert index == 0
        return self.image

    def read(self, graph: bytes) -> None:
        model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph))
        kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        kinds |= {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        types = {"Conv": self._library.LayerType.CONVOLUTION, "QuantizeLinear": self._library.LayerType.QUANTIZE}
        for node in model.graph.node:
            dtype = DTYPES.get(kinds.get(node.output[0], 0))
            kind = types.get(node.op_type, self._library.LayerType.OTHER)
            self.layers.append(SimpleNamespace(type=kind, get_output=lambda _, d=dtype: SimpleNamespace(dtype=d)))
        self.graph, self.num_inputs, self.num_outputs = graph, len(model.graph.input), len(model.graph.output)


class Parser:
    """An empty file is an empty network to the real one too."""

    def __init__(self, library: Any, network: Network) -> None:
        self._network, self._error = network, ""

    def parse(self, graph: bytes) -> bool:
        if not graph:
            return True
        try:
            self._network.read(graph)
        except Exception:  # protobuf's DecodeError
            self._error = "Assertion failed: Failed to parse the ONNX model."
        return not self._error

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self._error, node_name=lambda: "", node_operator=lambda: "")


class Runtime:
    def __init__(self, library: Any, machine: Machine, logger: Any) -> None:
        assert logger.ready
        self._library, self._machine, self._logger = library, machine, logger
        if library.__name__ == "tensorrt_rtx":
            self.get_engine_validity = self._validity

    def _validity(self, blob: bytes) -> tuple[int, int]:
        validity, found = self._library.EngineValidity, self._machine.invalid
        if not blob.startswith(b"{"):
            found |= int(self._library.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        return (validity.INVALID if found else validity.VALID), found

    def deserialize_cuda_engine(self, blob: bytes) -> Any:
        if "load" in self._machine.complaint or not blob.startswith(b"{"):
            message = self._machine.complaint.get("load", "Serialization assertion magicTag failed.\nin runtime.cpp")
            self._logger.log(Logger.Severity.ERROR, message)
            return None
        facts, _, graph = blob.partition(b"\n")
        return Engine(self._library, self._machine, self._logger, json.loads(facts)["shape"], graph)


class Engine:
    num_io_tensors = 2

    def __init__(self, library: Any, machine: Machine, logger: Any, shape: list[int], graph: bytes) -> None:
        self.library, self.machine, self.logger, self.shape = library, machine, logger, shape
        self.model = onnx.load_model_from_string(graph)
        self.values = {"image": self.model.graph.input[0], "features": self.model.graph.output[0]}

    def get_tensor_name(self, index: int) -> str:
        return ("features", "image")[index]

    def get_tensor_mode(self, name: str) -> int:
        modes = self.library.TensorIOMode
        return int(modes.INPUT if name == "image" else modes.OUTPUT)

    def get_tensor_shape(self, name: str) -> list[int]:
        channels = self.values[name].type.tensor_type.shape.dim[1].dim_value
        return [self.shape[0], channels, *self.shape[2:]]

    def get_tensor_dtype(self, name: str) -> Any:
        return DTYPES[self.values[name].type.tensor_type.elem_type]

    def create_runtime_config(self) -> Any:
        assert self.library.__name__ == "tensorrt_rtx"
        return RuntimeConfig(self.machine)

    def create_execution_context(self, runtime_config: RuntimeConfig | None = None) -> Any:
        assert (runtime_config is not None) == (self.library.__name__ == "tensorrt_rtx")
        if "context" in self.machine.complaint:
            self.logger.log(Logger.Severity.ERROR, self.machine.complaint["context"])
            return None
        return Context(self, runtime_config.cache if runtime_config else None)


class RuntimeConfig:
    cache: RuntimeCache | None = None

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._machine)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Kernels are compiled when a network runs for the first time, and taken back for the same GPU only."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.kernels = machine, b""

    def compile(self) -> None:
        if not self.kernels:
            self._machine.calls.append(("compile",))
            self.kernels = b"kernels for " + self._machine.name.encode()

    def serialize(self) -> bytes:
        return self.kernels

    def deserialize(self, blob: bytes) -> bool:
        fits = blob.endswith(self._machine.name.encode()) and not self._machine.stale
        self.kernels = blob if fits else b""
        return fits


class Context:
    def __init__(self, engine: Engine, cache: RuntimeCache | None) -> None:
        self._engine, self._cache = engine, cache
        self._addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        shape, dtype = self._engine.get_tensor_shape(name), np.dtype(self._engine.get_tensor_dtype(name))
        assert len(self._engine.machine.memory[address]) == int(np.prod(shape)) * dtype.itemsize
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        machine = self._engine.machine
        assert stream in machine.streams
        assert set(self._addresses) == {"image", "features"}
        if "run" in machine.complaint:
            self._engine.logger.log(Logger.Severity.ERROR, machine.complaint["run"])
            return False
        if self._cache is not None:
            self._cache.compile()
        machine.calls.append(("run",))
        machine.queue.append(self._run)
        return True

    def _run(self) -> None:
        image, features = (self._array(name) for name in ("image", "features"))
        constants = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in self._engine.model.graph.initializer}
        given = image[0, 0].astype(np.float64)
        conv = np.stack([ndimage.correlate(given, kernel[0], mode="constant") for kernel in constants["weight"]])
        conv += constants["bias"][:, None, None, None]
        features[0] = np.where(conv < 0, SLOPE * conv, conv)

    def _array(self, name: str) -> Any:
        buffer = self._engine.machine.memory[self._addresses[name]]
        dtype = np.dtype(self._engine.get_tensor_dtype(name))
        return np.frombuffer(buffer, dtype).reshape(self._engine.get_tensor_shape(name))
