"""A small U-Net as ONNX, without PyTorch: an encoder, a transposed convolution, a skip connection, normalisations."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTHS = {"skip": 4, "low": 6, "up": 5}


def unet(seed: int = 0, out: int = 4, parts: int = 2, scale: float = 1.0) -> onnx.ModelProto:
    """`image` (1, 1, D, H, W), D, H and W even, to `features` (1, out, D, H, W).

    `parts`: how many tensors the decoder joins. `scale`: of the upsampled part's weights, so that it can be far larger
    than the skip connection.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, NDArray[np.float32]] = {}
    nodes: list[onnx.NodeProto] = []

    def weight(name: str, *shape: int, spread: float = 0.0) -> str:
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 4.0
        weights[name] = rng.normal(0, spread or (2 / fan_in) ** 0.5, shape).astype(np.float32)
        return name

    def block(source: str, name: str, inside: int, outside: int, stride: int = 1, result: str = "") -> str:
        kernel = [weight(f"{name}.w", outside, inside, 3, 3, 3), weight(f"{name}.b", outside)]
        settings = {"kernel_shape": [3] * 3, "pads": [1] * 6, "strides": [stride] * 3}
        nodes.append(helper.make_node("Conv", [source, *kernel], [f"{name}.c"], f"{name}.conv", **settings))
        weights[f"{name}.g"], weights[f"{name}.h"] = np.ones(outside, np.float32), np.zeros(outside, np.float32)
        inputs = [f"{name}.c", f"{name}.g", f"{name}.h"]
        nodes.append(helper.make_node("InstanceNormalization", inputs, [f"{name}.n"], f"{name}.norm", epsilon=1e-5))
        nodes.append(helper.make_node("LeakyRelu", [f"{name}.n"], [result or name], f"{name}.act", alpha=0.01))
        return result or name

    block("image", "skip", 1, WIDTHS["skip"])
    block("skip", "low", WIDTHS["skip"], WIDTHS["low"], stride=2)
    spread = [weight("up.w", WIDTHS["low"], WIDTHS["up"], 2, 2, 2, spread=scale), weight("up.b", WIDTHS["up"])]
    settings = {"kernel_shape": [2] * 3, "strides": [2] * 3}
    nodes.append(helper.make_node("ConvTranspose", ["low", *spread], ["up"], "up", **settings))
    joined = ["up", *["skip"] * (parts - 1)]
    nodes.append(helper.make_node("Concat", joined, ["joined"], "join", axis=1))
    block("joined", "last", sum(WIDTHS[name] for name in joined), out, result="features")
    sizes = ["depth", "height", "width"]
    graph = helper.make_graph(
        nodes,
        "unet",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *sizes])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, out, *sizes])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    return model
