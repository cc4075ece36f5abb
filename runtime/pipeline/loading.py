"""From a file to a scan that waits for the network."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import InputError
from edgemuse.runtime.network.memory import MemoryPlan, check_memory
from edgemuse.runtime.network.preprocess import Prepared
from edgemuse.runtime.pipeline.stopwatch import Stopwatch
from edgemuse.runtime.results import picture
from edgemuse.runtime.scan.label_maps import refuse_label_map
from edgemuse.runtime.scan.nifti import Scan, read_image, reading
from edgemuse.runtime.scan.types import Image

log = logging.getLogger("edgemuse")


@dataclass
class Loaded:
    """A scan that waits for the network.

    Attributes:
        scan: where it comes from.
        memory: what it takes at most.
        shown: (i, j, k) its intensities as grey values.
        prepared: the network's input, from when it is prepared until it is taken.
        watch: the seconds so far.
        sha256: of the bytes that were read.
    """

    scan: Scan
    memory: MemoryPlan
    shown: NDArray[np.uint8]
    prepared: Prepared | None
    watch: Stopwatch
    sha256: str

    def take(self) -> Prepared:
        """The network's input, once: its memory is given back as soon as the network has run."""
        prepared, self.prepared = self.prepared, None
        assert prepared is not None
        return prepared


def load(
    path: str | Path, plan: Callable[[Scan], MemoryPlan], max_ram: float | None, room: float = math.inf
) -> tuple[Loaded, Image]:
    """The scan at `path`, to be prepared, and its voxels, all from one reading of the file.

    Raises a child of EdgemuseError where it is refused, or the memory that it takes: more than `max_ram` GiB in all,
    or more than `room` bytes before the network runs.
    """
    watch = Stopwatch()
    with watch.stage("load"), reading(path) as (scan, source):
        memory = plan(scan)
        check_memory(scan, memory, max_ram)
        if memory.ahead > room:
            raise InputError(f"{path}: a larger scan took its place since it was looked at; segment it again")
        log.info("memory: %s", memory)
        image, sha256 = read_image(scan, source)
        refuse_label_map(scan, image)
        return Loaded(scan, memory, picture.to_bytes(image), None, watch, sha256), image
