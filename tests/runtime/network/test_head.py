"""The deferred head gives what merging and resampling logits would have given."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemuse.runtime.model.bundle import Head
from edgemuse.runtime.model.manifest import Resampling
from edgemuse.runtime.network.head import class_dtype, classify, label_blocks
from edgemuse.runtime.network.resample import output_matrices
from edgemuse.runtime.network.tiles import merge_tiles, mirrored, plan_tiles

FEATURES, CLASSES = 4, 11


def head_of(rng, features=FEATURES, classes=CLASSES):
    return Head(rng.normal(size=(classes, features)).astype("f4"), rng.normal(size=classes).astype("f4"))


def network_of(rng, patch, features=FEATURES):
    """Depends on position within the tile and mixes neighbours, like a real one."""
    ramp = rng.normal(size=(features, *patch))

    def infer(tile):
        blurred = tile + np.roll(tile, 1, axis=-1)
        return np.moveaxis((blurred.astype(np.float64) * ramp).astype(np.float32), 0, -1)

    return infer


def logits_of(head, features):
    """(d, h, w, C) in float64."""
    return features.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias


def shortfall(logits, labels):
    """By how much the logit of the label chosen stays behind the highest."""
    return logits.max(axis=-1) - np.take_along_axis(logits, labels[..., None].astype(np.int64), axis=-1)[..., 0]


def apply_matrices(volume, matrices):
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            volume = np.moveaxis(np.tensordot(matrix.astype(np.float64), volume, axes=(1, axis)), 0, axis)
    return volume


@settings(max_examples=60)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    target=st.tuples(*[st.integers(1, 19)] * 3),
    patch=st.tuples(*[st.sampled_from([2, 4, 7])] * 3),
    step=st.sampled_from([0.5, 1.0]),
    axes=st.sampled_from([(), (0,), (1, 2), (0, 1, 2)]),
    spacing=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 1.0, 5.0), (4.0, 1.0, 1.0)]),
    order=st.sampled_from([0, 1]),
    folds=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equal_to_merging_and_resampling_logits(shape, target, patch, step, axes, spacing, order, folds, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape).astype(np.float32)
    networks = [network_of(rng, patch) for _ in range(folds)]
    heads = [head_of(rng) for _ in range(folds)]
    plan = plan_tiles(shape, patch, step)
    resampling = Resampling(order)
    matrices = output_matrices(shape, spacing, target, (1.0, 1.0, 1.0), resampling)

    def blocks(infer, slabs=True):
        return merge_tiles(image, plan, mirrored(infer, axes), slabs=slabs)

    def logits(network, head):
        volume = np.concatenate(
            [s.copy() for _, s in blocks(lambda tile: logits_of(head, network(tile)).astype(np.float32))]
        )
        return apply_matrices(volume.astype(np.float64), matrices)

    expected = np.mean([logits(n, h) for n, h in zip(networks, heads, strict=True)], axis=0)
    ensemble = Head(
        np.concatenate([h.weight for h in heads], axis=1) / np.float32(folds), np.mean([h.bias for h in heads], axis=0)
    )
    merged = blocks(
        lambda tile: np.concatenate([n(tile) for n in networks], axis=-1),
        slabs=any(matrix is not None for matrix in matrices),
    )
    labels = label_blocks(merged, ensemble, CLASSES, matrices, target)
    gap = shortfall(expected, labels)
    assert gap.max() <= 2e-5 * np.abs(expected).max()


def test_the_property_above_notices_a_wrong_bias():
    """The same comparison with the bias forgotten: the gap is far beyond rounding."""
    rng = np.random.default_rng(0)
    head, features = head_of(rng), rng.normal(size=(3, 4, 5, FEATURES)).astype("f4")
    expected = logits_of(head, features)
    labels = classify(features, Head(head.weight, 0 * head.bias), CLASSES)
    gap = shortfall(expected, labels)
    assert gap.max() > 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 3])
def test_features_in_half_precision_get_the_labels_of_their_values(threads):
    rng = np.random.default_rng(2)
    head, half = head_of(rng), rng.normal(size=(3, 40, 50, FEATURES)).astype(np.float16)
    for matrices in ((None,) * 3, (rng.random((7, 3), np.float32), None, None)):
        shape = (3 if matrices[0] is None else 7, 40, 50)
        found, wanted = (
            label_blocks([((0, 0, 0), features)], head, CLASSES, matrices, shape, threads)
            for features in (half, half.astype(np.float32))
        )
        np.testing.assert_array_equal(found, wanted)
        assert len(np.unique(found)) > 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 50), (2, 64, 64)])
def test_logits_without_a_head_are_just_compared(shape):
    logits = np.random.default_rng(1).normal(size=(*shape, 5)).astype("f4")
    np.testing.assert_array_equal(classify(logits, None, 5), logits.argmax(axis=-1))


def test_equal_logits_go_to_the_first_class():
    head = Head(np.zeros((3, 2), "f4"), np.array([1, 2, 2], "f4"))
    assert (classify(np.ones((2, 2, 2, 2), "f4"), head, 3) == 1).all()


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_class_numbers_never_overflow(classes, dtype):
    assert class_dtype(classes) == dtype
    head = Head(np.zeros((classes, 1), "f4"), np.arange(classes, dtype="f4"))
    assert (classify(np.zeros((2, 2, 2, 1), "f4"), head, classes) == classes - 1).all()


@given(st.integers(1, 12), st.integers(1, 30), st.lists(st.integers(1, 4), min_size=12, max_size=12), st.integers(1, 3))
def test_the_slabs_may_be_cut_anywhere(depth, target, cuts, threads):
    rng = np.random.default_rng(5)
    volume = rng.normal(size=(depth, 4, 5, 3)).astype("f4")
    matrices = output_matrices((depth, 4, 5), (1, 1, 1), (target, 6, 3), (1, 1, 1), Resampling(1))
    edges = [0, *(edge for edge in itertools.accumulate(cuts) if edge < depth), depth]
    slabs = [((a, 0, 0), volume[a:b]) for a, b in itertools.pairwise(edges)]
    pieces = label_blocks(slabs, None, 3, matrices, (target, 6, 3), threads)
    whole = apply_matrices(volume.astype(np.float64), matrices)
    assert shortfall(whole, pieces).max() <= 1e-5
