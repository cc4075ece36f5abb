"""The processor, the cores and the memory of this machine, found without special rights."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import sys
from pathlib import Path

import psutil

from edgemuse.engines import cgroups

CPU_FACTS = (
    *("vendor_id", "cpu family", "model", "stepping", "microcode", "flags"),
    *("Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),
)
"""In Linux's list of processors, of x86 and of ARM: what decides which instructions run, and how."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The names of those options in glibc's malloc.h."""
LARGE = 4 << 20
"""Arrays of this many bytes or more are mapped: images and sums, but not the small arrays of inner loops."""


def cpu_name() -> str:
    """The processor's own name, or the architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_identity() -> str:
    """The processor's name, and where the system tells more of it, eight digits of that.

    Virtual machines give one name to processors with different instructions.
    """
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in CPU_FACTS:
                facts.setdefault(name.strip(), value.strip())  # the first processor's
    digits = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:8]
    return f"{cpu_name()} ({digits})" if facts else cpu_name()


def cpu_cores(root: Path = cgroups.ROOT) -> int:
    """Cores that this process may use, no more than its groups get the time of; `root` is the file system's."""
    return min(_visible_cores(), _quota(root) or sys.maxsize)


def engine_threads(asked: int | None, root: Path = cgroups.ROOT) -> int | None:
    """Threads for a backend that was `asked` to use so many; None lets it use every core that it sees.

    Backends see cores, not what time the process gets on them: threads beyond that would wait for one another.
    """
    quota = _quota(root)
    return quota if asked is None and quota is not None and quota < _visible_cores() else asked


def _visible_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(root: Path) -> int | None:
    share = cgroups.cores(root)
    return None if share is None else max(math.ceil(share), 1)


def available_memory(root: Path = cgroups.ROOT) -> int:
    """Bytes that can be taken without swapping, within what a container or a batch system allows.

    `root` is the root of the file system.
    """
    free, allowed = int(psutil.virtual_memory().available), cgroups.free_memory(root)
    return free if allowed is None else min(free, allowed)


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory(pid: int | None = None) -> int:
    """Highest resident memory of this process, or of process `pid`, so far, in bytes.

    Where the system keeps no such record of another process (macOS), it is what that process holds now.
    """
    with contextlib.suppress(OSError, StopIteration):  # Linux; getrusage would count the parent's peak before exec
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    if sys.platform != "win32" and pid is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    memory = psutil.Process(pid).memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def map_large_arrays() -> None:
    """Have glibc map arrays of `LARGE` bytes and more in this process, so that their memory goes when they do.

    By itself glibc takes such arrays from its heap as soon as one of their size was freed, and memory of the heap
    cannot be given back while anything behind it is in use. The same number of bytes may stay free at the end of the
    heap: with glibc's own 128 KiB, inner loops would give memory back and have it zeroed again all the time.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE)


def machine() -> dict[str, str | int]:
    """The facts about this machine that a measurement or a cached engine depends on."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": cpu_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": platform.platform(),
    }
