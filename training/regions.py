"""The MUSE regions as classes of a network: numbers, names, sides, and which of them look alike in T1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.regions.muse import CORTICAL_CSF, Region, regions
from edgemuse.training.labelmaps import LARGEST
from edgemuse.training.synthesis import Tissues

ABSENT = (42, 43, 63, 64)
"""Classes of DLMUSE's network that its maps do not hold: cerebral exterior and vessel."""
LOOSE = (
    0, 1, 4, 11, 46, 49, 50, 51, 52, 69, 84, 85, 89, 90, 108, 109, 120, 121, 136, 137, 190, 191, 192, 193, 196, 197,
    204, 205,
)  # fmt: skip
"""Regions that are in several pieces in DLMUSE's own maps, for one: fluid, thin horns and tracts, winding gyri."""
FLUIDS = (1, 4, 11, 46, 49, 50, 51, 52)
WHITE_MATTER = (*range(81, 89), *range(91, 96))
"""Lobes, internal capsule and corpus callosum: no border between them can be seen."""
CEREBELLUM = (38, 39, 71, 72, 73)
FIRST_GYRUS = 100

MEANS = {
    0: 0.0, 1: 0.25, 4: 0.24, 11: 0.24, 30: 0.76, 32: 0.71, 35: 0.94, 37: 0.78, 39: 0.72, 41: 0.97, 48: 0.72,
    50: 0.28, 52: 0.22, 56: 0.96, 58: 0.84, 60: 0.89, 62: 0.94, 69: 0.85, 75: 0.80, 82: 1.0, 90: 0.95, 101: 0.70,
}  # fmt: skip
"""Mean intensity in T1, white matter = 1, as in `synthesis`, of the region that stands for its family."""


def _used() -> list[Region]:
    rows = (row for row in regions() if row.number is not None or row.index == CORTICAL_CSF)
    return sorted((row for row in rows if row.index not in ABSENT), key=lambda row: row.index)


INDICES = tuple(region.index for region in _used())
"""MUSE's number of each class; class 0 is the background."""


def class_labels() -> tuple[Label, ...]:
    """The label table: background and 148 regions."""
    return tuple(
        Label(number, region.index, region.name if number else "background", region.color, region.index not in LOOSE)
        for number, region in enumerate(_used())
    )


def class_table() -> NDArray[np.uint8]:
    """(1024,): the class of each number; 0 for what is no region."""
    table = np.zeros(LARGEST + 1, np.uint8)
    table[list(INDICES)] = np.arange(len(INDICES))
    return table


def pairs() -> dict[int, int]:
    """The numbers of the regions that have two sides, left to right."""
    numbers = {region.name: region.index for region in _used()}
    sides = ((name.removeprefix("Left "), index) for name, index in numbers.items() if name.startswith("Left "))
    return {index: numbers[f"Right {name}"] for name, index in sides}


def mirror_table() -> NDArray[np.int16]:
    """(1024,): the number that each number turns into when left and right change places."""
    table = np.arange(LARGEST + 1, dtype=np.int16)
    for left, right in pairs().items():
        table[left], table[right] = right, left
    return table


def tissues() -> Tissues:
    """What the regions are painted as: gyri alike, white matter alike, fluid around the brain as in its clefts."""
    family = np.arange(LARGEST + 1)
    for left, right in pairs().items():
        family[right] = left
    family[[index for index in INDICES if index >= FIRST_GYRUS]] = 101
    family[list(WHITE_MATTER)] = 82
    family[list(CEREBELLUM)] = 39
    family[46] = CORTICAL_CSF
    solid = tuple(index for index in MEANS if index and index not in FLUIDS)
    return Tissues(MEANS, family, tuple(index for index in FLUIDS if index in MEANS), solid, CORTICAL_CSF)
