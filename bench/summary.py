"""From rows to what a report says of each system: times, ratios, scores, and what does not hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

import numpy as np

from edgemuse.bench.accuracy import Score, Volumes, volume_agreement
from edgemuse.bench.rows import Row
from edgemuse.bench.systems import baseline, parse_system
from edgemuse.calibration.gate import LARGEST_DROP, SMALLEST_AGREEMENT, TRUTH_SHARE, TRUTH_SHARE_DEFAULT
from edgemuse.engines.errors import InputError

STRUCTURE_AGREEMENT = 0.8
"""Dice with the baseline's own labels below which a structure is not the same one."""
SHIFT = 0.5
"""Voxels by which a structure's centre may lie off the baseline's: rounding scatters, an error of geometry shifts."""
ALL_SHOWN = 5


@dataclass(frozen=True)
class Spread:
    """Median, tenth and ninetieth percentile, and of how many."""

    median: float
    p10: float
    p90: float
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """The spread of `values`; None if there are none."""
    numbers = list(values)
    if not numbers:
        return None
    p10, p90 = np.percentile(numbers, [10, 90])
    return Spread(median(numbers), float(p10), float(p90), len(numbers))


@dataclass(frozen=True)
class Accuracy:
    """A system's label maps against others: the scores of all scans, one after the other."""

    scans: tuple[tuple[Score, ...], ...]
    agreement: float
    absent: int

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        """Of all scans."""
        return tuple(score for scan in self.scans for score in scan)

    @cached_property
    def structures(self) -> dict[str, float]:
        """Mean Dice of each structure over the scans in which either map has it."""
        return _means((score.name, score.dice) for score in self.scores)

    @cached_property
    def shifts(self) -> dict[str, float]:
        """Mean displacement of each structure in voxels."""
        return _means((score.name, score.shift_voxels) for score in self.scores)

    @property
    def dice(self) -> float:
        """Mean over structures of `structures`."""
        return fmean(self.structures.values())

    @property
    def hd95(self) -> float | None:
        """Mean over structures and scans, mm; None where no structure is in both maps."""
        values = [score.hd95_mm for score in self.scores if score.hd95_mm is not None]
        return fmean(values) if values else None

    @property
    def one_sided(self) -> int:
        """Structures that only one of the maps has: Dice 0, no distance."""
        return sum(score.hd95_mm is None for score in self.scores)

    @cached_property
    def volumes(self) -> Volumes:
        """Over all structures and scans together."""
        return volume_agreement([x.found_mm3 for x in self.scores], [x.truth_mm3 for x in self.scores])

    @cached_property
    def volumes_by_structure(self) -> Volumes | None:
        """Median over the structures that vary over three scans or more; None if there is none."""
        groups: dict[str, list[Score]] = defaultdict(list)
        for score in self.scores:
            groups[score.name].append(score)
        each = [volume_agreement([x.found_mm3 for x in g], [x.truth_mm3 for x in g]) for g in groups.values()]
        each = [volumes for volumes in each if not np.isnan(volumes.icc)]
        if not each:
            return None
        columns = ((v.pairs, v.pearson, v.icc, v.mean_absolute_mm3) for v in each)
        pairs, pearson, icc, difference = (median(column) for column in zip(*columns, strict=True))
        return Volumes(int(pairs), pearson, icc, difference)


def _means(pairs: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        if value is not None:
            groups[name].append(value)
    return {name: fmean(values) for name, values in groups.items()}


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


def baseline_of(rows: Sequence[Row]) -> str:
    """The system that the others are compared with; raises InputError where nothing was measured."""
    names = dict.fromkeys(row["system"] for row in rows if row["kind"] == "run")
    if not names:
        raise InputError("there is no measurement in the report; run 'edgemuse bench' with more --systems")
    return baseline([parse_system(name) for name in names]).name


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary a system, the baseline's first."""
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
    """Seconds of a system over those of another in the same round on the same scan, warm-ups left out."""
    times = {
        (row["system"], row["scan"], row["round"]): row["seconds"]
        for row in rows
        if row["kind"] == "run" and row["round"] and not row["failed"]
    }
    pairs = [(seconds, times.get((base, *key[1:]))) for key, seconds in times.items() if key[0] == name]
    return [seconds / other for seconds, other in pairs if other]


def accuracy(rows: Sequence[Row], name: str, against: str) -> Accuracy | None:
    """A system's scores against `truth` or the system `against`; None where none were made.

    Where a scan was scored twice because its truth or the mapping changed, the later scores count.
    """
    rows = [row for row in rows if row["kind"] == "accuracy" and row["system"] == name and row["against"] == against]
    found = {row["scan"]: row for row in rows if row["structures"]}.values()
    if not found:
        return None
    return Accuracy(
        tuple(tuple(Score(**fields) for fields in row["structures"]) for row in found),
        fmean(row["agreement"] for row in found),
        sum(row["absent_in_both"] for row in found),
    )


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
    """One line for the structures beyond the limit, worst first."""
    beyond = sorted((name for name, value in values.items() if value > limit), key=lambda name: -values[name])
    if beyond:
        names = ", ".join(f"{name} ({form.format(values[name])})" for name in beyond[:ALL_SHOWN])
        more = f" and {len(beyond) - ALL_SHOWN} more" if len(beyond) > ALL_SHOWN else ""
        yield f"{what}: {names}{more}"


def precision(name: str) -> str:
    """Of a system by its name; what does not say is fp32."""
    return name.split("/")[2] if name.startswith("edgemuse/") else "fp32"


def focus(summaries: Sequence[Summary]) -> Summary | None:
    """The system whose pictures are shown beside the baseline's: the fastest of ours that nothing speaks against."""
    others = [summary for summary in summaries[1:] if summary.seconds and summary.baseline]
    ours = [summary for summary in others if summary.system.startswith("edgemuse/")] or others
    return min(ours, key=lambda s: (bool(s.flags), s.seconds.median if s.seconds else 0.0), default=None)
