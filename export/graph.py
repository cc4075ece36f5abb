"""Makes the ONNX graph of a network. It takes any spatial size, holds no trace of this machine and is reproducible.

The graph is traced at the patch's shape and its three spatial axes are named afterwards. Tracing with symbolic sizes
fails on residual encoders, where a skip connection divides a size twice and the main path once. None of the
operations of these networks depends on the size traced: `runtime.model.graph` knows no other.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxscript  # noqa: F401  # torch's exporter needs it: found missing here, not after the weights are read
import torch

from edgemuse.engines.errors import ModelFolderError, one_line
from edgemuse.runtime.model.graph import AXES, EXPORTED, inspect_graph
from edgemuse.runtime.scan.types import Shape

OPSET = 18
INPUT, OUTPUT = "image", "features"
SMALLEST_HALVED = 256
"""Weights with fewer values than this are not halved, because a cast for them saves nothing."""
MAX_WEIGHT_BYTES = (1 << 31) - (16 << 20)
"""An ONNX file is one protobuf message, which cannot be larger than 2 GiB; 16 MiB are left for the rest."""


def export_graph(network: torch.nn.Module, patch: Shape) -> bytes:
    """`network`, from (1, 1, D, H, W) to (1, F, D, H, W), as ONNX.

    Raises ModelFolderError if it does not fit into a file, or became something that the runtime refuses.
    """
    _check_size(network)
    model = _trace(network, patch)
    _check_operations(model)
    _free_axes(model)
    _strip(model)
    halve_weights(model)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    try:
        inspect_graph(data)
    except ValueError as error:
        raise ModelFolderError(f"the network became a graph that the runtime refuses: {one_line(error)}") from error
    return data


def _check_size(network: torch.nn.Module) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    if size > MAX_WEIGHT_BYTES:
        raise ModelFolderError(
            f"the weights of all folds take {size / 2**30:.1f} GiB and an ONNX file holds 2; choose fewer with --fold"
        )


def _trace(network: torch.nn.Module, patch: Shape) -> onnx.ModelProto:
    with _silence():
        program: Any = torch.onnx.export(
            network,
            (torch.zeros(1, 1, *patch),),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    return program.model_proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Torch's exporter warns about its own internals and prints its progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _check_operations(model: onnx.ModelProto) -> None:
    """A Reshape or BatchNormalization here would mean that the graph is not the network or holds the traced size."""
    if unknown := sorted({node.op_type for node in model.graph.node} - EXPORTED.keys()):
        raise ModelFolderError(
            f"the network became a graph with {', '.join(unknown)}, which edgemuse does not know; "
            "use the versions of torch and onnxscript that the extra '.[export]' installs"
        )


def _free_axes(model: onnx.ModelProto) -> None:
    """Name the spatial axes of the input and the output, and forget the sizes in between."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim[2:], AXES, strict=True):
            axis.dim_param = name
    del model.graph.value_info[:]


def _strip(model: onnx.ModelProto) -> None:
    """Remove torch's notes: they hold stack traces with local paths."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def halve_weights(model: onnx.ModelProto) -> None:
    """Store in half precision the weights that lose nothing by it, each followed by a cast back to single.

    Backends cast once, when they compile the graph. The built-in model's weights were rounded when they were saved, so
    that its bundle is half as large.
    """
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < SMALLEST_HALVED:
            continue
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            continue
        stored = f"{tensor.name}.half"
        casts.append(onnx.helper.make_node("Cast", [stored], [tensor.name], to=onnx.TensorProto.FLOAT))
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, stored))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
