"""From a file to a scan that waits for the network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemuse.runtime.network.memory import MemoryPlan, check_memory
from edgemuse.runtime.network.preprocess import Prepared
from edgemuse.runtime.pipeline.stopwatch import Stopwatch
from edgemuse.runtime.results import picture
from edgemuse.runtime.scan.label_maps import refuse_label_map
from edgemuse.runtime.scan.nifti import Scan, file_sha256, open_scan, read_image
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
        sha256: of the file, as it was read.
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


def load(path: str | Path, plan: Callable[[Scan], MemoryPlan], max_ram: float | None) -> tuple[Loaded, Image]:
    """The scan at `path`, to be prepared, and its voxels; raises where it or the memory that it takes is refused."""
    watch = Stopwatch()
    with watch.stage("load"):
        scan = open_scan(path)
        memory = plan(scan)
        check_memory(scan, memory, max_ram)
        log.info("memory: %s", memory)
        image = read_image(scan)
        refuse_label_map(scan, image)
        return Loaded(scan, memory, picture.to_bytes(image), None, watch, file_sha256(scan.path)), image
