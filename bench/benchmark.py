"""The whole benchmark: what to measure, the measuring, the scores, the report."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemuse.bench.accuracy import Comparison, Structure, compare_files, read_mapping, same_protocol
from edgemuse.bench.footprint import footprint
from edgemuse.bench.report import write_report
from edgemuse.bench.rows import Results, context
from edgemuse.bench.run import (
    Subject,
    find_scans,
    folder_sha256,
    label_path,
    measure_all,
    schedule,
    truth_of,
)
from edgemuse.bench.scaling import scale
from edgemuse.bench.systems import System, all_systems, baseline, quick, select
from edgemuse.engines.errors import InputError
from edgemuse.runtime.builtin import BUILT_IN, SAMPLE_SCAN
from edgemuse.runtime.bundle import Cascade, open_model
from edgemuse.runtime.scan import file_sha256, scan_stem


@dataclass(frozen=True)
class Request:
    """What the command line asks for, None where its default is meant, and how it was typed."""

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
    command: str


def benchmark(request: Request, say: Callable[[str], None]) -> Path:
    """Measure what `request` asks for, as far as its report does not hold it yet; returns the report's main file."""
    model = open_model(request.bundle or BUILT_IN)
    model.verify()
    if request.reference and isinstance(model, Cascade):
        raise InputError(f"{model.path} is a cascade, which nnU-Net's predictor cannot run; leave --reference out")
    scans = find_scans(request.data) if request.data else (SAMPLE_SCAN,)
    subject = Subject(model, request.reference, scans[:1] if request.quick else scans, request.threads)
    systems = _systems(request, subject)
    structures = same_protocol(model.labels)
    mapped = read_mapping(request.mapping, model.labels) if request.mapping else structures
    hashes = (model.sha256, folder_sha256(request.reference) if request.reference else None)
    results = Results(request.output, context(request.threads, *hashes))
    say(f"{len(systems)} systems on {len(subject.scans)} scans: {', '.join(system.name for system in systems)}")
    measure_all(subject, schedule(systems, subject.scans, request.repeats, not request.quick), results, say)
    for system in systems:
        if results.find(kind="installed", system=system.name) is None:
            results.add(kind="installed", system=system.name, bytes=footprint(system.name))
    score_all(subject, systems, results, structures, mapped, say)
    if request.scaling:
        with tempfile.TemporaryDirectory(prefix="edgemuse-scaling-") as work:
            scale(subject, _scaled(systems), results, Path(work), say)
    return write_report(request.output, results.rows, subject.scans, request.command)


def _systems(request: Request, subject: Subject) -> list[System]:
    systems = all_systems(subject.model, subject.reference is not None)
    if request.systems:
        return select(systems, request.systems)
    return quick(systems) if request.quick else systems


def _scaled(systems: Sequence[System]) -> System:
    """The system whose curves are drawn: the first of ours."""
    return next((system for system in systems if system.family == "edgemuse"), systems[0])


def score_all(
    subject: Subject,
    systems: Sequence[System],
    results: Results,
    structures: Sequence[Structure],
    mapped: Sequence[Structure],
    say: Callable[[str], None],
) -> None:
    """Compare every label map with the truth, through `mapped`, and with the baseline's."""
    base = baseline(systems)
    for scan, system in itertools.product(subject.scans, systems):
        found = label_path(results.folder, system.name, scan)
        if not found.exists():  # the system failed
            continue
        for against, other, table in _others(results.folder, scan, base, structures, mapped):
            key = {
                "kind": "accuracy",
                "system": system.name,
                "scan": scan_stem(scan),
                "found_sha256": file_sha256(found),
                "against": against,
                "against_sha256": file_sha256(other),
                "mapping": [structure.name for structure in table],
            }
            if results.find(**key) is None:
                say(f"scoring {system.name}  {scan_stem(scan)}  against the {against}")
                results.add(**key, baseline=base.name, **_compare(found, other, table).fields())


def _others(
    report: Path, scan: Path, base: System, structures: Sequence[Structure], mapped: Sequence[Structure]
) -> Iterable[tuple[str, Path, Sequence[Structure]]]:
    truth, labels = truth_of(scan), label_path(report, base.name, scan)
    if truth is not None:
        yield "truth", truth, mapped
    if labels.exists():
        yield "baseline", labels, structures


def _compare(found: Path, other: Path, table: Sequence[Structure]) -> Comparison:
    comparison = compare_files(found, other, table)
    if not comparison.scores:
        raise InputError(
            f"{other}: none of the model's structures is in it, nor in the result; if it has another protocol, "
            "say which labels correspond with --mapping"
        )
    return comparison
