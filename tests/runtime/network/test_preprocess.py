"""Preprocessing against nnU-Net's own `DefaultPreprocessor`, and its parts against what they stand for."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from edgemuse.runtime.model.manifest import Network, Normalization, Resampling
from edgemuse.runtime.network.preprocess import foreground, nonzero_box, normalize, preprocess
from edgemuse.runtime.network.resample import (
    axis_matrix,
    output_matrices,
    resample_image,
    resampled_shape,
    separate_axis,
)

NNUNET_SCHEMES = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "rescale01": "RescaleTo01Normalization",
    "rgb01": "RGBTo01Normalization",
    "none": "NoNormalization",
}
INTENSITIES = {"mean": 90.0, "std": 35.0, "percentile_00_5": 20.0, "percentile_99_5": 180.0}


def network_of(scheme="zscore", use_mask=True, spacing=(2.0, 2.0, 2.0), transpose=(0, 1, 2), order_z=0, force=None):
    return Network(
        orientation=None,
        transpose=transpose,
        spacing=spacing,
        patch=(16, 16, 16),
        stride=(1, 1, 1),
        mirror_axes=(),
        normalization=Normalization(scheme, use_mask, 90.0, 35.0, 20.0, 180.0),
        image_resampling=Resampling(3, order_z, force),
        output_resampling=Resampling(1, order_z, force),
        channels_out=1,
        classes=2,
        deferred_head=False,
        activation_bytes=1,
    )


def head_like(shape=(31, 37, 29), seed=0):
    """A noisy ball with holes of zeros inside, and zeros around it."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    image = (rng.gamma(4, 25, shape) * (np.linalg.norm(grid, axis=0) < 0.8)).astype(np.float32)
    image[14:17, 14:18, 12:15] = 0
    return np.minimum(image, 255).astype(np.float32)


def nnunet_preprocess(image, zooms, network):
    """nnU-Net's preprocessor on the same scan, as its readers would hand it over: (k, j, i)."""
    handler = pytest.importorskip("nnunetv2.utilities.plans_handling.plans_handler", reason="nnunetv2 is not installed")
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    resampling = {"order": 3, "order_z": network.image_resampling.order_z, "is_seg": False}
    resampling["force_separate_z"] = network.image_resampling.force_separate_z
    configuration = {
        "architecture": {},
        "spacing": list(network.spacing),
        "patch_size": list(network.patch),
        "normalization_schemes": [NNUNET_SCHEMES[network.normalization.scheme]],
        "use_mask_for_norm": [network.normalization.use_mask],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
    }
    plans = handler.PlansManager(
        {
            "transpose_forward": list(network.transpose),
            "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
            "configurations": {"3d_fullres": configuration},
        }
    )
    properties = {"spacing": list(zooms[::-1])}
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image.T[None].copy(), None, properties, plans, plans.get_configuration("3d_fullres"), {"labels": {}}
    )
    return data[0], properties


CASES = [
    dict(scheme="zscore"),
    dict(scheme="zscore", use_mask=False),
    dict(scheme="ct", use_mask=False),
    dict(scheme="rescale01", use_mask=False),
    dict(scheme="rgb01", use_mask=False),
    dict(scheme="none", use_mask=False),
    dict(transpose=(2, 0, 1)),
    dict(transpose=(1, 0, 2), spacing=(1.0, 2.5, 0.8)),
    dict(spacing=(0.9, 1.1, 4.0)),
    dict(spacing=(4.0, 1.0, 4.0)),
    dict(force=True, spacing=(1.0, 1.0, 1.5)),
    dict(force=False, spacing=(6.0, 1.0, 1.0)),
    dict(order_z=1, spacing=(6.0, 1.0, 1.0)),
    dict(order_z=3, spacing=(6.0, 1.0, 1.0)),
    dict(spacing=(1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize("zooms", [(1.0, 1.0, 1.0), (0.88, 0.9, 1.2), (1.0, 1.0, 5.0), (5.0, 0.7, 0.7)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case))
@pytest.mark.filterwarnings("ignore")
def test_equal_to_nnunets_preprocessor(case, zooms):
    network, image = network_of(**case), head_like()
    expected, properties = nnunet_preprocess(image, zooms, network)
    prepared = preprocess(image, np.diag([*zooms, 1.0]), zooms, network)
    assert prepared.image.shape == expected.shape
    assert prepared.image.dtype == np.float32
    np.testing.assert_allclose(prepared.image, expected, rtol=1e-5, atol=2e-5)
    assert [[s.start, s.stop] for s in prepared.box] == [list(b) for b in properties["bbox_used_for_cropping"]]
    assert prepared.grid_shape == tuple(properties["shape_before_cropping"])


@given(st.integers(0, 10_000), st.floats(0.3, 0.9))
@settings(max_examples=60)
def test_foreground_is_binary_fill_holes(seed, density):
    mask = np.random.default_rng(seed).random((7, 8, 9)) < density
    np.testing.assert_array_equal(foreground(mask.astype(np.float32)), ndimage.binary_fill_holes(mask))


def test_the_box_is_the_smallest_that_holds_every_voxel():
    image = np.zeros((9, 8, 7), np.float32)
    image[2, 3, 1] = image[5, 3, 6] = -1
    assert nonzero_box(image) == (slice(2, 6), slice(3, 4), slice(1, 7))


def test_zscore_leaves_the_outside_alone():
    image = head_like()
    outside = ~foreground(image)
    normalize(image, Normalization("zscore", True))
    assert not image[outside].any()
    assert abs(image[~outside].mean()) < 1e-4
    assert abs(image[~outside].std() - 1) < 1e-4


@pytest.mark.parametrize(
    ("spacing", "target", "force", "axis"),
    [
        ((1, 1, 1), (2, 2, 2), None, None),
        ((5, 1, 1), (1, 1, 1), None, 0),
        ((1, 1, 1), (1, 5, 1), None, 1),
        ((5, 5, 1), (1, 1, 1), None, None),
        ((1, 1, 2), (1, 1, 1), True, 2),
        ((1, 1, 9), (1, 1, 1), False, None),
        ((1, 1, 3), (1, 1, 1), None, None),
    ],
)
def test_which_axis_is_resampled_apart(spacing, target, force, axis):
    assert separate_axis(spacing, target, force) == axis


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1]))
def test_axis_matrices_are_what_zoom_does(n_in, n_out, order):
    signal = np.random.default_rng(0).normal(size=n_in)
    matrix = axis_matrix(n_in, n_out, order)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    assert matrix.min() >= 0
    expected = ndimage.zoom(signal, n_out / n_in, order=order, mode="nearest", grid_mode=True)
    if len(expected) == n_out:
        np.testing.assert_allclose(matrix @ signal, expected, atol=1e-12)


SHAPES = st.tuples(*[st.integers(1, 14)] * 3)


@given(SHAPES, SHAPES, st.sampled_from([0, 1, 2, 3]))
def test_an_image_is_resampled_as_zoom_does(shape, target, order):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = resample_image(image, target, (1, 1, 1), (1, 1, 1), Resampling(order, 0, force_separate_z=False))
    factors = [new / old for new, old in zip(target, shape, strict=True)]
    expected = ndimage.zoom(image.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)
    if expected.shape == target:
        expected = np.clip(expected, image.min(), image.max())
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-13)


@pytest.mark.parametrize("case", [((1, 1, 1), (2, 2, 2)), ((1, 1, 5), (1, 1, 1)), ((1, 1, 1), (0.9, 4.0, 1.1))])
@pytest.mark.filterwarnings("ignore")
def test_output_matrices_are_nnunets_resampling_of_logits(case):
    resampling = pytest.importorskip("nnunetv2.preprocessing.resampling.default_resampling", reason="no nnunetv2")
    spacing, target = case
    logits = np.random.default_rng(1).normal(size=(3, 9, 10, 11))
    shape = resampled_shape((9, 10, 11), spacing, target)
    expected = resampling.resample_data_or_seg_to_shape(
        copy.deepcopy(logits), shape, spacing, target, is_seg=False, order=1, order_z=0, force_separate_z=None
    )
    result = logits
    matrices = output_matrices((9, 10, 11), spacing, shape, target, Resampling(1))
    for axis, matrix in enumerate(matrices, start=1):
        if matrix is not None:
            result = np.moveaxis(np.tensordot(matrix, result, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_a_volume_of_the_same_shape_is_not_touched():
    image = head_like()
    assert resample_image(image, image.shape, (1, 1, 1), (1.001, 1, 1), Resampling(3)) is image


def test_splines_never_leave_the_range_of_the_image():
    image = (np.indices((12, 12, 12)).sum(axis=0) % 5 > 2).astype(np.float32)
    result = resample_image(image, (17, 23, 29), (1, 1, 1), (0.7, 0.5, 0.4), Resampling(3))
    assert result.min() == 0
    assert result.max() == 1
