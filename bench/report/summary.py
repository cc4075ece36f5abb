"""Sum up the rows of each system: times, ratios, scores, and what speaks against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from edgemuse.bench.measure.rows import Row
from edgemuse.bench.measure.scores import Accuracy, accuracy, baseline_of
from edgemuse.calibration.gate import LARGEST_DROP, SMALLEST_AGREEMENT, TRUTH_SHARE, TRUTH_SHARE_DEFAULT

STRUCTURE_AGREEMENT = 0.8
"""Dice with the baseline's labels below which a structure counts as another one."""
SHIFT = 0.5
"""Voxels by which a structure's centre may lie off the baseline's: rounding scatters, an error of geometry shifts."""
ALL_SHOWN = 5


@dataclass(frozen=True)
class Spread:
    """Median, tenth and ninetieth percentile of `count` values."""

    median: float
    p10: float
    p90: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return the spread of `values`; None if there are none."""
    numbers = list(values)
    if not numbers:
        return None
    p10, p90 = np.percentile(numbers, [10, 90])
    return Spread(median(numbers), float(p10), float(p90), len(numbers))


@dataclass(frozen=True)
class Summary:
    """What was measured of one system.

    Attributes:
        system: its name.
        seconds: of whole processes on one scan, warm.
        cold: the same, the first time, with empty caches.
        ratio: of `seconds` to the baseline's, pair by pair of scan and round.
        stages: median seconds of each stage, warm.
        peak: highest memory of any of its runs, bytes.
        joules: median of a warm run.
        batch: seconds a scan, all scans in one process.
        installed: bytes of the packages it needs; 0 where that was not looked up.
        truth: its labels against the truth.
        baseline: its labels against the baseline's.
        errors: of runs that failed.
        flags: what does not hold, in words.
    """

    system: str
    seconds: Spread | None
    cold: Spread | None
    ratio: Spread | None
    stages: Mapping[str, float]
    peak: int
    joules: float | None
    batch: float | None
    installed: int
    truth: Accuracy | None
    baseline: Accuracy | None
    errors: tuple[str, ...]
    flags: tuple[str, ...]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Sum up each system, the baseline first."""
    base = baseline_of(rows)
    names = dict.fromkeys([base, *(row["system"] for row in rows if row["kind"] == "run")])
    reference = accuracy(rows, base, "truth")
    return [_summary(rows, name, base, reference) for name in names]


def _summary(rows: Sequence[Row], name: str, base: str, reference: Accuracy | None) -> Summary:
    mine = [row for row in rows if row["system"] == name and row["kind"] in ("run", "batch")]
    done = [row for row in mine if not row["failed"]]
    warm = [row for row in done if row["kind"] == "run" and row["round"]]
    joules = [row["joules"] for row in warm if row["joules"] is not None]
    batch = [row["seconds"] / len(row["scan_seconds"]) for row in done if row["kind"] == "batch"]
    truth, agreed = accuracy(rows, name, "truth"), accuracy(rows, name, base)
    errors = tuple(dict.fromkeys(f"{row['scan']}: {row['error']}" for row in mine if row["failed"]))
    return Summary(
        name,
        spread(row["seconds"] for row in warm),
        spread(row["seconds"] for row in done if row["kind"] == "run" and not row["round"]),
        spread(ratios(rows, name, base)),
        {stage: median(row["stages"].get(stage, 0.0) for row in warm) for stage in warm[0]["stages"]} if warm else {},
        max((row["peak_bytes"] for row in done), default=0),
        median(joules) if joules else None,
        median(batch) if batch else None,
        next((row["bytes"] for row in rows if row["kind"] == "installed" and row["system"] == name), 0),
        truth,
        agreed,
        errors,
        () if name == base else tuple(_flags(name, truth, reference, agreed)),
    )


def ratios(rows: Sequence[Row], name: str, base: str) -> list[float]:
    """Divide a system's seconds by those of `base` in the same round on the same scan, without warm-ups."""
    times = {
        (row["system"], row["scan"], row["round"]): row["seconds"]
        for row in rows
        if row["kind"] == "run" and row["round"] and not row["failed"]
    }
    pairs = [(seconds, times.get((base, *key[1:]))) for key, seconds in times.items() if key[0] == name]
    return [seconds / other for seconds, other in pairs if other]


def _flags(name: str, truth: Accuracy | None, reference: Accuracy | None, agreed: Accuracy | None) -> Iterable[str]:
    if truth is not None and reference is not None:
        kept = TRUTH_SHARE.get(precision(name), TRUTH_SHARE_DEFAULT)
        if truth.dice < kept * reference.dice:
            yield f"mean Dice {truth.dice:.4f} is below {kept:.1%} of the baseline's {reference.dice:.4f}"
        drops = {s: reference.structures[s] - truth.structures.get(s, 0.0) for s in reference.structures}
        yield from _listed(drops, LARGEST_DROP, "Dice lower than the baseline's by", "{:.3f}")
    if agreed is not None:
        if agreed.dice < SMALLEST_AGREEMENT:
            yield f"mean Dice with the baseline's labels is {agreed.dice:.4f}, asked is {SMALLEST_AGREEMENT}"
        apart = {s: 1 - value for s, value in agreed.structures.items()}
        yield from _listed(apart, 1 - STRUCTURE_AGREEMENT, "Dice with the baseline's labels lower than 1 by", "{:.3f}")
        yield from _listed(agreed.shifts, SHIFT, "displaced from the baseline's by", "{:.2f} voxels")


def _listed(values: Mapping[str, float], limit: float, what: str, form: str) -> Iterable[str]:
    """List the structures beyond the limit in one line, worst first."""
    beyond = sorted((name for name, value in values.items() if value > limit), key=lambda name: -values[name])
    if beyond:
        names = ", ".join(f"{name} ({form.format(values[name])})" for name in beyond[:ALL_SHOWN])
        more = f" and {len(beyond) - ALL_SHOWN} more" if len(beyond) > ALL_SHOWN else ""
        yield f"{what}: {names}{more}"


def precision(name: str) -> str:
    """Read the precision from a system's name; one that does not say is fp32."""
    return name.split("/")[2] if name.startswith("edgemuse/") else "fp32"


def focus(summaries: Sequence[Summary]) -> Summary | None:
    """Choose the system that is shown beside the baseline: the fastest of ours that is not flagged."""
    others = [summary for summary in summaries[1:] if summary.seconds and summary.baseline]
    ours = [summary for summary in others if summary.system.startswith("edgemuse/")] or others
    return min(ours, key=lambda s: (bool(s.flags), s.seconds.median if s.seconds else 0.0), default=None)
