"""What an ONNX file says, read without trust and without the `onnx` package; weights are measured and never copied.

A file is a protobuf message. Only the fields that edgemuse's own graphs have are known: a field more, such as a
subgraph, a function or a file outside, is refused by its name, so that no backend gets to see what was not checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT, INT8, FLOAT16 = 1, 3, 10
"""ONNX's numbers for the types of tensors that there are here."""
ITEM_BYTES = {FLOAT: 4, INT8: 1, FLOAT16: 2}
MAX_PARTS = 1 << 19
"""Fields of messages, weights apart. An ensemble of five large networks has a fifth of that."""
MAX_LISTED = 1 << 16
"""Numbers of a tensor that are written one by one: scales are, weights are not."""
TEXT, INTEGER, SINGLE, BYTES, INTEGERS = "text", "integer", "single", "bytes", "integers"
"""What fields hold; of BYTES only the number is kept."""

FIELDS: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "model": {
        1: ("ir_version", INTEGER),
        2: ("producer_name", TEXT),
        3: ("producer_version", TEXT),
        7: ("graph", "graph"),
        8: ("opset_import", "opset*"),
    },
    "opset": {1: ("domain", TEXT), 2: ("version", INTEGER)},
    "graph": {
        1: ("node", "node*"),
        2: ("name", TEXT),
        5: ("initializer", "tensor*"),
        11: ("input", "value*"),
        12: ("output", "value*"),
        13: ("value_info", "value*"),
    },
    "node": {
        1: ("input", "text*"),
        2: ("output", "text*"),
        3: ("name", TEXT),
        4: ("op_type", TEXT),
        5: ("attribute", "attribute*"),
        7: ("domain", TEXT),
    },
    "attribute": {
        1: ("name", TEXT),
        2: ("f", SINGLE),
        3: ("i", INTEGER),
        4: ("s", TEXT),
        8: ("ints", "integers*"),
        20: ("type", INTEGER),
    },
    "tensor": {
        1: ("dims", "integers*"),
        2: ("data_type", INTEGER),
        4: ("float_data", "bytes*"),
        5: ("int32_data", "integers*"),
        8: ("name", TEXT),
        9: ("raw_data", BYTES),
    },
    "value": {1: ("name", TEXT), 2: ("type", "type")},
    "type": {1: ("tensor_type", "tensor type")},
    "tensor type": {1: ("elem_type", INTEGER), 2: ("shape", "shape")},
    "shape": {1: ("dim", "axis*")},
    "axis": {1: ("dim_value", INTEGER), 2: ("dim_param", TEXT)},
}
"""The messages: the name of each field by its number, and what it holds, `*` any number of them."""
REFUSED = {
    ("model", 20): "training information",
    ("model", 25): "functions",
    ("graph", 14): "quantization annotations",
    ("graph", 15): "sparse weights",
    ("attribute", 5): "a tensor as attribute",
    ("attribute", 6): "a subgraph",
    ("attribute", 10): "tensors as attribute",
    ("attribute", 11): "subgraphs",
    ("tensor", 3): "a tensor in segments",
    ("tensor", 6): "weights that are text",
    ("tensor", 13): "weights in a file outside the bundle",
    ("tensor", 14): "weights in a file outside the bundle",
}
"""What the fields are called that somebody might think of."""
VARINT, LENGTH, FIXED32 = 0, 2, 5
WIRES = {INTEGER: (VARINT,), SINGLE: (FIXED32,), INTEGERS: (VARINT, LENGTH), BYTES: (LENGTH, FIXED32)}
"""How what a field holds may be written; whatever else has a length."""
MESSAGES = {
    kind: {
        number: (name, holds.rstrip("*"), WIRES.get(holds.rstrip("*"), (LENGTH,)))
        for number, (name, holds) in fields.items()
    }
    for kind, fields in FIELDS.items()
}
LISTS = {kind: {name for name, holds in fields.values() if holds.endswith("*")} for kind, fields in FIELDS.items()}


@dataclass(frozen=True)
class Tensor:
    """Type and shape of weights, or of an activation whose axes may have names."""

    type: int
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """One operation: the names of what goes in and comes out, and its attributes."""

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """The nodes in the order of execution, and what is known of values by name."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    notes: Mapping[str, Tensor]


def read_graph(data: bytes) -> Graph:
    """The graph in an ONNX file; raises ValueError if there is anything in it that edgemuse does not know."""
    model = _Reader(data).message("model", 0, len(data))
    domains = [opset.get("domain", "") for opset in model["opset_import"]]
    if domains not in ([""], ["ai.onnx"]):
        raise ValueError(f"it has operators of {domains[:3]}, expected those of ONNX alone")
    graph = model.get("graph", {})
    return Graph(
        tuple(_node(row) for row in graph.get("node", ())),
        _named("weights", graph.get("initializer", ()), _weights),
        *(_named(field, graph.get(field, ()), _value) for field in ("input", "output", "value_info")),
    )


class _Reader:
    """Reads messages by the tables above; counts their fields."""

    def __init__(self, data: bytes) -> None:
        self.data, self.parts = data, 0

    def message(self, kind: str, at: int, end: int) -> dict[str, Any]:
        """The fields of the message from byte `at` to `end` by name; what may be there more than once, as a list.

        Raises ValueError.
        """
        table = MESSAGES[kind]
        found: dict[str, Any] = {name: [] for name in LISTS[kind]}
        while at < end:
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if number not in table:
                raise ValueError(f"it holds {REFUSED.get((kind, number), f'an unknown field {number} of a {kind}')}")
            name, holds, wires = table[number]
            if wire not in wires:
                raise ValueError(f"it is damaged or no ONNX file: {name} of a {kind} is written in another way")
            value, at = self._content(holds, wire, at, end)
            self.parts += 1
            if name not in LISTS[kind]:
                if name in found:
                    raise ValueError(f"it has {name} of a {kind} twice")
                found[name] = value
            elif isinstance(value, list):
                self.parts += len(value)
                found[name] += value
            else:
                found[name].append(value)
            if self.parts > MAX_PARTS:
                raise ValueError(f"it has more than {MAX_PARTS} parts")
        return found

    def _content(self, holds: str, wire: int, at: int, end: int) -> tuple[Any, int]:
        """What a field holds that begins at byte `at`, and where the next one begins."""
        if wire == VARINT:
            number, at = self._varint(at, end)
            return number - (number >> 63 << 64), at
        size, at = (4, at) if wire == FIXED32 else self._varint(at, end)
        stop = at + size
        if stop > end:
            raise ValueError("it is cut off or no ONNX file")
        if holds in MESSAGES:
            return self.message(holds, at, stop), stop
        if holds == TEXT:
            return self.data[at:stop].decode(), stop
        if holds == SINGLE:
            return struct.unpack_from("<f", self.data, at)[0], stop
        return (self._numbers(at, stop) if holds == INTEGERS else size), stop

    def _numbers(self, at: int, end: int) -> list[int]:
        if end - at > 10 * MAX_LISTED:  # before a number of one byte becomes an object
            raise ValueError(f"it lists more than {MAX_LISTED} numbers one by one")
        numbers = []
        while at < end:
            number, at = self._varint(at, end)
            numbers.append(number - (number >> 63 << 64))
        return numbers

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number from 0 to 2**64 - 1 that begins at byte `at`, and where the next one begins."""
        number = shift = 0
        while at < end and shift < 64:
            byte = self.data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number & (1 << 64) - 1, at
            shift += 7
        raise ValueError("it is cut off or no ONNX file")


def _named(what: str, rows: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], Tensor]) -> dict[str, Tensor]:
    found = {row.get("name", ""): read(row) for row in rows}
    if "" in found or len(found) < len(rows):
        raise ValueError(f"its {what} have no name, or one twice")
    return found


def _node(row: dict[str, Any]) -> Node:
    operation = row.get("op_type", "")
    if row.get("domain"):
        raise ValueError(f"it has the operator {operation} of {row['domain']}")
    attributes = {found.get("name", ""): _attribute(found) for found in row["attribute"]}
    if len(attributes) < len(row["attribute"]):
        raise ValueError(f"it has {operation} with an attribute twice")
    return Node(operation, tuple(row["input"]), tuple(row["output"]), attributes)


ATTRIBUTES: Mapping[int | None, tuple[str, Any]] = {1: ("f", 0.0), 2: ("i", 0), 3: ("s", ""), 7: ("ints", ())}
"""By its type: the field of an attribute that holds its value, and what it is where it is not written."""


def _attribute(row: dict[str, Any]) -> Any:
    field, default = ATTRIBUTES.get(row.get("type"), ("", None))
    if any(row.get(other) for other, _ in ATTRIBUTES.values() if other != field) or not field:
        raise ValueError(f"it has an attribute {row.get('name', '')} that is none of a number, numbers and text")
    value = row.get(field, default)
    return tuple(value) if field == "ints" else value


def _weights(row: dict[str, Any]) -> Tensor:
    """Type and shape of weights whose numbers are all there, no more and no fewer."""
    type, dims = row.get("data_type", 0), tuple(row["dims"])
    if type not in ITEM_BYTES or len(dims) > 5 or any(size < 1 for size in dims):
        raise ValueError(f"it has weights of type {type} and shape {dims[:6]}")
    stored = {
        "raw_data": row.get("raw_data", 0),
        "float_data": sum(row["float_data"]) if type == FLOAT else 0,
        "int32_data": len(row["int32_data"]) if type == INT8 else 0,
    }
    wanted = ITEM_BYTES[type] * math.prod(dims)
    if sorted(stored.values()) != [0, 0, wanted]:
        raise ValueError(f"it has weights of shape {dims} with {sum(stored.values())} bytes, expected {wanted}")
    return Tensor(type, dims)


def _value(row: dict[str, Any]) -> Tensor:
    tensor = row.get("type", {}).get("tensor_type", {})
    axes = tensor.get("shape", {}).get("dim", ())
    if any(len(axis) != 1 for axis in axes):
        raise ValueError("it has an axis with neither a size nor a name")
    return Tensor(tensor.get("elem_type", 0), tuple(size for axis in axes for size in axis.values()))
