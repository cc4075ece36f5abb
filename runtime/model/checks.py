"""Checks of what a JSON document says. Those of single values return the value or raise ValueError."""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from edgemuse.engines.errors import BundleError
from edgemuse.runtime.regions.labels import COLOR
from edgemuse.runtime.scan.types import Shape, Spacing

SPACING_RANGE = (1e-3, 1e3)
"""mm"""
MAX_TEXT = 1000
"""Characters of a line of text."""
MAX_DEPTH = 32
"""Of lists and objects inside one another: who walks through them may do so by recursion."""
MAX_CONTAINERS, MAX_VALUES = 1 << 18, 1 << 20
"""Lists and objects, and commas between values: each becomes an object of Python, up to a hundred times its size."""
BRIEF = reprlib.Repr()
BRIEF.maxlevel = 2
T = TypeVar("T")


def short(value: object) -> str:
    """What `value` looks like, in less than a line."""
    try:
        return BRIEF.repr(value).replace("\n", " ")
    except Exception:  # as of a number of more digits than Python writes
        return f"a {type(value).__name__}"


def parse_json(raw: bytes) -> Any:
    """What the JSON text `raw` says, as long as it is neither huge nor nested deeply; raises ValueError."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES:
        raise ValueError("it has too many values")
    try:
        data = json.loads(raw)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return data


def _children(node: object) -> Iterable[object]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def is_orientation(codes: object) -> bool:
    """True for three axis codes, one each of L/R, P/A and I/S, in any order."""
    axes = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    return isinstance(codes, str) and len(codes) == 3 and {axes.get(code) for code in codes} == {0, 1, 2}


def sha256(digest: object) -> str:
    """64 hexadecimal digits."""
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{short(digest)} is not a SHA-256")
    return digest


def text(value: object) -> str:
    """One line of printable text, of at most `MAX_TEXT` characters."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise ValueError(f"{short(value)} is not a line of printable text")
    return value


def boolean(value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{short(value)} is neither true nor false")
    return value


def integer(value: object, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{short(value)} is not a whole number from {low} to {high}")
    return value


def number(value: object, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    number = finite(value)
    if not low <= number <= high:
        raise ValueError(f"{short(value)} is not from {low:g} to {high:g}")
    return number


def optional(check: Callable[..., T], value: object, *limits: float) -> T | None:
    """None, or what `check` says of `value`."""
    return None if value is None else check(value, *limits)


def one_of(value: object, choices: tuple[str, ...], what: str) -> str:
    """One of `choices`; `what` they are is named in the error."""
    if value not in choices:
        raise ValueError(f"{short(value)} is no {what} of {', '.join(choices)}")
    return str(value)


def listed(value: object) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"{short(value)} is not a list")
    return value


def finite(value: object) -> float:
    """A number that is neither NaN nor infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{short(value)} is not a finite number")
    return float(value)


def three_integers(values: Any, low: int, high: int) -> Shape:
    """Three whole numbers from `low` to `high`."""
    i, j, k = (integer(value, low, high) for value in values)
    return i, j, k


def spacing(values: Any) -> Spacing:
    """Three voxel sides in mm, within `SPACING_RANGE`."""
    i, j, k = (finite(value) for value in values)
    low, high = SPACING_RANGE
    if not low <= min(i, j, k) <= max(i, j, k) <= high:
        raise ValueError(f"spacing {[i, j, k]} is outside {low:g} to {high:g} mm")
    return i, j, k


def document(raw: bytes, path: Path, name: str, format: str, known: int) -> dict[str, Any]:
    """The JSON object in `raw`, the content of the file `name` of the bundle at `path`.

    Raises BundleError if it is no JSON object of this `format` and in the version that is `known`.
    """
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise BundleError(f"{path}: {name} is not valid JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != format:
        raise BundleError(f"{path}: {name} does not describe an edgemuse bundle")
    version = data.get("format_version")
    if version != known:
        raise BundleError(
            f"{path}: bundle format {short(version)}, this edgemuse reads {known}; upgrade edgemuse or export again"
        )
    return data


@contextlib.contextmanager
def reported(path: Path, name: str) -> Iterator[None]:
    """Turn what a malformed document raises inside the block into a BundleError naming `path` and the file `name`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: {name} is not valid: {reason}") from error


def color(value: object) -> str | None:
    """None, or a color such as #1e90ff."""
    if value is not None and not COLOR.fullmatch(text(value)):
        raise ValueError(f"{short(value)} is not a color such as #1e90ff")
    return None if value is None else text(value)
