"""Rewrites of an OpenVINO model. They change how it computes, and not what it computes.

Their results differ only by the order in which float32 numbers are added up. They need shapes that are fixed.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager


def fold_constants(model: ov.Model) -> None:
    """Compute what does not depend on the input, such as weights that are stored in half precision and cast."""
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(model)


def normalise_precisely(model: ov.Model) -> None:
    """Replace every MVN (instance normalisation) by one whose sums keep float32's precision.

    OpenVINO's own loses digits on large patches. Adding up planes first keeps the error near PyTorch's. The planes are
    averaged by pooling, because OpenVINO would fuse nested means back to MVN.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MVN":
            continue
        source = node.input_value(0)
        centred = ops.subtract(source, _mean(source))
        variance = _mean(ops.multiply(centred, centred).output(0))
        deviation = ops.sqrt(ops.add(variance, np.float32(node.get_attributes()["eps"])))
        _replace(node, ops.multiply(centred, ops.divide(np.float32(1), deviation)))
    model.validate_nodes_and_infer_types()


def _mean(source: ov.Output) -> ov.Output:
    """(N, C, D, H, W) to (N, C, 1, 1, 1): the mean over planes, then over depth."""
    plane = [1, *source.get_shape()[3:]]
    planes = ops.avg_pool(source, plane, [0, 0, 0], [0, 0, 0], plane, exclude_pad=True)
    return ops.reduce_mean(planes, np.array([2, 3, 4]), keep_dims=True).output(0)


def merge_upsampling(model: ov.Model) -> None:
    """Merge a decoder's transposed convolution into the convolution behind it.

    A U-Net's decoder upsamples (2x2x2, stride 2), puts the encoder's features beside the result and convolves (3x3x3).
    Nothing non-linear stands between, so upsampling and its half of the convolution are one transposed convolution
    with a kernel of 4x4x4: half the multiplications, and the upsampled and concatenated features never exist.
    The bias of the upsampling must not be added outside the volume, so it enters as a channel of ones.
    """
    for node in model.get_ordered_ops():
        found = _match(node)
        if found is not None:
            _merge(node, *found)
    model.validate_nodes_and_infer_types()


def _match(node: ov.Node) -> tuple[ov.Node, NDArray[np.float32] | None, ov.Node] | None:
    """For a convolution of concat(upsampling (+ bias), skip): the upsampling, the bias, the concat; else None."""
    if node.get_type_name() != "Convolution" or not _is(node, [3, 3, 3], 1, 1):
        return None
    concat = node.input_value(0).get_node()
    if concat.get_type_name() != "Concat" or concat.get_input_size() != 2 or concat.get_attributes()["axis"] != 1:
        return None
    first, bias = concat.input_value(0).get_node(), None
    if first.get_type_name() == "Add":
        bias, first = _constant(first.input_value(1).get_node()), first.input_value(0).get_node()
        if bias is None or bias.size != concat.input_value(0).get_shape()[1]:
            return None
    if first.get_type_name() != "ConvolutionBackpropData" or not _is(first, [2, 2, 2], 2, 0):
        return None
    weights = (node.input_value(1).get_node(), first.input_value(1).get_node())
    return None if any(weight.get_type_name() != "Constant" for weight in weights) else (first, bias, concat)


def _constant(node: ov.Node) -> NDArray[np.float32] | None:
    """The numbers of a constant, reshaped or not; None for anything else."""
    if node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    data: NDArray[np.float32] | None = node.data if node.get_type_name() == "Constant" else None
    return data


def _is(node: ov.Node, kernel: list[int], stride: int, pad: int) -> bool:
    facts = node.get_attributes()
    same = [facts["strides"] == [stride] * 3, facts["dilations"] == [1] * 3]
    same += [facts["pads_begin"] == [pad] * 3, facts["pads_end"] == [pad] * 3]
    return (
        all(same)
        and list(node.input_value(1).get_shape())[2:] == kernel
        and facts["auto_pad"] in ("explicit", "notset")
    )


def _merge(conv: ov.Node, upsampling: ov.Node, bias: NDArray[np.float32] | None, concat: ov.Node) -> None:
    weight = conv.input_value(1).get_node().data  # (out, up + skip, 3, 3, 3)
    spread = upsampling.input_value(1).get_node().data  # (low, up, 2, 2, 2)
    low, skip = upsampling.input_value(0), concat.input_value(1)
    up = spread.shape[1]
    if bias is not None:
        ones = np.ones([1, 1, *list(low.get_shape())[2:]], np.float32)
        low = ops.concat([low, ops.constant(ones)], 1).output(0)
        row = np.broadcast_to(bias.reshape(1, up, 1, 1, 1), [1, *spread.shape[1:]])
        spread = np.concatenate([spread, row])
    kernel = ops.constant(composite_kernel(spread, weight[:, :up]))
    settings = {"pads_begin": [1] * 3, "pads_end": [1] * 3, "dilations": [1] * 3}
    raised = ops.convolution_backprop_data(low, kernel, [2] * 3, **settings)
    kept = ops.convolution(skip, ops.constant(np.ascontiguousarray(weight[:, up:])), [1] * 3, **settings)
    _replace(conv, ops.add(kept, raised))


def composite_kernel(spread: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(low, out, 4, 4, 4): `weight` (out, up, 3, 3, 3) after the upsampling `spread` (low, up, 2, 2, 2).

    With stride 2 and padding 1 it gives at every voxel, the border included, what the two give one after the other.
    """
    # One contiguous matrix for each tap: gathering them one at a time takes longer than all the products.
    first = np.ascontiguousarray(np.moveaxis(spread.astype(np.float64), (0, 1), (3, 4)))
    second = np.ascontiguousarray(np.moveaxis(weight.astype(np.float64), (1, 0), (3, 4)))
    kernel = np.zeros((4, 4, 4, len(spread), len(weight)))
    for i, j, k in np.ndindex(2, 2, 2):
        for a, b, c in np.ndindex(3, 3, 3):
            kernel[i - a + 2, j - b + 2, k - c + 2] += first[i, j, k] @ second[a, b, c]
    return np.ascontiguousarray(np.moveaxis(kernel.astype(np.float32), (3, 4), (0, 1)))


def put_channels_last(model: ov.Model) -> None:
    """Return (N, D, H, W, F), in which the CPU plugin computes, instead of (N, F, D, H, W): that saves a reorder."""
    (result,) = model.get_results()
    source = result.input_value(0)
    result.input(0).replace_source_output(ops.transpose(source, np.array([0, 2, 3, 4, 1])).output(0))
    model.validate_nodes_and_infer_types()


def halve_features(model: ov.Model) -> None:
    """Return float16; call this after `put_channels_last`.

    It halves the memory of the largest array, and int8 has left no more digits than float16 holds.

    OpenVINO's int8 transformations would move the scales of the last convolution behind the transposition, which costs
    two passes over the features. They do not move them past a clamp, so one is added whose limits nothing reaches.
    """
    (result,) = model.get_results()
    node = result.input_value(0).get_node()
    while node.get_input_size() and node.get_type_name() != "MVN":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "MVN":
        limit = float(np.finfo(np.float32).max)
        node.input(0).replace_source_output(ops.clamp(node.input_value(0), -limit, limit).output(0))
    result.input(0).replace_source_output(ops.convert(result.input_value(0), "f16").output(0))
    model.validate_nodes_and_infer_types()


def _replace(old: ov.Node, new: ov.Node) -> None:
    for target in old.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))
