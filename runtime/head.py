"""The deferred head: from merged features to class numbers on the scan's grid, slab by slab.

A 1x1x1 convolution, the weighted mean over tiles, the mean over mirrored copies and linear resampling are all linear
and their weights sum to one, so they commute. Applying the head last gives the same labels, and C channels never
exist for more than a few thousand voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgemuse.runtime.bundle import Head
from edgemuse.runtime.resample import AxisMatrices
from edgemuse.runtime.types import Features, Labels, Shape

BLOCK = 2048
"""Voxels whose logits exist at once: (2048, 152) float32 stays in the second-level cache."""


def class_dtype(classes: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every class number."""
    return np.min_scalar_type(classes - 1)


def classify(features: Features, head: Head | None, classes: int) -> Labels:
    """The class with the highest logit at each voxel; the first of equals, as `argmax` does.

    Args:
        features: (F, ...), or logits (C, ...) where `head` is None.
        head: from features to logits.
        classes: C.
    """
    shape = features.shape[1:]
    flat = np.ascontiguousarray(features).reshape(len(features), -1)
    labels = np.empty(flat.shape[1], class_dtype(classes))
    weight = None if head is None else np.ascontiguousarray(head.weight.T)
    for start in range(0, flat.shape[1], BLOCK):
        block = flat[:, start : start + BLOCK].T
        logits = np.ascontiguousarray(block) if weight is None or head is None else block @ weight + head.bias
        # argmax along contiguous memory is vectorised; along the first axis it is ten times slower.
        labels[start : start + BLOCK] = logits.argmax(axis=1)
    return labels.reshape(shape)


def label_slabs(
    slabs: Iterable[tuple[int, Features]],
    head: Head | None,
    classes: int,
    matrices: AxisMatrices,
    shape: Shape,
) -> Labels:
    """Consume merged features and return class numbers of `shape` (d, h, w), the scan's grid inside the crop.

    Args:
        slabs: consecutive along depth, each with the depth where it starts, at the network's spacing.
        head: None where the slabs hold logits.
        classes: C.
        matrices: from the network's grid to `shape`.
        shape: of the result.
    """
    labels = np.empty(shape, class_dtype(classes))
    rows = _rows(slabs) if matrices[0] is None else _resampled_rows(slabs, matrices[0])
    for row, plane in rows:  # so that only one row exists at the scan's spacing
        labels[row] = classify(_resample_plane(plane, matrices), head, classes)
    return labels


def _rows(slabs: Iterable[tuple[int, Features]]) -> Iterator[tuple[int, Features]]:
    """The rows (F, h, w) of the slabs as they are."""
    for start, slab in slabs:
        for offset in range(slab.shape[1]):
            yield start + offset, slab[:, offset]


def _resampled_rows(
    slabs: Iterable[tuple[int, Features]], matrix: NDArray[np.float32]
) -> Iterator[tuple[int, Features]]:
    """Rows (F, h, w) on the output's depth grid, each as soon as the slabs it needs have come."""
    used = [np.flatnonzero(weights) for weights in matrix]
    first, carried, row = 0, None, 0
    for start, slab in slabs:
        rows = slab if carried is None else np.concatenate([carried, slab], axis=1)
        end = start + slab.shape[1]
        while row < len(matrix) and used[row][-1] < end:
            yield row, np.tensordot(rows[:, used[row] - first], matrix[row, used[row]], axes=(1, 0))
            row += 1
        if row < len(matrix):
            needed = min(used[row][0], end)
            carried = rows[:, needed - first :].copy()
            first = needed


def _resample_plane(features: Features, matrices: AxisMatrices) -> Features:
    """Resample the last two axes of (F, ..., h, w)."""
    _, rows, columns = matrices
    if rows is not None:
        features = np.matmul(rows, features)
    if columns is not None:
        features = np.matmul(features, columns.T)
    return features
