"""How time and memory grow with the scan's resolution, the classes, the threads and the number of scans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgemuse.bench.measure import scans as copies
from edgemuse.bench.measure.rows import Results, Row
from edgemuse.bench.measure.run import Progress, Step, Subject, outcome, run_step
from edgemuse.bench.measure.systems import System
from edgemuse.calibration.scans import Source
from edgemuse.engines.hardware import cpu_cores
from edgemuse.export.writer import HEAD, head_bytes, write_bundle
from edgemuse.runtime.model.bundle import Bundle, Head, file_entry, open_bundle
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.nifti import file_sha256

SPACINGS = (2.0, 1.5, 1.0, 0.7)
CLASSES = (2, 33, 152)
SCANS = (1, 8, 32)
AXES = {
    "spacing": "voxel size, mm",
    "classes": "classes (random heads)",
    "threads": "threads",
    "scans": "scans in one process",
}


@dataclass(frozen=True)
class Point:
    """A point of a curve: what is varied, its value, and what is run."""

    axis: str
    value: float
    subject: Subject
    scans: tuple[Source, ...]


def scale(subject: Subject, system: System, results: Results, work: Path, say: Callable[[str], None]) -> None:
    """Measure the points that `results` does not hold; each is warm, after a run on one scan that does not count."""
    missing = [point for point in points(subject, work) if results.find(**_key(point, system)) is None]
    progress = Progress(len(missing), say)
    for point in missing:
        for scans in (point.scans[:1], point.scans):
            row = run_step(Step(system, scans, 1, batch=True), point.subject, work, work / "engines")
        results.add(**_key(point, system), **row)
        progress.done(f"{AXES[point.axis]}: {point.value:g}: {outcome(row)}")


def _key(point: Point, system: System) -> Row:
    return {"kind": "scaling", "system": system.name, "axis": point.axis, "value": point.value}


def points(subject: Subject, work: Path) -> Iterator[Point]:
    """Make every point of every curve, with its scans and bundles in `work`."""
    scan = subject.scans[0]
    for mm in SPACINGS:
        path = work / f"{mm:g}mm" / scan.path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        yield Point("spacing", mm, subject, (_source(copies.resampled(scan.path, path, (mm, mm, mm))),))
    if isinstance(subject.model, Bundle):
        for classes in CLASSES:
            bundle = with_classes(subject.model, classes, work / f"{classes}.bundle")
            yield Point("classes", classes, replace(subject, model=bundle), (scan,))
    for threads in range(1, cpu_cores() + 1):
        yield Point("threads", threads, replace(subject, threads=threads), (scan,))
    for count in SCANS:
        yield Point("scans", count, subject, _copied(scan, count, work / f"{count}scans"))


def _copied(scan: Source, count: int, folder: Path) -> tuple[Source, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [folder / f"{number:02}_{scan.path.name}" for number in range(count)]
    return tuple(replace(scan, path=Path(shutil.copy(scan.path, name))) for name in names)


def _source(path: Path) -> Source:
    return Source(path, file_sha256(path), None)


def with_classes(bundle: Bundle, classes: int, path: Path) -> Bundle:
    """Copy the bundle with a head of random weights for another number of classes."""
    manifest, features = bundle.manifest, bundle.manifest.network.channels_out
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (classes, features)).astype(np.float32)
    files = {name: bundle.read(name) for name in manifest.files if name != HEAD}
    files[HEAD] = head_bytes(Head(weight, np.zeros(classes, np.float32)))
    changed = replace(
        manifest,
        network=replace(manifest.network, classes=classes, deferred_head=True),
        labels=tuple(Label(n, n, f"class {n}") for n in range(classes)),
        files={name: file_entry(data) for name, data in files.items()},
    )
    return open_bundle(write_bundle(path, changed, files))


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (value, seconds, bytes) of every curve, in order of value."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if row["kind"] == "scaling" and not row["failed"]:
            found.setdefault(row["axis"], []).append((row["value"], row["seconds"], row["peak_bytes"]))
    return {axis: sorted(measured) for axis, measured in found.items()}
