"""Scans on the workers of a Dask cluster. Each worker keeps its model open from one scan to the next.

A worker does what a process of its own does for one scan: it claims it, looks whether it is done, and writes the
results itself, so the machines must see the same files. The scan of a worker that dies is given to another by Dask.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from distributed import Client, as_completed

from edgemuse.engines.errors import BackendError, BundleError, EdgemuseError, LabelMapError
from edgemuse.runtime.batch.jobs import Job
from edgemuse.runtime.batch.many import Batch, Counts, Screen, wanted
from edgemuse.runtime.model.cascade import open_model
from edgemuse.runtime.model.folders import default_cache_dir
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
from edgemuse.runtime.pipeline.open import segmenter_of
from edgemuse.runtime.pipeline.options import Options, Progress
from edgemuse.runtime.pipeline.segmenter import Segmenter

log = logging.getLogger("edgemuse")

CONNECT = "15s"
"""To reach the scheduler."""
_one_at_a_time = threading.Lock()
"""A worker with several threads has one engine."""


@dataclass(frozen=True)
class Task:
    """What every scan needs: the model's path and hash, and how to segment."""

    model: Path
    sha256: str
    options: Options
    with_picture: bool
    overwrite: bool


@dataclass
class Report:
    """What a worker did for a scan; also its screen, which keeps what there is to say."""

    counts: Counts = field(default_factory=Counts)
    errors: list[Exception] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    no_scan: LabelMapError | None = None
    seconds: float = 0.0

    def guard(self, work: Callable[[], None], job: Job) -> int:
        """Keep what `work` raises; the exit code."""
        try:
            work()
        except (EdgemuseError, OSError, MemoryError) as error:
            self.errors.append(error)
            return error.exit_code if isinstance(error, EdgemuseError) else 1
        except Exception as error:  # which perhaps cannot be sent
            self.errors.append(RuntimeError(f"{type(error).__name__}: {error}"))
            return 1
        return 0

    @contextlib.contextmanager
    def scan(self, job: Job) -> Iterator[Progress]:
        """Progress is not shown: nobody watches a worker."""
        yield lambda done, total: None

    def elsewhere(self, job: Job, seconds: float | None) -> None:
        """A worker hands no scan on, so this is never called."""

    def skipped(self, job: Job) -> None:
        """Nothing is shown: the counts say it."""

    def passed_over(self, job: Job, why: LabelMapError) -> None:
        """Keep why."""
        self.no_scan = why

    def waiting(self, count: int) -> None:
        """Nothing is shown: the process that started the run says it."""

    def written(self, paths: list[Path]) -> None:
        """Keep the paths."""
        self.paths += paths


class _Keep(logging.Handler):
    """Puts warnings into a list."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.into = into

    def emit(self, record: logging.LogRecord) -> None:
        self.into.append(record.getMessage())


def work(job: Job, task: Task) -> Report:
    """On a worker: segment the scan of `job`."""
    report, start = Report(), time.perf_counter()
    keep = _Keep(report.warnings)
    with _one_at_a_time:
        log.addHandler(keep)
        try:
            code = report.guard(lambda: _work(job, task, report), job)
        finally:
            log.removeHandler(keep)
    if code:
        report.counts.codes.append(code)
    report.seconds = time.perf_counter() - start
    return report


def _work(job: Job, task: Task, report: Report) -> None:
    batch = Batch(_segmenter(task), wanted(task.sha256, task.options), report, task.with_picture, task.overwrite)
    report.counts = batch.run([job])


@lru_cache(maxsize=1)
def _segmenter(task: Task) -> Segmenter | CascadeSegmenter:
    """The worker's model, open from one scan to the next."""
    opened = open_model(task.model)
    if opened.sha256 != task.sha256:
        raise BundleError(f"{task.model} is another model on a worker; all machines must see the same files")
    return segmenter_of(opened, replace(task.options, cache_dir=default_cache_dir()))


def run(address: str, task: Task, jobs: Sequence[Job], screen: Screen) -> Counts:
    """Segment `jobs` on the cluster whose scheduler is at `address`; raises BackendError if it cannot be reached."""
    task = replace(task, model=task.model.absolute())
    counts = Counts()
    with _connected(address) as client:
        if not client.scheduler_info()["workers"]:
            log.warning("%s has no workers yet; waiting for some, see docs/guide/cluster.md", address)
        futures = {client.submit(work, _absolute(job), task, pure=False): job for job in jobs}
        for future in as_completed(list(futures)):
            job = futures.pop(future)
            code = screen.guard(partial(_take_over, job, future, counts, screen), job)
            if code:
                counts.codes.append(code)
    return counts


def _take_over(job: Job, future: Any, counts: Counts, screen: Screen) -> None:
    """Say and count what a worker reports; raises what it raised."""
    report: Report = future.result()
    for warning in report.warnings:
        log.warning("%s", warning)
    counts.segmented += report.counts.segmented
    counts.skipped += report.counts.skipped
    counts.passed_over += report.counts.passed_over
    if report.errors:
        screen.elsewhere(job, None)
        raise report.errors[0]
    if report.counts.skipped:
        screen.skipped(job)
        return
    if report.no_scan is not None:
        screen.elsewhere(job, None)
        screen.passed_over(job, report.no_scan)
        return
    screen.elsewhere(job, report.seconds)
    screen.written(report.paths)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        client = Client(address, timeout=CONNECT)
    except Exception as error:  # each kind of address has its own
        raise BackendError(f"no Dask scheduler at {address} ({error}); start one, see docs/guide/cluster.md") from error
    with client:
        yield client


def _absolute(job: Job) -> Job:
    """Workers have other working directories."""
    return replace(job, scan=job.scan.absolute(), outputs={name: path.absolute() for name, path in job.outputs.items()})
