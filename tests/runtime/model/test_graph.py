"""Graphs are judged by themselves: what edgemuse writes is let through with its true sizes, all else is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import CommandLine, edit_manifest, replace_file, tiny_bundle, tiny_graph, write_scan
from hostile import CONV, GRAPHS, LAST, behind, image, model, node
from unets import unet

from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.calibration.half import half_precision
from edgemuse.engines.errors import BundleError
from edgemuse.runtime.model import graph as graph_module
from edgemuse.runtime.model import onnx_file
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.graph import Facts, inspect_graph

PATCH = (8, 12, 16)
UNET = unet().SerializeToString()


def live_bytes(data: bytes) -> int:
    """Peak bytes of live activations a voxel of `PATCH`, by ONNX's own inference of shapes."""
    loaded = onnx.load_model_from_string(data)
    for axis, size in zip(loaded.graph.input[0].type.tensor_type.shape.dim[2:], PATCH, strict=True):
        axis.dim_value = size
    loaded.graph.output[0].type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(loaded, strict_mode=True).graph
    sizes = {
        value.name: 4 * math.prod(axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last[graph.output[0].name] = len(graph.node)
    alive, peak = {"image": sizes["image"]}, 0
    for index, step in enumerate(graph.node):
        alive |= {name: sizes[name] for name in step.output}
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > index}
    return math.ceil(peak / math.prod(PATCH))


@pytest.mark.parametrize("data", [tiny_graph(), UNET, unet(out=9, parts=3).SerializeToString()])
def test_sizes_are_those_that_onnx_finds(data: bytes) -> None:
    loaded = onnx.load_model_from_string(data)
    facts = inspect_graph(data)
    assert facts.channels == loaded.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    assert facts.activation_bytes == live_bytes(data)


@pytest.mark.parametrize("convert", [to_int8, half_precision, lambda data: to_int8(half_precision(data))])
def test_lower_precisions_are_let_through_and_take_no_more(convert: object) -> None:
    assert callable(convert)
    whole, low = inspect_graph(UNET), inspect_graph(convert(UNET))
    assert (low.channels, low.stride) == (whole.channels, whole.stride) == (4, (2, 2, 2))
    assert low.activation_bytes <= whole.activation_bytes


def test_numbers_that_are_written_one_by_one() -> None:
    """As NNCF writes the scales of an int8 graph."""
    made = onnx.load_model_from_string(to_int8(UNET))
    for tensor in made.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim < 2:
            kind = tensor.data_type
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, values.shape, values.ravel().tolist()))
    assert inspect_graph(made.SerializeToString()) == inspect_graph(to_int8(UNET))


def test_built_in_model_says_what_its_graphs_are() -> None:
    bundle = open_bundle(BUILT_IN)
    network = bundle.manifest.network
    for precision in bundle.manifest.graphs:
        facts = inspect_graph(bundle.graph(precision))
        assert (facts.channels, facts.stride) == (network.channels_out, network.stride)
        assert facts.activation_bytes <= network.activation_bytes
    assert inspect_graph(bundle.graph("fp32")).activation_bytes == network.activation_bytes
    bundle.close()


def test_mean_of_folds() -> None:
    data = behind(node("Add", ["conv", "conv"], ["sum"]), node("Div", ["sum", "two"], ["last"]), two=np.float32(2))
    assert inspect_graph(data.SerializeToString()) == Facts(4, (1, 1, 1), 4 * 8)


@pytest.mark.parametrize("name", GRAPHS)
def test_hostile_graph_is_refused_by_what_it_has(name: str, tmp_path: Path) -> None:
    make, reason = GRAPHS[name]
    folder = replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", make().SerializeToString())
    with pytest.raises(BundleError, match=reason) as caught:
        open_bundle(folder).graph("fp32")
    assert str(caught.value).startswith(f"{folder}: fp32.onnx ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"PK\x03\x04", b"<?xml version='1.0'?><net/>", b"\x0a\xff", b"\x3a\x80"]
)
def test_file_that_is_no_graph(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|cut off|unknown field|operators of"):
        inspect_graph(data)


def test_message_twice_is_not_merged() -> None:
    """Protobuf merges what stands twice; then a backend would see more than what was checked."""
    data = tiny_graph()
    more = model([node("Evil", ["conv"], ["last"])])
    for field in ("ir_version", "producer_name", "opset_import"):
        more.ClearField(field)
    with pytest.raises(ValueError, match="graph of a model twice"):
        inspect_graph(data + more.SerializeToString())


def test_names_reach_messages_without_escapes(tmp_path: Path) -> None:
    data = behind(node("Evil\x1b[2J\n", ["conv"], ["last"])).SerializeToString()
    with pytest.raises(BundleError, match=r"operator Evil.*\[2J") as caught:
        open_bundle(replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", data)).graph("fp32")
    assert str(caught.value).isprintable()


def test_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_PARTS", 20)
    with pytest.raises(ValueError, match="more than 20 parts"):
        inspect_graph(UNET)


def test_too_many_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_NODES", 3)
    with pytest.raises(ValueError, match="11 nodes, expected 3"):
        inspect_graph(UNET)


def test_numbers_are_not_unpacked_without_end() -> None:
    wide = model([node("Conv", ["image", "weight", "bias"], ["conv"], pads=[0] * (11 << 16)), LAST])
    listed = wide.SerializeToString()
    with pytest.raises(ValueError, match="parts"):
        inspect_graph(listed)
    packed = onnx_file._Reader(b"\x42\x80\x80\x40" + bytes(1 << 20))  # field 8, each of 2**20 zeros a number
    with pytest.raises(ValueError, match="numbers one by one"):
        packed.message("attribute", 0, len(packed.data))


def test_flipped_bits_raise_value_error_or_are_understood() -> None:
    rng, refused = random.Random(1), 0
    for _ in range(400):
        raw = bytearray(UNET if rng.random() < 0.5 else to_int8(UNET))
        head = len(raw) if rng.random() < 0.3 else 1500  # nodes stand before weights
        for _ in range(rng.choice((1, 3))):
            raw[rng.randrange(head)] ^= 1 << rng.randrange(8)
        try:
            inspect_graph(bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_bytes": 31}, "has activation_bytes 32, its manifest says 31"),
        ({"patch": [16, 16, 16], "stride": [16, 16, 1]}, ""),
        ({"activation_bytes": 1000}, ""),
    ],
)
def test_manifest_is_held_against_the_graph(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "b")
    network = open_bundle(folder).manifest.network
    edit_manifest(folder, network=vars(network) | {"normalization": vars(network.normalization)} | {
        key: vars(getattr(network, key)) for key in ("image_resampling", "output_resampling")
    } | changes)  # fmt: skip
    if not reason:
        assert open_bundle(folder).graph("fp32") == tiny_graph()
        return
    with pytest.raises(BundleError, match=reason):
        open_bundle(folder).graph("fp32")


def test_stride_is_held_against_the_graph(tmp_path: Path) -> None:
    folder = replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", UNET)
    with pytest.raises(BundleError, match=r"has stride \(2, 2, 2\), its manifest says \(1, 1, 1\)"):
        open_bundle(folder).graph("fp32")


def test_lying_bundle_is_refused_before_its_memory_is_taken(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """768 channels at full size, none of them claimed."""
    wide = np.ones((768, 4, 1, 1, 1), np.float32)
    data = behind(
        node("Conv", ["conv", "wide"], ["w"]), node("Conv", ["w", "narrow"], ["last"]),
        wide=wide, narrow=wide.reshape(4, 768, 1, 1, 1),
    ).SerializeToString()  # fmt: skip
    folder = replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", data)
    ran = CommandLine(capfd, tmp_path / "cache")(
        "segment", write_scan(tmp_path / "t1.nii.gz"), "-m", folder, "-o", tmp_path / "out", "--max-ram", "0.7"
    )
    assert (ran.code, ran.out) == (2, "")
    assert "has activation_bytes 3088, its manifest says 36; export it again" in ran.err


def test_graph_is_inspected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "edgemuse.runtime.model.bundle.inspect_graph", lambda data: asked.append(1) or inspect_graph(data)
    )
    bundle = open_bundle(tiny_bundle(tmp_path / "b"))
    assert bundle.graph("fp32") == bundle.graph("fp32")
    assert len(asked) == 1


def test_helper_is_the_graph_of_tiny_bundles() -> None:
    assert inspect_graph(model([CONV, LAST], [image()]).SerializeToString()) == inspect_graph(tiny_graph())
