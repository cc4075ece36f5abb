"""Run a process to its end and measure it from outside: wall time, memory with its children, energy."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil

from edgemuse.engines.hardware import peak_memory

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 0.05
"""Seconds between two looks at the memory: each takes a millisecond or two of a core that is being measured."""


@dataclass(frozen=True)
class Run:
    """What a process took from its start to its end.

    Attributes:
        seconds: wall time.
        peak: highest resident memory of the process alone, as the system keeps it, or of it and its children together,
            as seen from time to time; bytes. Pages that they share count once for each.
        joules: what the processor packages used meanwhile, the rest of the machine's work included; None where that
            cannot be read.
    """

    seconds: float
    peak: int
    joules: float | None


class ProcessFailure(Exception):
    """The process ended with an error; the message is the last line it wrote to stderr."""


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run `command` to its end; raises ProcessFailure if it fails."""
    with tempfile.TemporaryFile() as stderr:
        before, start = energy(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
        try:
            with _watched(process.pid) as peaks:
                process.wait()
                seconds, after = time.perf_counter() - start, energy()
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()
        if process.returncode:
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            raise ProcessFailure(f"exit code {process.returncode}: {last}")
    return Run(seconds, max(peaks, default=0), joules_between(before, after))


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Look at the memory of the process and its children while the block runs; the list receives what was seen."""
    peaks: list[int] = []
    ended = Event()

    def look() -> None:
        with contextlib.suppress(psutil.Error):  # the process has ended
            root = psutil.Process(pid)
            while not ended.is_set():
                tree = (root, *root.children(recursive=True))
                peaks.append(max(peak_memory(pid), sum(map(resident, tree))))
                ended.wait(INTERVAL)

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def resident(process: psutil.Process) -> int:
    """Bytes of `process` alone now; 0 if it has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def energy() -> dict[str, tuple[int, int]]:
    """Microjoules used so far by each processor package, and where its counter starts again; empty if unreadable."""
    counters = {}
    for folder in sorted(POWERCAP.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") == 1:  # a package; its parts have another colon
            with contextlib.suppress(OSError, ValueError):
                counters[folder.name] = (
                    int((folder / "energy_uj").read_text()),
                    int((folder / "max_energy_range_uj").read_text()),
                )
    return counters


def joules_between(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> float | None:
    """Energy used between two readings of `energy`; None if there are none. A counter may have started again once."""
    if not before or before.keys() != after.keys():
        return None
    return sum((after[name][0] - start) % limit for name, (start, limit) in before.items()) / 1e6
