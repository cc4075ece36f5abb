"""Post-training quantisation of a backbone to ONNX with Q/DQ nodes, which OpenVINO, ONNX Runtime and TensorRT accept.

Convolutions compute in int8. Weights have one scale for each channel and activations one for each tensor. All are
symmetric, so that every zero point is 0, because TensorRT refuses others. Everything else stays in floating point:
normalisation and upsampling take little time, and their rounding would cost accuracy.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from edgemuse.calibration.graphs import (
    constants,
    graph_bytes,
    needed,
    producers,
    read_graph,
    set_nodes,
    single_precision,
    split_joined_convolutions,
)
from edgemuse.engines.errors import VerificationError
from edgemuse.engines.protocol import Batch, EngineOptions
from edgemuse.engines.registry import open_engine

os.environ.setdefault("NNCF_CI", "1")  # else NNCF reports its use to its makers
import nncf

QUANTISED = "Conv"
SIGNED_PER_UNSIGNED = 255 / 127


@dataclass(frozen=True)
class Quantised:
    """`int8`: every convolution quantised; `single`: the same nodes in fp32."""

    single: onnx.ModelProto
    int8: onnx.ModelProto

    @property
    def layers(self) -> list[str]:
        """Names of the convolutions, in order of execution."""
        return [node.name for node in self.single.graph.node if node.op_type == QUANTISED]

    def graph(self, excluded: Collection[str] = ()) -> bytes:
        """The ONNX graph with the convolutions called `excluded` in fp32."""
        model = onnx.ModelProto()
        model.CopyFrom(self.int8)
        _exclude(model, self.single, set(excluded))
        return graph_bytes(model)


def quantise(graph: bytes, patches: Sequence[Batch]) -> Quantised:
    """Quantise the fp32 `graph`; the ranges of activations are those seen on `patches`, (1, 1, D, H, W) each.

    Raises:
        BundleError: the graph is not valid ONNX.
        VerificationError: a zero point is not 0.
    """
    single = read_graph(graph)
    single_precision(single)
    split_joined_convolutions(single)
    int8 = _run_nncf(single, patches)
    make_signed(int8)
    check_zero_points(int8)
    return Quantised(single, int8)


def _run_nncf(model: onnx.ModelProto, patches: Sequence[Batch]) -> onnx.ModelProto:
    name = model.graph.input[0].name
    others = sorted({node.op_type for node in model.graph.node} - {QUANTISED})
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function changes the handlers of every logger
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(patches, lambda patch: {name: patch}),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(patches),
            ignored_scope=nncf.IgnoredScope(types=others),
        )


def make_signed(model: onnx.ModelProto) -> None:
    """Turn uint8 with zero point 0, which NNCF takes for values that are never negative, into int8 of the same range.

    TensorRT knows int8 only.
    """
    stored, changed = constants(model), set[str]()
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[2] in changed:
            continue
        scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
        if zero.dtype != np.uint8 or zero.any():
            continue
        changed.add(node.input[2])
        wider = (scale * SIGNED_PER_UNSIGNED).astype(np.float32)
        stored[node.input[1]].CopyFrom(numpy_helper.from_array(wider, node.input[1]))
        stored[node.input[2]].CopyFrom(numpy_helper.from_array(zero.astype(np.int8), node.input[2]))
    if changed:
        del model.graph.value_info[:]  # they name the old types


def check_zero_points(model: onnx.ModelProto) -> None:
    """Raise VerificationError unless every zero point is an int8 0."""
    stored = constants(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(stored[node.input[2]])
            if zero.dtype != np.int8 or zero.any():
                raise VerificationError(f"{node.name} has a zero point of {zero.dtype} {zero.ravel()[:3]}, expected 0")


def _exclude(model: onnx.ModelProto, single: onnx.ModelProto, names: set[str]) -> None:
    """Give the convolutions called `names` their fp32 inputs, weights and biases back."""
    made, originals = producers(model), {node.name: node for node in single.graph.node}
    weights = constants(single)
    for node in model.graph.node:
        if node.name not in names:
            continue
        quantise = made[made[node.input[0]].input[0]]
        node.input[0] = quantise.input[0]
        for index, name in enumerate(originals[node.name].input[1:], start=1):
            node.input[index] = f"{node.name}.fp32.{index}"
            model.graph.initializer.append(
                numpy_helper.from_array(numpy_helper.to_array(weights[name]), node.input[index])
            )
    set_nodes(model, needed(list(model.graph.node), model))


def sensitivity(
    quantised: Quantised, patches: Sequence[Batch], options: EngineOptions, progress: Callable[[str], None]
) -> dict[str, float]:
    """The error that each convolution causes if it alone is quantised, the worst first.

    Returns:
        For each name the root mean square error of the features, in standard deviations of the exact ones.
    """
    layers = quantised.layers
    exact = _features(quantised.graph(layers), patches, options)
    errors = {}
    for number, layer in enumerate(layers, start=1):
        progress(f"error of quantising layer {number} of {len(layers)} alone")
        found = _features(quantised.graph(set(layers) - {layer}), patches, options)
        squares = [np.square(a - b).mean() for a, b in zip(found, exact, strict=True)]
        errors[layer] = float(np.sqrt(np.mean(squares)) / np.std(exact))
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _features(graph: bytes, patches: Sequence[Batch], options: EngineOptions) -> list[Batch]:
    n, c, d, h, w = patches[0].shape
    engine = open_engine(graph, (n, c, d, h, w), options)
    try:
        return [engine.infer(patch).astype(np.float32) for patch in patches]
    finally:
        engine.close()
