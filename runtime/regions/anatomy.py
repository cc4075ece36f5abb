"""What is known of the structures of a brain: which tissue each belongs to, and how large each is in adults.

`data/anatomy.tsv` is the one source, for FreeSurfer's and for MUSE's numbers. Its volumes are wide ranges around what
was measured on scans of healthy adults (`edgemuse.bench.pages.flags` writes them), so that a volume outside them is
more likely an error than a finding.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from edgemuse.runtime.regions.labels import Label

TABLE = Path(__file__).parents[1] / "data" / "anatomy.tsv"
WHOLE = 0
"""Index of the row for all structures together, without fluid outside the brain."""
ENOUGH = 10
"""So many labels must have the protocol's numbers and names before they are taken for that protocol's."""
SIDES = {"left", "right"}
Range: TypeAlias = tuple[float, float]
"""Least and largest volume, mm3."""


@dataclass(frozen=True)
class Structure:
    """One row of the table.

    Attributes:
        protocol: `FreeSurfer` or `MUSE`.
        index: in the protocol.
        name: in the protocol.
        tissue: `white` or `grey` in the cerebrum, `cerebellum`, `fluid` outside the brain, or empty.
        mm3: plausible volumes; None: any.
    """

    protocol: str
    index: int
    name: str
    tissue: str
    mm3: Range | None


@dataclass(frozen=True)
class Anatomy:
    """What is known of a model's labels: their structures by index, and the volume of the whole brain."""

    structures: Mapping[int, Structure]
    whole_mm3: Range | None

    def of(self, tissue: str, side: str = "") -> list[int]:
        """Indices of the structures of `tissue`, of those on the `left` or `right` `side` if one is given."""
        return [row.index for row in self.structures.values() if row.tissue == tissue and side in row.name.lower()]


def anatomy_of(labels: Sequence[Label]) -> Anatomy:
    """What is known of `labels`, by the protocol that most of them belong to; nothing where they are too few.

    A label belongs to a protocol if it has the index of one of its structures, is on the same side and shares a word
    of its name: `Left-Thalamus-Proper` is FreeSurfer's `left_thalamus`.
    """
    named = {label.index: _words(label.name) for label in labels}
    found = [row for row in read_table() if row.index in named and _alike(_words(row.name), named[row.index])]
    counts = Counter(row.protocol for row in found).most_common(1)
    if not counts or counts[0][1] < ENOUGH:
        return Anatomy({}, None)
    protocol = counts[0][0]
    (whole,) = (row for row in read_table() if (row.protocol, row.index) == (protocol, WHOLE))
    return Anatomy({row.index: row for row in found if row.protocol == protocol}, whole.mm3)


@cache
def read_table() -> tuple[Structure, ...]:
    """Every row of the table, in its order."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_structure(row) for row in csv.DictReader(file, delimiter="\t"))


def _structure(row: dict[str, str]) -> Structure:
    mm3 = (float(row["least_mm3"]), float(row["most_mm3"])) if row["least_mm3"] else None
    return Structure(row["protocol"], int(row["index"]), row["name"], row["tissue"], mm3)


def _words(name: str) -> set[str]:
    return set(re.split("[^a-z0-9]+", name.lower())) - {""}


def _alike(one: set[str], other: set[str]) -> bool:
    return one & SIDES == other & SIDES and bool((one & other) - SIDES)
