"""Reading the JSON files of a model folder, which may come from anywhere, and checking every value taken from them.

The checks raise ValueError, TypeError or KeyError; `blaming` turns these into one ModelFolderError that names the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import ModelFolderError
from edgemuse.runtime.model.checks import parse_json, short
from edgemuse.runtime.scan.stand_in import stand_in

MAX_JSON_BYTES = 16 << 20
"""Nothing larger than this is read into memory; real plans have a few kilobytes."""


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Report what is wrong with a value as a ModelFolderError about `path`."""
    try:
        yield
    except KeyError as error:
        message = f"{path}: {error} is missing; is this file from nnU-Net v2?"
        raise ModelFolderError(message) from error
    except (TypeError, ValueError) as error:
        raise ModelFolderError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; raises ModelFolderError."""
    try:
        if path.exists() and not path.is_file():  # of a pipe, opening it would wait for somebody to write
            raise ModelFolderError(f"{path}: not a file; copy it again")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        reason = stand_in(path) or "no such file; name the folder that holds plans.json, dataset.json and fold_*"
        raise ModelFolderError(f"{path}: {reason}") from error
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_JSON_BYTES:
        raise ModelFolderError(f"{path}: larger than {MAX_JSON_BYTES} bytes, so it is not a file of nnU-Net")
    try:
        data = parse_json(raw)
    except ValueError as error:
        reason = stand_in(path) or f"not valid JSON ({error}); copy it again"
        raise ModelFolderError(f"{path}: {reason}") from error
    with blaming(path):
        return mapping(data, "the file")


def mapping(value: object, what: str) -> dict[str, Any]:
    """`value`, which must be a JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"{what} must map names to values, found {short(value)}")
    return value


def text(value: object, what: str) -> str:
    """`value`, which must be one line of text."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 200:
        raise ValueError(f"{what} must be one line of text, found {short(value)}")
    return value


def flag(value: object, what: str) -> bool:
    """`value`, which must be true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, found {short(value)}")
    return value


def whole(value: object, low: int, high: int, what: str) -> int:
    """`value`, which must be a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{what} must be a whole number from {low} to {high}, found {short(value)}")
    return value


def real(value: object, low: float, high: float, what: str) -> float:
    """`value`, which must be a number from `low` to `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator,arg-type]
        raise ValueError(f"{what} must be a number from {low:g} to {high:g}, found {short(value)}")
    return float(value)  # type: ignore[arg-type]


def sequence(value: object, count: int, what: str) -> list[Any]:
    """`value`, which must be a list of `count` entries."""
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"{what} must be a list of {count}, found {short(value)}")
    return list(value)
