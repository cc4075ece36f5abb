"""Label maps by their content: a file that holds what a segmentation gave is not to be segmented again as a scan."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import LabelMapError
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Image

INTENTS = {1002: "NIFTI_INTENT_LABEL", 1003: "NIFTI_INTENT_NEURONAME"}
SLICES = 5
"""In the middle along k, which are looked at. Of 161 T1 scans and their label maps they tell all apart."""
ENOUGH = 500
"""Voxels that are not background; fewer do not tell anything."""
MOST_VALUES = 512
"""Label maps of up to 152 structures had at most 130 values in those slices."""
FEW_VALUES = 16
"""No scan has so few."""
EQUAL, CLEARLY_EQUAL = 0.45, 0.75
"""Share of neighbours with equal values. Of label maps it is 0.47 (at 4 mm) to 0.99, of scans at most 0.24. Scans on a
finer grid than they were made on come to 0.4."""
SMALL_STEP, SMALL_STEPS = 3, 0.5
"""Where neighbours differ, they differ in such scans by little: more often than this by at most so much. Neighbouring
structures have other numbers, except for FreeSurfer's cortex and white matter."""


def refuse_label_map(scan: Scan, image: Image) -> None:
    """Raise LabelMapError if `image` (i, j, k), read from `scan`, holds labels and not intensities."""
    intent = INTENTS.get(int(scan.header["intent_code"]))
    slab = _middle(image)
    if intent and _are_whole(slab):
        why = f"its header says {intent}; if that is wrong, set intent_code to 0"
    elif are_labels(slab):
        why = f"patches of {np.unique(slab).size} whole numbers; give the scan that it was made of"
    else:
        return
    raise LabelMapError(f"{scan.path}: a label map and no T1 scan: {why}")


def are_labels(slab: NDArray[Any]) -> bool:
    """Whether (i, j, k) values are those of a label map: whole numbers, few of them, each in patches.

    Looked at is the upper half of what is not background, because air may hold but a few small numbers in scans, too.
    """
    slab = _unrepeated(slab)
    here = slab[:-1, :-1]
    inside = here != _commonest(slab[::3, ::3])
    if np.count_nonzero(inside) < ENOUGH:
        return False
    inside &= here >= np.median(here[inside])
    steps = np.concatenate([np.abs(there - here)[inside] for there in (slab[1:, :-1], slab[:-1, 1:])])
    changes = steps[steps > 0]
    equal = 1 - changes.size / steps.size
    if equal < EQUAL or not _are_whole(slab):
        return False
    count = np.unique(slab).size
    smooth = np.count_nonzero(changes <= SMALL_STEP) > SMALL_STEPS * changes.size
    return count <= FEW_VALUES or (count <= MOST_VALUES and (equal >= CLEARLY_EQUAL or not smooth))


def _middle(image: Image) -> Image:
    start = max(image.shape[2] - SLICES, 0) // 2
    return image[:, :, start : start + SLICES]


def _unrepeated(slab: NDArray[Any]) -> NDArray[Any]:
    """`slab` without rows that equal the row before, as a scan has them on a finer grid than it was made on."""
    for axis in (0, 1):
        rows = np.moveaxis(slab, axis, 0)
        new = np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=(1, 2))])
        slab = np.compress(new, slab, axis)
    return slab


def _are_whole(values: NDArray[Any]) -> bool:
    return bool(np.array_equal(values, np.rint(values)))


def _commonest(values: NDArray[Any]) -> float:
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])
