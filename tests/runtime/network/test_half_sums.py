"""nnU-Net's sums in half precision: the conversions number by number, and the sums against PyTorch's own."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemuse.engines.errors import BackendError
from edgemuse.runtime.model.bundle import Head
from edgemuse.runtime.model.manifest import Resampling
from edgemuse.runtime.network.half_sums import HalfSums, fold_head, rounded, to_single
from edgemuse.runtime.network.head import label_blocks
from edgemuse.runtime.network.resample import output_matrices
from edgemuse.runtime.network.tiles import gaussian_window, merge_tiles, plan_tiles

ONE = plan_tiles((2, 2, 2), (2, 2, 2), 1.0)

FINITE = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = FINITE[np.isfinite(FINITE)]


def test_every_half_becomes_single():
    np.testing.assert_array_equal(to_single(FINITE), FINITE.astype(np.float32))


def test_numbers_between_two_halves_go_to_the_nearest_and_ties_to_even():
    positive = np.sort(FINITE[FINITE >= 2.0**-14].astype(np.float32))
    middle = (positive[1:] + positive[:-1]) / 2
    for values in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))):
        for signed in (values, -values):
            np.testing.assert_array_equal(rounded(signed.copy()), signed.astype(np.float16))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    patch=st.tuples(*[st.sampled_from([2, 4, 7])] * 3),
    target=st.one_of(st.none(), st.tuples(*[st.integers(1, 19)] * 3)),
    folds=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([1, 128]),
    deferred=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_labels_are_those_of_nnunets_steps_in_pytorch(shape, patch, target, folds, scale, deferred, seed):
    """Its loop over tiles, quotient, sum over folds and rounding after resampling, written with PyTorch's halves."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
    rng = np.random.default_rng(seed)
    classes, features = 5, 3
    image, plan = rng.normal(size=shape).astype(np.float32), plan_tiles(shape, patch, 0.5)
    ramps = rng.integers(-8, 9, (folds, *patch, features)).astype(np.float32)  # few bits, so that logits are exact
    weights = rng.integers(-8, 9, (folds, classes, features)).astype(np.float32)
    biases = (scale * rng.integers(-8, 9, (folds, classes))).astype(np.float32)
    if not deferred:
        folds, ramps, weights, biases = 1, ramps[:1], weights[:1], biases[:1]
    image = np.round(image * 4)
    padded = np.pad(image, plan.pad)
    window = torch.from_numpy(gaussian_window(patch).astype(np.float16))
    total = None
    for ramp, weight, bias in zip(ramps, weights, biases, strict=True):
        sums = torch.zeros((classes, *padded.shape), dtype=torch.half)
        count = torch.zeros(padded.shape, dtype=torch.half)
        for corner in itertools.product(*plan.starts):
            where = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            tile = padded[where][..., None] * ramp
            logits = torch.from_numpy(np.moveaxis(tile @ weight.T + bias, -1, 0).copy())
            logits *= window
            sums[(slice(None), *where)] += logits
            count[where] += window
        torch.div(sums, count, out=sums)
        total = sums if total is None else total.add_(sums)
    if folds > 1:
        total /= folds
    inner = tuple(slice(before, before + size) for size, (before, _) in zip(shape, plan.pad, strict=True))
    expected = total.float().numpy()[(slice(None), *inner)].astype(np.float64)
    matrices = output_matrices(shape, (1, 1, 1), target or shape, (1, 1, 1), Resampling(1))
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is not None:
            expected = np.moveaxis(np.tensordot(matrix.astype(np.float64), expected, (1, axis)), 0, axis)
    expected = expected.astype(np.float16)

    def infer(tile):
        every = [tile[..., None] * ramp for ramp in ramps]
        return np.concatenate(every, axis=-1) if deferred else every[0] @ weights[0].T + biases[0]

    merged_weight = np.concatenate(list(weights), axis=1) / np.float32(folds)
    head = Head(merged_weight, biases.mean(0), biases if folds > 1 else None) if deferred else None
    blocks = merge_tiles(image, plan, infer, new_sums=partial(HalfSums, head=head), slabs=target is not None)
    labels = label_blocks(blocks, None, classes, matrices, target or shape, half=True)
    chosen = np.take_along_axis(expected, labels[None].astype(np.int64), 0)[0]
    if target is None:  # sums of whole numbers are exact, and so is every rounding
        np.testing.assert_array_equal(labels, expected.argmax(0))
    # a float32 sum of neighbours may fall on the other side of a rounding
    shortfall = expected.max(0).astype(np.float64) - chosen
    assert (shortfall <= 2.0**-10 * np.abs(expected).max(0) + 2.0**-24).all()
    assert np.mean(labels == expected.argmax(0)) >= 0.99 or labels.size < 100


def test_single_precision_gives_other_labels():
    """So that the comparison above can tell the two apart."""
    rng = np.random.default_rng(0)
    image, plan = rng.normal(size=(20, 20, 20)).astype(np.float32), plan_tiles((20, 20, 20), (8, 8, 8), 0.5)
    head = Head(rng.normal(size=(30, 2)).astype("f4") / 100, rng.normal(size=30).astype("f4") / 100 + 1)

    def infer(tile):
        return np.stack([tile, tile**2], axis=-1)

    none = (None, None, None)
    single = label_blocks(merge_tiles(image, plan, infer), head, 30, none, image.shape)
    half = label_blocks(
        merge_tiles(image, plan, infer, new_sums=partial(HalfSums, head=head)),
        None,
        30,
        none,
        image.shape,
        half=True,
    )
    assert 0.5 < np.mean(single == half) < 0.999


def test_the_head_of_each_fold():
    rng = np.random.default_rng(1)
    weights, biases = rng.normal(size=(2, 5, 3)).astype("f4"), rng.normal(size=(2, 5)).astype("f4")
    every = fold_head(Head(np.concatenate(list(weights), axis=1) / np.float32(2), biases.mean(0), biases))
    features = rng.normal(size=6).astype("f4")
    expected = [weight @ part + bias for weight, part, bias in zip(weights, np.split(features, 2), biases, strict=True)]
    np.testing.assert_allclose(every.weight @ features + every.bias, np.concatenate(expected), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(value):
    with ThreadPoolExecutor(1) as pool:
        sums = HalfSums(ONE, gaussian_window(ONE.patch), pool, slabs=True)
        with pytest.raises(BackendError, match="NaN or infinity"):
            sums.add(np.full((2, 2, 2, 3), value, np.float32), (0, 0, 0))


def test_logits_that_cannot_be_added_up_are_refused():
    with ThreadPoolExecutor(1) as pool:
        sums = HalfSums(ONE, gaussian_window(ONE.patch), pool, slabs=True)
        sums.add(np.full((2, 2, 2, 3), 1e6, np.float32), (0, 0, 0))
        with pytest.raises(BackendError, match=r"too large .* --profile balanced"):
            sums.take((0, 0, 0))


def test_means_that_cannot_be_held_are_refused():
    """Of a weight below 1, and of folds."""
    with ThreadPoolExecutor(1) as pool:
        sums = HalfSums(ONE, np.full((2, 2, 2), 0.25, np.float32), pool, slabs=True)
        sums.add(np.full((2, 2, 2, 3), 60000, np.float32), (0, 0, 0))
        _, weights = sums.blocks[0, 0, 0]
        weights /= 2
        with pytest.raises(BackendError, match="too large"):
            sums.take((0, 0, 0))
        head = Head(np.ones((3, 2), "f4") / 2, np.zeros(3, "f4"), np.zeros((2, 3), "f4"))
        sums = HalfSums(ONE, np.ones((2, 2, 2), np.float32), pool, slabs=True, head=head)
        sums.add(np.full((2, 2, 2, 2), 60000, np.float32), (0, 0, 0))
        with pytest.raises(BackendError, match="too large"):
            sums.take((0, 0, 0))
