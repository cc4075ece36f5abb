"""Resampling between spacings as nnU-Net does it, for the image on its way in and the features on their way out.

nnU-Net resamples a strongly anisotropic volume (ratio above 3) in the plane and along its coarse axis apart.
Its `skimage.transform.resize(mode="edge")` is `scipy.ndimage.zoom(mode="nearest", grid_mode=True)` clipped to the
input's range. Splines of every order are linear maps along each axis, so they are applied as matrices.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.model.manifest import Resampling
from edgemuse.runtime.scan.types import Image, Shape, Spacing

ANISOTROPY_THRESHOLD = 3
"""nnU-Net's `ANISO_THRESHOLD`."""

AxisMatrices: TypeAlias = tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, NDArray[np.float32] | None]
"""(n_out, n_in) per axis; None where the axis keeps its length."""


def resampled_shape(shape: Shape, spacing: Spacing, target: Spacing) -> Shape:
    """Shape of the volume at `target` spacing, rounded half to even as nnU-Net does."""
    d, h, w = (round(old / new * n) for old, new, n in zip(spacing, target, shape, strict=True))
    return max(d, 1), max(h, 1), max(w, 1)


def separate_axis(spacing: Spacing, target: Spacing, force: bool | None) -> int | None:
    """The axis to resample apart, or None: the coarse one of `spacing`, or else of `target`, if there is just one."""
    if force is False:
        return None
    for candidate in (spacing,) if force else (spacing, target):
        if force or max(candidate) / min(candidate) > ANISOTROPY_THRESHOLD:
            coarse = [axis for axis in range(3) if candidate[axis] == max(candidate)]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample_image(image: Image, shape: Shape, spacing: Spacing, target: Spacing, resampling: Resampling) -> Image:
    """Resample `image` (d, h, w) from `spacing` to `shape` at `target` spacing with splines, computed in float64."""
    if image.shape == shape:
        return image
    axis = separate_axis(spacing, target, resampling.force_separate_z)
    if axis is None:
        return _zoom(image, shape, resampling.order).astype(np.float32)
    plane = shape[:axis] + shape[axis + 1 :]
    slices = [_zoom(piece, plane, resampling.order) for piece in np.moveaxis(image, axis, 0)]
    stacked = np.stack(slices, axis=axis)
    if stacked.shape[axis] != shape[axis]:
        matrix = axis_matrix(stacked.shape[axis], shape[axis], resampling.order_z)
        stacked = np.moveaxis(np.tensordot(matrix, stacked, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(stacked, dtype=np.float32)


def _zoom(image: Image, shape: tuple[int, ...], order: int) -> NDArray[np.float64]:
    """`ndimage.zoom(mode="nearest", grid_mode=True)`, clipped: a product of matrices axis by axis, so it is fast.

    The axis that shrinks most comes first, so that the rest has the least to do.
    """
    zoomed = image.astype(np.float64)
    for axis in sorted(range(image.ndim), key=lambda axis: shape[axis] / image.shape[axis]):
        if zoomed.shape[axis] != shape[axis]:
            zoomed = _along(axis_matrix(zoomed.shape[axis], shape[axis], order), zoomed, axis)
    clipped: NDArray[np.float64] = np.clip(zoomed, image.min(), image.max(), out=zoomed)
    return clipped


def _along(matrix: NDArray[np.float64], volume: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Apply `matrix` (n_out, n_in) along `axis`, in the memory order of `volume`."""
    product: NDArray[np.float64]
    if axis == volume.ndim - 1:
        product = volume @ matrix.T
        return product
    before, after = volume.shape[:axis], volume.shape[axis + 1 :]
    product = matrix @ volume.reshape(*before, volume.shape[axis], -1)
    return product.reshape(*before, len(matrix), *after)


def axis_matrix(n_in: int, n_out: int, order: int) -> NDArray[np.float64]:
    """(n_out, n_in): interpolation along one axis, voxel centres at (i + 0.5) / n, the ends held.

    Its rows sum to one. It is what `scipy.ndimage.map_coordinates(mode="nearest")` makes of unit vectors.
    """
    centres = n_in / n_out * (np.arange(n_out) + 0.5) - 0.5
    grid = np.meshgrid(centres, np.arange(n_in), indexing="ij")
    matrix: NDArray[np.float64] = ndimage.map_coordinates(np.eye(n_in), grid, order=order, mode="nearest")
    return matrix


def output_matrices(
    shape: Shape, spacing: Spacing, target_shape: Shape, target: Spacing, resampling: Resampling
) -> AxisMatrices:
    """The maps that take features from the network's grid (`shape`, `spacing`) to the scan's."""
    axis = separate_axis(spacing, target, resampling.force_separate_z)
    orders = [resampling.order_z if n == axis else resampling.order for n in range(3)]
    d, h, w = (
        None if old == new else axis_matrix(old, new, order).astype(np.float32)
        for old, new, order in zip(shape, target_shape, orders, strict=True)
    )
    return d, h, w
