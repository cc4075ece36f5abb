"""The result for one scan, and what every segmenter does to come to it."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgemuse.runtime.network.memory import MemoryPlan
from edgemuse.runtime.pipeline.loading import Loaded
from edgemuse.runtime.pipeline.options import Options, Planned, Progress
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.results import quality
from edgemuse.runtime.results.quality import Flag, Subject
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Labels

log = logging.getLogger("edgemuse")

L = TypeVar("L", bound=Loaded)
P = TypeVar("P", bound="Pipeline[Any]")


@dataclass(frozen=True)
class Segmentation:
    """The result for one scan, on its grid.

    Attributes:
        scan: what was segmented.
        shown: (i, j, k) its intensities as grey values, for pictures.
        classes: (i, j, k) class numbers.
        labels: of the classes.
        flags: why the result should be looked at before it is used.
        seconds: of each stage.
        provenance: how it was made.
    """

    scan: Scan
    shown: NDArray[np.uint8]
    classes: Labels
    labels: tuple[Label, ...]
    flags: tuple[Flag, ...]
    seconds: dict[str, float]
    provenance: dict[str, Any]


class Pipeline(ABC, Generic[L]):
    """A model and its engines, ready for any number of scans. Use it as a context manager."""

    options: Options

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def segment(self, path: str | Path, progress: Progress = lambda done, total: None) -> Segmentation:
        """Segment the NIfTI file at `path`; `progress` hears of every tile. Raises a child of EdgemuseError."""
        return self.finish(self.prepare(path), progress)

    @abstractmethod
    def plan(self, scan: Scan) -> MemoryPlan:
        """The memory that `scan` will take at most."""

    @abstractmethod
    def prepare(self, path: str | Path, room: float = math.inf) -> L:
        """Everything before the first network, in at most `room` bytes; may run beside `finish` of another scan."""

    @abstractmethod
    def finish(self, loaded: L, progress: Progress, planned: Planned = lambda total, last: None) -> Segmentation:
        """All networks and everything after them; `planned` hears of the memory before each runs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the engines and their memory; they are opened again when they are needed."""


def conclude(loaded: Loaded, subject: Subject, threads: int, provenance: Callable[[], dict[str, Any]]) -> Segmentation:
    """Look for signs of trouble in the labels of `subject`, say so in the log, and put the result together.

    Args:
        loaded: the scan that was segmented.
        subject: its labels.
        threads: processor cores to use.
        provenance: called when everything else is done.
    """
    with loaded.watch.stage("quality"):
        flags = quality.assess(subject, threads)
    if flags:
        log.warning("%s: look at this result: %s", loaded.scan.path, quality.summary(flags))
    record = provenance() | quality.record(flags)
    return Segmentation(
        loaded.scan, loaded.shown, subject.classes, tuple(subject.labels), flags, loaded.watch.seconds, record
    )
