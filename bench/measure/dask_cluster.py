"""A Dask cluster on this machine: a scheduler and workers, each a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgemuse.bench.measure.process import INTERVAL, resident

WORKERS = 2
PATIENCE = 60.0
"""Seconds within which the workers must have started."""


@dataclass(frozen=True)
class Cluster:
    """A Dask scheduler's address, and the processes that watch over its workers."""

    address: str
    nannies: list[subprocess.Popen[bytes]]

    def workers(self) -> list[psutil.Process]:
        """Return the process of each worker, which is the largest of its nanny's children."""
        children = [psutil.Process(nanny.pid).children(recursive=True) for nanny in self.nannies]
        return [max(found, key=resident) for found in children]


@contextmanager
def dask_cluster(folder: Path, preload: str = "") -> Iterator[Cluster]:
    """Run a scheduler and `WORKERS` workers with their files in `folder`; the workers run the code `preload` first."""
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "preload.py").write_text(preload)
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(folder / "cache")}
    running = list[subprocess.Popen[bytes]]()
    try:
        for name, *options in _commands(place):
            with (place / "dask.txt").open("ab") as log:
                command = [sys.executable, "-m", f"distributed.cli.{name}", *options]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        _wait_for(lambda: (place / "dask.txt").read_text().count("Registered to:") >= WORKERS)
        yield Cluster(json.loads((place / "scheduler.json").read_text())["address"], running[1:])
    finally:
        for process in reversed(running):  # a nanny ends its worker
            process.terminate()
        for process in running:
            process.wait()


def _commands(place: Path) -> list[list[str]]:
    """Return the command of the scheduler and those of the workers."""
    common = ["--scheduler-file", str(place / "scheduler.json"), "--no-dashboard", "--host", "127.0.0.1"]
    worker = ["--nthreads", "1", "--memory-limit", "0", "--local-directory", str(place)]
    scheduler = ["dask_scheduler", "--port", "0", *common]
    return [scheduler] + [["dask_worker", *common, *worker, "--preload", str(place / "preload.py")]] * WORKERS


def _wait_for(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"Dask's workers did not start within {PATIENCE:.0f} seconds")
        time.sleep(INTERVAL)
