"""The sliding window: nnU-Net's grid and window, and what merging must keep whatever the network returns."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemuse.runtime.network.tiles import (
    Sums,
    gaussian_window,
    largest_tiles,
    merge_tiles,
    mirrored,
    plan_tiles,
    tile_starts,
)

SIZES = st.tuples(*[st.integers(1, 11)] * 3)
PATCHES = st.tuples(*[st.sampled_from([2, 3, 5, 8])] * 3)
STEPS = st.sampled_from([0.25, 0.5, 0.7, 1.0])


class DoubleSums(Sums):
    """In double precision."""

    dtype = np.float64


def merged(image, patch, step, infer, sums=Sums, threads=1):
    """The mean of all tiles, from slabs and, the same bit for bit, from blocks."""
    plan = plan_tiles(image.shape, patch, step)
    slabs = [(corner, slab.copy()) for corner, slab in merge_tiles(image, plan, infer, threads=threads, new_sums=sums)]
    depths = [len(slab) for _, slab in slabs]
    starts = itertools.accumulate([0, *depths[:-1]])
    assert [corner for corner, _ in slabs] == [(start, 0, 0) for start in starts]
    whole = np.concatenate([slab for _, slab in slabs])
    pieces, filled = np.full_like(whole, np.nan), np.zeros(image.shape, int)
    for corner, block in merge_tiles(image, plan, infer, threads=threads, new_sums=sums, slabs=False):
        part = tuple(slice(first, first + size) for first, size in zip(corner, block.shape[:3], strict=True))
        pieces[part] = block
        filled[part] += 1
    assert (filled == 1).all()
    np.testing.assert_array_equal(pieces, whole)
    return whole


@given(SIZES, PATCHES, STEPS)
def test_a_network_that_returns_a_constant_gives_it_at_every_voxel(shape, patch, step):
    value = np.float32(-3.7)
    result = merged(np.ones(shape, np.float32), patch, step, lambda tile: np.full((*patch, 2), value))
    assert result.shape == (*shape, 2)
    np.testing.assert_allclose(result, value, rtol=5e-6)  # up to 64 tiles are added in float32


@given(SIZES, PATCHES, STEPS)
def test_a_voxelwise_network_gives_its_own_output(shape, patch, step):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    result = merged(image, patch, step, lambda tile: np.stack([tile, 2 * tile + 1], axis=-1))
    np.testing.assert_allclose(result, np.stack([image, 2 * image + 1], axis=-1), rtol=1e-5, atol=1e-6)


@given(SIZES, PATCHES, STEPS)
@settings(max_examples=30)
def test_blocks_equal_a_sum_over_the_whole_volume(shape, patch, step):
    """The network depends on where its tile lies, so that every weight matters."""
    rng = np.random.default_rng(1)
    image = rng.normal(size=shape).astype(np.float32)
    ramp = rng.normal(size=patch).astype(np.float32)
    plan, window = plan_tiles(shape, patch, step), gaussian_window(patch)
    padded = np.pad(image, plan.pad)
    total, weight = np.zeros(padded.shape), np.zeros(padded.shape)
    for corner in itertools.product(*plan.starts):
        tile = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        total[tile] += (padded[tile] * ramp).astype(np.float64) * window
        weight[tile] += window
    inner = tuple(slice(before, before + size) for (before, _), size in zip(plan.pad, shape, strict=True))
    for sums, tolerance in ((Sums, 1e-4), (DoubleSums, 1e-12)):
        result = merged(image, patch, step, lambda tile: (tile * ramp)[..., None], sums)
        np.testing.assert_allclose(result[..., 0], (total / weight)[inner], rtol=tolerance, atol=tolerance)


@given(SIZES, PATCHES, STEPS)
@settings(max_examples=30)
def test_half_precision_is_added_up_in_single(shape, patch, step):
    """The same bits as if the network had returned its rounded features in single precision."""
    image = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    halves = merged(image, patch, step, lambda tile: np.stack([tile, tile], axis=-1).astype(np.float16))
    singles = merged(image.astype(np.float16).astype(np.float32), patch, step, lambda tile: np.stack([tile] * 2, -1))
    np.testing.assert_array_equal(halves, singles)


def test_threads_change_nothing():
    image = np.random.default_rng(3).normal(size=(40, 21, 18)).astype(np.float32)
    one, three = (merged(image, (16, 12, 8), 0.5, lambda tile: tile[..., None], threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_mirrored_copies_in_half_precision_are_averaged_in_single():
    tile = np.random.default_rng(4).normal(size=(4, 6, 8)).astype(np.float16).astype(np.float32)
    result = mirrored(lambda tile: tile[..., None].astype(np.float16), (0, 1, 2))(tile)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[..., 0], tile, rtol=1e-6)


STRIDES = st.tuples(*[st.sampled_from([1, 2, 4])] * 3)


@given(SIZES, PATCHES, STRIDES)
def test_large_tiles_begin_with_the_whole_and_end_with_the_patch(shape, patch, stride):
    patch = tuple(-(-side // unit) * unit for side, unit in zip(patch, stride, strict=True))
    plans = list(largest_tiles(shape, patch, stride))
    counts = [plan.count for plan in plans]
    assert counts == sorted(counts)
    first, last = plans[0], plans[-1]
    assert first.count == 1
    assert all(0 <= side - size < unit for side, size, unit in zip(first.patch, shape, stride, strict=True))
    assert all(side <= max(size, tile) for side, tile, size in zip(last.patch, patch, shape, strict=True))
    assert all(side % unit == 0 for plan in plans for side, unit in zip(plan.patch, stride, strict=True))


@given(SIZES, PATCHES, STRIDES)
@settings(max_examples=30)
def test_large_tiles_share_half_a_patch_and_cover_everything(shape, patch, stride):
    patch = tuple(-(-side // unit) * unit for side, unit in zip(patch, stride, strict=True))
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for plan in itertools.islice(largest_tiles(shape, patch, stride), 6):
        slabs = merge_tiles(image, plan, lambda tile: tile[..., None].copy())
        whole = np.concatenate([slab.copy() for _, slab in slabs])
        np.testing.assert_allclose(whole[..., 0], image, rtol=1e-5, atol=1e-6)
        for starts, side, tile in zip(plan.starts, plan.patch, patch, strict=True):
            assert all(first + side - second >= tile // 2 for first, second in itertools.pairwise(starts))


@given(st.integers(1, 400), st.integers(4, 128), STEPS)
def test_tiles_cover_the_axis_and_are_no_further_apart_than_the_step(size, tile, step):
    size = max(size, tile)
    starts = tile_starts(size, tile, tile * step)
    assert starts[0] == 0
    assert starts[-1] == size - tile
    assert all(0 < b - a <= np.ceil(tile * step) for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize("axes", [(), (0,), (2,), (0, 1), (0, 1, 2)])
def test_mirroring_averages_every_combination_of_axes(axes):
    tile = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(np.float32)
    ramp = np.random.default_rng(3).normal(size=(3, 4, 5)).astype(np.float32)
    subsets = [s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n)]
    expected = np.mean([np.flip(np.flip(tile, s) * ramp, s) for s in subsets], axis=0)
    found = mirrored(lambda x: (x * ramp)[..., None], axes)(tile)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-5, atol=1e-6)


def test_an_engine_that_reuses_its_buffer_is_mirrored_right():
    buffer = np.empty((2, 3, 4, 1), np.float32)

    def infer(tile):
        np.cumsum(tile[..., None], axis=0, out=buffer)
        return buffer

    tile = np.random.default_rng(4).normal(size=buffer.shape[:3]).astype(np.float32)
    expected = (tile.cumsum(0) + np.flip(np.flip(tile, 0).cumsum(0), 0)) / 2
    np.testing.assert_allclose(mirrored(infer, (0,))(tile)[..., 0], expected, rtol=1e-5)


def test_only_what_later_tiles_touch_is_kept():
    """Blocks that are handed on are dropped, and none is made before a tile touches it."""
    plan, most = plan_tiles((20, 12, 12), (8, 8, 8), 0.5), {}
    for slabs in (True, False):
        made = []

        def sums(*arguments, made=made):
            made.append(Sums(*arguments))
            return made[0]

        held = []

        def infer(tile, made=made, held=held):
            held.append(sum(weights.size for _, weights in made[0].blocks.values()))
            return tile[..., None].copy()

        for _ in merge_tiles(np.ones(plan.shape, np.float32), plan, infer, new_sums=sums, slabs=slabs):
            pass
        assert not made[0].blocks
        most[slabs] = max(held)
    patch_deep = 8 * 12 * 12
    assert most[True] <= patch_deep
    assert most[False] < 0.8 * patch_deep


def test_progress_hears_of_every_tile():
    plan = plan_tiles((20, 9, 9), (8, 8, 8), 0.5)
    calls = []
    for _ in merge_tiles(
        np.ones((20, 9, 9), np.float32),
        plan,
        lambda tile: tile[..., None].copy(),
        lambda: calls.append(1),
    ):
        pass
    assert len(calls) == plan.count == 4 * 2 * 2


class TestAgainstNnunet:
    """nnU-Net's own functions on the same numbers."""

    @pytest.mark.parametrize("patch", [(112, 128, 96), (64, 80, 64), (5, 7, 9), (16, 16, 4)])
    def test_the_window_is_bit_for_bit_the_same(self, patch):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        sliding = pytest.importorskip(
            "nnunetv2.inference.sliding_window_prediction", reason="nnunetv2 is not installed"
        )
        expected = sliding.compute_gaussian(patch, 1 / 8, 10, dtype=torch.float16, device=torch.device("cpu"))
        np.testing.assert_array_equal(gaussian_window(patch), expected.numpy().astype(np.float32))

    @given(st.tuples(*[st.integers(16, 300)] * 3), st.tuples(*[st.sampled_from([16, 48, 112])] * 3), STEPS)
    def test_the_grid_is_the_same(self, shape, patch, step):
        sliding = pytest.importorskip(
            "nnunetv2.inference.sliding_window_prediction", reason="nnunetv2 is not installed"
        )
        whole = tuple(max(size, tile) for size, tile in zip(shape, patch, strict=True))
        expected = sliding.compute_steps_for_sliding_window(whole, patch, step)
        assert [list(axis) for axis in plan_tiles(shape, patch, step).starts] == expected
