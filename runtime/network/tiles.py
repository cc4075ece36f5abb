"""The sliding window: where the tiles lie, how they are weighted, and adding them up block by block.

Tiles are run in order of depth, then of height, then of width. As soon as no later tile can touch a block of the sum,
it is divided by its weights, handed on and dropped, so there is never more of the sum than one patch in depth: memory
does not grow with depth.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage

from edgemuse.runtime.scan.types import Features, Image, Shape

Infer = Callable[[NDArray[np.float32]], Features]
"""(d, h, w) -> (d, h, w, F)"""
PIECE = 1 << 19
"""Numbers worked on at once: few enough for the caches, and so many that threads do not wait for the interpreter."""
MOST_VALUES = 1 << 30
"""Most numbers in one feature map: libraries count them in 32 bits."""


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
    """Plan of tiles that begin at most `apart` voxels from one another."""
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


Index: TypeAlias = tuple[int, int, int]
Part: TypeAlias = tuple[slice, slice, slice]
"""Three values, along depth, height and width."""


class Sums:
    """Weighted features of overlapping tiles, added up in blocks: the voxels of a block are touched by the same tiles.

    Args:
        plan: where the tiles lie.
        window: (d, h, w) weights of a tile.
        pool: where rows are added up at once.
        slabs: blocks reach over all of height and width all the same.
    """

    dtype: DTypeLike = np.float32
    """Type of the sums, and thereby of what is added up."""

    def __init__(self, plan: TilePlan, window: NDArray[np.float32], pool: Executor, slabs: bool) -> None:
        self.window, self.pool = window, pool
        self._edges = [
            sorted({*starts, *(first + side for first in starts)})
            for starts, side in zip(plan.starts, plan.patch, strict=True)
        ]
        if slabs:
            self._edges[1:] = [[edges[0], edges[-1]] for edges in self._edges[1:]]
        self.blocks: dict[Index, tuple[Features, Features]] = {}

    def channels(self, features: Features) -> int:
        """How many numbers are added up at each voxel."""
        return int(features.shape[-1])

    def add(self, features: Features, corner: Index) -> None:
        """Add the features (d, h, w, F) of a tile that begins at `corner`."""
        pieces = []
        for where, part, tile in self._touched(corner):
            if where not in self.blocks:
                self.blocks[where] = self._new_block(where, self.channels(features))
            total, weights = self.blocks[where]
            weights[part] += self.window[tile]
            whole = (total[part], features[tile], self.window[tile])
            pieces += [[array[piece] for array in whole] for piece in _pieces(whole[0].shape)]
        list(self.pool.map(lambda piece: self.add_piece(*piece), pieces))

    def _touched(self, corner: Index) -> Iterator[tuple[Index, Part, Part]]:
        """The blocks that a tile at `corner` touches: where each begins, and the part of it and of the tile."""
        axes = []
        for edges, first, side in zip(self._edges, corner, self.window.shape, strict=True):
            spans = ((low, max(low, first), min(high, first + side)) for low, high in pairwise(edges))
            axes.append([(low, slice(a - low, b - low), slice(a - first, b - first)) for low, a, b in spans if a < b])
        for (d, part_d, tile_d), (h, part_h, tile_h), (w, part_w, tile_w) in itertools.product(*axes):
            yield (d, h, w), (part_d, part_h, part_w), (tile_d, tile_h, tile_w)

    def _new_block(self, where: Index, channels: int) -> tuple[Features, Features]:
        shape = [edges[edges.index(low) + 1] - low for edges, low in zip(self._edges, where, strict=True)]
        return np.zeros((*shape, channels), self.dtype), np.zeros(shape, self.dtype)

    def add_piece(self, total: Features, features: Features, weights: NDArray[np.float32]) -> None:
        """Add `features` (d, h, w, F), weighted by `weights` (d, h, w), to `total`."""
        total += features * weights[..., None].astype(total.dtype, copy=False)

    def finished(self, corner: Index, following: Sequence[float]) -> list[Index]:
        """Where the blocks begin that a tile at `corner` touches and no later one.

        `following`: along each axis, where the next tiles begin, or infinity.
        """
        axes = [
            [low for low, high in pairwise(edges) if first < high <= limit]
            for edges, first, limit in zip(self._edges, corner, following, strict=True)
        ]
        return [(d, h, w) for d, h, w in itertools.product(*axes)]

    def take(self, where: Index) -> Features:
        """The weighted mean (d, h, w, F) of the block that begins at `where`; its sums are dropped."""
        total, weights = self.blocks.pop(where)
        list(self.pool.map(lambda piece: self.divide_piece(total[piece], weights[piece]), _pieces(total.shape)))
        return total

    def divide_piece(self, total: Features, weights: Features) -> None:
        """Divide `total` (d, h, w, F) by `weights` (d, h, w)."""
        total /= weights[..., None]


def _pieces(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut (d, h, w, F) along depth, and along height where a plane is large, to about `PIECE` numbers each."""
    depth, height, width, channels = shape
    row = width * channels
    deep = max(PIECE // (height * row), 1)
    high = max(PIECE // row, 1) if deep == 1 else height
    for d, h in itertools.product(range(0, depth, deep), range(0, height, high)):
        yield slice(d, d + deep), slice(h, h + high)


NewSums = Callable[[TilePlan, NDArray[np.float32], Executor, bool], Sums]
"""Makes the sums for an image, as the class `Sums` does."""
Block: TypeAlias = tuple[Index, Features]
"""Where a block begins in the image, and its features (d, h, w, F)."""


def merge_tiles(
    image: Image,
    plan: TilePlan,
    infer: Infer,
    progress: Callable[[], None] = lambda: None,
    threads: int = 1,
    new_sums: NewSums | None = None,
    slabs: bool = True,
) -> Iterator[Block]:
    """Run every tile and yield the weighted mean of their features, block after block.

    Args:
        image: (d, h, w), of `plan.shape`.
        plan: where the tiles lie.
        infer: one tile's features, in single or half precision.
        progress: called after each tile.
        threads: rows that are added up at once.
        new_sums: makes what tiles are added up in; None: sums in float32, and a single tile stays as it is.
        slabs: blocks hold all of height and width and follow one another along depth; else they are as small as the
            tiles allow, which takes less memory.

    Yields:
        Blocks, each valid until the next one is asked for.
    """
    # before the large arrays, because what is kept behind them in the heap keeps their memory
    window = gaussian_window(plan.patch) if new_sums or plan.count > 1 else None
    padded = np.pad(image, plan.pad) if any(map(any, plan.pad)) else image
    if window is None:
        features = infer(padded)
        progress()
        yield _unpadded((0, 0, 0), features, plan)
        return
    ahead = [(*starts[1:], math.inf) for starts in plan.starts]
    with ThreadPoolExecutor(threads) as pool:
        sums = (new_sums or Sums)(plan, window, pool, slabs)
        for i, j, k in np.ndindex(*(len(starts) for starts in plan.starts)):
            corner = (plan.starts[0][i], plan.starts[1][j], plan.starts[2][k])
            sums.add(infer(cut(padded, corner, plan.patch)), corner)
            progress()
            following = (ahead[0][i], ahead[1][j], ahead[2][k])
            for where in sums.finished(corner, following):
                yield _unpadded(where, sums.take(where), plan)


def _unpadded(corner: Index, features: Features, plan: TilePlan) -> Block:
    """A block that begins at `corner` of the padded image, without what was padded."""
    inner = []
    for first, size, whole, (before, _) in zip(corner, features.shape, plan.shape, plan.pad, strict=False):
        inner.append((max(first, before), min(first + size, before + whole), first, before))
    cropped = features[tuple(slice(low - first, high - first) for low, high, first, _ in inner)]
    d, h, w = (low - before for low, _, _, before in inner)
    return (d, h, w), cropped


def cut(padded: Image, corner: Sequence[int], patch: Shape) -> NDArray[np.float32]:
    """The tile of shape `patch` that begins at `corner`."""
    box = tuple(slice(first, first + size) for first, size in zip(corner, patch, strict=True))
    return np.ascontiguousarray(padded[box])
