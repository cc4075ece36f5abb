"""The deferred head: from merged features to class numbers on the scan's grid, block by block.

A 1x1x1 convolution, the weighted mean over tiles, the mean over mirrored copies and linear resampling are all linear
and their weights sum to one, so they commute. Applying the head last gives the same labels, and C channels never
exist for more than a few thousand voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edgemuse.engines.errors import BackendError
from edgemuse.runtime.model.bundle import Head
from edgemuse.runtime.network.half_sums import NOT_FINITE, rounded, to_single
from edgemuse.runtime.network.resample import AxisMatrices
from edgemuse.runtime.network.tiles import Block, Index
from edgemuse.runtime.scan.types import Features, Labels, Shape

BLOCK = 2048
"""Voxels whose logits exist at once: (2048, 152) float32 stays in the second-level cache."""
MOST_LOGITS = 512 * BLOCK
"""Logits that exist at once, however many classes there are."""


def class_dtype(classes: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds every class number."""
    return np.min_scalar_type(classes - 1)


def classify(features: Features, head: Head | None, classes: int) -> Labels:
    """The class with the highest logit at each voxel; the first of equals, as `argmax` does.

    Args:
        features: (..., F), or logits (..., C) where `head` is None.
        head: from features to logits.
        classes: C.
    """
    rows = min(max(MOST_LOGITS // classes, 1), BLOCK)
    flat = features.reshape(-1, features.shape[-1])
    labels = np.empty(len(flat), class_dtype(classes))
    if head is not None:  # the bias as one more feature, which is always 1
        weight = np.vstack([head.weight.T, head.bias])
        ones = np.ones((rows, len(weight)), np.result_type(flat, weight))
        product = np.empty((rows, classes), ones.dtype)
    for start in range(0, len(flat), rows):
        logits = flat[start : start + rows]
        if head is not None:
            block, out = ones[: len(logits)], product[: len(logits)]
            block[:, :-1] = logits
            logits = np.matmul(block, weight, out=out)
        labels[start : start + rows] = logits.argmax(axis=1)
    return labels.reshape(features.shape[:-1])


def label_blocks(
    blocks: Iterable[Block],
    head: Head | None,
    classes: int,
    matrices: AxisMatrices,
    shape: Shape,
    threads: int = 1,
    half: bool = False,
) -> Labels:
    """Consume merged features and return class numbers of `shape` (d, h, w), the scan's grid inside the crop.

    Args:
        blocks: each with where it begins on the network's grid; in single or half precision. They follow one another
            along depth and hold all of height and width if `matrices` resample anything.
        head: None where the blocks hold logits.
        classes: C.
        matrices: from the network's grid to `shape`.
        shape: of the result.
        threads: rows that are worked on at once.
        half: the blocks are finite and in half precision, and what is resampled is rounded to it, as in nnU-Net.

    Raises:
        BackendError: a feature is NaN or infinite.
    """
    labels = np.empty(shape, class_dtype(classes))
    depth, *plane = matrices

    def finish(task: Row) -> None:  # so that only one row a thread exists at the scan's spacing
        (row, left, near), rows, weights = task
        single = to_single(rows) if half else rows.astype(np.float32, copy=False)
        mixed = single[0] if weights is None else np.tensordot(weights, single, 1)
        if not np.isfinite(mixed.sum()):
            raise BackendError(NOT_FINITE)
        resampled = _resample_plane(mixed, *plane)
        if half and any(matrix is not None for matrix in matrices):
            resampled = rounded(np.ascontiguousarray(resampled))
        height, width, _ = resampled.shape
        labels[row, left : left + height, near : near + width] = classify(resampled, head, classes)

    # one thread a product: BLAS's own would wait for each other
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for tasks in _rows(blocks) if depth is None else _resampled_rows(blocks, depth):
            list(pool.map(finish, tasks))
            tasks.clear()  # so that no block is kept while the network runs for the next one
    return labels


Row: TypeAlias = tuple[Index, Features, NDArray[np.float32] | None]
"""Where a row of the result begins, the rows (n, h, w, F) it is made of, and their weights (n,) unless it is one."""


def _rows(blocks: Iterable[Block]) -> Iterator[list[Row]]:
    """The rows of each block, which need no resampling."""
    for (start, left, near), block in blocks:
        yield [((start + offset, left, near), block[offset : offset + 1], None) for offset in range(len(block))]
        del block


def _resampled_rows(slabs: Iterable[Block], matrix: NDArray[np.float32]) -> Iterator[list[Row]]:
    """The rows on the output's depth grid that each slab completes."""
    used = [np.flatnonzero(weights) for weights in matrix]
    first, carried, row = 0, None, 0
    for (start, _, _), slab in slabs:
        rows = slab if carried is None else np.concatenate([carried, slab])
        end = start + len(slab)
        tasks: list[Row] = []
        while row < len(matrix) and used[row][-1] < end:
            span = slice(used[row][0], used[row][-1] + 1)
            tasks.append(((row, 0, 0), rows[span.start - first : span.stop - first], matrix[row, span]))
            row += 1
        yield tasks
        if row < len(matrix):
            needed = min(used[row][0], end)
            carried = rows[needed - first :].copy()
            first = needed
        del slab, rows


def _resample_plane(
    features: Features, rows: NDArray[np.float32] | None, columns: NDArray[np.float32] | None
) -> Features:
    """Resample the first two axes of (h, w, F)."""
    if rows is not None:
        features = np.tensordot(rows, features, 1)
    if columns is not None:
        features = np.matmul(columns, features)
    return features
