"""Reads `dataset.json`: it must name one input channel, and it says what the classes are called."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.documents import blaming, mapping, read_json, text, whole
from edgemuse.runtime.model.checks import short
from edgemuse.runtime.regions.labels import Label, parse_label_table

DATASET = "dataset.json"
MAX_CLASSES = 1 << 16
MAX_TABLE_BYTES = 16 << 20
"""Of a label table; what is beyond is not read."""
DIGITS = re.compile(r"\s*[0-9]{1,9}\s*")


@dataclass(frozen=True)
class Dataset:
    """The ending of the scans' file names, and the names of the classes by their numbers."""

    file_ending: str
    names: Mapping[int, str]


def read_dataset(folder: Path) -> Dataset:
    """Read `folder/dataset.json`; raises ModelFolderError for more than one channel and for overlapping regions."""
    path = folder / DATASET
    data = read_json(path)
    with blaming(path):
        _check_channels(data)
        labels = mapping(data["labels"], "labels")
        _refuse_regions(labels)
        return Dataset(text(data.get("file_ending", ".nii.gz"), "file_ending"), _names(labels))


def _check_channels(data: Mapping[str, Any]) -> None:
    key = "modality" if "modality" in data else "channel_names"
    channels = mapping(data[key], key)
    if len(channels) != 1:
        raise ValueError(
            f"the model takes {len(channels)} input channels ({short(list(channels.values()))}); "
            "edgemuse runs models with one"
        )


def _refuse_regions(labels: Mapping[str, Any]) -> None:
    """A list of one number is a plain label to nnU-Net, and then a `regions_class_order` is not looked at."""
    regions = [name for name, value in labels.items() if isinstance(value, list) and len(value) > 1]
    if regions:
        raise ValueError(
            f"the model predicts overlapping regions ({short(regions)}), which edgemuse does not support; "
            "export a model trained on plain labels"
        )


def _names(labels: Mapping[str, Any]) -> dict[int, str]:
    """The first name of every number. `ignore` marks voxels left out of training and is no class."""
    names: dict[int, str] = {}
    for name, value in labels.items():
        for number in value if isinstance(value, list) else [value]:
            found = whole(_number(number), 0, MAX_CLASSES, f"label {short(name)}")
            if name != "ignore":
                names.setdefault(found, text(name, "the name of a label"))
    return names


def _number(value: object) -> object:
    """The whole number that `value` writes as text or with a point, as nnU-Net reads it; anything else as it is."""
    if isinstance(value, str) and DIGITS.fullmatch(value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def class_labels(dataset: Dataset, classes: int) -> tuple[Label, ...]:
    """One label a class, with its number as index and `dataset.json`'s name."""
    if beyond := sorted(number for number in dataset.names if number >= classes):
        raise ModelFolderError(
            f"{DATASET} names label {beyond[0]}, but the network has classes 0 to {classes - 1}; "
            "are both from the same training?"
        )
    return tuple(Label(number, number, dataset.names.get(number, f"class_{number}")) for number in range(classes))


def read_label_table(path: Path, classes: int) -> tuple[Label, ...]:
    """The label table in the file `path`; raises ModelFolderError unless it has `classes` rows."""
    try:
        with path.open("rb") as file:
            labels = parse_label_table(file.read(MAX_TABLE_BYTES).decode())
    except OSError as error:
        raise ModelFolderError(f"{path}: the label table cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error) as error:
        raise ModelFolderError(f"{path}: not a label table: {error}") from error
    if len(labels) != classes:
        raise ModelFolderError(
            f"{path}: the table has {len(labels)} classes, the network {classes}; give one row a class"
        )
    return labels
