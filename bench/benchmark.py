"""`edgemuse bench run` from its request to its report."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemuse.bench.measure import mlperf
from edgemuse.bench.measure.accuracy import Structure, compare_files, read_labels, read_mapping, same_protocol
from edgemuse.bench.measure.footprint import footprint
from edgemuse.bench.measure.rows import Results, context
from edgemuse.bench.measure.run import Subject, label_path, measure_all, scans_in, schedule, source_of
from edgemuse.bench.measure.scaling import scale
from edgemuse.bench.measure.scores import baseline_of
from edgemuse.bench.measure.systems import System, all_systems, parse_system, quick, select
from edgemuse.bench.report.report import write_report
from edgemuse.bench.report.summary import focus, summarise
from edgemuse.calibration.scans import Source
from edgemuse.engines.errors import InputError, OutputError
from edgemuse.runtime.model.builtin import SAMPLE_SCAN
from edgemuse.runtime.model.cascade import open_model
from edgemuse.runtime.model.store import find_model
from edgemuse.runtime.scan.nifti import file_sha256, scan_stem


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None stands for a default. `command` is the line as it was typed."""

    bundle: Path | None
    output: Path
    data: Path | None
    reference: Path | None
    systems: tuple[str, ...]
    repeats: int
    threads: int | None
    mapping: Path | None
    quick: bool
    scaling: bool
    mlperf: bool
    command: str


def benchmark(request: Request, say: Callable[[str], None]) -> Path:
    """Measure what the report in `request` does not hold yet, and write the report; returns its main file."""
    if request.mlperf:
        mlperf.require_loadgen()
    model = open_model(find_model(request.bundle))
    model.verify()
    reference = source_of(model, request.reference) if request.reference else None
    scans = scans_in(request.data or SAMPLE_SCAN.parent)
    if request.quick:
        scans = (min(scans, key=lambda scan: scan.truth is None),)
    subject = Subject(model, reference, scans, request.threads)
    systems = _systems(request, subject)
    structures = same_protocol(model.labels)
    mapped = read_mapping(request.mapping, model.labels) if request.mapping else structures
    _check_truth(subject.scans, mapped)
    results = Results(request.output, context(request.threads, model.sha256))
    _check_unchanged(results, subject.scans)
    say(f"{len(systems)} systems on {len(subject.scans)} scans: {', '.join(system.name for system in systems)}")
    measure_all(subject, schedule(systems, subject.scans, request.repeats, not request.quick), results, say)
    for system in systems:
        if results.find(kind="installed", system=system.name) is None:
            results.add(kind="installed", system=system.name, bytes=footprint(system.name))
    score_all(subject, results, structures, mapped, say)
    if request.scaling:
        with tempfile.TemporaryDirectory(prefix="edgemuse-scaling-") as work:
            scale(subject, _scaled(systems), results, Path(work), say)
    if request.mlperf:
        summaries = summarise(results.rows)
        system = parse_system((focus(summaries) or summaries[0]).system)
        say(f"MLPerf's scenarios: {system.name}")
        mlperf.measure(subject, system, mlperf.judge_of(subject, results, structures, mapped), results)
    return write_report(request.output, results.rows, subject.scans, request.command)


def _systems(request: Request, subject: Subject) -> list[System]:
    systems = all_systems(subject.model, subject.reference is not None)
    if request.systems:
        return select(systems, request.systems)
    return quick(systems) if request.quick else systems


def _scaled(systems: Sequence[System]) -> System:
    """The system whose curves are drawn: the first of ours."""
    return next((system for system in systems if system.family == "edgemuse"), systems[0])


def _check_truth(scans: Sequence[Source], table: Sequence[Structure]) -> None:
    """Raise InputError, before anything is measured, for a truth that none of the model's structures is in."""
    known = {number for structure in table for number in structure.truth}
    for scan in scans:
        if scan.truth is not None and known.isdisjoint(np.unique(read_labels(scan.truth)[0]).tolist()):
            raise InputError(
                f"{scan.truth}: none of the model's structures is in it; if it has another protocol, say which labels "
                "correspond with --mapping"
            )


def _check_unchanged(results: Results, scans: Sequence[Source]) -> None:
    """Raise OutputError if the report holds measurements on another scan of the same name."""
    for scan in scans:
        row = results.find(kind="run", scan=scan_stem(scan.path))
        if row is not None and row["scan_sha256"] != [scan.sha256]:
            raise OutputError(f"{results.folder} was made with another {scan.path.name}; choose another folder")


def score_all(
    subject: Subject,
    results: Results,
    structures: Sequence[Structure],
    mapped: Sequence[Structure],
    say: Callable[[str], None],
) -> None:
    """Compare every label map with the truth, through `mapped`, and with the baseline's."""
    base = baseline_of(results.rows)
    names = dict.fromkeys(row["system"] for row in results.rows if row["kind"] == "run")
    for scan, name in itertools.product(subject.scans, names):
        found, theirs = (label_path(results.folder, system, scan.path) for system in (name, base))
        for against, other, table in (("truth", scan.truth, mapped), (base, theirs, structures)):
            if other is None or not (found.exists() and other.exists()):  # a system failed
                continue
            key = {
                "kind": "accuracy",
                "system": name,
                "scan": scan_stem(scan.path),
                "found_sha256": file_sha256(found),
                "against": against,
                "against_sha256": file_sha256(other),
                "mapping": [structure.name for structure in table],
            }
            if results.find(**key) is None:
                say(f"scoring {name}  {scan_stem(scan.path)}  against {against}")
                results.add(**key, **compare_files(found, other, table).fields())
