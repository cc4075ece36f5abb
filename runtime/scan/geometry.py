"""From a scan's voxel grid to a network's axes and back, by permutations and flips: nothing is interpolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from edgemuse.runtime.scan.types import Affine, Shape, Spacing


@dataclass(frozen=True)
class Reorientation:
    """Network axis `n` of (d, h, w) reads image axis `axes[n]` of (i, j, k), reversed where `flips[n]`."""

    axes: Shape
    flips: tuple[bool, bool, bool]

    def apply(self, image: NDArray[Any]) -> NDArray[Any]:
        """(i, j, k) to (d, h, w), as a view."""
        return image.transpose(self.axes)[self._slices()]

    def undo(self, image: NDArray[Any]) -> NDArray[Any]:
        """(d, h, w) to (i, j, k), as a view; the inverse of `apply`."""
        i, j, k = (self.axes.index(axis) for axis in range(3))
        return image[self._slices()].transpose(i, j, k)

    def spacing(self, zooms: Spacing) -> Spacing:
        """Millimetres along i, j, k to millimetres along d, h, w."""
        d, h, w = (zooms[axis] for axis in self.axes)
        return d, h, w

    def shape(self, shape: Shape) -> Shape:
        """Lengths along i, j, k to lengths along d, h, w."""
        d, h, w = (shape[axis] for axis in self.axes)
        return d, h, w

    def _slices(self) -> tuple[slice, slice, slice]:
        d, h, w = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return d, h, w


def voxel_mm3(affine: Affine) -> float:
    """Volume of a voxel, mm3."""
    return float(abs(np.linalg.det(affine[:3, :3])))


def shape_of(image: NDArray[Any]) -> Shape:
    """Lengths along the three axes."""
    d, h, w = image.shape
    return d, h, w


def in_memory_order(*volumes: NDArray[Any]) -> list[NDArray[Any]]:
    """Views of volumes of one shape, their axes turned so that the first is walked through as it lies in memory.

    NIfTI files store i fastest, so that going through (i, j, k) plane by plane takes several times longer.
    """
    slowest_first = np.argsort([-abs(stride) for stride in volumes[0].strides])
    return [volume.transpose(slowest_first) for volume in volumes]


def orientation(affine: Affine) -> str:
    """Axis codes of the voxel grid, nearest to the world axes: `LPS` when i runs to the left, j back, k up."""
    return "".join(nib.orientations.aff2axcodes(affine))


def reorientation(affine: Affine, target: str | None, transpose: Shape) -> Reorientation:
    """From the grid of `affine` to axis codes `target` (None: as stored), then reversed to (k, j, i) and transposed.

    nnU-Net's readers hand it arrays as (k, j, i); `transpose` is the plan's `transpose_forward`.
    """
    start = io_orientation(affine)
    end = start if target is None else axcodes2ornt(tuple(target))
    transform = ornt_transform(start, end).astype(int)
    sources = [int(np.flatnonzero(transform[:, 0] == out)[0]) for out in range(3)]
    reverse = [bool(transform[source, 1] == -1) for source in sources]
    outs = [2 - axis for axis in transpose]
    d, h, w = (sources[out] for out in outs)
    flip_d, flip_h, flip_w = (reverse[out] for out in outs)
    return Reorientation((d, h, w), (flip_d, flip_h, flip_w))
