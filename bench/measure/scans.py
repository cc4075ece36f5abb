"""Copies of a scan that are changed in one way each: spacing, orientation, field of view or intensities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.eulerangles import euler2mat
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage


def reoriented(path: Path, target: Path, codes: str) -> Path:
    """Store the same voxels with axes `codes`, such as LPS."""
    nifti: Any = nib.load(path)
    turn = ornt_transform(io_orientation(nifti.affine), axcodes2ornt(tuple(codes)))
    data = apply_orientation(np.asanyarray(nifti.dataobj), turn)
    return _save(data, nifti.affine @ inv_ornt_aff(turn, nifti.shape), target)


def resampled(path: Path, target: Path, spacing: tuple[float, float, float]) -> Path:
    """Interpolate linearly to `spacing`, in mm along i, j, k."""
    nifti: Any = nib.load(path)
    data = np.asanyarray(nifti.dataobj).astype(np.float32)
    zooms = voxel_sizes(nifti.affine)
    factors = zooms / np.asarray(spacing)
    image = ndimage.zoom(data, factors, order=1, mode="nearest", grid_mode=True)
    affine = nifti.affine @ np.diag([*(np.asarray(spacing) / zooms), 1])
    return _save(image, affine, target)


def oblique(path: Path, target: Path, degrees: float) -> Path:
    """Turn the affine about two axes and leave the voxels as they are."""
    nifti: Any = nib.load(path)
    turn = euler2mat(np.deg2rad(degrees), 0, np.deg2rad(degrees / 2))
    affine = np.array(nifti.affine)
    affine[:3, :3] = turn @ affine[:3, :3]
    return _save(np.asanyarray(nifti.dataobj), affine, target)


def centre_crop(path: Path, target: Path, shape: tuple[int, int, int]) -> Path:
    """Crop to the middle of what is not 0, to `shape` at most."""
    nifti: Any = nib.load(path)
    data = np.asanyarray(nifti.dataobj)
    starts, sides = [], []
    for axis, size in enumerate(shape):
        used = np.flatnonzero((data != 0).any(axis=tuple(n for n in range(3) if n != axis)))
        start = max((used[0] + used[-1] + 1 - size) // 2, 0)
        starts.append(start)
        sides.append(slice(start, start + size))
    affine = np.array(nifti.affine)
    affine[:3, 3] = apply_affine(affine, starts)
    return _save(data[tuple(sides)], affine, target)


def changed(path: Path, target: Path, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Path:
    """Change the intensities on the same grid."""
    image: Any = nib.load(path)
    return save(change(np.asanyarray(image.dataobj).astype(np.float32)), path, target)


def rician(image: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Add noise of `share` of the 99th percentile wherever intensities are not 0."""
    rng, scale = np.random.default_rng(0), share * np.percentile(image[image > 0], 99)
    real, imaginary = (rng.normal(0, scale, image.shape) for _ in range(2))
    noisy: NDArray[np.float32] = np.where(image > 0, np.hypot(image + real, imaginary), 0).astype(np.float32)
    return noisy


def bias_field(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply intensities by a smooth field from 0.5 to 2 across the volume."""
    ramps = np.meshgrid(*(np.linspace(-1, 1, size) for size in image.shape), indexing="ij", sparse=True)
    field = np.exp(np.log(2) * (0.5 * ramps[0] + 0.3 * ramps[1] - 0.5 * ramps[2] ** 2 + 0.3 * ramps[1] * ramps[2]))
    biased: NDArray[np.float32] = (image * field).astype(np.float32)
    return biased


def lowest_quarter_cut(path: Path, target: Path) -> Path:
    """Cut off the lowest quarter of what is not 0; the result is stored as LPS."""
    image: Any = nib.load(reoriented(path, target, "LPS"))
    used = np.flatnonzero(np.asanyarray(image.dataobj).any(axis=(0, 1)))
    first = int(used[0] + (used[-1] - used[0]) // 4)
    nib.save(image.slicer[:, :, first:], target)
    return target


def save(data: NDArray[Any], like: Path, target: Path) -> Path:
    """Save `data` on the voxel grid of the scan `like`."""
    nifti: Any = nib.load(like)
    return _save(data, nifti.affine, target)


def labels_of(path: Path) -> NDArray[np.int64]:
    """Return the voxels of the label map at `path`."""
    return numbers(nib.load(path))


def numbers(image: Any) -> NDArray[np.int64]:
    """Return the voxels of a label map that was loaded."""
    labels: NDArray[np.int64] = np.asanyarray(image.dataobj).astype(np.int64)
    return labels


def _save(data: NDArray[Any], affine: NDArray[np.float64], target: Path) -> Path:
    image = nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, target)
    return target
