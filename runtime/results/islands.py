"""Removing islands: what a network labels far from where the structure is.

Which classes are in one piece is said by the bundle's label table, so that a model exported without it gives what
nnU-Net gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.network.preprocess import nonzero_box
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.types import Labels

TOUCHING = ndimage.generate_binary_structure(3, 3)
"""Voxels that share a corner are connected: folded sheets such as the cortex stay in one piece."""


def remove_islands(classes: Labels, labels: Sequence[Label]) -> int:
    """Keep the largest component of everything labelled, then of each class that is in one piece; in place.

    An island of the first kind becomes background; one of the second takes the class that surrounds most of it.

    Args:
        classes: (i, j, k) class numbers, background 0. Changed.
        labels: of the classes; nothing is done if none is `single`.

    Returns:
        How many voxels changed.
    """
    single = [label.number for label in labels if label.single]
    if not single or not classes.any():
        return 0
    used = nonzero_box(classes)
    inside = classes[tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in used)]  # with what is around it
    changed = _keep_brain(inside)
    boxes = ndimage.find_objects(inside, max_label=max(single))
    return changed + sum(_keep_largest(inside, number, boxes[number - 1]) for number in single if boxes[number - 1])


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest part of `mask` whose voxels share faces; of two equals the first in memory order."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    largest: NDArray[np.bool_] = parts == _largest(parts)
    return largest


def _keep_brain(classes: Labels) -> int:
    inside = classes != 0
    stray = inside & ~largest_component(inside)
    classes[stray] = 0
    return int(np.count_nonzero(stray))


def _keep_largest(classes: Labels, number: int, box: tuple[slice, slice, slice]) -> int:
    parts, count = ndimage.label(classes[box] == number, TOUCHING)
    if count < 2:
        return 0
    largest, changed = _largest(parts), 0
    for part, place in enumerate(ndimage.find_objects(parts), start=1):
        if part != largest:
            first = [outer.start + inner.start for outer, inner in zip(box, place, strict=True)]
            changed += _absorb(classes, parts[place] == part, first)
    return changed


def _largest(parts: NDArray[np.int32]) -> int:
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return int(sizes.argmax())


def _absorb(classes: Labels, island: NDArray[np.bool_], first: list[int]) -> int:
    """Give an island, whose box begins at voxel `first`, the class of most voxels around it."""
    around = tuple(slice(max(start - 1, 0), start + size + 1) for start, size in zip(first, island.shape, strict=True))
    view = classes[around]
    padded = np.zeros(view.shape, bool)
    padded[
        tuple(
            slice(start - a.start, start - a.start + n) for start, a, n in zip(first, around, island.shape, strict=True)
        )
    ] = island
    shell = ndimage.binary_dilation(padded) & ~padded
    view[padded] = np.bincount(view[shell]).argmax() if shell.any() else 0
    return int(island.sum())
