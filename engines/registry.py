"""The list of backends: which of them work on this machine, which one to use, and how it is opened.

The order of `BACKENDS` is the order of preference of `auto`, and follows what was measured: OpenVINO is the fastest on
CPUs, and TensorRT, not measured on a GPU yet, comes last. A backend that is asked for by name is used or refused, and
never replaced.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from edgemuse.engines import cache
from edgemuse.engines.errors import BackendError, one_line, pip_install
from edgemuse.engines.hardware import engine_threads
from edgemuse.engines.protocol import Engine, EngineOptions, TileShape

log = logging.getLogger("edgemuse")


@dataclass(frozen=True)
class Backend:
    """A row of the registry: module and class are imported on use; `install` is what pip is told to install."""

    name: str
    module: str
    engine: str
    install: str


BACKENDS = (
    Backend("openvino", "edgemuse.engines.openvino", "OpenVINOEngine", "openvino"),
    Backend("onnxruntime", "edgemuse.engines.onnxruntime", "ONNXRuntimeEngine", ".[onnxruntime]"),
    Backend("tensorrt", "edgemuse.engines.tensorrt", "TensorRTEngine", ".[tensorrt]"),
)
NAMES = tuple(backend.name for backend in BACKENDS)
Way: TypeAlias = tuple[str, str, str]
"""Backend, device and precision."""


@dataclass(frozen=True)
class Status:
    """Whether a backend works here: `devices` maps device to precisions; `reason` says why not, or is empty."""

    backend: Backend
    version: str
    devices: dict[str, list[str]]
    reason: str


def statuses(name: str = "auto") -> Iterator[Status]:
    """Probe the backend called `name`, or with `auto` every one, most preferred first."""
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        try:
            module = _import(backend)
            devices = module.probe()
        except BackendError as error:
            yield Status(backend, "", {}, str(error))
            continue
        except Exception as error:  # a driver's fault may be raised as anything, and must not hide the other backends
            yield Status(backend, "", {}, one_line(f"it does not start ({error})"))
            continue
        reason = "" if devices else "it finds no device that edgemuse can use"
        yield Status(backend, str(getattr(module, backend.engine).version), devices, reason)


def _import(backend: Backend) -> ModuleType:
    try:
        return importlib.import_module(backend.module)
    except ImportError as error:
        if error.name and backend.module.rpartition(".")[2] == error.name.partition(".")[0]:
            why = "it is not installed"
        else:
            why = f"its installation does not load ({error})".replace("\n", " ")
        raise BackendError(f"{backend.name}: {why}; {pip_install(backend.install)}") from error


def way(options: EngineOptions) -> Way:
    """How definite `options` compute."""
    return options.backend, options.device, options.precision


def basis(options: EngineOptions) -> dict[str, str]:
    """What the results of definite `options` depend on besides the graph: how they compute, with what, and where.

    Raises BackendError where the backend cannot be used.
    """
    backend = next(row for row in BACKENDS if row.name == options.backend)
    module = _import(backend)
    return {
        "backend": backend.name,
        "version": str(getattr(module, backend.engine).version),
        "device": options.device,
        "precision": options.precision,
        "processor": str(module.processor(options.device)),
    }


def choose(options: EngineOptions, refused: Mapping[Way, str] | None = None) -> tuple[Backend, EngineOptions]:
    """The backend to use and `options` without `auto`.

    `refused` says why a way is not to be taken. Raises BackendError with the reason for every backend rejected.
    """
    if options.backend not in ("auto", *NAMES):
        raise BackendError(f"unknown backend {options.backend!r}; choose from auto, {', '.join(NAMES)}")
    rejected = []
    for status in statuses(options.backend):
        chosen, reason = _fit(status, options, refused or {})
        if chosen is not None:
            return status.backend, chosen
        rejected.append(reason)
    raise BackendError("no usable backend: " + "; ".join(rejected))


def _fit(status: Status, options: EngineOptions, refused: Mapping[Way, str]) -> tuple[EngineOptions | None, str]:
    name = status.backend.name
    if status.reason:
        return None, status.reason if status.reason.startswith(name) else f"{name}: {status.reason}"
    device = next(iter(status.devices)) if options.device == "auto" else options.device.upper()
    if device not in status.devices:
        return None, f"{name}: no device {device}, only {', '.join(status.devices)}"
    precision = "fp32" if options.precision == "auto" else options.precision
    if precision not in status.devices[device]:
        return None, f"{name}: no {precision} on this {device}, only {', '.join(status.devices[device])}"
    if (name, device, precision) in refused:
        return None, refused[name, device, precision]
    threads = engine_threads(options.threads)
    return replace(options, backend=name, device=device, precision=precision, threads=threads), ""


def open_engine(graph: bytes, shape: TileShape, options: EngineOptions) -> Engine:
    """Compile the ONNX `graph` for tiles of `shape` (N, C, D, H, W), or load it from `options.cache_dir`."""
    backend, options = choose(options)
    engine: Any = getattr(_import(backend), backend.engine)(options, shape)
    if options.cache_dir is None:
        engine.build(graph, keep=False)
    else:
        _open_cached(engine, graph, options.cache_dir, cache.cache_key(_facts(engine, graph, shape)))
    opened: Engine = engine
    return opened


def build_engine(
    graph: bytes,
    shape: TileShape,
    options: EngineOptions,
    folder: Path,
    capability: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Compile the ONNX `graph` for tiles of `shape` (N, C, D, H, W) into `folder`, where `open_engine` finds it.

    Args:
        graph: ONNX of the precision that `options` names.
        shape: of one tile.
        options: as for `open_engine`.
        folder: a cache folder, here or carried to another machine.
        capability: compute capability of a GPU that need not be here, such as "8.6"; only TensorRT takes one.
        progress: called with a phase, the steps of it that are done and all of them; only TensorRT tells.

    Returns:
        The file, replaced if it existed. Raises BackendError, or OSError where it cannot be written.
    """
    if capability is None:
        backend, options = choose(options)
        engine: Any = getattr(_import(backend), backend.engine)(options, shape)
    else:
        backend = next(row for row in BACKENDS if row.name == "tensorrt")
        engine = getattr(_import(backend), backend.engine)(options, shape, capability)
    engine.progress = progress
    blob = engine.build(graph, keep=True)
    engine.close()
    return cache.save(folder, cache.cache_key(_facts(engine, graph, shape)), blob)


def _open_cached(engine: Any, graph: bytes, folder: Path, key: str) -> None:
    if _load(engine, folder, key):
        log.info("engine from cache: %s", key)
        return
    cache.store(folder, key, engine.build(graph, keep=True))
    if engine.lighter_from_cache:
        _load(engine, folder, key)  # if it is refused, what was built stays


def _load(engine: Any, folder: Path, key: str) -> bool:
    """Whether `engine` is ready to run from what is stored under `key`."""
    blob = cache.load(folder, key)
    return blob is not None and bool(engine.load(blob))


def _facts(engine: Any, graph: bytes, shape: TileShape) -> dict[str, object]:
    return {
        "edgemuse": version("edgemuse"),  # what is done to a graph before it is compiled may change between versions
        "graph": hashlib.sha256(graph).hexdigest(),
        "backend": engine.backend,
        "version": engine.version,
        "device": engine.device,
        "precision": engine.precision,
        "shape": shape,
        **engine.facts(),
    }
