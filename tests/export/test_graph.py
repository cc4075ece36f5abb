"""The ONNX graph: its operations, its free axes, its bytes, and how much memory it says it needs."""

from __future__ import annotations

import getpass
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="tracing needs PyTorch")
onnx = pytest.importorskip("onnx", reason="graphs need onnx")

from edgemuse.engines.errors import BackendError, ModelFolderError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import NAMES, open_engine
from edgemuse.export import graph as graph_module
from edgemuse.export.architecture import backbone, load_network
from edgemuse.export.checkpoint import read_checkpoints
from edgemuse.export.graph import export_graph, halve_weights
from edgemuse.export.plans import read_plan
from edgemuse.runtime.model.graph import inspect_graph


def test_no_path_nor_user_of_this_machine(exported: Any) -> None:
    raw = exported.bundle.graph("fp32")
    for trace in (b".py", b"site-packages", b"File ", b"torch.nn", str(Path.home()).encode() + b"/", b"/tmp"):
        assert trace not in raw, trace
    user = getpass.getuser().encode()
    assert not re.search(rb"[/\\]" + re.escape(user) + rb"[/\\]", raw)
    model = onnx.load_model_from_string(raw)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_axes_are_free_and_named(exported: Any) -> None:
    model = onnx.load_model_from_string(exported.bundle.graph("fp32"))
    network = exported.bundle.manifest.network
    for value, name, channels in (
        (model.graph.input[0], "image", 1), (model.graph.output[0], "features", network.channels_out),
    ):  # fmt: skip
        found = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert (value.name, found) == (name, [1, channels, "depth", "height", "width"])
    assert not model.graph.value_info
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]


def test_normalisation_stays_one_operation(exported: Any) -> None:
    model = onnx.load_model_from_string(exported.bundle.graph("fp32"))
    count = Counter(node.op_type for node in model.graph.node)
    plain = exported.options.network == "PlainConvUNet"
    # Encoder (residual: stem, two a block, two projections) and decoder.
    a_fold = 3 + 2 if plain else 1 + 3 * 2 + 2 + 2
    assert count["InstanceNormalization"] == a_fold * len(exported.options.folds)
    assert count["ConvTranspose"] == 2 * len(exported.options.folds)
    assert count["AveragePool"] == (0 if plain else 2 * len(exported.options.folds))


def test_same_model_same_bytes(exported: Any) -> None:
    plan = read_plan(exported.folder, "3d_fullres")
    checkpoints = read_checkpoints(exported.folder, exported.options.folds, "checkpoint_final.pth")
    networks = [load_network(plan.architecture, found) for found in checkpoints]
    assert export_graph(backbone(networks), plan.patch) == exported.bundle.graph("fp32")


def make_graph(nodes: list[Any], weights: dict[str, tuple[int, ...]], channels: int) -> bytes:
    def value(name: str, count: int) -> Any:
        return onnx.helper.make_tensor_value_info(name, 1, [1, count, "depth", "height", "width"])

    initializers = [onnx.numpy_helper.from_array(np.zeros(shape, np.float32), n) for n, shape in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [value("image", 1)], [value("features", channels)], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    data: bytes = model.SerializeToString()
    return data


def test_activation_bytes_of_a_chain() -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["image", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["features"]),
    ]
    raw = make_graph(nodes, {"w1": (6, 1, 1, 1, 1), "w2": (2, 6, 1, 1, 1)}, 2)
    # The image (1 channel) with a (6); then a with b (6 + 6); then b with features (6 + 2).
    assert inspect_graph(raw).activation_bytes == 4 * 12


def test_activation_bytes_with_a_skip_connection() -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["image", "w1"], ["a"]),
        node("AveragePool", ["a"], ["low"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("Relu", ["low"], ["low2"]),
        node("ConvTranspose", ["low2", "w2"], ["up"], kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
        node("Concat", ["up", "a"], ["features"], axis=1),
    ]
    raw = make_graph(nodes, {"w1": (8, 1, 1, 1, 1), "w2": (8, 3, 2, 2, 2)}, 11)
    # At Concat: up (3), the skip a (8) and the result (11); what is low counts an eighth and is gone by then.
    assert inspect_graph(raw).activation_bytes == 4 * 22


def test_unknown_operations_are_refused() -> None:
    class Upsampling(torch.nn.Module):  # type: ignore[misc]
        def forward(self, image: Any) -> Any:
            return torch.nn.functional.interpolate(image, scale_factor=2.0)

    with pytest.raises(ModelFolderError, match=r"became a graph with .*Resize"):
        export_graph(Upsampling(), (4, 4, 4))


def test_too_many_weights_for_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MAX_WEIGHT_BYTES", 100)
    with pytest.raises(ModelFolderError, match="choose fewer with --fold"):
        export_graph(torch.nn.Conv3d(1, 1, 3), (4, 4, 4))


def rounded(raw: bytes) -> Any:
    """A graph whose every weight is a half-precision number."""
    model = onnx.load_model_from_string(raw)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16).astype(np.float32), tensor.name))
    return model


def test_halved_weights_are_the_same_weights(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "SMALLEST_HALVED", 1)
    model = rounded(exported.bundle.graph("fp32"))
    whole = model.SerializeToString()
    halve_weights(model)
    onnx.checker.check_model(model)
    halved = model.SerializeToString()
    patch = exported.bundle.manifest.network.patch
    assert len(halved) < 0.75 * len(whole)
    assert inspect_graph(halved) == inspect_graph(whole)
    batch = np.random.default_rng(0).standard_normal((1, 1, *patch)).astype(np.float32)
    for backend in NAMES:
        results = []
        for raw in (whole, halved):
            try:
                engine = open_engine(raw, batch.shape, EngineOptions(backend=backend))
            except BackendError as error:
                pytest.skip(str(error))
            results.append(engine.infer(batch).copy())
            engine.close()
        assert np.array_equal(*results), backend


def test_weights_that_would_lose_are_left_alone(exported: Any) -> None:
    model = onnx.load_model_from_string(exported.bundle.graph("fp32"))
    before = model.SerializeToString()
    halve_weights(model)
    assert model.SerializeToString() == before
