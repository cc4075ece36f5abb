"""Rewritten models give what the originals give: to float32 rounding, or closer to the truth."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from scipy.signal import convolve

from edgemuse.engines.openvino_rewrites import composite_kernel, merge_upsampling, normalise_precisely

FP32 = {"INFERENCE_PRECISION_HINT": "f32"}


def run(model, *inputs):
    return ov.Core().compile_model(model, "CPU", FP32)(inputs)[0]


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def decoder(rng, low=5, up=3, skip=4, out=6, bias=True, stride=2, bias_size=3):
    """Convolution of concat(upsampled (+ bias), skip), as a decoder's stage begins."""
    below, beside = ops.parameter([1, low, 3, 4, 2], np.float32), ops.parameter([1, skip, 6, 8, 2 * stride], np.float32)
    spread = rng.normal(size=(low, up, 2, 2, stride)).astype("f4")
    settings = {"pads_begin": [0] * 3, "pads_end": [0] * 3, "dilations": [1] * 3}
    raised = ops.convolution_backprop_data(below, ops.constant(spread), [2, 2, stride], **settings)
    if bias:
        raised = ops.add(raised, ops.constant(rng.normal(size=(1, bias_size, 1, 1, 1)).astype("f4")))
    weight = rng.normal(size=(out, up + skip, 3, 3, 3)).astype("f4")
    joined = ops.concat([raised, beside], 1)
    result = ops.convolution(joined, ops.constant(weight), [1] * 3, [1] * 3, [1] * 3, [1] * 3)
    return ov.Model([ops.relu(result)], [below, beside])


@pytest.mark.parametrize("bias", [True, False])
def test_merged_upsampling_is_the_same_at_every_voxel(bias):
    rng = np.random.default_rng(0)
    model = decoder(rng, bias=bias)
    inputs = [rng.normal(size=list(port.get_shape())).astype("f4") for port in model.inputs]
    expected = run(model, *inputs)
    merge_upsampling(model)
    assert "Concat" not in kinds(model) or bias
    backprop = next(node for node in model.get_ordered_ops() if node.get_type_name() == "ConvolutionBackpropData")
    assert list(backprop.input_value(1).get_shape())[2:] == [4, 4, 4]
    np.testing.assert_allclose(run(model, *inputs), expected, atol=2e-5 * expected.std())


@pytest.mark.parametrize("odd", [{"stride": 1}, {"bias_size": 1}], ids=str)
def test_what_is_not_such_a_decoder_is_left_alone(odd):
    model = decoder(np.random.default_rng(1), **odd)
    before = kinds(model)
    merge_upsampling(model)
    assert kinds(model) == before


def test_the_composite_kernel_is_the_convolution_of_both():
    rng = np.random.default_rng(2)
    spread, weight = rng.normal(size=(1, 1, 2, 2, 2)).astype("f4"), rng.normal(size=(1, 1, 3, 3, 3)).astype("f4")
    expected = convolve(spread[0, 0], weight[0, 0, ::-1, ::-1, ::-1])  # networks correlate, upsampling convolves
    np.testing.assert_allclose(composite_kernel(spread, weight)[0, 0], expected, rtol=1e-5, atol=1e-6)


def normalisation(shape):
    image = ops.parameter(list(shape), np.float32)
    axes = ops.constant(np.array([2, 3, 4], np.int64))
    return ov.Model([ops.relu(ops.mvn(image, axes, True, 1e-5, "inside_sqrt"))], [image])


@pytest.mark.parametrize("shape", [(1, 2, 96, 96, 96), (1, 3, 1, 5, 7), (1, 1, 16, 1, 1)])
def test_precise_normalisation(shape):
    image = (np.random.default_rng(3).normal(size=shape) + 5).astype("f4")
    exact = image.astype(np.float64)
    exact = exact - exact.mean((2, 3, 4), keepdims=True)
    exact = np.maximum(exact / np.sqrt(np.square(exact).mean((2, 3, 4), keepdims=True) + 1e-5), 0)
    model = normalisation(shape)
    normalise_precisely(model)
    assert "MVN" not in kinds(model)
    assert np.abs(run(model, image) - exact).max() < 5e-6
