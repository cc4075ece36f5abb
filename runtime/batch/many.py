"""Many scans: one after the other through the network, with reading and writing beside it.

While the network runs on a scan, a second thread writes the results of the scan before it and reads and prepares the
one after it, never more than one. Either waits where the memory that is allowed does not hold it as well.

A run that was interrupted goes on where it stopped: what is done, the provenance says. Several processes may share a
folder: each claims the scan that it works on, and at the end waits for those that others claimed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgemuse.engines.errors import InputError, LabelMapError, OutputError
from edgemuse.runtime.batch.claim import Claim
from edgemuse.runtime.batch.jobs import Job
from edgemuse.runtime.network.memory import memory_limit
from edgemuse.runtime.pipeline.loading import Loaded
from edgemuse.runtime.pipeline.options import Options, Progress
from edgemuse.runtime.pipeline.result import Pipeline
from edgemuse.runtime.pipeline.write import write
from edgemuse.runtime.results.files import PROVENANCE, discard_parts, free, present, read_record
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.nifti import file_sha256, open_scan
from edgemuse.runtime.scan.stand_in import stand_in

POLL = 1.0
"""Seconds between two looks at the scans that other processes work on."""
at_work: ContextVar[Path | None] = ContextVar("at_work", default=None)
"""The scan that this thread works on, for those who show the log: lines about two scans may mix."""


class Screen(Protocol):
    """Who is told what happens."""

    def guard(self, work: Callable[[], None], job: Job) -> int:
        """Run `work` on `job`, report what it raises and return an exit code: 0 if nothing was raised."""
        ...

    def scan(self, job: Job) -> AbstractContextManager[Progress]:
        """The network will run on this one."""
        ...

    def elsewhere(self, job: Job, seconds: float | None) -> None:
        """A worker has done it in `seconds`; None: it could not."""
        ...

    def skipped(self, job: Job) -> None:
        """It is done already."""
        ...

    def passed_over(self, job: Job, why: LabelMapError) -> None:
        """It was found in a folder and is no scan."""
        ...

    def waiting(self, count: int) -> None:
        """Other processes work on the `count` scans that are left."""
        ...

    def written(self, paths: list[Path]) -> None:
        """A scan is done."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What makes results those of this run: the model's hash and what was asked for, as in the provenance."""

    model: str
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class Taken:
    """A scan that this process has claimed; `loaded` None: still to be read. `error`: why it cannot be done.

    `new`: those of its outputs where nothing is, and where nothing may be replaced.
    """

    job: Job
    claim: Claim
    loaded: Loaded | None = None
    error: Exception | None = None
    new: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Writing:
    """Results on their way to the disk, and the memory that they take until they are there."""

    job: Job
    claim: Claim
    bytes: int
    paths: Future[list[Path]]


@dataclass
class Counts:
    """How many scans came to what; `codes`: an exit code for each that failed."""

    segmented: int = 0
    skipped: int = 0
    passed_over: int = 0
    codes: list[int] = field(default_factory=list)


class Batch:
    """Segments jobs, and counts them."""

    def __init__(
        self,
        segmenter: Pipeline[Any],
        wanted: Wanted,
        screen: Screen,
        with_picture: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.segmenter, self.wanted, self.screen = segmenter, wanted, screen
        self.with_picture, self.overwrite = with_picture, overwrite
        self.counts = Counts()
        self._ahead: Future[Taken | None] | None = None
        self._writing: Writing | None = None
        self._claims: set[Claim] = set()

    def run(self, jobs: Iterable[Job]) -> Counts:
        """Segment every job that is not done; one that fails does not stop the others."""
        self._open, self._elsewhere = deque(jobs), deque[Job]()
        try:
            with ThreadPoolExecutor(1, "edgemuse") as self._pool:
                while (taken := self._next()) is not None:
                    self._guarded(partial(self._segment, taken), taken.job, taken.claim)
                    del taken
                self._settle()
        finally:
            at_work.set(None)
            for claim in list(self._claims):
                self._release(claim)
        return self.counts

    def _next(self) -> Taken | None:
        """The next scan to be done by this process; None: all are done."""
        while True:
            ahead, self._ahead = self._ahead, None
            taken = ahead.result() if ahead else self._take(0)
            if taken is not None or not self._elsewhere:
                return taken
            self._settle()
            self.screen.waiting(len(self._elsewhere))
            time.sleep(POLL)
            self._open, self._elsewhere = self._elsewhere, deque()

    def _take(self, room: float) -> Taken | None:
        """Claim the first job that is not done; read and prepare it if that takes no more than `room` bytes."""
        while self._open:
            job = self._open.popleft()
            at_work.set(job.scan)
            claim = Claim(job.outputs[PROVENANCE])
            try:
                if job.refused:
                    raise InputError(job.refused)
                plan = self.segmenter.plan(open_scan(job.scan))
                if not self._claim(claim, job):
                    self._elsewhere.append(job)
                elif is_done(job, None if self.overwrite else self.wanted):
                    self._release(claim)
                    self.counts.skipped += 1
                    self.screen.skipped(job)
                else:
                    if claim.exclusive:
                        discard_parts(job.outputs.values())
                    new = free(job.outputs) if claim.exclusive and not self.overwrite else frozenset()
                    loaded = self.segmenter.prepare(job.scan, room) if plan.ahead <= room else None
                    return Taken(job, claim, loaded, new=new)
            except Exception as error:  # raised again where it is reported
                return Taken(job, claim, error=error)
        return None

    def _claim(self, claim: Claim, job: Job) -> bool:
        try:
            for path in job.outputs.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            granted = claim.acquire()
        except OSError as error:
            raise OutputError(f"{claim.path.parent}: cannot write there ({error.strerror})") from error
        if granted:
            self._claims.add(claim)
        return granted

    def _segment(self, taken: Taken) -> None:
        job = taken.job
        at_work.set(job.scan)
        if taken.loaded is None:
            self._settle()
        try:
            with self.screen.scan(job) as progress:
                if taken.error is not None:
                    raise taken.error
                loaded = taken.loaded or self.segmenter.prepare(job.scan)
                result = self.segmenter.finish(loaded, progress, self._planned)
        except LabelMapError as error:
            self._pass_over(taken, error)
            return
        self._settle()
        work = partial(write, result, job.outputs, self.with_picture, job.notes, taken.new)
        self._writing = Writing(job, taken.claim, loaded.memory.behind, self._pool.submit(work))

    def _pass_over(self, taken: Taken, error: LabelMapError) -> None:
        """What was found in a folder and is no scan is no failure."""
        if not taken.job.walked:
            raise error
        self._release(taken.claim)
        self.counts.passed_over += 1
        self.screen.passed_over(taken.job, error)

    def _planned(self, total: int, last: bool) -> None:
        """The network is about to run, and this process to take `total` bytes without reading and writing."""
        limit = memory_limit(self.segmenter.options.max_ram)
        if self._writing and total + self._writing.bytes > limit:
            wait([self._writing.paths])  # it is told of when this scan is done
        if last:
            behind = self._writing.bytes if self._writing and not self._writing.paths.done() else 0
            self._ahead = self._pool.submit(self._take, limit - total - behind)

    def _settle(self) -> None:
        """Wait until what is being written is there."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self._guarded(lambda: self._written(writing), writing.job, writing.claim)

    def _written(self, writing: Writing) -> None:
        paths = writing.paths.result()
        self._release(writing.claim)
        self.counts.segmented += 1
        self.screen.written(paths)

    def _guarded(self, work: Callable[[], None], job: Job, claim: Claim) -> None:
        code = self.screen.guard(work, job)
        if code:
            self.counts.codes.append(code)
            self._release(claim)

    def _release(self, claim: Claim) -> None:
        claim.release()
        self._claims.discard(claim)


def is_done(job: Job, wanted: Wanted | None) -> bool:
    """Whether the results of `job` are there, whole, and those that are wanted; None: whatever is there is replaced.

    What a killed process began is not done. Raises OutputError where something else is in the way: results of another
    model, scan or of other options, or files that edgemuse did not write or that were changed since.
    """
    found = present(job.outputs)
    if not found or wanted is None:
        return False
    for path in (job.outputs[name] for name in found):
        if path.is_symlink() and not path.exists():
            raise _in_the_way(path, f" and is {foreign.of_missing(path)}")
    record = read_record(job.outputs[PROVENANCE]) if PROVENANCE in found else {}
    files = record.get("files")
    if not isinstance(files, dict):
        raise _in_the_way(job.outputs[found[0]], "")
    strange = [name for name in found if name not in (*files, PROVENANCE)]
    if strange:
        raise _in_the_way(job.outputs[strange[0]], ", which the provenance does not list")
    other = _other(record, wanted, job.scan)
    if other:
        raise _in_the_way(job.outputs[PROVENANCE], f" for {other}")
    return all([name in found and _is_whole(job.outputs[name], sha256) for name, sha256 in files.items()])


def _is_whole(path: Path, sha256: object) -> bool:
    """Whether this result is there; not, if it was removed just now. Raises OutputError if it is another."""
    try:
        if file_sha256(path) == sha256:
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _in_the_way(path, f" and cannot be read ({error.strerror})") from error
    instead = stand_in(path)
    changed = ", but not as its provenance says: changed since, or left by a killed run"
    raise _in_the_way(path, f" and is {instead}" if instead else changed)


def _other(record: Mapping[str, Any], wanted: Wanted, scan: Path) -> str:
    """What sets the results of `record` apart from those wanted; empty if nothing does."""
    if _sha256(record, "model") != wanted.model:
        return "another model"
    if record.get("asked") != wanted.asked:
        return "other options"
    try:
        return "" if _sha256(record, "input") == file_sha256(scan) else "another scan of this name"
    except OSError as error:
        raise InputError(f"{scan}: cannot be read ({error.strerror})") from error


def _sha256(record: Mapping[str, Any], of: str) -> object:
    part = record.get(of)
    return part.get("sha256") if isinstance(part, dict) else None


def _in_the_way(path: Path, why: str) -> OutputError:
    return OutputError(f"{path} exists{why}; choose another folder, or segment this scan again with --overwrite")


def wanted(model_sha256: str, options: Options) -> Wanted:
    """What results of a model with `options`, as the user gave them, say in their provenance."""
    return Wanted(model_sha256, options.asked)
