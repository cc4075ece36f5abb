"""The MUSE regions: DLMUSE's classes, their numbers, names and colours, and the regions that are sums of others.

`data/muse.tsv` is the one source: index, class of the network, name, parts (the indices summed up) and colour. Rows
with parts are the columns of DLMUSE's volume table, in its order.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgemuse.runtime.regions.labels import Label

TABLE = Path(__file__).parents[1] / "data" / "muse.tsv"
CORTICAL_CSF = 1
"""Index of what lies inside the ICV mask and got no label."""
ICV = 702


@dataclass(frozen=True)
class Region:
    """One row of the table.

    Attributes:
        index: in MUSE.
        number: class of the network; None for sums and for cortical CSF.
        name: for people.
        parts: indices that are summed up; a region's own if it is one of the network's; empty if it is not reported.
        color: `#rrggbb`; None for sums.
    """

    index: int
    number: int | None
    name: str
    parts: tuple[int, ...]
    color: str | None


@cache
def regions() -> tuple[Region, ...]:
    """Every row of the table, in its order."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_region(row) for row in csv.DictReader(file, delimiter="\t"))


def _region(row: dict[str, str]) -> Region:
    return Region(
        int(row["index"]),
        int(row["class"]) if row["class"] else None,
        row["name"],
        tuple(map(int, row["parts"].split())),
        row["color"] or None,
    )


@cache
def muse_labels() -> tuple[Label, ...]:
    """The label table of DLMUSE's network, in order of class."""
    rows = [
        Label(region.number, region.index, region.name, region.color)
        for region in regions()
        if region.number is not None
    ]
    return tuple(sorted(rows, key=lambda label: label.number))


def cortical_csf(number: int) -> Label:
    """The label of what a cascade fills in, as class `number`."""
    region = next(region for region in regions() if region.index == CORTICAL_CSF)
    return Label(number, region.index, region.name, region.color)


def is_muse(labels: Sequence[Label]) -> bool:
    """Whether `labels` are those of DLMUSE's network with cortical CSF filled in: then the sums have a meaning."""
    numbered = {(label.number, label.index) for label in (*muse_labels(), cortical_csf(len(muse_labels())))}
    return {(label.number, label.index) for label in labels} == numbered


def region_voxels(voxels: Mapping[int, int]) -> dict[int, int]:
    """Voxels of every reported region, sums included, in the table's order, from those of each index."""
    return {region.index: sum(voxels.get(part, 0) for part in region.parts) for region in regions() if region.parts}
