"""Run every system on every scan, in turn; each run is a process of its own and gives a row."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import nibabel as nib
import numpy as np

from edgemuse.bench.measure import scans as copies
from edgemuse.bench.measure.plain import logits_graph
from edgemuse.bench.measure.process import ProcessFailure, Run, measure
from edgemuse.bench.measure.rows import Results, Row
from edgemuse.bench.measure.systems import System
from edgemuse.bench.measure.worker import Job
from edgemuse.calibration.scans import Source, find_scans
from edgemuse.engines.errors import InputError
from edgemuse.runtime.cli.options import LINEAR_ALGEBRA
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.regions.labels import Label, to_indices
from edgemuse.runtime.results.files import nifti_bytes, write_files
from edgemuse.runtime.scan.geometry import orientation
from edgemuse.runtime.scan.nifti import file_sha256, open_scan, scan_stem

LABELS = "labels"
CACHE = "cache"
"""Compiled engines, in the report's folder until it is whole: a run that goes on must not find them cold."""
OUTPUT = "output"
WORKER = "edgemuse.bench.measure.worker"


@dataclass(frozen=True)
class Checkpoints:
    """What a bundle was exported from: an nnU-Net model folder, its folds, and the checkpoint's name in each."""

    folder: Path
    folds: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Subject:
    """What is measured: a bundle or cascade, what it was exported from if that is known, and scans."""

    model: Bundle | Cascade
    reference: Checkpoints | None
    scans: tuple[Source, ...]
    threads: int | None


@dataclass(frozen=True)
class Step:
    """One process: a system on one scan, or on all of them (`batch`). Round 0 warms up with an empty cache."""

    system: System
    scans: tuple[Source, ...]
    round: int
    batch: bool = False

    @property
    def key(self) -> Row:
        """Return the fields that tell the step's row from all others."""
        return {
            "kind": "batch" if self.batch else "run",
            "system": self.system.name,
            "scan": " ".join(scan_stem(scan.path) for scan in self.scans),
            "scan_sha256": [scan.sha256 for scan in self.scans],
            "round": self.round,
        }

    @property
    def what(self) -> str:
        """Describe the step for people."""
        if self.batch:
            return f"{len(self.scans)} scans in one process"
        return f"{scan_stem(self.scans[0].path)}, {f'round {self.round}' if self.round else 'warm-up'}"


class Progress:
    """Says what is done and how long the rest will take, judged by the time that each took so far."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self._say, self._done, self._start = total, say, 0, time.perf_counter()

    def done(self, what: str) -> None:
        """Count one more as done and say so."""
        self._done += 1
        seconds = (time.perf_counter() - self._start) / self._done * (self.total - self._done)
        left = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
        self._say(f"[{self._done}/{self.total}] {what}; {left} left")


def scans_in(folder: Path) -> tuple[Source, ...]:
    """Find the scans in `folder`; `<stem>_dseg.nii.gz` beside one is its truth. Raises InputError."""
    sources = tuple(find_scans(folder))
    if not sources:
        raise InputError(f"{folder}: no scan (.nii.gz, .nii) in this folder")
    stems = [scan_stem(source.path) for source in sources]
    if len(set(stems)) < len(stems):
        raise InputError(f"{folder}: two scans have the same name but for _T1w; rename one")
    return sources


def source_of(model: Bundle | Cascade, folder: Path) -> Checkpoints:
    """Find the checkpoints in `folder` that `model` was exported from; raises InputError."""
    if isinstance(model, Cascade):
        raise InputError(f"{model.path} is a cascade, which nnU-Net's predictor cannot run; leave --reference out")
    digests = model.manifest.source.get("checkpoint_sha256")
    if not isinstance(digests, dict) or not digests:
        raise InputError(f"{model.path} does not say which checkpoints it was exported from; export it again")
    names = set()
    for fold, digest in digests.items():
        files = sorted((folder / f"fold_{fold}").glob("*.pth"))
        same = [path.name for path in files if file_sha256(path) == digest]
        if not same:
            raise InputError(f"{folder}: no checkpoint of fold {fold} is the one that {model.path} was exported from")
        names.add(same[0])
    return Checkpoints(folder, tuple(digests), min(names))


def schedule(systems: Sequence[System], scans: Sequence[Source], repeats: int, batch: bool) -> list[Step]:
    """Let the systems take turns, round after round, so that a slow spell of the machine slows all of them."""
    rounds = range(repeats + 1)
    steps = [Step(system, (scan,), n) for scan in scans for n in rounds for system in systems]
    return steps + [Step(system, tuple(scans), 1, batch=True) for system in systems if batch and len(scans) > 1]


def measure_all(subject: Subject, steps: Sequence[Step], results: Results, say: Callable[[str], None]) -> None:
    """Take the steps that `results` does not hold yet. A system that fails on a scan is not tried on it again."""
    missing = [step for step in steps if results.find(**step.key) is None]
    if len(missing) < len(steps):
        say(f"{len(steps) - len(missing)} of {len(steps)} measurements are there already")
    progress = Progress(len(missing), say)
    with tempfile.TemporaryDirectory(prefix="edgemuse-bench-") as work:
        for step in missing:
            key = step.key
            if results.find(system=key["system"], scan=key["scan"], round=0, failed=True):
                progress.done(f"{key['system']}, {step.what}: left out, its warm-up failed")
                continue
            row = results.add(**key, created=_now(), **_take(step, subject, Path(work), results.folder))
            progress.done(f"{key['system']}, {step.what}: {outcome(row)}")
    shutil.rmtree(results.folder / CACHE, ignore_errors=True)


def outcome(row: Row) -> str:
    """Describe a row in a few words: its time and memory, or why it failed."""
    return str(row["error"]) if row["failed"] else f"{row['seconds']:.2f} s, {row['peak_bytes'] / 1e9:.2f} GB"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _take(step: Step, subject: Subject, work: Path, report: Path) -> Row:
    """Run a step. Compiled engines and labels are kept from round 0 of a scan on, each system's apart."""
    caches = [report / CACHE / step.system.name / scan_stem(scan.path) for scan in step.scans]
    cache = report / CACHE / step.system.name / "batch" if step.batch else caches[0]
    if step.round == 0:
        shutil.rmtree(cache, ignore_errors=True)
    for scan, warm in zip(step.scans, caches, strict=True):
        if step.round and not warm.exists():  # it was taken away when the report was whole
            run_step(Step(step.system, (scan,), 0), subject, work, warm)
            warm.mkdir(parents=True, exist_ok=True)
        if step.batch:
            shutil.copytree(warm, cache, dirs_exist_ok=True)
    row = run_step(step, subject, work, cache)
    cache.mkdir(parents=True, exist_ok=True)  # even where the system keeps nothing, it is warm now
    if not row["failed"] and not step.batch:
        _keep(step, work / OUTPUT, subject.model.labels, report)
    return row


def run_step(step: Step, subject: Subject, work: Path, cache: Path) -> Row:
    """Run the step's process and return what it gave as fields of a row; label maps are in `work / OUTPUT`."""
    try:
        run, row = run_process(WORKER, step, subject, work, cache)
    except ProcessFailure as failure:
        return {"failed": True, "error": str(failure)}
    row["stages"]["rest"] = run.seconds - sum(row["stages"].values())
    return row | {"failed": False, "seconds": run.seconds, "peak_bytes": run.peak, "joules": run.joules}


def run_process(module: str, step: Step, subject: Subject, work: Path, cache: Path) -> tuple[Run, Row]:
    """Run `module` in a process of its own; returns how that went and what it wrote. Raises ProcessFailure."""
    output, result = work / OUTPUT, work / "result.json"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    nnunet, graph = step.system.family == "nnunet", work / f"{subject.model.sha256}.onnx"
    if step.system.family == "plain" and isinstance(subject.model, Bundle) and not graph.exists():
        graph.write_bytes(logits_graph(subject.model))
    scans = [_as_trained(scan, subject.model, work) if nnunet else scan.path for scan in step.scans]
    trained = subject.reference
    job = Job(
        step.system.name,
        str(subject.model.path.resolve()),
        (str(trained.folder.resolve()), trained.folds, trained.name) if trained else None,
        str(graph),
        [str(scan.resolve()) for scan in scans],
        str(output),
        subject.threads,
        time.perf_counter(),
    )
    command = [sys.executable, "-m", module, json.dumps(asdict(job)), str(result)]
    run = measure(command, _environment(step.system.family, subject, cache))
    return run, json.loads(result.read_text())


def _environment(family: str, subject: Subject, cache: Path) -> dict[str, str]:
    """Bind threads as `edgemuse segment` binds them for itself; PyTorch gets all threads that are allowed."""
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    if subject.threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", *LINEAR_ALGEBRA), str(subject.threads))
    if family != "nnunet":
        environment |= dict.fromkeys(LINEAR_ALGEBRA, "1")
    return environment


def _as_trained(scan: Source, model: Bundle | Cascade, work: Path) -> Path:
    """Return the scan in the network's orientation, because nnU-Net takes voxels as they are stored."""
    codes = model.manifest.network.orientation if isinstance(model, Bundle) else model.manifest.orientation
    if codes is None or orientation(open_scan(scan.path).affine) == codes:
        return scan.path
    target = work / "upright" / scan.sha256 / scan.path.name
    if not target.exists():
        target.parent.mkdir(parents=True)
        copies.reoriented(scan.path, target, codes)
    return target


def label_path(report: Path, system: str, scan: Path) -> Path:
    """Return where a report keeps a label map: it has the protocol's numbers, on the scan's grid."""
    return report / LABELS / system.replace("/", "_") / f"{scan_stem(scan)}_dseg.nii.gz"


def _keep(step: Step, output: Path, labels: Sequence[Label], report: Path) -> None:
    scan = step.scans[0].path
    made, target = output / f"{scan_stem(scan)}_dseg.nii.gz", label_path(report, step.system.name, scan)
    if step.round and target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    data = on_the_scans_grid(made, scan, labels) if step.system.family == "nnunet" else made.read_bytes()
    write_files({target: data})


def on_the_scans_grid(made: Path, scan: Path, labels: Sequence[Label]) -> bytes:
    """Turn nnU-Net's class numbers into a label map with the protocol's numbers in the scan's orientation."""
    given, stored = nib.load(made), open_scan(scan)
    back = nib.orientations.ornt_transform(nib.io_orientation(given.affine), nib.io_orientation(stored.affine))
    classes = nib.orientations.apply_orientation(np.asanyarray(given.dataobj), back)
    return nifti_bytes(to_indices(classes.astype(np.uint16), labels), stored)
