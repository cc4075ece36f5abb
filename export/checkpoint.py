"""Reads nnU-Net's checkpoints as data only: a checkpoint is a pickle, and a pickle could run any program."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.documents import blaming, mapping, short, text, whole
from edgemuse.runtime.scan.nifti import file_sha256

NUMBERS = (
    "Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32", "Float64",
)  # fmt: skip
SCALAR: Any = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    # numpy renamed the module of this function in 2.0, so checkpoints know it by either name.
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name.lower())) for name in NUMBERS),
]
"""What nnU-Net's own checkpoints need beyond tensors: the losses and Dice of its log are numpy numbers."""
WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")
"""Prefixes that torch.compile and DataParallel leave on the names of weights."""
FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
FOLD = re.compile(r"fold_(\d+|all)")


@dataclass(frozen=True)
class Checkpoint:
    """What is used of one fold's checkpoint: finite float32 `weights` by name, and how the fold was trained."""

    fold: str
    weights: Mapping[str, torch.Tensor]
    configuration: str
    mirror_axes: tuple[int, ...]
    trainer: str
    sha256: str


def find_folds(folder: Path, name: str) -> tuple[str, ...]:
    """The folds of `folder` that have the checkpoint `name`. As in nnU-Net, `all` counts only if it is alone."""
    found = [match[1] for path in folder.glob("fold_*") if (match := FOLD.fullmatch(path.name))]
    ready = [fold for fold in found if (folder / f"fold_{fold}" / name).is_file()]
    if not ready:
        there = sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/*.pth"))
        hint = f"; there is {', '.join(there)}: choose with --checkpoint" if there else ""
        raise ModelFolderError(f"{folder}: no fold_*/{name} in this folder{hint}")
    numbered = sorted((fold for fold in ready if fold != "all"), key=int)
    return tuple(numbered) or ("all",)


def read_checkpoints(folder: Path, folds: tuple[str, ...], name: str) -> tuple[Checkpoint, ...]:
    """The checkpoints of `folds`, which must have been trained alike; raises ModelFolderError."""
    checkpoints = tuple(read_checkpoint(folder / f"fold_{fold}" / name, fold) for fold in folds)
    for what in ("configuration", "mirror_axes"):
        found = {checkpoint.fold: getattr(checkpoint, what) for checkpoint in checkpoints}
        if len(set(found.values())) > 1:
            raise ModelFolderError(
                f"{folder}: the folds differ in {what} ({found}); choose those that agree with --fold"
            )
    return checkpoints


def read_checkpoint(path: Path, fold: str) -> Checkpoint:
    """Read one checkpoint without running anything that is in it; raises ModelFolderError."""
    if not path.is_file():
        raise ModelFolderError(f"{path}: no such checkpoint; choose with --fold and --checkpoint")
    data = _load(path)
    with blaming(path):
        contents = mapping(data, "a checkpoint")
        return Checkpoint(
            fold=fold,
            weights=_weights(mapping(contents["network_weights"], "network_weights")),
            configuration=text(mapping(contents["init_args"], "init_args")["configuration"], "configuration"),
            mirror_axes=_mirror_axes(contents.get("inference_allowed_mirroring_axes")),
            trainer=text(contents["trainer_name"], "trainer_name"),
            sha256=file_sha256(path),
        )


def _load(path: Path) -> Any:
    try:
        # Old checkpoints bring warnings about pickle protocols and storages, which are nobody's business here.
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a hostile or cut-off file makes torch fail in any way it likes
        if forbidden := FORBIDDEN.search(str(error)):
            raise ModelFolderError(
                f"{path}: refused, as loading it would call {forbidden[1]}, which no checkpoint of nnU-Net needs"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFolderError(f"{path}: not a whole checkpoint, copy it again ({reason})") from error


def _weights(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(f"network_weights must map names to tensors, found {short(name)}: {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise TypeError(f"weight {short(name)} must be a plain tensor of real numbers, found {tensor.dtype}")
        weights[WRAPPERS.sub("", name)] = tensor.detach()
    return weights


def _mirror_axes(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    what = "inference_allowed_mirroring_axes"
    if not isinstance(value, list | tuple):
        raise TypeError(f"{what} must be a list of axes, found {short(value)}")
    return tuple(sorted({whole(axis, 0, 2, what) for axis in value}))
