"""MLPerf's way of measuring: run its scenarios through its load generator, and score its accuracy log.

Its 3D-UNet benchmark asks for 99 % or 99.9 % of the reference's mean Dice.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemuse.bench.measure.accuracy import Structure, compare_files
from edgemuse.bench.measure.process import ProcessFailure
from edgemuse.bench.measure.rows import Results, Row
from edgemuse.bench.measure.run import OUTPUT, Step, Subject, label_path, on_the_scans_grid, run_process
from edgemuse.bench.measure.scores import Accuracy, accuracy, baseline_of
from edgemuse.bench.measure.systems import System
from edgemuse.calibration.scans import Source
from edgemuse.engines.errors import BackendError

LOADGEN = "edgemuse.bench.measure.loadgen"
SCENARIOS = ("SingleStream", "Offline")
LOGS = "mlperf"
ACCURACY_LOG = Path("AccuracyOnly", "mlperf_log_accuracy.json")
SHARES = (0.99, 0.999)
"""MLPerf's two levels of accuracy, as shares of the reference's mean Dice."""


@dataclass(frozen=True)
class Judge:
    """What the label maps of an accuracy log are compared with.

    Attributes:
        against: `truth` if any scan has one, else the baseline's name.
        others: a label map for each scan that is scored.
        table: which labels correspond.
    """

    against: str
    others: dict[Source, Path]
    table: Sequence[Structure]


def require_loadgen() -> None:
    """Raise BackendError if LoadGen is not installed."""
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise BackendError("--mlperf needs MLPerf's load generator; run: pip install mlcommons-loadgen")


def measure(subject: Subject, system: System, judge: Judge, results: Results) -> None:
    """Run `system` through LoadGen, unless `results` holds that; the logs stay beside the report."""
    key = {"kind": "mlperf", "system": system.name, "scan_sha256": [scan.sha256 for scan in subject.scans]}
    if results.find(**key, against=judge.against) is None:
        with tempfile.TemporaryDirectory(prefix="edgemuse-mlperf-") as work:
            for row in _rows(subject, system, judge, Path(work), results.folder):
                results.add(**key, against=judge.against, **row)


def _rows(subject: Subject, system: System, judge: Judge, work: Path, report: Path) -> list[Row]:
    """Run `system` and return a row for each scenario."""
    try:
        _, found = run_process(LOADGEN, Step(system, subject.scans, 1, batch=True), subject, work, work / "engines")
    except ProcessFailure as failure:
        return [{"scenario": scenario, "failed": True, "error": str(failure)} for scenario in SCENARIOS]
    rows = []
    for scenario in SCENARIOS:
        logs = report / LOGS / system.name.replace("/", "_") / scenario
        shutil.copytree(work / OUTPUT / scenario, logs, dirs_exist_ok=True)
        dice = logged_dice(logs / ACCURACY_LOG, system, subject, judge, work)
        rows.append({"scenario": scenario, "failed": False, "dice": dice, **found[scenario]})
    return rows


def logged_dice(log: Path, system: System, subject: Subject, judge: Judge, work: Path) -> float:
    """Mean Dice of the label maps in an accuracy log; raises BackendError unless every scan is in it once."""
    entries = json.loads(log.read_text())
    if sorted(entry["qsl_idx"] for entry in entries) != list(range(len(subject.scans))):
        raise BackendError(f"{log}: expected every scan once; LoadGen asked for others")
    scores = []
    for entry in entries:
        scan = subject.scans[entry["qsl_idx"]]
        if scan not in judge.others:
            continue
        made = work / "logged.nii.gz"
        made.write_bytes(bytes.fromhex(entry["data"]))
        if system.family == "nnunet":
            made.write_bytes(on_the_scans_grid(made, scan.path, subject.model.labels))
        scores.append(compare_files(made, judge.others[scan], judge.table).scores)
    return Accuracy(tuple(scores), 1.0, 0).dice


def judge_of(subject: Subject, results: Results, structures: Sequence[Structure], mapped: Sequence[Structure]) -> Judge:
    """Judge by the truth, through `mapped`, of the scans that have one; if none has, by the baseline's labels."""
    truths = {scan: scan.truth for scan in subject.scans if scan.truth is not None}
    if truths:
        return Judge("truth", truths, mapped)
    base = baseline_of(results.rows)
    paths = {scan: label_path(results.folder, base, scan.path) for scan in subject.scans}
    return Judge(base, {scan: path for scan, path in paths.items() if path.exists()}, structures)


@dataclass(frozen=True)
class Scenario:
    """What LoadGen found of a system in a scenario.

    Attributes:
        system: its name.
        scenario: SingleStream or Offline.
        result: 90th percentile of seconds a scan, or scans a second.
        queries: scans that were asked for.
        dice: mean, of the accuracy log.
        share: of the baseline's mean Dice.
        valid: whether LoadGen found the run long enough.
    """

    system: str
    scenario: str
    result: float
    queries: int
    dice: float
    share: float
    valid: bool


def scenarios(rows: Sequence[Row]) -> list[Scenario]:
    """Return what was measured through LoadGen."""
    found = []
    base = baseline_of(rows)
    for row in rows:
        reference = accuracy(rows, base, row["against"]) if row["kind"] == "mlperf" else None
        if reference is None or row["failed"]:
            continue
        share = row["dice"] / reference.dice if reference.dice else float("nan")
        values = (row["system"], row["scenario"], row["result"], row["queries"], row["dice"])
        found.append(Scenario(*values, share, row["valid"]))
    return found
