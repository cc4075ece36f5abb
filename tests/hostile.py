"""Graphs and zip files that somebody wrote to do harm, each with what is wrong with it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bundles import IR_VERSION, OPSET, SLOPE, Tiny, conv_weights
from onnx import TensorProto, helper, numpy_helper

SIZES = ("depth", "height", "width")
F32, F16, I8, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.INT64
node = helper.make_node


def image(kind: int = F32, shape: tuple[Any, ...] = (1, 1, *SIZES)) -> Any:
    """The input, as ONNX describes it."""
    return helper.make_tensor_value_info("image", kind, shape)


def features(kind: int = F32, shape: tuple[Any, ...] | None = (1, 4, *SIZES)) -> Any:
    """The output."""
    return helper.make_tensor_value_info("features", kind, shape)


CONV = node("Conv", ["image", "weight", "bias"], ["conv"], pads=[1] * 6)
LAST = node("LeakyRelu", ["conv"], ["features"], alpha=SLOPE)


def model(
    nodes: list[Any] | None = None, inputs: Any = (), outputs: Any = (), weights: Mapping[str, Any] | None = None
) -> Any:
    """The tiny bundle's graph with other nodes, inputs, outputs, or more weights."""
    weight, bias = conv_weights(Tiny())
    known = {"weight": weight, "bias": bias} | dict(weights or {})
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in known.items()]
    graph = helper.make_graph(nodes or [CONV, LAST], "tiny", inputs or [image()], outputs or [features()], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def behind(*nodes: Any, **weights: Any) -> Any:
    """The graph with `nodes` between its convolution and its end; they lead from `conv` to `last`."""
    return model([CONV, *nodes, node("LeakyRelu", ["last"], ["features"], alpha=SLOPE)], weights=weights)


def _changed(change: Callable[[Any], object]) -> Any:
    """The graph after `change`."""
    made = model()
    change(made)
    return made


def _external(made: Any) -> None:
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")


def _sparse(made: Any) -> None:
    values = helper.make_tensor("sparse", F32, [1], [1.0])
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("i", I64, [1], [0]), [1 << 40])
    )


def _branch() -> Any:
    body = helper.make_graph([node("Relu", ["conv"], ["inner"])], "body", [], [helper.make_empty_tensor_value_info("")])
    return node("If", ["flag"], ["last"], then_branch=body, else_branch=body)


def _note(kind: int, shape: tuple[Any, ...]) -> Any:
    return _changed(lambda made: made.graph.value_info.append(helper.make_tensor_value_info("conv", kind, shape)))


def _function(made: Any) -> None:
    made.functions.append(helper.make_function("own", "Own", ["x"], ["y"], [node("Relu", ["x"], ["y"])], []))


def _raw(made: Any, data: bytes) -> None:
    made.graph.initializer[0].raw_data = data


def _dims(made: Any, *dims: int) -> None:
    made.graph.initializer[0].dims[:] = dims


ONE, INT, SHAPE = np.float32(1), np.int64(1), np.array([1 << 31, 1 << 20])
SCALE, ZERO = np.float32(0.1), np.int8(0)
GRAPHS: dict[str, tuple[Callable[[], Any], str]] = {
    "external": (lambda: _changed(_external), "weights in a file outside the bundle"),
    "sparse": (lambda: _changed(_sparse), "sparse weights"),
    "function": (lambda: _changed(_function), "functions"),
    "subgraph": (lambda: behind(_branch(), flag=np.array(True)), "it holds a subgraph"),
    "constant": (lambda: behind(node("Constant", [], ["last"], value=helper.make_tensor("v", F32, [1], [1.0]))),
                 "a tensor as attribute"),
    "training": (lambda: _changed(lambda made: made.training_info.add()), "training information"),
    "notes": (lambda: _changed(lambda made: made.metadata_props.add(key="a", value="b")), "unknown field 14"),
    "zeros": (lambda: behind(node("ConstantOfShape", ["shape"], ["k"]), node("Add", ["conv", "k"], ["last"]),
                             shape=SHAPE), "weights of type 7"),
    "zeros of an input": (lambda: behind(node("Shape", ["conv"], ["s"]), node("ConstantOfShape", ["s"], ["last"])),
                          "the operator ConstantOfShape, Shape"),
    "expand": (lambda: behind(node("Expand", ["conv", "shape"], ["last"]), shape=np.float32([2, 1])),
               "the operator Expand"),
    "loop": (lambda: behind(node("Loop", ["conv"], ["last"])), "the operator Loop"),
    "foreign": (lambda: behind(node("Evil", ["conv"], ["last"], domain="evil.so")), "the operator Evil of evil.so"),
    "foreign operators": (lambda: _changed(lambda made: made.opset_import.add(domain="evil.so", version=1)),
                          "operators of"),
    "no operators": (lambda: _changed(lambda made: made.opset_import.pop()), "operators of"),
    "two inputs": (lambda: model(inputs=[image(), helper.make_tensor_value_info("b", F32, [1])]), "2 inputs"),
    "no input": (lambda: _changed(lambda made: made.graph.ClearField("input")), "0 inputs"),
    "no output": (lambda: _changed(lambda made: made.graph.ClearField("output")), "0 outputs"),
    "two outputs": (lambda: model(outputs=[features(), helper.make_tensor_value_info("conv", F32, None)]), "2 outputs"),
    "no graph": (lambda: _changed(lambda made: made.ClearField("graph")), "0 inputs"),
    "input is a weight": (lambda: model(weights={"image": ONE}), "its input is a weight"),
    "output from nowhere": (lambda: model([CONV]), "its output is not float32"),
    "output is a weight": (lambda: model([CONV], weights={"features": ONE}), "its output is not float32"),
    "double output": (lambda: model([CONV, node("Cast", ["conv"], ["features"], to=TensorProto.DOUBLE)]),
                      "other types"),
    "half output": (lambda: model([CONV, node("Cast", ["conv"], ["features"], to=F16)]), "its output is not float32"),
    "output of another rank": (lambda: model(outputs=[features(shape=(1, 4))]), "another shape for features"),
    "output without a shape": (lambda: model(outputs=[features(shape=None)]), "another shape for features"),
    "other channels noted": (lambda: model(outputs=[features(shape=(1, 5, *SIZES))]), "another shape for features"),
    "another type noted": (lambda: model(outputs=[features(I64)]), "another shape for features"),
    "smaller output": (lambda: behind(node("AveragePool", ["conv"], ["last"], kernel_shape=[2] * 3, strides=[2] * 3)),
                       "its output is not float32 in the image's size"),
    "batches": (lambda: model(inputs=[image(shape=(2, 1, *SIZES))]), "another shape for image"),
    "fixed size": (lambda: model(inputs=[image(shape=(1, 1, 16, 16, 16))]), "axes of a fixed size"),
    "axes of other names": (lambda: model(inputs=[image(shape=(1, 1, "a", "b", "c"))]), "its axes are called"),
    "axes of one name": (lambda: _note(F32, (1, 4, "depth", "depth", "width")), "two sizes of one name"),
    "a size that lies": (lambda: _note(F32, (1, 1 << 40, *SIZES)), "another shape for conv"),
    "a type that lies": (lambda: _note(I8, (1, 4, *SIZES)), "another shape for conv"),
    "cycle": (lambda: behind(node("Add", ["conv", "last"], ["last"])), "an input that is not made before"),
    "made twice": (lambda: behind(node("Relu", ["conv"], ["last"]), node("Relu", ["conv"], ["last"])), "made twice"),
    "weight made twice": (lambda: behind(node("Relu", ["conv"], ["weight"])), "made twice"),
    "no weights": (lambda: behind(node("Conv", ["conv", "absent"], ["last"])), "an input that is not made before"),
    "no inputs": (lambda: behind(node("Concat", [], ["last"], axis=1)), "inputs of another kind"),
    "too many inputs": (lambda: behind(node("Relu", ["conv", "conv"], ["last"])), "Relu last with"),
    "weights in place of an image": (lambda: behind(node("Relu", ["weight"], ["r"]), node("Relu", ["r"], ["last"])),
                                     "inputs of another kind"),
    "unknown attribute": (lambda: behind(node("Relu", ["conv"], ["last"], evil=1)), "the attributes evil"),
    "auto_pad": (lambda: behind(node("Conv", ["conv", "k"], ["last"], auto_pad="SAME_UPPER"),
                                k=np.ones((4, 4, 1, 1, 1), np.float32)), "auto_pad"),
    "padded far": (lambda: model([node("Conv", ["image", "weight", "bias"], ["conv"], pads=[500] * 6), LAST]), "pads"),
    "padded more": (lambda: model([node("Conv", ["image", "weight", "bias"], ["conv"], pads=[2] * 6), LAST]),
                    "a kernel of 3, padding of 4"),
    "not padded": (lambda: model([node("Conv", ["image", "weight", "bias"], ["conv"]), LAST]),
                   "a kernel of 3, padding of 0"),
    "strides of no size": (lambda: behind(node("Conv", ["conv", "k"], ["last"], strides=[0] * 3),
                                          k=np.ones((4, 4, 1, 1, 1), np.float32)), "strides"),
    "strides that are one number": (lambda: behind(node("Conv", ["conv", "k"], ["last"], strides=1),
                                                   k=np.ones((4, 4, 1, 1, 1), np.float32)), "strides"),
    "huge kernel": (lambda: behind(node("Conv", ["conv", "k"], ["last"], pads=[8] * 6),
                                   k=np.ones((4, 4, 17, 17, 17), np.float16)), "a kernel of"),
    "larger than the image": (lambda: behind(node("ConvTranspose", ["conv", "k"], ["last"], strides=[2] * 3),
                                             k=np.ones((4, 4, 2, 2, 2), np.float32)), "larger than the image"),
    "upsampled with overlap": (lambda: behind(node("ConvTranspose", ["conv", "k"], ["last"], strides=[1] * 3),
                                              k=np.ones((4, 4, 9, 9, 9), np.float32)), "strides of"),
    "other weights": (lambda: behind(node("Conv", ["conv", "k"], ["last"]), k=np.ones((4, 5, 1, 1, 1), np.float32)),
                      "weights of"),
    "weights of another type": (lambda: behind(node("Conv", ["conv", "k"], ["last"]),
                                               k=np.ones((4, 4, 1, 1, 1), np.float16)), "weights of another type"),
    "weights of another rank": (lambda: behind(node("Conv", ["conv", "k"], ["last"]), k=np.ones((4, 4), np.float32)),
                                "Conv last with"),
    "another bias": (lambda: behind(node("Conv", ["conv", "k", "b"], ["last"]), b=np.ones(5, np.float32),
                                    k=np.ones((4, 4, 1, 1, 1), np.float32)), "a bias of another shape"),
    "another scale": (lambda: behind(node("InstanceNormalization", ["conv", "s", "s"], ["last"]),
                                     s=np.ones(1, np.float32)), "a scale or shift of another shape"),
    "whole numbers": (lambda: behind(node("Cast", ["conv"], ["i"], to=I64), node("Cast", ["i"], ["last"], to=F32)),
                      "other types"),
    "added along an axis": (lambda: behind(node("Add", ["conv", "k"], ["last"]),
                                           k=np.ones((1, 1, 64, 1, 1), np.float32)), "operands of different sizes"),
    "joined along an axis": (lambda: behind(node("Concat", ["conv", "conv"], ["last"], axis=2)), "another axis"),
    "quantised to nothing": (lambda: behind(node("QuantizeLinear", ["conv", "s", "z"], ["q"]),
                                            node("Relu", ["q"], ["last"]), s=SCALE, z=ZERO), "not floating point"),
    "quantised to another type": (lambda: behind(node("QuantizeLinear", ["conv", "s", "s"], ["last"]), s=SCALE),
                                  "other types"),
    "other steps": (lambda: behind(node("QuantizeLinear", ["conv", "s", "z"], ["last"]), s=np.ones(4, np.float32),
                                   z=np.zeros(4, np.int8)), "scales of"),
    "giant weights": (lambda: _changed(lambda made: _dims(made, 1 << 40, 1, 3, 3, 3)), "with 432 bytes"),
    "negative weights": (lambda: _changed(lambda made: _dims(made, -4, 1, 3, 3, 3)), "weights of type 1 and shape"),
    "weights of no size": (lambda: _changed(lambda made: _dims(made, 0, 1, 3, 3, 3)), "weights of type 1 and shape"),
    "weights that lack bytes": (lambda: _changed(lambda made: _raw(made, bytes(428))), "with 428 bytes, expected 432"),
    "weights that are text": (lambda: behind(node("Relu", ["conv"], ["last"]), k=np.array(["a"])), "that are text"),
    "weights twice": (lambda: _changed(lambda made: made.graph.initializer.append(made.graph.initializer[0])), "twice"),
}  # fmt: skip
"""Graphs by what is wrong with them: what makes it, and what the refusal says."""


def zip64(path: Path, claimed: int) -> Path:
    """Append to the zip file `path` an end that claims a list of members of `claimed` bytes; returns `path`."""
    data = path.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, claimed, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    path.write_bytes(data[:end] + record + locator + data[end:])
    return path


def overlapping(path: Path, name: str, copies: int) -> Path:
    """List the member `name` of the zip file `path` under `copies` names more; all share its bytes. Returns `path`."""
    with zipfile.ZipFile(path, "a") as archive:
        member = archive.getinfo(name)
        for index in range(copies):
            again = zipfile.ZipInfo(f"{name}.{index}")
            for field in ("CRC", "compress_size", "file_size", "header_offset", "compress_type"):
                setattr(again, field, getattr(member, field))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True  # type: ignore[attr-defined]
    return path
