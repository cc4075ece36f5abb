"""Signs that a result should be looked at before it is used: each is measured, compared with a limit, and explained.

The limits are chosen, not learned: wide enough that usual scans stay silent. None of them says that a result is right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.network.preprocess import Box, nonzero_box
from edgemuse.runtime.regions.labels import Label, by_index, count_voxels, structure_voxels
from edgemuse.runtime.regions.muse import is_muse, region_voxels
from edgemuse.runtime.results.islands import TOUCHING
from edgemuse.runtime.scan.geometry import in_memory_order, orientation, voxel_mm3
from edgemuse.runtime.scan.types import Affine, Labels, Spacing

CUT_MM2 = 1000.0
"""A slice of 1 mm that only touches a brain (a sphere of 70 mm) shows 440 mm2 of it, the foramen magnum 800."""
ANISOTROPY = 3.0
"""Longest to shortest voxel side beyond which nnU-Net itself treats a scan as made of slices (its ANISO_THRESHOLD)."""
ASYMMETRY = 0.15
"""|left - right| over their mean, all pairs of structures together; healthy hemispheres differ by some percent."""
PAIR_RATIO = 3.0
"""Ratio of the larger to the smaller side of one pair beyond which they are flagged."""
PAIR_MM3 = 300.0
"""Pairs whose larger side is smaller are not compared."""
APART = 0.3
"""Share of a structure outside its largest component."""
APART_MM3 = 1000.0
"""Structures that are smaller may be in pieces without a flag."""
AT_ONCE = 4
"""Most structures examined at the same time: each takes up to two bytes a voxel of the volume."""
CONTRAST_TO_NOISE = 8.0
"""Contrast-to-noise ratio below which the noise is plain to see."""
NOISE = math.sqrt(1 / 42)
"""From six times a voxel less its six neighbours, of variance 36 + 6, to the standard deviation of white noise."""
NAMED = 5
"""Most structures that an explanation names."""
FACES = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
OPPOSITE = dict(zip("LRAPSI", "RLPAIS", strict=True))
SIDES = {"left": 0, "lh": 0, "l": 0, "right": 1, "rh": 1, "r": 1}


@dataclass(frozen=True)
class Flag:
    """One sign: a short name, a sentence for people, what was measured and the limit it is beyond."""

    name: str
    explanation: str
    measured: float
    limit: float


@dataclass(frozen=True)
class Subject:
    """A segmented scan whose quality is assessed.

    Attributes:
        shown: (i, j, k) grey values, 0 to 255.
        classes: (i, j, k) class numbers.
        labels: of the classes.
        affine: of both.
        zooms: mm along i, j, k.
        spacing: of the network, mm.
        inside: (i, j, k) the intracranial mask of a cascade; None: whatever is labelled.
        plausible_mm3: least and largest volume of `inside`; None: any.
    """

    shown: NDArray[np.uint8]
    classes: Labels
    labels: Sequence[Label]
    affine: Affine
    zooms: Spacing
    spacing: Spacing
    inside: NDArray[np.bool_] | None = None
    plausible_mm3: tuple[float, float] | None = None


def assess(subject: Subject, threads: int = 1) -> tuple[Flag, ...]:
    """Every reason to look at `subject` before its result is used, most general first."""
    inside = subject.inside
    if inside is None:
        inside = np.array([label.index > 0 for label in subject.labels])[subject.classes]
    voxel = voxel_mm3(subject.affine)
    voxels = structure_voxels(count_voxels(subject.classes, subject.labels), subject.labels)
    mm3 = {index: count * voxel for index, count in voxels.items()}
    return (
        *_field_of_view(
            faces_mm2(inside, subject.affine), "labelled region" if subject.inside is None else "brain mask"
        ),
        *_volume(np.count_nonzero(inside) * voxel, subject.plausible_mm3),
        *_missing(mm3, subject.labels),
        *_fragmented(apart(subject.classes, subject.labels, voxel, threads), subject.labels),
        *_asymmetric(pairs(mm3, subject.labels)),
        *_noisy(contrast_to_noise(subject.shown, inside)),
        *_anisotropic(subject.zooms, subject.spacing),
    )


def record(flags: Sequence[Flag]) -> dict[str, Any]:
    """The flags as they stand in the provenance."""
    return {"quality": [asdict(flag) for flag in flags]}


def summary(flags: Sequence[Flag]) -> str:
    """All explanations in one line."""
    return "; ".join(flag.explanation for flag in flags)


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


def _field_of_view(areas: Mapping[str, float], what: str) -> Iterator[Flag]:
    side, area = max(areas.items(), key=lambda item: item[1])
    if area >= CUT_MM2:
        text = f"the field of view cuts the {what}: {area:.0f} mm2 of it lie on the {side} face of the volume"
        yield Flag("field of view", text, area, CUT_MM2)
    elif area > 0:
        text = f"the {what} touches the {side} face of the volume ({area:.0f} mm2), so some of it may be missing"
        yield Flag("border", text, area, 0.0)


def _volume(mm3: float, plausible: tuple[float, float] | None) -> Iterator[Flag]:
    if plausible is not None and not plausible[0] <= mm3 <= plausible[1]:
        low, high = plausible
        text = f"an intracranial volume of {mm3 / 1000:.0f} ml is outside {low / 1000:.0f} to {high / 1000:.0f} ml"
        yield Flag("volume", text, mm3, low if mm3 < low else high)


def _missing(mm3: Mapping[int, float], labels: Sequence[Label]) -> Iterator[Flag]:
    expected = region_voxels({}) if is_muse(labels) else mm3  # vessels and the like are not always found
    absent = [label.name for label in by_index(labels) if label.index in expected and not mm3[label.index]]
    if absent:
        yield Flag("missing", f"{_names(absent)} not found", float(len(absent)), 0.0)


def _fragmented(shares: Mapping[int, float], labels: Sequence[Label]) -> Iterator[Flag]:
    worst = {label.name: shares[label.index] for label in by_index(labels) if shares.get(label.index, 0) > APART}
    if worst:
        text = f"{_names(sorted(worst, key=worst.__getitem__, reverse=True))} in pieces"
        yield Flag("fragmented", text, max(worst.values()), APART)


def _asymmetric(sides: Mapping[str, tuple[float, float]]) -> Iterator[Flag]:
    left, right = (sum(pair[side] for pair in sides.values()) for side in (0, 1))
    index = 2 * (left - right) / (left + right) if left + right else 0.0
    if abs(index) > ASYMMETRY:
        text = f"left and right differ: {left / 1000:.0f} and {right / 1000:.0f} ml over all structures"
        yield Flag("asymmetry", text, abs(index), ASYMMETRY)
    ratios = {name: max(pair) / max(min(pair), 1e-9) for name, pair in sides.items() if max(pair) >= PAIR_MM3}
    worst = {name: ratio for name, ratio in ratios.items() if ratio > PAIR_RATIO}
    if worst:
        names = _names(sorted(worst, key=worst.__getitem__, reverse=True))
        text = f"one side over {PAIR_RATIO:g} times the other: {names}"
        yield Flag("asymmetric structures", text, float(len(worst)), 0.0)


def _noisy(ratio: float | None) -> Iterator[Flag]:
    if ratio is not None and ratio < CONTRAST_TO_NOISE:
        text = f"low contrast or strong noise: a contrast-to-noise ratio of {ratio:.1f}, below {CONTRAST_TO_NOISE:g}"
        yield Flag("noise", text, ratio, CONTRAST_TO_NOISE)


def _anisotropic(zooms: Spacing, spacing: Spacing) -> Iterator[Flag]:
    found, usual = max(zooms) / min(zooms), max(spacing) / min(spacing)
    if found > ANISOTROPY and found > usual:
        text = (
            f"voxels of {' x '.join(f'{zoom:.3g}' for zoom in zooms)} mm are {found:.1f} times longer than wide, "
            f"{usual:.1f} in training"
        )
        yield Flag("anisotropy", text, found, max(ANISOTROPY, usual))


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
