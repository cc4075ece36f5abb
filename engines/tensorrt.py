"""NVIDIA GPUs by TensorRT-RTX 1 where it is installed, else by TensorRT 10 or 11.

Networks are strongly typed: the precision is that of the graph, and it is checked. TensorRT-RTX compiles for the
compute capability that it is told, without a GPU, and its engines run on every operating system and driver. TensorRT
makes engines for the GPU, the driver and the system that it finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

try:
    import tensorrt_rtx as trt
except ModuleNotFoundError:
    import tensorrt as trt

from edgemuse.engines import cache
from edgemuse.engines.errors import BackendError, foreign, one_line, pip_install
from edgemuse.engines.protocol import Batch, EngineOptions, TileShape
from edgemuse.engines.tensorrt_cuda import Stream, find_gpu, pinned

log = logging.getLogger("edgemuse")

LIBRARY = str(trt.__name__)
VERSIONS = {"tensorrt_rtx": ("1",), "tensorrt": ("10", "11")}
PRECISIONS = ("fp32", "fp16", "int8")
TURING = "7.5"
"""TensorRT-RTX has no fp32 convolution in 3D for this compute capability, so int8 graphs must be fp16 elsewhere."""
MISMATCHES = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it",
    "UNSUPPORTED_CC": "it was built for another compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is no engine of this version",
    "CUDA_ERROR": "CUDA does not work here",
}
"""Why TensorRT-RTX refuses an engine before it is loaded, in words for people."""
COMPLAINTS = {
    "platform specific tag": "it was built on another operating system",
    "incompatible device": "it was built for another GPU",
    "version tag": "another version of TensorRT built it",
    "library version": "another version of TensorRT built it",
    "serialization version": "another version of TensorRT built it",
    "for turing": "GPUs of compute capability 7.5 need fp16, or int8 that is fp16 elsewhere",
    "out of memory": "the GPU is out of memory",
    "outofmemory": "the GPU is out of memory",
}
"""Parts of TensorRT's messages, in lower case, and what they mean."""
Progress = Callable[[str, int, int], None]
"""Is called with the phase of a build, the number of steps that are done and the number of all steps."""


def probe() -> dict[str, list[str]]:
    """The GPU and the precisions that it offers; raises BackendError where no GPU can be used."""
    _check_version()
    capability = find_gpu().capability
    _target(capability)
    return {"GPU": [name for name in PRECISIONS if (LIBRARY, capability, name) != ("tensorrt_rtx", TURING, "fp32")]}


def processor(device: str) -> str:
    """What computes for `device`: the GPU, and the driver that compiles for it; raises BackendError."""
    gpu = find_gpu()
    return f"{gpu.name}, driver for CUDA {gpu.driver}"


def _check_version() -> None:
    if trt.__version__.partition(".")[0] not in VERSIONS[LIBRARY]:
        raise BackendError(
            f"{LIBRARY} {trt.__version__} is installed, edgemuse works with {' and '.join(VERSIONS[LIBRARY])}; "
            + pip_install(".[tensorrt]")
        )


def _target(capability: str) -> Any:
    """What the library calls a compute capability; None if it builds for the GPU at hand and no other."""
    if LIBRARY == "tensorrt":
        return None
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in trt.ComputeCapability.__members__.items()}
    offered = [name for name in known if name[0].isdigit()]
    if capability not in offered:
        raise BackendError(
            f"{LIBRARY} {trt.__version__} builds for compute capability {', '.join(offered)}, not {capability}; "
            "NVIDIA's tensorrt, installed in its place, may"
        )
    return known[capability]


def _place(capability: str | None) -> dict[str, str]:
    """What an engine is bound to: TensorRT-RTX's run under every driver and system, TensorRT's do not."""
    if LIBRARY == "tensorrt_rtx":
        anywhere = dict.fromkeys(("gpu", "driver", "system"), "any")
        return {"compute_capability": capability or find_gpu().capability, **anywhere}
    gpu = find_gpu()
    if capability not in (None, gpu.capability):
        raise BackendError(
            f"tensorrt builds for the GPU at hand, whose compute capability is {gpu.capability}, not {capability}; "
            "tensorrt_rtx builds for others"
        )
    system = f"{platform.system()} {platform.machine()}"
    return {"compute_capability": gpu.capability, "gpu": gpu.name, "driver": gpu.driver, "system": system}


class TensorRTEngine:
    """One engine with one execution context and one stream.

    With `capability` it is built for such a GPU, which need not be here, and cannot be run.
    """

    backend = "tensorrt"
    lighter_from_cache = False
    version = f"{LIBRARY} {trt.__version__}"

    def __init__(self, options: EngineOptions, shape: TileShape, capability: str | None = None) -> None:
        _check_version()
        self.device, self.precision = "GPU", options.precision
        self.progress: Progress | None = None
        self._shape = shape
        self._ahead = capability is not None
        self._place = _place(capability)
        self._cache_dir = options.cache_dir
        self._target = _target(self._place["compute_capability"])
        self._session: _Session | None = None

    def facts(self) -> dict[str, object]:
        """What an engine depends on besides the graph."""
        return dict(self._place)

    def build(self, graph: bytes, keep: bool) -> bytes:
        """Compile the ONNX `graph`; return the engine if it is to be kept, else nothing."""
        log.info("building a TensorRT engine; 'edgemuse build' does it beforehand")
        blob = self._compile(graph)
        if not self._ahead:
            reason = self._start(blob)
            if reason:
                raise BackendError(f"TensorRT does not load the engine that it built: {reason}")
        return blob if keep else b""

    def load(self, blob: memoryview) -> bool:
        """Take an engine back; False if it was built by another version, for another GPU or system."""
        reason = self._start(bytes(blob))
        if reason:
            log.warning("cached TensorRT engine is not usable: %s; building again", reason)
        return not reason

    def _compile(self, graph: bytes) -> bytes:
        messages = _Messages()
        with _refusals("build"):
            builder = trt.Builder(messages)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            parser = trt.OnnxParser(network, messages)
            self._parse(parser, network, graph)
            config = builder.create_builder_config()
            config.clear_flag(trt.BuilderFlag.TF32)  # which would round fp32 to ten bits
            if self._target is not None:
                config.num_compute_capabilities = 1
                config.set_compute_capability(self._target, 0)
            if self.progress is not None:
                config.progress_monitor = _Monitor(self.progress)
            built = builder.build_serialized_network(network, config)
        if built is None:
            capability = self._place["compute_capability"]
            raise BackendError(f"TensorRT cannot build for compute capability {capability}: {messages.reason()}")
        return bytes(built)

    def _parse(self, parser: Any, network: Any, graph: bytes) -> None:
        if not parser.parse(graph):
            error = parser.get_error(0)
            node = f" (node {error.node_name()}, {error.node_operator()})" if error.node_name() else ""
            raise BackendError(f"TensorRT cannot read the network: {one_line(error.desc())}{node}")
        if (network.num_inputs, network.num_outputs) != (1, 1):
            raise BackendError("TensorRT cannot read the network: it must have one input and one output")
        network.get_input(0).shape = self._shape
        found = _precision(network)
        if found != self.precision:
            raise BackendError(f"TensorRT runs a graph as it is: this one is {found}, {self.precision} was asked for")

    def _start(self, blob: bytes) -> str:
        """Make the engine ready to run. Returns why TensorRT refuses it, or nothing; raises if the GPU fails."""
        messages = _Messages()
        with _refusals("load"):
            runtime = trt.Runtime(messages)
            if reason := _mismatch(runtime, blob):
                return reason
            engine = runtime.deserialize_cuda_engine(blob)
            if engine is None:
                return messages.reason()
            self.close()
            kernels = _Kernels(blob, self._cache_dir) if LIBRARY == "tensorrt_rtx" else None
            self._session = _Session(runtime, engine, messages, kernels)
        return ""

    def infer(self, batch: Batch) -> Batch:
        """Run the network once; a float32 result lies in the engine's own page-locked buffer."""
        if self._session is None:
            raise BackendError("the TensorRT engine is closed")
        if batch.shape != self._shape:
            raise BackendError(f"the TensorRT engine takes tiles of {self._shape}, not {batch.shape}")
        return self._session.run(batch)

    def close(self) -> None:
        """Free the GPU's memory."""
        if self._session is not None:
            self._session.close()
            self._session = None


class _Session:
    """An engine's context with its buffers: page-locked here, their twins on the GPU."""

    def __init__(self, runtime: Any, engine: Any, messages: _Messages, kernels: _Kernels | None) -> None:
        self._runtime, self._engine, self._messages = runtime, engine, messages  # they must outlive the context
        self._kernels = kernels
        self._has_run = False
        self._stream = Stream()
        try:
            self._context = kernels.context(engine) if kernels else engine.create_execution_context()
            if self._context is None:
                raise BackendError(f"TensorRT cannot make the engine ready: {messages.reason()}")
            names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
            is_input = [engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
            self._input, self._input_address = self._buffer(names[is_input.index(True)])
            self._output, self._output_address = self._buffer(names[is_input.index(False)])
        except BaseException:
            self.close()
            raise

    def _buffer(self, name: str) -> tuple[Any, int]:
        array = pinned(tuple(self._engine.get_tensor_shape(name)), trt.nptype(self._engine.get_tensor_dtype(name)))
        address = self._stream.allocate(array.nbytes)
        if not self._context.set_tensor_address(name, address):
            raise BackendError(f"TensorRT refuses the buffer of {name}: {self._messages.reason()}")
        return array, address

    def run(self, batch: Batch) -> Batch:
        """Copy, compute, copy back: queued in one stream, so each waits for the one before."""
        np.copyto(self._input, batch, casting="same_kind")
        self._stream.upload(self._input, self._input_address)
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise BackendError(f"TensorRT failed while running the network: {self._messages.reason()}")
        self._stream.download(self._output_address, self._output)
        self._stream.wait()
        self._has_run = True
        features: Batch = self._output.astype(np.float32, copy=False)
        return features

    def close(self) -> None:
        """Free the context before the memory that it was given."""
        if self._kernels and self._has_run:
            self._kernels.keep()
        self._context = self._engine = self._runtime = None
        self._stream.close()


class _Kernels:
    """What TensorRT-RTX compiles for the GPU when an engine first runs, kept beside the engines in `folder`.

    TensorRT-RTX itself refuses what is kept if GPU, driver or version have changed.
    """

    def __init__(self, blob: bytes, folder: Path | None) -> None:
        self._folder = folder
        key = cache.cache_key({"engine": hashlib.sha256(blob).hexdigest(), **asdict(find_gpu())})
        self._key = f"{key}.kernels"
        stored = cache.load(folder, self._key) if folder else None
        self._before = bytes(stored) if stored else None  # not mapped: the file may be replaced
        self._config: Any = None
        self._cache: Any = None

    def context(self, engine: Any) -> Any:
        """An execution context that starts from what is kept."""
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        if self._before and not self._cache.deserialize(self._before):
            log.info("kernels of an earlier run are not usable; compiling again")
        self._config.set_runtime_cache(self._cache)
        return engine.create_execution_context(runtime_config=self._config)

    def keep(self) -> None:
        """Write what was compiled, if that is more than was read."""
        if self._folder is None:
            return
        with contextlib.suppress(RuntimeError, TypeError, OSError):  # only the next start would be slower
            found = bytes(self._cache.serialize())
            if found != self._before:
                cache.save(self._folder, self._key, found)


class _Messages(trt.ILogger):  # type: ignore[misc]  # trt is Any to mypy
    """Keeps what TensorRT reports as errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        log.debug("TensorRT: %s", message)
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self._errors.append(message)

    def reason(self) -> str:
        """The first error in a line: in our words if it is a known one, else in TensorRT's."""
        everything = " ".join(self._errors).lower()
        for part, meaning in COMPLAINTS.items():
            if part in everything:
                return f"{meaning} ({one_line(self._errors[0])})"
        return one_line(self._errors[0]) if self._errors else "it does not say why"


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Passes the steps of a build on."""

    def __init__(self, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._steps: dict[str, int] = {}

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        """Called by TensorRT, from any thread."""
        self._steps[phase] = steps
        self._progress(phase, 0, steps)

    def step_complete(self, phase: str, step: int) -> bool:
        """Called by TensorRT with the step just done, counted from 0; False would end the build."""
        self._progress(phase, step + 1, self._steps.get(phase, step + 1))
        return True

    def phase_finish(self, phase: str) -> None:
        """Called by TensorRT."""


def _mismatch(runtime: Any, blob: bytes) -> str:
    """Why TensorRT-RTX would not run the engine here; nothing if it would, or if the library has no such check."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    validity, found = runtime.get_engine_validity(blob)
    if validity != trt.EngineValidity.INVALID:
        return ""
    flags = trt.EngineInvalidityDiagnostics.__members__
    reasons = [text for name, text in MISMATCHES.items() if name in flags and int(found) & int(flags[name])]
    return ", ".join(reasons) or "TensorRT-RTX calls it invalid"


def _precision(network: Any) -> str:
    """Of a parsed network: int8 if anything is quantised, fp16 if a convolution is, else fp32."""
    if any(layer.type == trt.LayerType.QUANTIZE for layer in _layers(network)):
        return "int8"
    convolutions = [layer for layer in _layers(network) if layer.type == trt.LayerType.CONVOLUTION]
    return "fp16" if any(layer.get_output(0).dtype == trt.float16 for layer in convolutions) else "fp32"


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


@contextlib.contextmanager
def _refusals(doing: str) -> Iterator[None]:
    """Turn what the bindings raise into a BackendError. They report by a TypeError that they made nothing."""
    with foreign(BackendError, f"TensorRT cannot {doing} the engine"):
        yield
