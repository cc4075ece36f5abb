"""Segmenting with a cascade: a mask network on the whole scan, a region network on what is inside the mask."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgemuse.engines.errors import InputError
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.network.memory import MemoryPlan, check_memory, memory_limit
from edgemuse.runtime.network.preprocess import Box, preprocess
from edgemuse.runtime.pipeline.crop import (
    Mask,
    fill,
    masked_crop,
    padded_box,
    paste,
    turn_to,
    turned_affine,
)
from edgemuse.runtime.pipeline.loading import Loaded, load
from edgemuse.runtime.pipeline.options import Options, Planned, Progress
from edgemuse.runtime.pipeline.record import Run
from edgemuse.runtime.pipeline.result import Pipeline, Segmentation, conclude
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.results.islands import largest_component
from edgemuse.runtime.results.quality import Subject
from edgemuse.runtime.scan.geometry import Reorientation, shape_of, voxel_mm3
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Affine, Image, Labels, Shape, Spacing

log = logging.getLogger("edgemuse")

HEAD_MM = 240.0
"""The most that a padded box around an adult's intracranial volume measures; planned for before the mask is known."""
PER_STAGE = ("model", "backend", "profile", "postprocess")
"""Parts of the provenance that are recorded for each stage."""
IN_MASK, IN_REGIONS = "mask ", "regions "
"""Prefixes of the names of what is timed, for the two networks."""


@dataclass(frozen=True)
class Turned:
    """A scan's voxels on the cascade's grid: (i, j, k) intensities, their affine and mm along each axis."""

    image: Image
    affine: Affine
    zooms: Spacing


@dataclass(frozen=True)
class Crop:
    """What the second network gets of a scan: of `turned` the part at `box`, in `image` 0 outside the mask.

    `turn`: from the scan's own grid to that of `turned`.
    """

    turn: Reorientation
    turned: Turned
    box: Box
    image: Image


@dataclass
class LoadedTurned(Loaded):
    """A scan that waits for the first network, `prepared` for it; `turned`: as the second will need it."""

    turned: Turned


class CascadeSegmenter(Pipeline[LoadedTurned]):
    """A cascade and its two engines."""

    def __init__(self, cascade: Cascade, options: Options) -> None:
        self.cascade, self.options = cascade, options
        self.mask, self.regions = Segmenter(cascade.mask, options), Segmenter(cascade.regions, options)

    def close(self) -> None:
        """Let go of both engines and their memory."""
        self.mask.close()
        self.regions.close()

    def prepare(self, path: str | Path, room: float = math.inf) -> LoadedTurned:
        """Everything before the first network, in at most `room` bytes; may run beside `finish` of another scan."""
        loaded, image = load(path, self.plan, self.options.max_ram, room)
        scan = loaded.scan
        turn = turn_to(scan.affine, self.cascade.manifest.orientation)
        turned = Turned(turn.apply(image), turned_affine(scan.affine, scan.shape, turn), turn.spacing(scan.zooms))
        with loaded.watch.within(IN_MASK).stage("preprocess"):
            loaded.prepared = preprocess(turned.image, turned.affine, turned.zooms, self.mask.network)
        return LoadedTurned(**vars(loaded), turned=turned)

    def finish(
        self, loaded: LoadedTurned, progress: Progress, planned: Planned = lambda total, last: None
    ) -> Segmentation:
        """Both networks and everything after them; `planned` hears of the memory before each runs."""
        scan, memory = loaded.scan, loaded.memory
        with self._room(self.mask, scan, memory):
            kept = self.regions.plan(scan).engine if self.regions.is_open else 0
            first, mask = self._find_mask(loaded, progress, lambda total, _: planned(total + kept, False))
        with self._room(self.regions, scan, memory):
            kept = self.mask.plan(scan).engine if self.mask.is_open else 0
            progress = _after(first.plan.count, progress)
            second, box, classes = self._label(loaded, mask, progress, lambda total, last: planned(total + kept, last))
        turn = turn_to(scan.affine, self.cascade.manifest.orientation)
        subject = self._subject(loaded, turn.undo(classes), turn.undo(mask))
        record = partial(self._record, loaded, first, second, mask, box)
        return conclude(loaded, subject, self.regions.threads, record)

    def _subject(self, loaded: Loaded, classes: Labels, inside: Mask) -> Subject:
        scan, labels, spacing = loaded.scan, self.cascade.labels, self.regions.network.spacing
        plausible = self.cascade.manifest.plausible_mm3
        return Subject(loaded.shown, classes, labels, scan.affine, scan.zooms, spacing, inside, plausible)

    def crop(self, path: str | Path) -> Crop:
        """What the second network gets of the NIfTI file at `path`. Raises a child of EdgemuseError."""
        loaded = self.prepare(path)
        with self._room(self.mask, loaded.scan, loaded.memory):
            _, mask = self._find_mask(loaded, lambda done, total: None, lambda total, last: None)
        box, image = self._crop(loaded.scan, loaded.turned, mask)
        turn = turn_to(loaded.scan.affine, self.cascade.manifest.orientation)
        return Crop(turn, loaded.turned, box, image)

    def plan(self, scan: Scan, crop: Shape | None = None) -> MemoryPlan:
        """The memory that `scan` will take at most, if what is inside the mask has the shape `crop` (None: a head)."""
        i, j, k = (min(size, math.ceil(HEAD_MM / zoom)) for size, zoom in zip(scan.shape, scan.zooms, strict=True))
        mask, regions = self.mask.plan(scan), self.regions.plan(replace(scan, shape=crop or (i, j, k)))
        return MemoryPlan(
            engine=max(mask.engine, regions.engine),
            scan=mask.scan + self._held(scan),
            preprocessing=max(mask.preprocessing, regions.preprocessing),
            features=max(mask.features, regions.features),
        )

    def _find_mask(self, loaded: LoadedTurned, progress: Progress, planned: Planned) -> tuple[Run, Mask]:
        scan, watch, held = loaded.scan, loaded.watch.within(IN_MASK), self._held(loaded.scan)
        run = self.mask.run(scan, loaded.take(), watch, lambda done, total: progress(done, 2 * total), planned, held)
        outside = np.array([label.index == 0 for label in self.mask.bundle.labels])
        mask: Mask = ~outside[run.classes]
        if self.cascade.manifest.keep_largest:
            mask = largest_component(mask)
        if not mask.any():
            raise InputError(
                f"{scan.path}: {self.mask.bundle.name} found no brain; look at the scan and its orientation"
            )
        return run, mask

    def _label(self, loaded: LoadedTurned, mask: Mask, progress: Progress, planned: Planned) -> tuple[Run, Box, Labels]:
        scan, turned, watch = loaded.scan, loaded.turned, loaded.watch.within(IN_REGIONS)
        with watch.stage("crop"):
            box, crop = self._crop(scan, turned, mask)
        check_memory(scan, self.plan(scan, shape_of(crop)), self.options.max_ram)
        cropped = replace(scan, shape=shape_of(crop))
        with watch.stage("preprocess"):
            prepared = preprocess(crop, turned.affine, turned.zooms, self.regions.network)
            del crop
        held = self._held(scan) + self.mask.plan(scan).scan
        run = self.regions.run(cropped, prepared, watch, progress, planned, held)
        with watch.stage("paste"):
            classes = paste(run.classes, box, shape_of(turned.image))
            if self.cascade.manifest.fill is not None:
                classes = fill(classes, mask, self.regions.bundle.labels, self.cascade.manifest.fill.number)
        return run, box, classes

    def _crop(self, scan: Scan, turned: Turned, mask: Mask) -> tuple[Box, Image]:
        box = padded_box(mask, self.cascade.manifest.padding_percent)
        crop = masked_crop(turned.image, mask, box)
        if not crop.any():
            raise InputError(f"{scan.path}: every voxel inside the mask is 0, so there is nothing to segment")
        return box, crop

    def _held(self, scan: Scan) -> int:
        """Bytes that stay for the second stage and for the way back: the scan, the mask, and its classes."""
        return 6 * math.prod(scan.shape)

    @contextlib.contextmanager
    def _room(self, stage: Segmenter, scan: Scan, memory: MemoryPlan) -> Iterator[None]:
        """Close the engine of `stage` afterwards, unless both fit into the memory at once.

        Large tiles take what memory there is, and each scan's differ.
        """
        smaller = min(self.mask.plan(scan).engine, self.regions.plan(scan).engine)
        try:
            yield
        finally:
            if stage.profile.large_tiles or memory.total + smaller > memory_limit(self.options.max_ram):
                stage.close()

    def _record(self, loaded: Loaded, first: Run, second: Run, mask: Mask, box: Box) -> dict[str, Any]:
        """The provenance: of the whole, and under `stages` what differs between them."""
        records = {"mask": self.mask.provenance(loaded, first), "regions": self.regions.provenance(loaded, second)}
        stages = {role: {key: record[key] for key in PER_STAGE} for role, record in records.items()}
        common = {key: value for key, value in records["regions"].items() if key not in PER_STAGE}
        common["memory"]["planned_bytes"] = self._planned_bytes(loaded, first, second)
        return common | {
            "model": {"name": self.cascade.name, "sha256": self.cascade.sha256},
            "stages": stages,
            "mask": {
                "voxels": int(mask.sum()),
                "mm3": float(mask.sum() * voxel_mm3(loaded.scan.affine)),
                "crop": _sides(box),
            },
        }

    def _planned_bytes(self, loaded: Loaded, first: Run, second: Run) -> int:
        held = self._held(loaded.scan)
        kept = held + self.mask.plan(loaded.scan).scan
        return max(loaded.memory.total, first.memory.total + held, second.memory.total + kept)


def _after(tiles: int, progress: Progress) -> Progress:
    return lambda done, total: progress(tiles + done, tiles + total)


def _sides(box: Box) -> list[list[int]]:
    return [[side.start, side.stop] for side in box]
