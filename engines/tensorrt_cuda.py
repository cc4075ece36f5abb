"""The parts of CUDA that TensorRT needs: the GPU's facts, page-locked memory, memory on the GPU and a stream."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda
from numpy.typing import DTypeLike, NDArray

from edgemuse.engines.errors import BackendError


@dataclass(frozen=True)
class GPU:
    """The first GPU that CUDA shows. `driver` is the highest CUDA version that the driver supports."""

    name: str
    capability: str
    driver: str


def find_gpu() -> GPU:
    """The GPU to run on; raises BackendError where there is none, or its driver is missing or too old."""
    driver = _version(_call("asking for the driver", cuda.cudaDriverGetVersion))
    if driver == "0.0":
        raise BackendError("no NVIDIA driver is loaded; install the driver of this machine's GPU")
    error, count = cuda.cudaGetDeviceCount()
    if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
        needed = _version(_call("asking for the version", cuda.cudaRuntimeGetVersion))
        raise BackendError(f"the NVIDIA driver supports CUDA {driver}, cuda-python needs {needed}; update the driver")
    if error == cuda.cudaError_t.cudaErrorNoDevice or not (error or count):
        raise BackendError("the NVIDIA driver finds no GPU")
    _check("looking for a GPU", error)
    facts = _call("asking for the GPU", cuda.cudaGetDeviceProperties, 0)
    return GPU(facts.name.rstrip(b"\0").decode(errors="replace"), f"{facts.major}.{facts.minor}", driver)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class Stream:
    """A queue of work on the GPU, and the memory that the work uses. Everything is freed by `close`."""

    def __init__(self) -> None:
        self._cleanup = contextlib.ExitStack()
        self.handle = _call("making a stream", cuda.cudaStreamCreate)
        self._cleanup.callback(cuda.cudaStreamDestroy, self.handle)

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the GPU."""
        address = int(_call(f"taking {size / 2**20:.0f} MiB of GPU memory", cuda.cudaMalloc, size))
        self._cleanup.callback(cuda.cudaFree, address)
        return address

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Queue a copy of the page-locked `array` to the GPU."""
        self._copy(address, array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Queue a copy from the GPU into the page-locked `array`."""
        self._copy(array.ctypes.data, address, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        _call("copying", cuda.cudaMemcpyAsync, to, source, size, kind, self.handle)

    def wait(self) -> None:
        """Return when all that was queued is done; raises BackendError if any of it failed."""
        _call("running the network", cuda.cudaStreamSynchronize, self.handle)

    def close(self) -> None:
        """Free what was allocated, last first."""
        self._cleanup.close()


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in page-locked memory, which the GPU can copy at full speed. It is freed when no view is left."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    address = int(_call(f"locking {size / 2**20:.0f} MiB of memory", cuda.cudaMallocHost, size))
    buffer = (ctypes.c_byte * size).from_address(address)
    weakref.finalize(buffer, cuda.cudaFreeHost, address)
    array: NDArray[Any] = np.frombuffer(memoryview(buffer), kind).reshape(shape)
    return array


def _call(doing: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of CUDA; returns its value, raises BackendError for its error."""
    error, *values = function(*arguments)
    _check(doing, error)
    return values[0] if values else None


def _check(doing: str, error: Any) -> None:
    if not error:
        return
    if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
        raise BackendError(
            f"out of memory while {doing}; end other programs that use the GPU, or run on the CPU with "
            "--backend openvino"
        )
    text = cuda.cudaGetErrorString(error)[1].decode(errors="replace")
    raise BackendError(f"CUDA failed while {doing}: {text} ({int(error)})")
