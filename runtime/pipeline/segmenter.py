"""One scan from file to files: the whole main path, one named step after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from edgemuse.engines.errors import BundleError
from edgemuse.engines.fallback import open_with_fallback
from edgemuse.engines.hardware import cpu_cores, machine, peak_memory
from edgemuse.engines.protocol import Engine, EngineOptions
from edgemuse.engines.registry import open_engine
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.model.precision import NOT_MEASURED, choose_engine, stored_precision, verdict
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
from edgemuse.runtime.regions.labels import Label, count_voxels, dseg_tsv, structure_voxels, to_indices
from edgemuse.runtime.regions.muse import is_muse
from edgemuse.runtime.regions.volumes import dlmuse_csv, volumes_tsv
from edgemuse.runtime.results import files as outputs
from edgemuse.runtime.results import picture, quality
from edgemuse.runtime.results.islands import remove_islands
from edgemuse.runtime.results.quality import Flag, Subject
from edgemuse.runtime.scan.geometry import orientation, shape_of, voxel_mm3
from edgemuse.runtime.scan.nifti import Scan, file_sha256, open_scan, read_image, scan_stem
from edgemuse.runtime.scan.types import Features, Image, Labels, Shape

log = logging.getLogger("edgemuse")

Progress = Callable[[int, int], None]
"""Told how many tiles of how many are done."""
Planned = Callable[[int, bool], None]
"""Told, before a network runs, the bytes that the process will take at most, and whether it is the scan's last."""


@dataclass(frozen=True)
class Options:
    """How to segment.

    `max_ram` is in GiB; None: nine tenths of what is free. `postprocess`: remove islands, if the bundle says of what.
    """

    profile: str = "reference"
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(cache_dir=default_cache_dir()))
    max_ram: float | None = None
    postprocess: bool = True


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


@dataclass(frozen=True)
class Run:
    """What one network gave.

    `classes`: (i, j, k) on the grid that was prepared; `removed`: voxels changed by removing islands.
    """

    classes: Labels
    plan: TilePlan
    engine: Engine
    memory: MemoryPlan
    removed: int


def default_cache_dir() -> Path:
    """Where compiled engines are kept: `EDGEMUSE_CACHE_DIR`, or the user's cache directory."""
    folder = os.environ.get("EDGEMUSE_CACHE_DIR")
    return Path(folder) if folder else Path(platformdirs.user_cache_dir("edgemuse", appauthor=False)) / "engines"


class Segmenter:
    """A bundle and its engine, ready for any number of scans. Use it as a context manager."""

    def __init__(self, bundle: Bundle, options: Options) -> None:
        self.bundle, self.options, self._asked = bundle, options, options.engine
        self._instead_of = ""
        self._choose(options.engine)
        self.profile = PROFILES[options.profile]
        self.network = bundle.manifest.network
        self.head = bundle.head()
        self._engine: Engine | None = None
        self._tile: Shape | None = None

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether the engine takes memory."""
        return self._engine is not None

    @property
    def threads(self) -> int:
        """Cores to use beside the engine."""
        return self.options.engine.threads or cpu_cores()

    def close(self) -> None:
        """Let go of the engine and its memory; it is opened again when it is needed."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def segment(self, path: str | Path, progress: Progress = lambda done, total: None) -> Segmentation:
        """Segment the NIfTI file at `path`; `progress` hears of every tile. Raises a child of EdgemuseError."""
        return self.finish(self.prepare(path), progress)

    def prepare(self, path: str | Path) -> Loaded:
        """Everything before the network; may run in a thread beside `finish` of another scan."""
        loaded, image = load(path, self.plan, self.options.max_ram)
        scan = loaded.scan
        _warn_orientation(scan, self.network)
        with loaded.watch.stage("preprocess"):
            loaded.prepared = preprocess(image, scan.affine, scan.zooms, self.network)
        return loaded

    def finish(self, loaded: Loaded, progress: Progress, planned: Planned = lambda total, last: None) -> Segmentation:
        """The network and everything after it; `planned` hears of the memory before the network runs."""
        scan, shown, watch = loaded.scan, loaded.shown, loaded.watch
        run = self.run(scan, loaded.take(), watch, progress, planned)
        with watch.stage("quality"):
            subject = Subject(shown, run.classes, self.bundle.labels, scan.affine, scan.zooms, self.network.spacing)
            flags = flagged(scan, subject, self.threads)
        provenance = self.provenance(scan, loaded.sha256, run, watch.seconds) | quality.record(flags)
        return Segmentation(scan, shown, run.classes, self.bundle.labels, flags, watch.seconds, provenance)

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
        graph_bytes = self.bundle.manifest.files[self.bundle.manifest.graphs["fp32"]].bytes
        engine = (self.options.engine.backend, self.options.engine.precision)
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
            chosen = self.options.engine
            replaceable = chosen.device != "CPU" and (self._asked.backend, self._asked.device) == ("auto", "auto")
            self._engine = open_with_fallback(partial(self._open, tile), chosen, self._cpu if replaceable else None)
            log.info(
                "engine: %s %s on %s, %s",
                self._engine.backend,
                self._engine.version,
                self._engine.device,
                self._engine.precision,
            )
        return self._engine

    def _choose(self, asked: EngineOptions) -> EngineOptions:
        """Make the options for the engine definite; raises BackendError or BundleError if there is no such engine."""
        chosen = choose_engine(self.bundle, self.options.profile, asked)
        self.options = replace(self.options, engine=chosen)
        self.verdict = verdict(self.bundle, self.options.profile, chosen)
        _warn_accuracy(self.bundle.name, self.options.profile, chosen.precision, self.verdict)
        return chosen

    def _open(self, tile: Shape, options: EngineOptions) -> Engine:
        return open_engine(self.bundle.graph(stored_precision(options.precision)), (1, 1, *tile), options)

    def _cpu(self, reason: str) -> EngineOptions:
        """What takes over, for this scan and all later ones, from a GPU that failed."""
        self._instead_of = reason
        return self._choose(replace(self._asked, device="CPU"))

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

    def provenance(self, scan: Scan, sha256: str, run: Run, seconds: dict[str, float]) -> dict[str, Any]:
        """How `run` was made of `scan`, a file of that hash, for people and for making it again."""
        plan, engine = run.plan, run.engine
        mirrored_axes = list(self.network.mirror_axes) if self.profile.mirror else []
        return {
            "edgemuse": version("edgemuse"),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "input": {
                "name": scan.path.name,
                "sha256": sha256,
                "shape": scan.shape,
                "mm": scan.zooms,
            },
            "model": {"name": self.bundle.manifest.name, "sha256": self.bundle.sha256},
            "asked": asked(replace(self.options, engine=self._asked)),
            "backend": {
                "name": engine.backend,
                "version": engine.version,
                "device": engine.device,
                "precision": engine.precision,
                "gate": self.verdict,
                "threads": self.options.engine.threads,
                "instead_of": self._instead_of,
            },
            "profile": {
                "name": self.options.profile,
                "tiles": plan.count,
                "tile": plan.patch,
                "mirrored_axes": mirrored_axes,
            },
            "postprocess": {"done": self.options.postprocess, "voxels_changed": run.removed},
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("numpy", "scipy", "nibabel")},
            "machine": machine(),
            "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
            "memory": {"planned_bytes": run.memory.total, "peak_bytes": peak_memory()},
        }


class Stopwatch:
    """Seconds of each stage, logged as they end; `prefix` stands before every name."""

    def __init__(self, prefix: str = "", seconds: dict[str, float] | None = None) -> None:
        self.prefix, self.seconds = prefix, {} if seconds is None else seconds

    def within(self, prefix: str) -> Stopwatch:
        """The same watch for stages whose names begin with `prefix`."""
        return Stopwatch(prefix, self.seconds)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`."""
        name, start = self.prefix + name, time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        log.info("%s: %.2f s", name, self.seconds[name])


def load(path: str | Path, plan: Callable[[Scan], MemoryPlan], max_ram: float | None) -> tuple[Loaded, Image]:
    """The scan at `path`, to be prepared, and its voxels; raises where it or the memory that it takes is refused."""
    watch = Stopwatch()
    with watch.stage("load"):
        scan = open_scan(path)
        memory = plan(scan)
        check_memory(scan, memory, max_ram)
        log.info("memory: %s", memory)
        image = read_image(scan)
        return Loaded(scan, memory, picture.to_bytes(image), None, watch, file_sha256(scan.path)), image


def flagged(scan: Scan, subject: Subject, threads: int) -> tuple[Flag, ...]:
    """Why the result for `scan` should be looked at; says so in the log as well."""
    flags = quality.assess(subject, threads)
    if flags:
        log.warning("%s: look at this result: %s", scan.path, quality.summary(flags))
    return flags


def asked(options: Options) -> dict[str, Any]:
    """What the user asked for that may change labels, for the provenance. Memory does where it decides the tiles."""
    large_tiles = PROFILES[options.profile].large_tiles
    return {
        "profile": options.profile,
        "backend": options.engine.backend,
        "device": options.engine.device,
        "precision": options.engine.precision,
        "postprocess": options.postprocess,
        "max_ram": options.max_ram if large_tiles else None,
    }


def write(
    segmentation: Segmentation,
    paths: Mapping[str, Path],
    with_picture: bool = True,
    notes: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the label map, its legend, the volumes, the provenance and a picture to `paths`.

    Args:
        segmentation: what to write.
        paths: by their name in `outputs.NAMES`.
        with_picture: whether to make one.
        notes: what the provenance says besides.

    Returns:
        The files written; older ones of a kind that is not written are removed. The provenance, which lists the hashes
        of the others, is placed first: where the process is killed halfway, it tells what is missing.
    """
    start = time.perf_counter()
    contents = _results(segmentation, with_picture)
    seconds = segmentation.provenance["seconds"] | {"write": round(time.perf_counter() - start, 4)}
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    provenance = {**(notes or {}), **segmentation.provenance, "seconds": seconds, "files": files}
    record = {outputs.PROVENANCE: (json.dumps(provenance, indent=2) + "\n").encode()}
    contents = record | contents
    gone = [paths[name] for name in outputs.NAMES if name not in contents]
    outputs.write_files({paths[name]: data for name, data in contents.items()}, gone)
    return [paths[name] for name in outputs.NAMES if name in contents]


def _results(segmentation: Segmentation, with_picture: bool) -> dict[str, bytes]:
    """All files but the provenance."""
    with ThreadPoolExecutor(1) as pool:  # the label map is compressed while the picture is drawn
        dseg = pool.submit(_label_map, segmentation)
        others = _tables_and_picture(segmentation, with_picture)
        return {"dseg.nii.gz": dseg.result(), **others}


def _label_map(segmentation: Segmentation) -> bytes:
    return outputs.nifti_bytes(to_indices(segmentation.classes, segmentation.labels), segmentation.scan)


def _tables_and_picture(segmentation: Segmentation, with_picture: bool) -> dict[str, bytes]:
    labels, scan = segmentation.labels, segmentation.scan
    voxels, mm3 = structure_voxels(count_voxels(segmentation.classes, labels), labels), voxel_mm3(scan.affine)
    contents = {
        "dseg.tsv": dseg_tsv(labels).encode(),
        "volumes.tsv": volumes_tsv(voxels, labels, mm3).encode(),
    }
    if is_muse(labels):
        contents[outputs.DLMUSE_CSV] = dlmuse_csv(scan_stem(scan.path), voxels, mm3).encode()
    if with_picture:
        found, litres = np.count_nonzero(list(voxels.values())), sum(voxels.values()) * mm3 / 1e6
        caption = f"{scan.path.name}   {segmentation.provenance['model']['name']}   {found} structures   {litres:.2f} l"
        names = [flag.name for flag in segmentation.flags]
        shown, classes = segmentation.shown, segmentation.classes
        contents["qc.png"] = picture.picture(shown, classes, scan.affine, labels, caption, names)
    return contents


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
