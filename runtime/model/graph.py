"""What a graph does, worked out from the file itself before any backend sees it: its operators, shapes and memory.

Only what `edgemuse export` and `edgemuse calibrate` write is let through. All their operators keep a fixed ratio
between the size of an activation and that of the image, so one number a voxel bounds the memory of a tile of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

from edgemuse.runtime.model.onnx_file import FLOAT, FLOAT16, INT8, Graph, Node, Tensor, read_graph

MAX_NODES = 4000
"""Five folds of the largest network that nnU-Net plans have half of that in int8."""
MAX_KERNEL, MAX_STRIDE = 15, 16
AXES = ("depth", "height", "width")
"""Names of the image's axes, by which a backend is told their sizes."""
Scale: TypeAlias = tuple[Fraction, Fraction, Fraction]
WHOLE: Scale = (Fraction(1), Fraction(1), Fraction(1))
"""As large as the image."""


@dataclass(frozen=True)
class Activation:
    """(1, channels, d, h, w) of an ONNX `type`; d, h and w relative to the image's."""

    type: int
    channels: int
    scale: Scale = WHOLE

    @property
    def values(self) -> Fraction:
        """Numbers a voxel of the image."""
        d, h, w = self.scale
        return self.channels * d * h * w


Value: TypeAlias = Activation | Tensor
"""What an operator takes and gives: what depends on the image, or weights."""


@dataclass(frozen=True)
class Facts:
    """What is known of a graph that was let through.

    Attributes:
        channels: that it returns, for an image of one channel and the same size.
        stride: what d, h and w of the image must be multiples of.
        activation_bytes: peak of live activations a voxel of the image, if run node by node in float32.
    """

    channels: int
    stride: tuple[int, int, int]
    activation_bytes: int


def inspect_graph(data: bytes) -> Facts:
    """Check the ONNX graph in `data`; raises ValueError, which says what of it edgemuse does not run."""
    graph = read_graph(data)
    if len(graph.nodes) > MAX_NODES:
        raise ValueError(f"it has {len(graph.nodes)} nodes, expected {MAX_NODES} at most")
    if unknown := sorted({node.operation for node in graph.nodes} - RULES.keys()):
        raise ValueError(f"it has the operator {', '.join(unknown[:3])}, which edgemuse does not run")
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ValueError(f"it has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected one of each")
    (source,), (result,) = graph.inputs, graph.outputs
    if source in graph.weights:
        raise ValueError("its input is a weight, too")
    values: dict[str, Value] = {**graph.weights, source: Activation(FLOAT, 1)}
    for node in graph.nodes:
        _run(node, values)
    found = values.get(result)
    if not isinstance(found, Activation) or (found.type, found.scale) != (FLOAT, WHOLE):
        raise ValueError("its output is not float32 in the image's size")
    _check_notes(graph, values)
    flows = {name: value for name, value in values.items() if isinstance(value, Activation)}
    d, h, w = (math.lcm(*(flow.scale[axis].denominator for flow in flows.values())) for axis in range(3))
    return Facts(found.channels, (d, h, w), math.ceil(4 * _peak(graph.nodes, flows, result)))


def _run(node: Node, values: dict[str, Value]) -> None:
    """Add to `values` what `node` makes of them."""
    rule, known = RULES[node.operation]
    inputs = [values.get(name) for name in node.inputs]
    try:
        _need(None not in inputs, "an input that is not made before")
        _need(len(node.outputs) == 1 and node.outputs[0] not in values, "an output that is made twice")
        _need(known.issuperset(node.attributes), f"the attributes {', '.join(node.attributes)}")
        values[node.outputs[0]] = rule(inputs, node.attributes)
    except ValueError as error:
        raise ValueError(f"it has {node.operation} {' '.join(node.outputs[:1])} with {error}") from error
    except (TypeError, AttributeError, IndexError) as error:  # such as weights where an activation should be
        raise ValueError(f"it has {node.operation} {' '.join(node.outputs[:1])} with inputs of another kind") from error


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _three(attributes: Mapping[str, Any], name: str, low: int, high: int) -> tuple[int, ...]:
    found: tuple[int, ...] = attributes.get(name, (low,) * 3)
    _need(isinstance(found, tuple) and len(found) == 3 and low <= min(found) <= max(found) <= high, f"{name} {found}")
    return found


def _window(attributes: Mapping[str, Any], kernel: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """Strides and, before and after together, the padding of a window of shape `kernel`."""
    pads = attributes.get("pads", (0,) * 6)
    _need(isinstance(pads, tuple) and len(pads) == 6 and 0 <= min(pads) <= max(pads) <= MAX_KERNEL, f"pads {pads}")
    _need(attributes.get("kernel_shape", tuple(kernel)) == tuple(kernel), "a kernel_shape that its weights have not")
    _need(max(kernel) <= MAX_KERNEL, f"a kernel of {kernel}")
    _need(attributes.get("auto_pad", "NOTSET") == "NOTSET", "auto_pad")
    _three(attributes, "dilations", 1, 1)
    return _three(attributes, "strides", 1, MAX_STRIDE), [
        before + after for before, after in zip(pads[:3], pads[3:], strict=True)
    ]


def _scaled(source: Activation, type: int, channels: int, factors: Sequence[Fraction]) -> Activation:
    d, h, w = (scale * factor for scale, factor in zip(source.scale, factors, strict=True))
    _need(max(d, h, w) <= 1, "an output larger than the image")
    return Activation(type, channels, (d, h, w))


def _convolve(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    source, weight, *bias = inputs
    groups, (out, per_group, *kernel) = attributes.get("group", 1), weight.dims
    strides, pads = _window(attributes, kernel)
    _need(groups > 0 and per_group * groups == source.channels and out % groups == 0, f"weights of {weight.dims}")
    _check_bias(source, weight, bias, out)
    for size, stride, pad in zip(kernel, strides, pads, strict=True):
        _need(size - stride <= pad < size, f"a kernel of {size}, padding of {pad} and stride of {stride}")
    return _scaled(source, source.type, out, [Fraction(1, stride) for stride in strides])


def _upsample(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    source, weight, *bias = inputs
    enters, out, *kernel = weight.dims
    strides, pads = _window(attributes, kernel)
    _three(attributes, "output_padding", 0, 0)
    _need(enters == source.channels and attributes.get("group", 1) == 1, f"weights of {weight.dims}")
    _need(tuple(kernel) == strides and not any(pads), f"a kernel of {kernel} and strides of {strides}")
    _check_bias(source, weight, bias, out)
    return _scaled(source, source.type, out, [Fraction(stride) for stride in strides])


def _check_bias(source: Activation, weight: Tensor, bias: Sequence[Tensor], out: int) -> None:
    _need(isinstance(source, Activation) and source.type in (FLOAT, FLOAT16), "an input that is not floating point")
    _need(isinstance(weight, Tensor) and weight.type == source.type, "weights of another type than the input")
    _need(len(bias) < 2 and all(row == Tensor(source.type, (out,)) for row in bias), "a bias of another shape")


def _pool(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    (source,) = inputs
    kernel = _three(attributes, "kernel_shape", 1, MAX_STRIDE)
    strides, pads = _window(attributes, kernel)
    _need(kernel == strides and not any(pads) and not attributes.get("ceil_mode"), f"a kernel of {kernel}")
    return _scaled(source, source.type, source.channels, [Fraction(1, stride) for stride in strides])


def _normalise(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    source, scale, shift = inputs
    wanted = Tensor(source.type, (source.channels,))
    _need(source.type == FLOAT and scale == shift == wanted, "a scale or shift of another shape than its channels")
    return _scaled(source, source.type, source.channels, WHOLE)


def _activate(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    (source,) = inputs
    _need(source.type in (FLOAT, FLOAT16), "an input that is not floating point")
    return _scaled(source, source.type, source.channels, WHOLE)


def _join(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    first: Activation = inputs[0]
    _need(attributes.get("axis") == 1, "another axis than that of channels")
    _need(all((part.type, part.scale) == (first.type, first.scale) for part in inputs), "parts of different sizes")
    return replace(first, channels=sum(part.channels for part in inputs))


def _combine(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Activation:
    """Of two activations alike, or of one and a number."""
    first, second = inputs
    if isinstance(first, Tensor):
        first, second = second, first
    alike = second == first or (
        isinstance(second, Tensor) and second.type == first.type and math.prod(second.dims) == 1
    )
    _need(isinstance(first, Activation) and alike, "operands of different sizes")
    _need(first.type in (FLOAT, FLOAT16), "an input that is not floating point")
    return Activation(first.type, first.channels, first.scale)


def _cast(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Value:
    (source,), target = inputs, attributes.get("to", 0)
    _need({source.type, target} <= {FLOAT, FLOAT16}, "other types than float32 and float16")
    return _converted(source, target)


def _quantise(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Value:
    source, scale, zero = inputs
    _need(source.type == scale.type and zero.type == INT8, "other types than floating point and int8")
    _check_steps(source, scale, zero, attributes)
    return _converted(source, INT8)


def _dequantise(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Value:
    source, scale, zero = inputs
    _need((source.type, zero.type) == (INT8, INT8), "other types than int8")
    _check_steps(source, scale, zero, attributes)
    return _converted(source, scale.type)


def _converted(source: Value, type: int) -> Value:
    return replace(source, type=type)


def _check_steps(source: Value, scale: Tensor, zero: Tensor, attributes: Mapping[str, Any]) -> None:
    """One scale for everything or, of weights, one for each along an axis."""
    axis = attributes.get("axis", 1)
    along = [(), (1,)] if isinstance(source, Activation) else [(), (1,), source.dims[axis : axis + 1]]
    fits = scale.type in (FLOAT, FLOAT16) and scale.dims == zero.dims and scale.dims in along
    _need(fits, f"scales of {scale.dims}")
    _need(axis in (0, 1), f"axis {axis}")


Rule: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any]], Value]
WINDOW = frozenset(("auto_pad", "dilations", "kernel_shape", "pads", "strides"))
NONE: frozenset[str] = frozenset()
EXPORTED: Mapping[str, tuple[Rule, frozenset[str]]] = {
    "Add": (_combine, NONE),
    "AveragePool": (_pool, WINDOW | {"ceil_mode", "count_include_pad"}),
    "Concat": (_join, frozenset(("axis",))),
    "Conv": (_convolve, WINDOW | {"group"}),
    "ConvTranspose": (_upsample, WINDOW | {"group", "output_padding"}),
    "Div": (_combine, NONE),
    "InstanceNormalization": (_normalise, frozenset(("epsilon",))),
    "LeakyRelu": (_activate, frozenset(("alpha",))),
    "Mul": (_combine, NONE),
    "Relu": (_activate, NONE),
}
"""Operators that a network may become: what each gives, and the attributes that it may have.

All work at any spatial size. Div and Mul take the mean over folds; their other operand is a number.
"""
CONVERSIONS: Mapping[str, tuple[Rule, frozenset[str]]] = {
    "Cast": (_cast, frozenset(("to",))),
    "DequantizeLinear": (_dequantise, frozenset(("axis",))),
    "QuantizeLinear": (_quantise, frozenset(("axis",))),
}
"""What lower precisions add, and weights that are stored in half precision."""
RULES = {**EXPORTED, **CONVERSIONS}


def _check_notes(graph: Graph, values: Mapping[str, Value]) -> None:
    """What a graph says of its values must be what comes out, because backends plan their memory by it."""
    sizes: dict[object, tuple[int, Fraction]] = {}
    for name, note in {**graph.notes, **graph.inputs, **graph.outputs}.items():
        value = values.get(name)
        if isinstance(value, Tensor):
            _need(note == value, f"it notes another shape for {name}")
        if not isinstance(value, Activation):
            continue
        known, named = note.dims[:2], note.dims[2:]
        _need(
            (note.type, known, len(named)) == (value.type, (1, value.channels), 3), f"it notes another shape for {name}"
        )
        for axis, size in enumerate(named):
            found = (axis, value.scale[axis])
            _need(
                isinstance(size, str) and sizes.setdefault(size, found) == found,
                f"it has axes of a fixed size, or two sizes of one name, on {name}",
            )
    (source,) = graph.inputs.values()
    _need(source.dims[2:] == AXES, f"its axes are called {source.dims[2:]}, expected {AXES}")


def _peak(nodes: Sequence[Node], flows: Mapping[str, Activation], result: str) -> Fraction:
    """Most numbers a voxel of the image that are alive at once.

    Conversions count as what they convert: no backend keeps both for longer than it takes.
    """
    owners: dict[str, str] = {}
    for node in nodes:
        if node.operation in CONVERSIONS:
            owners[node.outputs[0]] = owners.get(node.inputs[0], node.inputs[0])
    last = {owners.get(name, name): index for index, node in enumerate(nodes) for name in node.inputs}
    last[owners.get(result, result)] = len(nodes)
    made = {node.outputs[0] for node in nodes}
    alive = sum((flow.values for name, flow in flows.items() if name not in made), Fraction(0))
    peak = Fraction(0)
    for index, node in enumerate(nodes):
        (name,) = node.outputs
        if name in owners or name not in flows:
            continue
        alive += flows[name].values
        peak = max(peak, alive)
        gone = {owners.get(used, used) for used in (*node.inputs, name)}
        alive -= sum(
            (flows[used].values for used in gone if used in flows and last.get(used, -1) <= index), Fraction(0)
        )
    return peak
