"""Label tables: what the network's classes are called, numbered and coloured, and how much of each there is."""

from __future__ import annotations

import colorsys
import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import printable
from edgemuse.runtime.scan.geometry import in_memory_order
from edgemuse.runtime.scan.types import Labels

COLOR = re.compile("#[0-9a-fA-F]{6}")
FORMULA = tuple("=+-@＝＋－＠")
"""How a cell begins that a spreadsheet computes when the table is opened."""
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Label:
    """One class of the network.

    Attributes:
        number: in the network.
        index: in the protocol (FreeSurfer, MUSE).
        name: of the structure.
        color: `#rrggbb`.
        single: whether the structure is in one piece, so that islands of it are errors.
    """

    number: int
    index: int
    name: str
    color: str | None = None
    single: bool = False


def parse_label_table(text: str) -> tuple[Label, ...]:
    """Read a table with the columns class, index, name and optionally color and single (yes, no).

    Columns are separated by tabs or commas. Returns the rows in order of class; raises ValueError naming the line that
    is off.
    """
    lines = text.lstrip("\ufeff").splitlines()
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    missing = {"class", "index", "name"} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(
            f"the first line must name the columns class, index, name; {', '.join(sorted(missing))} missing"
        )
    labels = [_row(row, reader.line_num) for row in reader]
    labels.sort(key=lambda label: label.number)
    if [label.number for label in labels] != list(range(len(labels))):
        raise ValueError(f"classes must be 0 to {len(labels) - 1}, each once")
    return tuple(labels)


def _row(row: dict[str, str], line: int) -> Label:
    try:
        number, index = int(row["class"]), int(row["index"])
    except (TypeError, ValueError):
        raise ValueError(f"line {line}: class and index must be whole numbers") from None
    if not 0 <= index < 1 << 32 or not row["name"]:
        raise ValueError(f"line {line}: index must be 0 to {2**32 - 1} and name not empty")
    color = row.get("color") or None
    if color and not COLOR.fullmatch(color):
        raise ValueError(f"line {line}: color {color!r} is not #rrggbb")
    single = (row.get("single") or "no").lower()
    if single not in ("yes", "no"):
        raise ValueError(f"line {line}: single must be yes or no, found {single!r}")
    return Label(number, index, row["name"], color, single == "yes")


def label_color(label: Label) -> str:
    """`#rrggbb`: the table's colour, black for index 0, else a hue that differs from its neighbours'."""
    if label.color:
        return label.color
    if label.index == 0:
        return "#000000"
    hue = label.index * 0.618033988749895 % 1.0
    rgb = colorsys.hsv_to_rgb(hue, 0.55 + 0.3 * (label.index % 2), 0.95)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def to_indices(classes: Labels, labels: Sequence[Label]) -> Labels:
    """Class numbers to the protocol's label numbers, in the smallest unsigned type that holds them all."""
    highest = max(label.index for label in labels)
    table = np.array([label.index for label in labels], dtype=np.min_scalar_type(highest))
    return table[classes]


def by_index(labels: Sequence[Label]) -> list[Label]:
    """One label an index, in order of index: classes that share an index are one structure."""
    return list(
        {label.index: label for label in sorted(labels, key=lambda label: (label.index, -label.number))}.values()
    )


def dseg_tsv(labels: Sequence[Label]) -> str:
    """BIDS's description of a discrete segmentation: index, name, color."""
    return table("\t", ["index", "name", "color"], [[x.index, x.name, label_color(x)] for x in by_index(labels)])


def count_voxels(classes: Labels, labels: Sequence[Label]) -> NDArray[np.int64]:
    """Voxels of each class, (C,)."""
    counts = np.zeros(len(labels), np.int64)
    for plane in in_memory_order(classes)[0]:  # bincount makes a copy of eight bytes a voxel
        counts += np.bincount(plane.ravel(), minlength=len(labels))
    return counts


def structure_voxels(counts: NDArray[np.int64], labels: Sequence[Label]) -> dict[int, int]:
    """Voxels of every structure but background by its index, absent ones included as 0."""
    totals = {label.index: 0 for label in by_index(labels)}
    for label in labels:
        totals[label.index] += int(counts[label.number])
    return {index: voxels for index, voxels in totals.items() if index}


def table(delimiter: str, header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """The text of a table, a line a row; no cell is one that a spreadsheet would run."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in (header, *rows))
    return out.getvalue()


def _cell(value: object) -> object:
    """`value`, and text that begins as a formula with an apostrophe before it. Line breaks and tabs are written out."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text
