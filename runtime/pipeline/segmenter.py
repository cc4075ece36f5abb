"""Segmenting with one network: what happens between a file and its labels, one named step after the other."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BundleError
from edgemuse.engines.fallback import open_with_fallback
from edgemuse.engines.hardware import cpu_cores
from edgemuse.engines.protocol import Engine, EngineOptions
from edgemuse.engines.registry import open_engine
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.model.precision import NOT_MEASURED, choose_engine, stored_precision, verdict
from edgemuse.runtime.model.selftest import trusted
from edgemuse.runtime.network.half_sums import HalfSums
from edgemuse.runtime.network.head import class_dtype, label_blocks
from edgemuse.runtime.network.memory import MemoryPlan, check_memory, memory_limit, plan_memory
from edgemuse.runtime.network.preprocess import Prepared, preprocess
from edgemuse.runtime.network.profiles import PROFILES
from edgemuse.runtime.network.resample import output_matrices
from edgemuse.runtime.network.tiles import (
    MOST_VALUES,
    TilePlan,
    largest_tiles,
    merge_tiles,
    mirrored,
    plan_tiles,
)
from edgemuse.runtime.pipeline.loading import Loaded, load
from edgemuse.runtime.pipeline.options import Options, Planned, Progress
from edgemuse.runtime.pipeline.record import Run, Setup, provenance
from edgemuse.runtime.pipeline.result import Pipeline, Segmentation, conclude
from edgemuse.runtime.pipeline.stopwatch import Stopwatch
from edgemuse.runtime.results.islands import remove_islands
from edgemuse.runtime.results.quality import Subject
from edgemuse.runtime.scan.geometry import orientation, shape_of
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Features, Labels, Shape

log = logging.getLogger("edgemuse")


class Segmenter(Pipeline[Loaded]):
    """A bundle and its engine."""

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self.bundle, self.options = bundle, options
        self._instead_of = ""
        self._checked = False
        self._choose(choose_engine(bundle, options.profile, options.engine))
        self.profile = PROFILES[options.profile]
        self.network = bundle.manifest.network
        self.head = bundle.head()
        self._engine: Engine | None = None
        self._tile: Shape | None = None

    @property
    def is_open(self) -> bool:
        """Whether the engine is open, and so takes memory."""
        return self._engine is not None

    @property
    def threads(self) -> int:
        """Processor cores to use for what runs beside the engine."""
        return self.options.threads or cpu_cores()

    def close(self) -> None:
        """Let go of the engine and its memory; it is opened again when it is needed."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def prepare(self, path: str | Path, room: float = math.inf) -> Loaded:
        """Everything before the network, in at most `room` bytes; may run beside `finish` of another scan."""
        loaded, image = load(path, self.plan, self.options.max_ram, room)
        scan = loaded.scan
        _warn_orientation(scan, self.network)
        with loaded.watch.stage("preprocess"):
            loaded.prepared = preprocess(image, scan.affine, scan.zooms, self.network)
        return loaded

    def finish(self, loaded: Loaded, progress: Progress, planned: Planned = lambda total, last: None) -> Segmentation:
        """The network and everything after it; `planned` hears of the memory before the network runs."""
        scan, shown, watch = loaded.scan, loaded.shown, loaded.watch
        run = self.run(scan, loaded.take(), watch, progress, planned)
        subject = Subject(shown, run.classes, self.bundle.labels, scan.affine, scan.zooms, self.network.spacing)
        return conclude(loaded, subject, self.threads, partial(self.provenance, loaded, run))

    def run(
        self,
        scan: Scan,
        prepared: Prepared,
        watch: Stopwatch,
        progress: Progress,
        planned: Planned,
        held: int = 0,
    ) -> Run:
        """From the network's input, made of `scan`, to classes on its grid. `held`: bytes taken by other things."""
        if not self._checked:
            with watch.stage("engine"):
                self._check(scan)
        plan, memory = self._tiles(scan, shape_of(prepared.image), held)
        planned(memory.total + held, True)
        with watch.stage("engine"):
            engine = self.engine(plan.patch)
        with watch.stage("infer"):
            classes = self._classes(engine, prepared, plan, progress)
        with watch.stage("restore"):
            restored = _restore(classes, prepared, self.network.classes)
        removed = 0
        if self.options.postprocess:
            with watch.stage("postprocess"):
                removed = remove_islands(restored, self.bundle.manifest.labels)
        return Run(restored, plan, engine, memory, removed)

    def plan(self, scan: Scan, tiles: TilePlan | None = None) -> MemoryPlan:
        """The memory that `scan` will take at most, with `tiles` or with patches."""
        graphs, files = self.bundle.manifest.graphs, self.bundle.manifest.files
        stored = {"fp32", stored_precision(self.chosen.precision)}
        graph_bytes = max(files[name].bytes for precision, name in graphs.items() if precision in stored)
        engine = (self.chosen.backend, self.chosen.precision)
        folds = 1 if self.head is None else self.head.folds
        sums = folds if self.profile.half_sums else 0
        return plan_memory(scan, self.network, graph_bytes, self.profile.mirror, tiles, engine, sums)

    def _tiles(self, scan: Scan, shape: Shape, held: int) -> tuple[TilePlan, MemoryPlan]:
        """The tiles for an image of `shape`, and the memory they take: patches, or the largest tiles that fit."""
        if not self.profile.large_tiles:
            return plan_tiles(shape, self.network.patch, self.profile.step), self.plan(scan)
        limit = memory_limit(self.options.max_ram) - held
        for tiles in largest_tiles(shape, self.network.patch, self.network.stride):
            memory = self.plan(scan, tiles)
            if memory.total <= limit and math.prod(tiles.patch) * self.network.channels_out <= MOST_VALUES:
                break
        return tiles, memory

    def engine(self, tile: Shape) -> Engine:
        """The engine for tiles of shape `tile`, opened on first use."""
        if self._engine is None or self._tile != tile:
            self.close()
            self._tile = tile
            asked = (self.options.backend, self.options.device)
            spare = self._cpu if asked == ("auto", "auto") and self.chosen.device != "CPU" else None
            self._engine = open_with_fallback(partial(self._open, tile), self.chosen, spare)
            log.info(
                "engine: %s %s on %s, %s",
                self._engine.backend,
                self._engine.version,
                self._engine.device,
                self._engine.precision,
            )
        return self._engine

    def _choose(self, chosen: EngineOptions) -> None:
        """Use definite options for the engine."""
        self.chosen = chosen
        self.verdict = verdict(self.bundle, self.options.profile, chosen)
        _warn_accuracy(self.bundle.name, self.options.profile, chosen.precision, self.verdict)

    def _trust(self, asked: EngineOptions) -> EngineOptions:
        """Choose an engine again if the one chosen computes wrongly here; raises BackendError if nothing takes over."""
        chosen, reason = trusted(self.bundle, self.options.profile, asked)
        self._instead_of = "; ".join(filter(None, (self._instead_of, reason)))
        if chosen != self.chosen:
            self._choose(chosen)
        return chosen

    def _check(self, scan: Scan) -> None:
        """Before the first scan: the engine must be right, and what takes its place fit in memory as it did."""
        before = self.chosen
        if self._trust(self.options.engine) != before:
            check_memory(scan, self.plan(scan), self.options.max_ram)
        self._checked = True

    def _open(self, tile: Shape, options: EngineOptions) -> Engine:
        return open_engine(self.bundle.graph(stored_precision(options.precision)), (1, 1, *tile), options)

    def _cpu(self, reason: str) -> EngineOptions:
        """What takes over, for this scan and all later ones, from a GPU that failed."""
        self._instead_of = reason
        return self._trust(replace(self.options.engine, device="CPU"))

    def _classes(self, engine: Engine, prepared: Prepared, plan: TilePlan, progress: Progress) -> Labels:
        infer = mirrored(partial(self._infer, engine), self.network.mirror_axes if self.profile.mirror else ())
        done = iter(range(1, plan.count + 1))
        half, network = self.profile.half_sums, self.network
        new_sums = partial(HalfSums, head=self.head, threads=self.threads) if half else None
        matrices = output_matrices(
            plan.shape, network.spacing, prepared.box_shape, prepared.spacing, network.output_resampling
        )
        blocks = merge_tiles(
            prepared.image,
            plan,
            infer,
            lambda: progress(next(done), plan.count),
            self.threads,
            new_sums,
            slabs=any(matrix is not None for matrix in matrices),
        )
        head = None if half else self.head
        return label_blocks(blocks, head, network.classes, matrices, prepared.box_shape, self.threads, half)

    def _infer(self, engine: Engine, tile: NDArray[np.float32]) -> Features:
        features = engine.infer(tile[None, None])
        expected = (1, self.network.channels_out, *tile.shape)
        if features.shape != expected:
            raise BundleError(
                f"{self.bundle.path}: the graph returns {features.shape}, its manifest says {expected}; export it again"
            )
        return np.ascontiguousarray(np.moveaxis(features[0], 0, -1))

    def provenance(self, loaded: Loaded, run: Run) -> dict[str, Any]:
        """How `run` was made of the scan that was loaded."""
        mirrored_axes = self.network.mirror_axes if self.profile.mirror else ()
        setup = Setup(self.bundle, self.options, mirrored_axes, self.verdict, self._instead_of)
        return provenance(loaded.scan, loaded.sha256, run, setup, loaded.watch.seconds)


def _warn_accuracy(name: str, profile: str, precision: str, gate: str) -> None:
    """fp32 needs no proof, but may fail: tiles of another size have another normalisation."""
    if gate == "passed" or (precision == "fp32" and gate == NOT_MEASURED):
        return
    log.warning(
        "the accuracy of %s with the profile %s is not proven for %s and this backend: %s; 'edgemuse info' shows "
        "what passed, 'edgemuse calibrate' measures",
        precision,
        profile,
        name,
        gate,
    )


def _warn_orientation(scan: Scan, network: Network) -> None:
    if network.orientation is None:
        log.warning(
            "%s is stored %s and the bundle does not say what its network was trained on; if that differs, the labels "
            "are wrong: export the model again with --orientation",
            scan.path,
            orientation(scan.affine),
        )


def _restore(classes: Labels, prepared: Prepared, count: int) -> Labels:
    """Paste the crop's classes into the whole grid, background elsewhere, and turn it back to (i, j, k)."""
    whole = np.zeros(prepared.grid_shape, class_dtype(count))
    whole[prepared.box] = classes
    return prepared.reorientation.undo(whole)
