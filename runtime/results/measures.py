"""What is measured of a segmented scan, so that `quality` can compare it with limits: plain arrays in, figures out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.network.preprocess import Box, nonzero_box
from edgemuse.runtime.regions.anatomy import anatomy_of
from edgemuse.runtime.regions.labels import Label, by_index
from edgemuse.runtime.results.islands import TOUCHING
from edgemuse.runtime.scan.geometry import in_memory_order, orientation
from edgemuse.runtime.scan.types import Affine, Labels

APART_MM3 = 1000.0
"""Structures that are smaller may be in pieces without a flag."""
AT_ONCE = 4
"""Most structures examined at the same time: each takes up to two bytes a voxel of the volume."""
NOISE = math.sqrt(1 / 42)
"""From six times a voxel less its six neighbours, of variance 36 + 6, to the standard deviation of white noise."""
FACES = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
CEREBRUM_FORWARD = 29.0
"""Degrees, the median of the scans that the limits of `quality` were set on."""
SIDES = {"left": 0, "lh": 0, "l": 0, "right": 1, "rh": 1, "r": 1}


def faces_mm2(inside: NDArray[np.bool_], affine: Affine) -> dict[str, float]:
    """Area of `inside` on each of the volume's six faces, mm2, by the side of the body that the face looks to."""
    areas = {}
    for axis, code in enumerate(orientation(affine)):
        first, second = (affine[:3, other] for other in range(3) if other != axis)
        pixel = float(np.linalg.norm(np.cross(first, second)))
        slices = np.moveaxis(inside, axis, 0)  # a view; np.take would walk through the whole volume
        areas[FACES[OPPOSITE[code]]] = float(slices[0].sum()) * pixel
        areas[FACES[code]] = float(slices[-1].sum()) * pixel
    return areas


def apart(classes: Labels, labels: Sequence[Label], voxel_mm3: float, threads: int = 1) -> dict[int, float]:
    """Share of each structure's voxels outside its largest component, by index; small structures are left out.

    Components are found among the volume's blocks of 2 x 2 x 2 voxels, so that parts with less than a block between
    them are one. A structure of several classes counts by its largest class. Up to `threads` classes are looked at at
    once.
    """
    if not classes.any():
        return {}
    (classes,) = in_memory_order(classes)
    inside = classes[tuple(slice(2 * side.start, 2 * side.stop) for side in _halved(nonzero_box(classes)))]
    boxes: list[Box | None] = ndimage.find_objects(inside, max_label=len(labels) - 1)
    found = [(label, _halved(box)) for label, box in zip(labels[1:], boxes, strict=True) if box and label.index]
    corners = _corners(inside)

    def look(item: tuple[Label, Box]) -> tuple[int, int, float]:
        label, box = item
        # of a block's eight voxels, each in a volume of its own, those of the class
        blocks = (corners[(slice(None), *box)] == label.number).view(np.uint8).sum(axis=0, dtype=np.uint8)
        voxels = int(blocks.sum())
        return voxels, label.index, _outside_largest(blocks) if voxels * voxel_mm3 >= APART_MM3 else 0.0

    with ThreadPoolExecutor(min(threads, AT_ONCE)) as pool:
        looked = sorted(pool.map(look, found))
    return {index: share for voxels, index, share in looked if voxels * voxel_mm3 >= APART_MM3}


def _corners(classes: Labels) -> Labels:
    """(8, i, j, k): the blocks of 2 x 2 x 2 voxels, their first voxels, their second ones, and so on; 0 beyond."""
    corners = np.zeros((8, *((size + 1) // 2 for size in classes.shape)), classes.dtype)
    for corner, first in zip(corners, product((0, 1), repeat=3), strict=True):
        voxels = classes[tuple(slice(start, None, 2) for start in first)]
        corner[tuple(slice(size) for size in voxels.shape)] = voxels
    return corners


def _halved(box: Box) -> Box:
    """The blocks of 2 x 2 x 2 voxels that `box` meets."""
    i, j, k = (slice(side.start // 2, (side.stop + 1) // 2) for side in box)
    return i, j, k


def _outside_largest(blocks: NDArray[np.uint8]) -> float:
    """Share of the voxels outside the largest component of the blocks that hold some; `blocks`: how many each holds."""
    parts, count = ndimage.label(blocks, TOUCHING)
    if count == 1:
        return 0.0
    occupied = np.flatnonzero(blocks)
    sizes = np.bincount(parts.ravel()[occupied], blocks.ravel()[occupied])
    return 1 - float(sizes.max() / sizes.sum())


def pairs(mm3: Mapping[int, float], labels: Sequence[Label]) -> dict[str, tuple[float, float]]:
    """Volumes (left, right) of the structures whose names differ in the side alone."""
    found: dict[str, dict[int, float]] = {}
    for label in by_index(labels):
        words = re.split("[^a-z0-9]+", label.name.lower())
        sides = [SIDES[word] for word in words if word in SIDES]
        if len(sides) == 1 and label.index:
            found.setdefault(" ".join(word for word in words if word not in SIDES), {})[sides[0]] = mm3[label.index]
    return {name: (sides[0], sides[1]) for name, sides in found.items() if len(sides) == 2}


def noise(image: NDArray[Any]) -> NDArray[Any]:
    """Six times each inner voxel of a volume less its six neighbours, in the image's own type.

    Times `NOISE` these are pseudo-residuals, and white noise keeps its standard deviation (Gasser et al. 1986,
    doi:10.1093/biomet/73.3.625; used for MRI by Coupé et al. 2010, doi:10.1016/j.media.2010.03.001). Two voxels shorter
    along each axis.
    """
    inner, before, after = slice(1, -1), slice(None, -2), slice(2, None)
    residuals: NDArray[Any] = image.dtype.type(6) * image[inner, inner, inner]
    for side in (before, after):
        residuals -= image[side, inner, inner]
        residuals -= image[inner, side, inner]
        residuals -= image[inner, inner, side]
    return residuals


def contrast_to_noise(shown: NDArray[np.uint8], inside: NDArray[np.bool_]) -> float | None:
    """Spread of the intensities inside (10th to 90th percentile) over the standard deviation of their noise.

    The noise is 1.4826 times the median absolute pseudo-residual, so that edges count little; half a grey level at
    least, which is what rounding to grey levels hides. None where less than a thousand voxels are inside.
    """
    if not inside.any():
        return None
    shown, inside = in_memory_order(shown, inside)
    box = nonzero_box(inside)
    grey, core = shown[box].astype(np.int16), inside[box][1:-1, 1:-1, 1:-1]
    if np.count_nonzero(core) < 1000:
        return None
    levels, residuals = np.zeros(256, np.int64), np.zeros(6 * 255 + 1, np.int64)  # how often each value occurs
    for i, plane in enumerate(core):
        levels += np.bincount(grey[i + 1, 1:-1, 1:-1][plane], minlength=len(levels))
        residuals += np.bincount(np.abs(noise(grey[i : i + 3])[0][plane]), minlength=len(residuals))
    sigma = 1.4826 * NOISE * _quantile(residuals, 0.5)
    return (_quantile(levels, 0.9) - _quantile(levels, 0.1)) / max(sigma, 0.5)


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    """The quantile of whole numbers that occur `counts` times; between two of them as `numpy.quantile` does."""
    place = share * (int(counts.sum()) - 1)
    low, high = np.searchsorted(counts.cumsum(), (math.floor(place), math.ceil(place)), side="right")
    return float(low + (high - low) * (place % 1))


def centre_mm(inside: NDArray[np.bool_], affine: Affine) -> NDArray[np.float64] | None:
    """Where the middle of `inside` lies, in mm to the right, anterior and superior along the voxels' own axes.

    Each axis counts towards the side of the body that it is closest to, however oblique it is. None if `inside` is
    empty.
    """
    if not inside.any():
        return None
    centre = np.zeros(3)
    for axis, (side, sign) in enumerate(io_orientation(affine)):
        counts = np.count_nonzero(inside, axis=tuple(other for other in range(3) if other != axis))
        middle = float(np.average(np.arange(len(counts)), weights=counts))
        centre[int(side)] = sign * middle * float(np.linalg.norm(affine[:3, axis]))
    return centre


def turned_degrees(classes: Labels, labels: Sequence[Label], affine: Affine) -> tuple[float, float] | None:
    """By how much the brain is turned from where the voxels' axes say that its sides are: sideways, and nodding.

    Two directions are compared with where they point in healthy adults: that from the middle of the left to the middle
    of the right white matter, and, seen from the side, that from the cerebellum to the white matter of the cerebrum,
    which points upwards and `CEREBRUM_FORWARD` degrees forward. None where the labels do not tell these structures or
    they were not found.
    """
    classes, affine = classes[::2, ::2, ::2], affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    anatomy = anatomy_of(labels)
    groups = (("white", "left"), ("white", "right"), ("cerebellum", ""), ("white", ""))
    left, right, back, up = (centre_mm(_of(classes, labels, anatomy.of(*group)), affine) for group in groups)
    if left is None or right is None or back is None or up is None:
        return None
    across, along = right - left, up - back
    sideways = np.degrees(np.arccos(across[0] / max(float(np.linalg.norm(across)), 1e-9)))
    nodding = np.degrees(np.arctan2(along[1], along[2])) - CEREBRUM_FORWARD
    return float(sideways), float(abs((nodding + 180) % 360 - 180))


def tissue_ratio(shown: NDArray[np.uint8], classes: Labels, labels: Sequence[Label]) -> float | None:
    """Median grey value of the cerebrum's white matter over that of its cortex; None where either was not found."""
    shown, classes = shown[::2, ::2, ::2], classes[::2, ::2, ::2]
    anatomy = anatomy_of(labels)
    white, grey = (shown[_of(classes, labels, anatomy.of(tissue))] for tissue in ("white", "grey"))
    return float(np.median(white) / max(float(np.median(grey)), 1.0)) if white.size and grey.size else None


def _of(classes: Labels, labels: Sequence[Label], indices: Sequence[int]) -> NDArray[np.bool_]:
    """Where the structures with `indices` are."""
    return np.array([label.index in indices for label in labels])[classes]
