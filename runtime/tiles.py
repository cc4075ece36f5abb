"""The sliding window: where the tiles lie, how they are weighted, and adding them up slab by slab.

Tiles are run in order of depth. As soon as no later tile can touch the front of the sum, that slab is divided by its
weights and handed on, so the sum is never larger than one patch in depth: memory does not grow with depth.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from edgemuse.runtime.types import Features, Image, Shape

Infer = Callable[[NDArray[np.float32]], Features]
"""(d, h, w) -> (d, h, w, F)"""
MOST_VALUES = 1 << 30
"""In one feature map: libraries count in 32 bits."""


@dataclass(frozen=True)
class TilePlan:
    """Where tiles of shape `patch` start in an image padded by `pad` (before, after) to at least one patch."""

    shape: Shape
    patch: Shape
    pad: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(len(axis) for axis in self.starts)


def plan_tiles(shape: Shape, patch: Shape, step: float) -> TilePlan:
    """nnU-Net's grid: evenly spread starts, at most `step` patches apart, the image centred in its zero padding."""
    return _spread(shape, patch, [size * step for size in patch])


def largest_tiles(shape: Shape, patch: Shape, stride: Shape) -> Iterator[TilePlan]:
    """Ever more and smaller tiles: first one for the whole image, last the patch; neighbours share half a patch.

    Tiles are multiples of `stride` and may be smaller than the patch where the image is. Of plans with equally many
    tiles the one with the smallest comes first.
    """
    most = [math.ceil(2 * size / side) for size, side in zip(shape, patch, strict=True)]
    plans = []
    for counts in itertools.product(*(range(1, max(count, 1) + 1) for count in most)):
        tile = [_side(*axis) for axis in zip(shape, counts, patch, stride, strict=True)]
        apart = [max(side - half // 2, 1) for side, half in zip(tile, patch, strict=True)]
        plans.append(_spread(shape, (tile[0], tile[1], tile[2]), apart))
    plans.sort(key=lambda plan: (plan.count, math.prod(plan.patch)))
    yield from plans


def _side(size: int, count: int, patch: int, stride: int) -> int:
    """Side of `count` tiles that cover `size` and share half a patch, not smaller than a patch unless one does."""
    side = math.ceil((size + (count - 1) * (patch // 2)) / count)
    return -(-(side if count == 1 else max(side, patch)) // stride) * stride


def _spread(shape: Shape, patch: Shape, apart: Sequence[float]) -> TilePlan:
    """Tiles at most `apart` voxels from one another."""
    missing = [max(tile - size, 0) for size, tile in zip(shape, patch, strict=True)]
    d, h, w = ((gap // 2, gap - gap // 2) for gap in missing)
    sizes = (max(size, tile) for size, tile in zip(shape, patch, strict=True))
    start_d, start_h, start_w = (tile_starts(*axis) for axis in zip(sizes, patch, apart, strict=True))
    return TilePlan(shape, patch, (d, h, w), (start_d, start_h, start_w))


def tile_starts(size: int, tile: int, apart: float) -> tuple[int, ...]:
    """First voxels of the tiles along one axis, as nnU-Net's `compute_steps_for_sliding_window` gives them."""
    last = size - tile
    count = math.ceil(last / apart) + 1
    return tuple(round(last / (count - 1) * n) for n in range(count)) if count > 1 else (0,)


@functools.lru_cache(maxsize=1)
def gaussian_window(patch: Shape) -> NDArray[np.float32]:
    """(d, h, w) weights of a tile: a Gaussian of sigma patch/8, its peak 10.

    Rounded to half precision with zeros lifted to the smallest weight left, as nnU-Net's `compute_gaussian`.
    """
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    window = ndimage.gaussian_filter(impulse, [n / 8 for n in patch], order=0, mode="constant", cval=0)
    half = (window / (window.max() / 10)).astype(np.float32).astype(np.float16)  # torch rounds twice as well
    half[half == 0] = half[half != 0].min()
    weights: NDArray[np.float32] = half.astype(np.float32)
    weights.setflags(write=False)
    return weights


def mirrored(infer: Infer, axes: Sequence[int]) -> Infer:
    """Average `infer` over every combination of mirrored `axes` of (d, h, w), each mirrored back."""
    flips = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    if len(flips) == 1:
        return infer

    def averaged(tile: NDArray[np.float32]) -> Features:
        total = infer(tile).astype(np.float32)
        for flip in flips[1:]:
            total += np.flip(infer(np.ascontiguousarray(np.flip(tile, flip))), flip)
        total /= len(flips)
        return total

    return averaged


class Sums:
    """Weighted features of overlapping tiles, added up row by row along depth, in `dtype`.

    Args:
        size: (d, h, w) of the sum.
        window: (d, h, w) weights of a tile.
        pool: where rows are added up at once.
    """

    def __init__(self, size: Shape, window: NDArray[np.float32], pool: Executor, dtype: DTypeLike = np.float32) -> None:
        self.weights: Features = np.zeros(size, dtype)
        self.total: Features | None = None  # until it is known how many features there are
        self.window, self.pool = window, pool

    def channels(self, features: Features) -> int:
        """How many numbers are added up at each voxel."""
        return int(features.shape[-1])

    def add(self, features: Features, corner: tuple[int, int]) -> None:
        """Add the features (d, h, w, F) of a tile that begins at `corner` (h, w)."""
        if self.total is None:
            self.total = np.zeros((*self.weights.shape, self.channels(features)), self.weights.dtype)
        total, window = self.total, self.window
        rows, columns = (slice(first, first + size) for first, size in zip(corner, window.shape[1:], strict=True))

        def add(depth: int) -> None:  # so that a product stays in the processor's cache
            self.add_row(total[depth, rows, columns], features[depth], window[depth])

        list(self.pool.map(add, range(len(window))))
        self.weights[:, rows, columns] += window

    def add_row(self, total: Features, features: Features, weights: NDArray[np.float32]) -> None:
        """Add `features` (h, w, F), weighted by `weights` (h, w), to `total`."""
        total += features * weights[..., None].astype(total.dtype, copy=False)

    def divided(self, rows: int) -> Features:
        """The weighted mean (rows, h, w, F) at the front, divided in place."""
        assert self.total is not None
        slab = self.total[:rows]
        list(self.pool.map(self.divide_row, slab, self.weights[:rows]))
        return slab

    def divide_row(self, total: Features, weights: Features) -> None:
        """Divide `total` (h, w, F) by `weights` (h, w)."""
        total /= weights[..., None]

    def advance(self, done: int) -> None:
        """Drop the first `done` rows, move the others up and clear what is left behind them."""
        assert self.total is not None
        for sums in (self.total, self.weights):
            kept = len(sums) - done
            for row in range(kept):  # row by row, because numpy copies overlapping arrays through a temporary one
                sums[row] = sums[row + done]
            sums[kept:] = 0


NewSums = Callable[[Shape, NDArray[np.float32], Executor], Sums]
"""As `Sums` is made."""


def merge_tiles(
    image: Image,
    plan: TilePlan,
    infer: Infer,
    progress: Callable[[], None] = lambda: None,
    threads: int = 1,
    new_sums: NewSums | None = None,
) -> Iterator[tuple[int, Features]]:
    """Run every tile and yield the weighted mean of their features, (n, h, w, F), slab after slab along depth.

    Args:
        image: (d, h, w), of `plan.shape`.
        plan: where the tiles lie.
        infer: one tile's features, in single or half precision.
        progress: called after each tile.
        threads: rows that are added up at once.
        new_sums: makes what tiles are added up in; None: sums in float32, and a single tile stays as it is.

    Yields:
        The depth at which a slab starts, and the slab: a view that is valid until the next one is asked for.
    """
    # before the large arrays, because what is kept behind them in the heap keeps their memory
    window = gaussian_window(plan.patch) if new_sums or plan.count > 1 else None
    padded = np.pad(image, plan.pad)
    (top, _), (left, _), (near, _) = plan.pad
    _, height, width = plan.shape
    if window is None:
        features = infer(padded)
        progress()
        yield 0, features[top : top + plan.shape[0], left : left + height, near : near + width]
        return
    depth = plan.patch[0]
    with ThreadPoolExecutor(threads) as pool:
        sums = (new_sums or Sums)((depth, *padded.shape[1:]), window, pool)
        for start, following in itertools.pairwise((*plan.starts[0], padded.shape[0])):
            for row, column in itertools.product(*plan.starts[1:]):
                sums.add(infer(cut(padded, (start, row, column), plan.patch)), (row, column))
                progress()
            done = min(following - start, depth)
            slab = sums.divided(done)
            first, last = max(start, top), min(start + done, top + plan.shape[0])
            if first < last:
                rows = slice(first - start, last - start)
                yield first - top, slab[rows, left : left + height, near : near + width]
            sums.advance(done)


def cut(padded: Image, corner: Sequence[int], patch: Shape) -> NDArray[np.float32]:
    """The tile of shape `patch` that begins at `corner`."""
    box = tuple(slice(first, first + size) for first, size in zip(corner, patch, strict=True))
    return np.ascontiguousarray(padded[box])
