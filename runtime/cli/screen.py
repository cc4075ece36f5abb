"""What people see: progress, lines about what happens, and one line for every error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemuse.engines.errors import EdgemuseError, LabelMapError, one_line
from edgemuse.runtime.cli.terminal import note, progress, say_paths, watched

if TYPE_CHECKING:
    from edgemuse.runtime.batch.jobs import Job
    from edgemuse.runtime.batch.many import Counts

FAILURE = 1
"""Exit code of an error that is not the user's."""


def guard(work: Callable[[], int | None], debug: bool, about: str = "") -> int:
    """Run `work`; turn what it raises into a line on stderr, which names what it is `about`, and the exit code."""
    try:
        return work() or 0
    except (EdgemuseError, MemoryError, OSError) as error:
        if debug:
            raise
        note(f"edgemuse: {_named(_words(error), about)}")
        return error.exit_code if isinstance(error, EdgemuseError) else FAILURE
    except (click.ClickException, click.exceptions.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        if debug:
            raise
        note(f"edgemuse: internal error: {_named(error, about)}; --debug shows where")
        return FAILURE


def _words(error: Exception) -> str:
    words = one_line(error)
    return f"there is not enough memory ({words}); close other programs" if isinstance(error, MemoryError) else words


def _named(text: object, about: str) -> str:
    line, about = one_line(text), one_line(about)
    return line if about in line else f"{about}: {line}"


class _Lines(logging.Handler):
    """The log as lines on stderr, which name what they are `about` at that moment."""

    def __init__(self, about: Callable[[], str]) -> None:
        super().__init__()
        self.about = about

    def emit(self, record: logging.LogRecord) -> None:
        note(f"edgemuse: {_named(record.getMessage(), self.about())}")


def show_log(verbose: bool, about: Callable[[], str] = str) -> None:
    """Show warnings of edgemuse on stderr, and with `verbose` what it does; `about` names the scan it is about."""
    logger = logging.getLogger("edgemuse")
    logger.handlers = [_Lines(about)]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False  # a library that sets up the root logger would say every line again
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong with a header, edgemuse says


class Screen:
    """Tells people how far a run over `total` scans is. Of a single scan only the results are told."""

    def __init__(self, total: int, debug: bool) -> None:
        self.total, self.debug = total, debug
        self._started, self._begun, self._handled = time.perf_counter(), 0, 0
        self._waiting = False

    def guard(self, work: Callable[[], None], job: Job) -> int:
        """Run `work`; what it raises becomes a line, which names the scan if there are several, and the exit code."""
        return guard(work, self.debug, str(job.scan) if self.total > 1 else "")

    @contextmanager
    def scan(self, job: Job) -> Iterator[Callable[[int, int], None]]:
        """A bar of tiles where stderr is a terminal, else a line when the network is done with the scan."""
        self._handled += 1
        number, left = f"{self._handled}/{self.total} " if self.total > 1 else "", self._left()
        with progress(f"{number}{job.scan.name}{left and f' ({left})'}") as advance:
            start = time.perf_counter()
            yield advance
        self._begun += 1
        if not watched():
            self._line(job, time.perf_counter() - start)

    def elsewhere(self, job: Job, seconds: float | None) -> None:
        """A worker on some machine has done it in `seconds`; None: it could not."""
        self._handled += 1
        if seconds is not None:
            self._begun += 1
            self._line(job, seconds)

    def _line(self, job: Job, seconds: float) -> None:
        if self.total > 1:
            left = self._left()
            self._say(f"{self._handled}/{self.total} {job.scan}: {_duration(seconds)}{left and f', {left}'}")

    def _left(self) -> str:
        rest = self.total - self._handled
        if not self._begun or not rest:
            return ""
        return f"about {_duration((time.perf_counter() - self._started) / self._begun * rest)} left"

    def skipped(self, job: Job) -> None:
        """It is done already."""
        self._handled += 1
        self._say(f"{job.scan}: done already, skipped; --overwrite does it again")

    def passed_over(self, job: Job, why: LabelMapError) -> None:
        """It was found in a folder and is no scan."""
        self._say(f"passed over: {why}")

    def waiting(self, count: int) -> None:
        """Other processes work on the `count` scans that are left."""
        if not self._waiting:
            self._say(f"waiting for {count} scan{'s' * (count > 1)} that other processes work on")
        self._waiting = True

    def written(self, paths: list[Path]) -> None:
        """The paths of the results, on stdout."""
        say_paths(paths)

    def summary(self, counts: Counts) -> None:
        """How many scans came to what."""
        if self.total > 1:
            rows = [
                (counts.segmented, "segmented"),
                (counts.skipped, "done before"),
                (counts.passed_over, "passed over"),
                (len(counts.codes), "failed"),
            ]
            said = ", ".join(f"{count} {what}" for count, what in rows if count)
            self._say(f"{self.total} scans: {said}; {_duration(time.perf_counter() - self._started)}")

    def _say(self, line: str) -> None:
        note(f"edgemuse: {one_line(line)}")


def _duration(seconds: float) -> str:
    """Seconds as text such as `4.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
