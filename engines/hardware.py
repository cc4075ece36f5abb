"""What the machine offers: processor, cores and memory, found without asking for rights."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

import psutil

CPU_FACTS = (
    *("vendor_id", "cpu family", "model", "stepping", "microcode", "flags"),
    *("Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),
)
"""In Linux's list of processors, of x86 and of ARM: what decides which instructions run, and how."""
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Folder, limit, usage, and the part of the usage that is page cache, given back under pressure."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The names of those options in glibc's malloc.h."""
LARGE = 4 << 20
"""Bytes of an array from which on it is mapped: images and sums, not the small ones of inner loops."""


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


def cpu_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the container's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, used, cache in CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(statistics[cache])
            free = min(free, int((folder / limit).read_text()) - taken)
    return max(free, 0)


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

    By itself it takes them from its heap as soon as one of their size was freed; there, whatever was allocated after
    them holds them. As much as that stays free at the heap's end: with glibc's 128 KiB, inner loops would give memory
    back and have it zeroed again all the time.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library, or Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, LARGE)


def machine() -> dict[str, str | int]:
    """The facts that a measurement or a cached engine depends on."""
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": cpu_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": platform.platform(),
    }
