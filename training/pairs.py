"""Real scans with DLMUSE's label maps: which subjects are for what, and how they are read.

The folder holds t1/SUBJECT_T1w.nii.gz and dlmuse/SUBJECT_dseg.nii.gz on one grid, as DLMUSE's authors publish them for
161 scans of IXI (brain-development.org, CC BY-SA 3.0; label maps under SBIA's licence 1.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import InputError
from edgemuse.training.labelmaps import OUTSIDE
from edgemuse.training.regions import INDICES, WHITE_MATTER

HELD_OUT = (
    "IXI159-HH-1549", "IXI614-HH-2735", "IXI568-HH-2607", "IXI600-HH-2660", "IXI439-HH-2114", "IXI608-HH-2599",
    "IXI255-HH-1882", "IXI328-HH-2295", "IXI481-HH-2175", "IXI482-HH-2178",
)  # fmt: skip
"""Subjects that checkpoints are chosen on and nothing is trained on: every sixteenth of all, sorted by age."""
TISSUES = 7
"""Kinds of tissue outside the brain, air among them, that a scan's intensities are parted into."""
ROUNDS = 12
"""Of k-means."""


@dataclass(frozen=True)
class Pair:
    """A scan and its regions on one grid, (d, h, w): inferior to superior, anterior to posterior, right to left.

    Attributes:
        name: of the subject.
        image: (d, h, w) grey values as stored.
        white: mean grey value of white matter.
        numbers: (d, h, w) MUSE's numbers; outside the brain 0 for air, `OUTSIDE` plus n for the n-th darkest tissue.
        spacing: mm.
    """

    name: str
    image: NDArray[np.uint8]
    white: float
    numbers: NDArray[np.int16]
    spacing: float


def find_subjects(folder: Path, held_out: bool) -> list[str]:
    """The names of the subjects for training, or of those held out, sorted; raises InputError if there are none."""
    names = sorted(path.name.removesuffix("_dseg.nii.gz") for path in (folder / "dlmuse").glob("*_dseg.nii.gz"))
    chosen = [name for name in names if (name in HELD_OUT) == held_out]
    if not chosen:
        raise InputError(f"{folder}: no {'held-out ' if held_out else ''}label maps (dlmuse/*_dseg.nii.gz) here")
    return chosen


def read_pair(folder: Path, name: str) -> Pair:
    """Read a subject's scan and label map; raises InputError where they do not belong together."""
    scan, regions = (nib.load(folder / kind) for kind in (f"t1/{name}_T1w.nii.gz", f"dlmuse/{name}_dseg.nii.gz"))
    sizes = np.asarray(regions.header.get_zooms()[:3], float)
    if scan.shape != regions.shape or not np.allclose(scan.affine, regions.affine, atol=1e-2):
        raise InputError(f"{folder}: scan and label map of {name} have different grids")
    if np.ptp(sizes) > 0.05:
        raise InputError(f"{folder}: expected cubic voxels in {name}, found {sizes} mm")
    image, numbers = _upright(scan), _upright(regions).astype(np.int16)
    strange = sorted({*np.unique(numbers).tolist()} - {*INDICES})
    if strange:
        raise InputError(f"{folder}: label map of {name} holds {strange}, which are no MUSE regions")
    white = float(image[np.isin(numbers, WHITE_MATTER)].mean())
    return Pair(name, image, white, with_tissues(image, numbers), float(sizes.mean()))


def _upright(image: Any) -> NDArray[Any]:
    """(d, h, w) of an image in any orientation: LPS with its axes reversed. Values as stored: a scale is of no use."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("LPS"))
    stored = np.asanyarray(image.dataobj.get_unscaled())
    turned: NDArray[Any] = nib.orientations.apply_orientation(stored, turn).transpose(2, 1, 0)
    return np.ascontiguousarray(turned)


def with_tissues(image: NDArray[np.uint8], numbers: NDArray[np.int16]) -> NDArray[np.int16]:
    """`numbers` with kinds of tissue outside the brain: one-dimensional k-means of the grey values there."""
    outside = numbers == 0
    count = np.bincount(image[outside], minlength=256).astype(float)
    grey = np.arange(256.0)
    top = float(np.searchsorted(count.cumsum(), 0.999 * count.sum()))
    centres = np.linspace(0, top, TISSUES)
    for _ in range(ROUNDS):
        kind = np.abs(grey[:, None] - centres).argmin(1)
        weight = np.bincount(kind, count, TISSUES)
        centres = np.where(weight > 0, np.bincount(kind, count * grey, TISSUES) / np.maximum(weight, 1), centres)
    table = np.where(kind > 0, OUTSIDE + kind, 0).astype(np.int16)
    return np.where(outside, table[image], numbers)
