"""Scores of label maps: Dice, surface distance, volume and displacement of every structure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from scipy import ndimage, stats

from edgemuse.engines.errors import InputError
from edgemuse.runtime.regions.agreement import agreement, dice
from edgemuse.runtime.regions.labels import Label, by_index
from edgemuse.runtime.scan.nifti import read_voxels, reading
from edgemuse.runtime.scan.types import Affine

PERCENTILE = 95
LabelMap = NDArray[np.int64]


@dataclass(frozen=True)
class Structure:
    """A structure, and the label numbers that make it up in the model's protocol and in the truth's."""

    name: str
    found: tuple[int, ...]
    truth: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """One structure in two maps, of which at least one has it.

    Attributes:
        name: of the structure.
        dice: 2 |A and B| / (|A| + |B|).
        hd95_mm: 95 % Hausdorff distance; None where one of the maps lacks the structure.
        found_mm3: its volume in the map that is judged.
        truth_mm3: its volume in the other.
        shift_voxels: distance between its centres in voxels; None where one of the maps lacks it.
    """

    name: str
    dice: float
    hd95_mm: float | None
    found_mm3: float
    truth_mm3: float
    shift_voxels: float | None


@dataclass(frozen=True)
class Comparison:
    """How two label maps compare.

    Attributes:
        agreement: share of voxels with the same label.
        scores: of the structures that either map has.
        absent: number of structures that neither map has.
    """

    agreement: float
    scores: tuple[Score, ...]
    absent: int

    def fields(self) -> dict[str, Any]:
        """Return the comparison as fields of a row."""
        return {
            "agreement": self.agreement,
            "structures": [asdict(score) for score in self.scores],
            "absent_in_both": self.absent,
        }


def same_protocol(labels: Sequence[Label]) -> list[Structure]:
    """The structures of a bundle, for a truth that uses the bundle's own numbers."""
    return [Structure(label.name, (label.index,), (label.index,)) for label in by_index(labels) if label.index]


def read_mapping(path: Path, labels: Sequence[Label]) -> list[Structure]:
    """Read a table with the columns name, model, truth, separated by tabs, one structure a row.

    `model` and `truth` are the label numbers that make up the structure in the bundle's protocol and in the truth's,
    several separated by commas. Labels in no row are not scored. Raises InputError.
    """
    known = {label.index for label in labels} - {0}
    structures = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                structures.append(Structure(row["name"], _numbers(row["model"]), _numbers(row["truth"])))
    except KeyError as error:
        raise InputError(f"{path}: no column {error}; expected name, model, truth, separated by tabs") from error
    except (OSError, UnicodeDecodeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(f"{path}: not a mapping ({error}); numbers are separated by commas") from error
    for structure in structures:
        if unknown := sorted(set(structure.found) - known):
            raise InputError(f"{path}: {structure.name}: the model has no label {unknown[0]}")
    if not structures:
        raise InputError(f"{path}: no structure in it")
    return structures


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def read_labels(path: Path) -> tuple[LabelMap, Affine]:
    """Read the label map at `path`: whole numbers (i, j, k) and its affine; raises InputError."""
    with reading(path) as (scan, source):
        data, _ = read_voxels(scan, source, np.float64)
    labels = data.astype(np.int64)
    if (labels != data).any() or labels.min() < 0:
        raise InputError(f"{path}: not a label map: its values are not whole numbers from 0 on")
    return labels, scan.affine


def compare_files(found: Path, truth: Path, structures: Sequence[Structure]) -> Comparison:
    """Compare two label maps of the same grid; raises InputError where grids differ."""
    first, affine = read_labels(found)
    second, other = read_labels(truth)
    if first.shape != second.shape or not np.allclose(affine, other, atol=0.01):
        raise InputError(f"{truth}: not on the grid of the scan; resample it to the scan first")
    return compare(first, second, structures, affine)


def compare(found: LabelMap, truth: LabelMap, structures: Sequence[Structure], affine: Affine) -> Comparison:
    """Score every structure of two maps (i, j, k) with the voxel sizes of `affine`."""
    ours = _renumbered(found, [structure.found for structure in structures])
    theirs = _renumbered(truth, [structure.truth for structure in structures])
    spacing = voxel_sizes(affine)
    overlaps = dice(ours, theirs)
    boxes = ndimage.find_objects(ours), ndimage.find_objects(theirs)
    scores = tuple(
        _score(structures[number - 1].name, overlap, number, (ours, theirs), boxes, spacing)
        for number, overlap in overlaps.items()
    )
    return Comparison(agreement(ours, theirs), scores, len(structures) - len(scores))


def _renumbered(labels: LabelMap, groups: Sequence[tuple[int, ...]]) -> LabelMap:
    """Number the voxels of `labels` by the group that has their label, from 1 on; 0 if none has."""
    highest = max(int(labels.max()), *(max(group) for group in groups))
    table = np.zeros(highest + 1, np.int64)
    for number, group in enumerate(groups, 1):
        table[list(group)] = number
    return table[labels]


def _score(
    name: str,
    overlap: float,
    number: int,
    maps: tuple[LabelMap, LabelMap],
    boxes: tuple[Any, Any],
    spacing: NDArray[np.float64],
) -> Score:
    box = _union([found[number - 1] for found in boxes if number <= len(found) and found[number - 1]])
    first, second = (volume[box] == number for volume in maps)
    counts = [int(np.count_nonzero(mask)) for mask in (first, second)]
    voxel = float(np.prod(spacing))
    both = all(counts)
    return Score(
        name,
        overlap,
        hausdorff(first, second, spacing) if both else None,
        counts[0] * voxel,
        counts[1] * voxel,
        _shift(first, second) if both else None,
    )


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in sides), max(s.stop for s in sides)) for sides in zip(*boxes, strict=True))


def _shift(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    centres = [np.array(ndimage.center_of_mass(mask)) for mask in (first, second)]
    return float(np.linalg.norm(centres[0] - centres[1]))


def hausdorff(first: NDArray[np.bool_], second: NDArray[np.bool_], spacing: Sequence[float] | Any) -> float:
    """95 % Hausdorff distance in mm of two masks (i, j, k), neither empty.

    The larger of the two 95th percentiles of the distances from the border voxels of one mask to the nearest border
    voxel of the other. A border voxel has a face on the outside; so has every voxel on the face of the volume.
    """
    if np.array_equal(first, second):
        return 0.0
    borders = [sitk.LabelContour(_image(np.pad(mask, 1), spacing)) for mask in (first, second)]
    away = [sitk.Abs(sitk.SignedMaurerDistanceMap(border, False, False, True)) for border in borders]
    there, back = (
        sitk.GetArrayViewFromImage(distance)[sitk.GetArrayViewFromImage(border) > 0]
        for border, distance in zip(borders, reversed(away), strict=True)
    )
    return float(max(np.percentile(there, PERCENTILE), np.percentile(back, PERCENTILE)))


def _image(mask: NDArray[np.bool_], spacing: Sequence[float] | Any) -> Any:
    image = sitk.GetImageFromArray(mask.astype(np.uint8).T)  # SimpleITK's arrays run k, j, i
    image.SetSpacing([float(mm) for mm in spacing])
    return image


@dataclass(frozen=True)
class Volumes:
    """How the volumes of two methods agree: Pearson's r, intraclass correlation, mean absolute difference in mm3."""

    pairs: int
    pearson: float
    icc: float
    mean_absolute_mm3: float


def volume_agreement(found: Sequence[float], truth: Sequence[float]) -> Volumes:
    """Agreement of paired volumes in mm3; correlations are NaN for fewer than three pairs or where none vary."""
    pairs = np.array([found, truth], np.float64)
    difference = float(np.abs(pairs[0] - pairs[1]).mean()) if pairs.size else float("nan")
    if pairs.shape[1] < 3 or (np.ptp(pairs, axis=1) == 0).any():
        return Volumes(pairs.shape[1], float("nan"), float("nan"), difference)
    pearson = float(stats.pearsonr(*pairs).statistic)
    return Volumes(pairs.shape[1], pearson, intraclass_correlation(pairs.T), difference)


def intraclass_correlation(ratings: NDArray[np.float64]) -> float:
    """ICC(A,1) of (subjects, raters): two-way, absolute agreement, single measurement.

    McGraw and Wong, Forming inferences about some intraclass correlation coefficients, 1996, table 4.
    """
    subjects, raters = ratings.shape
    grand = ratings.mean()
    between = raters * ((ratings.mean(1) - grand) ** 2).sum() / (subjects - 1)
    columns = subjects * ((ratings.mean(0) - grand) ** 2).sum() / (raters - 1)
    total = ((ratings - grand) ** 2).sum()
    error = total - between * (subjects - 1) - columns * (raters - 1)
    error /= (subjects - 1) * (raters - 1)
    spread = between + (raters - 1) * error + raters * (columns - error) / subjects
    return float((between - error) / spread)
