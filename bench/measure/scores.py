"""Scores of one system over all scans of a report, from the report's rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

import numpy as np

from edgemuse.bench.measure.accuracy import Score, Volumes, volume_agreement
from edgemuse.bench.measure.rows import Row
from edgemuse.bench.measure.systems import baseline, parse_system
from edgemuse.engines.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """How a system's label maps compare with others, scan by scan."""

    scans: tuple[tuple[Score, ...], ...]
    agreement: float
    absent: int

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        """The scores of all scans together."""
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
        """Mean Dice over the structures."""
        return fmean(self.structures.values())

    @property
    def hd95(self) -> float | None:
        """Mean distance over structures and scans in mm; None if no structure is in both maps."""
        values = [score.hd95_mm for score in self.scores if score.hd95_mm is not None]
        return fmean(values) if values else None

    @property
    def one_sided(self) -> int:
        """How many structures only one of the maps has; their Dice is 0, and they have no distance."""
        return sum(score.hd95_mm is None for score in self.scores)

    @cached_property
    def volumes(self) -> Volumes:
        """Agreement of volumes over all structures and scans together."""
        return volume_agreement([x.found_mm3 for x in self.scores], [x.truth_mm3 for x in self.scores])

    @cached_property
    def volumes_by_structure(self) -> Volumes | None:
        """Median agreement of volumes over the structures with three scans or more; None if there are none."""
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


def baseline_of(rows: Sequence[Row]) -> str:
    """Name the system that the others are compared with; raises InputError if nothing was measured."""
    names = dict.fromkeys(row["system"] for row in rows if row["kind"] == "run")
    if not names:
        raise InputError("there is no measurement in the report; run 'edgemuse bench' with more --systems")
    return baseline([parse_system(name) for name in names]).name


def accuracy(rows: Sequence[Row], name: str, against: str) -> Accuracy | None:
    """Return a system's scores against `truth` or the system `against`; None if there are none.

    If a scan was scored twice because its truth or the mapping changed, the later scores count.
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
