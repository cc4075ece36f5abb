"""Signs that a result should be looked at before it is used: each is measured, compared with a limit, and explained.

The limits are chosen, not learned: wide enough that usual scans stay silent. None of them says that a result is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.runtime.regions.anatomy import Anatomy, anatomy_of
from edgemuse.runtime.regions.labels import Label, by_index, count_voxels, structure_voxels
from edgemuse.runtime.regions.muse import is_muse, region_voxels
from edgemuse.runtime.results.measures import (
    apart,
    contrast_to_noise,
    faces_mm2,
    pairs,
    tissue_ratio,
    turned_degrees,
)
from edgemuse.runtime.scan.geometry import voxel_mm3
from edgemuse.runtime.scan.types import Affine, Labels, Spacing

CUT_MM2 = 1000.0
"""A slice of 1 mm that only touches a brain (a sphere of 70 mm) shows 440 mm2 of it, the foramen magnum 800."""
BORDER_MM2 = 100.0
"""So little of a brain on a face of the volume is no sign that any of it is missing."""
TURNED = (20.0, 27.0)
"""Degrees, sideways and nodding. Heads that lie as usual are turned by up to 7 and 24."""
WHITE_TO_GREY = 1.05
"""In T1 white matter is brighter than cortex, by a quarter and more where the contrast is good."""
ANISOTROPY = 3.0
"""Longest to shortest voxel side beyond which nnU-Net itself treats a scan as made of slices (its ANISO_THRESHOLD)."""
ASYMMETRY = 0.15
"""|left - right| over their mean, all pairs of structures together; healthy hemispheres differ by some percent."""
PAIR_RATIO = 3.0
"""Ratio of the larger to the smaller side of one pair beyond which they are flagged."""
PAIR_MM3 = 1000.0
"""Pairs whose larger side is smaller are not compared: small ventricles differ that much in healthy adults."""
APART = 0.3
"""Share of a structure outside its largest component."""
CONTRAST_TO_NOISE = 8.0
"""Contrast-to-noise ratio below which the noise is plain to see."""
NAMED = 5
"""Most structures that an explanation names."""


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
    labels, voxel, anatomy = subject.labels, voxel_mm3(subject.affine), anatomy_of(subject.labels)
    labelled = np.array([label.index > 0 for label in labels])[subject.classes]
    inside = labelled if subject.inside is None else subject.inside
    voxels = structure_voxels(count_voxels(subject.classes, labels), labels)
    mm3 = {index: count * voxel for index, count in voxels.items()}
    return (
        *_field_of_view(*_at_the_faces(subject, anatomy)),
        *_volume(np.count_nonzero(inside) * voxel, subject.plausible_mm3),
        *_whole(mm3, anatomy, subject.zooms),
        *_turned(turned_degrees(subject.classes, labels, subject.affine)),
        *_contrast(tissue_ratio(subject.shown, subject.classes, labels)),
        *_implausible(mm3, anatomy),
        *_missing(mm3, labels),
        *_fragmented(apart(subject.classes, labels, voxel, threads), labels),
        *_asymmetric(pairs(mm3, labels)),
        *_noisy(contrast_to_noise(subject.shown, inside)),
        *_anisotropic(subject.zooms, subject.spacing),
    )


def _at_the_faces(subject: Subject, anatomy: Anatomy) -> tuple[dict[str, float], str]:
    """How much of the brain lies on each face of the volume, mm2, and what is called so: fluid around it is none."""
    if subject.inside is not None:
        return faces_mm2(subject.inside, subject.affine), "brain mask"
    fluid = anatomy.of("fluid")
    brain = np.array([label.index > 0 and label.index not in fluid for label in subject.labels])
    return faces_mm2(brain[subject.classes], subject.affine), "labelled region"


def record(flags: Sequence[Flag]) -> dict[str, Any]:
    """The flags as they stand in the provenance."""
    return {"quality": [asdict(flag) for flag in flags]}


def summary(flags: Sequence[Flag]) -> str:
    """All explanations in one line."""
    return "; ".join(flag.explanation for flag in flags)


def _field_of_view(areas: Mapping[str, float], what: str) -> Iterator[Flag]:
    side, area = max(areas.items(), key=lambda item: item[1])
    if area >= CUT_MM2:
        text = f"the field of view cuts the {what}: {area:.0f} mm2 of it lie on the {side} face of the volume"
        yield Flag("field of view", text, area, CUT_MM2)
    elif area > BORDER_MM2:
        text = f"the {what} touches the {side} face of the volume ({area:.0f} mm2), so some of it may be missing"
        yield Flag("border", text, area, BORDER_MM2)


def _volume(mm3: float, plausible: tuple[float, float] | None) -> Iterator[Flag]:
    if plausible is not None and not plausible[0] <= mm3 <= plausible[1]:
        low, high = plausible
        text = f"an intracranial volume of {mm3 / 1000:.0f} ml is outside {low / 1000:.0f} to {high / 1000:.0f} ml"
        yield Flag("volume", text, mm3, low if mm3 < low else high)


def _whole(mm3: Mapping[int, float], anatomy: Anatomy, zooms: Spacing) -> Iterator[Flag]:
    fluid = anatomy.of("fluid")
    total = sum(mm3[index] for index in anatomy.structures if index not in fluid)
    if anatomy.whole_mm3 is not None and not anatomy.whole_mm3[0] <= total <= anatomy.whole_mm3[1]:
        low, high = anatomy.whole_mm3
        size = " x ".join(f"{zoom:.3g}" for zoom in zooms)
        text = (
            f"a brain of {total / 1000:.0f} ml is outside {low / 1000:.0f} to {high / 1000:.0f} ml: if the scan shows "
            f"all of it, its header's voxel size of {size} mm is wrong"
        )
        yield Flag("volume", text, total, low if total < low else high)


def _turned(found: tuple[float, float] | None) -> Iterator[Flag]:
    for degrees, limit in zip(found or (), TURNED, strict=False):
        if degrees > limit:
            text = (
                f"the brain lies turned by {degrees:.0f} degrees: if it looks upright in the picture's grey values, "
                "the header's orientation is wrong; if the head was tilted, turn the scan first"
            )
            yield Flag("orientation", text, degrees, limit)
            return


def _contrast(ratio: float | None) -> Iterator[Flag]:
    if ratio is not None and ratio < WHITE_TO_GREY:
        text = f"white matter is {ratio:.2f} times as bright as cortex, in T1 it is brighter: is this another contrast?"
        yield Flag("contrast", text, ratio, WHITE_TO_GREY)


def _implausible(mm3: Mapping[int, float], anatomy: Anatomy) -> Iterator[Flag]:
    """Structures that were not found at all are named as missing."""
    found = {
        row: mm3[index]
        for index, row in anatomy.structures.items()
        if row.mm3 and mm3[index] and not row.mm3[0] <= mm3[index] <= row.mm3[1]
    }
    if found:
        named = _names([f"{row.name} ({volume / 1000:.1f} ml)" for row, volume in found.items()])
        text = f"volumes that adults do not have: {named}; check the header's orientation and voxel size"
        yield Flag("structures", text, float(len(found)), 0.0)


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
