"""The steps between the two networks of a cascade, on arrays: a mask network, then a region network inside the mask.

They do what NiChart_DLMUSE 1.0.10 does between DLICV and DLMUSE. All arrays lie on one grid, that of the cascade's
orientation (LPS for DLMUSE), because the padding of the box is not the same on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.network.preprocess import Box
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.results.islands import largest_component
from edgemuse.runtime.scan.geometry import Reorientation, reorientation
from edgemuse.runtime.scan.types import Affine, Image, Labels, Shape

Mask = NDArray[np.bool_]
"""(i, j, k), True inside."""
UNCHANGED = (2, 1, 0)
"""A plan's transpose that leaves the axes in the order i, j, k."""


def turn_to(affine: Affine, orientation: str) -> Reorientation:
    """From the grid of `affine` to the grid whose axes run towards the codes `orientation`, (i, j, k) on both sides."""
    return reorientation(affine, orientation, UNCHANGED)


def turned_affine(affine: Affine, shape: Shape, turn: Reorientation) -> Affine:
    """Affine of the array that `turn` makes of one of `shape` with `affine`."""
    moved = np.zeros((4, 4))
    moved[3, 3] = 1
    for axis, (source, flip) in enumerate(zip(turn.axes, turn.flips, strict=True)):
        moved[source, axis] = -1 if flip else 1
        moved[source, 3] = shape[source] - 1 if flip else 0
    turned: Affine = affine @ moved
    return turned


def padded_box(mask: Mask, percent: int) -> Box:
    """Where to crop: the box of `mask`'s largest component, `percent` of its extent wider on both sides.

    The padding, per axis, is `percent` of the distance from the first to the last voxel, rounded half to even, and ends
    at the border of the volume. Upstream counts it from the last voxel, as the end that is not included, so that it is
    one voxel less there. We do the same, but never cut the component itself: upstream does where the padding is 0.

    Raises:
        ValueError: the mask is empty. Upstream takes the whole volume then.
    """
    found = ndimage.find_objects(largest_component(mask).view(np.uint8))
    if not found:
        raise ValueError("the mask is empty")
    i, j, k = (_padded(side, size, percent) for side, size in zip(found[0], mask.shape, strict=True))
    return i, j, k


def _padded(side: slice, size: int, percent: int) -> slice:
    first, last = side.start, side.stop - 1
    padding = round((last - first) * percent / 100)
    return slice(max(first - padding, 0), min(max(last + padding, last + 1), size))


def masked_crop(image: Image, mask: Mask, box: Box) -> Image:
    """The part of `image` inside `box`, 0 outside the mask: all of it, not its largest component alone."""
    return np.where(mask[box], image[box], np.float32(0))


def paste(classes: Labels, box: Box, shape: Shape) -> Labels:
    """`classes` at `box` in a volume of `shape`, background elsewhere."""
    whole = np.zeros(shape, classes.dtype)
    whole[box] = classes
    return whole


def fill(classes: Labels, mask: Mask, labels: Sequence[Label], number: int) -> Labels:
    """Give the class `number` to the voxels of `mask` that have no label: for DLMUSE mostly cortical CSF.

    Args:
        classes: (i, j, k) class numbers.
        mask: on the same grid.
        labels: of the classes; those of index 0 count as no label.
        number: of the new class.

    Returns:
        A copy, of a type that can hold `number`.
    """
    background = np.array([label.index == 0 for label in labels])
    filled: NDArray[Any] = classes.astype(np.result_type(classes.dtype, np.min_scalar_type(number)))
    filled[background[classes] & mask] = number
    return filled
