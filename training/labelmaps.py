"""The label maps that images are synthesised from: classes, sides, and how they are read.

SynthSeg's 20 training label maps (Billot et al., Medical Image Analysis 2023; Apache-2.0) carry FreeSurfer's numbers
inside the brain, 24 for all fluid around it, and numbers from 500 on for the tissues outside.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import InputError
from edgemuse.runtime.regions.labels import Label

LabelMap = NDArray[np.int16]
"""(d, h, w): inferior to superior, anterior to posterior, right to left, at 1 mm. That is an LPS grid's (k, j, i)."""

NAMES = {
    2: "cerebral_white_matter", 3: "cerebral_cortex", 4: "lateral_ventricle", 5: "inferior_lateral_ventricle",
    7: "cerebellum_white_matter", 8: "cerebellum_cortex", 10: "thalamus", 11: "caudate", 12: "putamen",
    13: "pallidum", 14: "3rd_ventricle", 15: "4th_ventricle", 16: "brain_stem", 17: "hippocampus", 18: "amygdala",
    24: "CSF", 26: "accumbens_area", 28: "ventral_DC",
}  # fmt: skip
"""FreeSurfer's number of the left-hand or unpaired structure."""
COLORS = {
    2: "f5f5f5", 3: "cd3e4e", 4: "781286", 5: "c43afa", 7: "dcf8a4", 8: "e69422", 10: "00760e", 11: "7abadc",
    12: "ec0db0", 13: "0c30ff", 14: "ccb68e", 15: "2acca4", 16: "779fb0", 17: "dcd814", 18: "67ffff", 24: "3c3c3c",
    26: "ffa500", 28: "a52a2a",
}  # fmt: skip
"""FreeSurfer's colours of the left-hand structures; the right-hand ones have the same, but for the white matter."""
RIGHT_WHITE_MATTER = "00e100"
MIDLINE = (14, 15, 16, 24)
THIN = (5, 44)
RIGHT = {2: 41, 3: 42, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54, 26: 58, 28: 60}
"""Left to right."""
LESIONS = {25: 2, 57: 41}
"""Lesions of the white matter count as white matter of their side."""
PLEXUS = {136: 163, 137: 164}
"""Choroid plexus of the lateral and of the inferior lateral ventricle, left to right: not FreeSurfer's numbers."""
INNER_PAIRS = {25: 57, 30: 62} | PLEXUS
"""Labels of the maps that are no class of their own, left to right."""
INDICES = (0, *sorted(NAMES), *sorted(RIGHT.values()))
"""FreeSurfer's number of each class; class 0 is the background."""
OUTSIDE = 500
"""Numbers from here on are tissues outside the brain."""
LARGEST = 1023
HELD_OUT = ("17", "18", "19", "20")
"""Maps that no training image is made from."""
MARGIN = 8
"""Voxels of air kept around the head."""


def class_names() -> list[str]:
    """The name of each class, in order."""
    left = {right: left for left, right in RIGHT.items()}
    names = ["background"]
    for index in INDICES[1:]:
        side = "" if index in MIDLINE else "right_" if index in left else "left_"
        names.append(side + NAMES[left.get(index, index)])
    return names


def class_singles() -> list[bool]:
    """Whether each class is in one piece.

    Not the background, nor the fluid, which fills what is left, nor the inferior lateral ventricles: they are so thin
    that the network finds them in pieces, and all but one would be lost.
    """
    return [index not in (0, 24, *THIN) for index in INDICES]


def class_colors() -> list[str]:
    """`#rrggbb` of each class, in order, as FreeSurfer's colour table has them."""
    left = {right: left for left, right in RIGHT.items()}
    colors = {index: COLORS[left.get(index, index)] for index in INDICES[1:]} | {0: "000000", 41: RIGHT_WHITE_MATTER}
    return [f"#{colors[index]}" for index in INDICES]


def class_labels() -> tuple[Label, ...]:
    """The label table."""
    rows = zip(INDICES, class_names(), class_colors(), class_singles(), strict=True)
    return tuple(Label(number, *row) for number, row in enumerate(rows))


def class_table() -> NDArray[np.uint8]:
    """(1024,): the class of each number of a label map."""
    table = np.zeros(LARGEST + 1, np.uint8)
    table[list(INDICES)] = np.arange(len(INDICES))
    for lesion, tissue in LESIONS.items():
        table[lesion] = table[tissue]
    return table


def mirror_table() -> NDArray[np.int16]:
    """(1024,): the number that each number turns into when left and right change places."""
    table = np.arange(LARGEST + 1, dtype=np.int16)
    for left, right in (RIGHT | INNER_PAIRS).items():
        table[left], table[right] = right, left
    return table


def read_label_map(path: Path) -> LabelMap:
    """Read a label map of 1 mm, turn it to LPS and crop it to the head and `MARGIN`; raises InputError."""
    image = nib.load(path)
    if not np.allclose(image.header.get_zooms()[:3], 1, atol=0.05):
        raise InputError(f"{path}: expected voxels of 1 mm, found {image.header.get_zooms()}")
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS"))
    numbers = np.asanyarray(image.as_reoriented(turn).dataobj).transpose(2, 1, 0)
    if numbers.min() < 0 or numbers.max() > LARGEST:
        raise InputError(f"{path}: expected labels from 0 to {LARGEST}")
    box = tuple(
        slice(max(int(used[0]) - MARGIN, 0), int(used[-1]) + MARGIN + 1)
        for used in (np.flatnonzero(numbers.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1)))
    )
    return np.ascontiguousarray(numbers[box], dtype=np.int16)


def find_label_maps(folder: Path, held_out: bool) -> list[Path]:
    """The maps for training, or those that were held out, sorted; raises InputError if there are none."""
    found = sorted(folder.glob("*.nii.gz"))
    chosen = [path for path in found if (path.name.removesuffix(".nii.gz")[-2:] in HELD_OUT) == held_out]
    if not chosen:
        raise InputError(f"{folder}: no {'held-out ' if held_out else ''}label maps (*.nii.gz) here")
    return chosen
