"""Reads nnU-Net's checkpoints as data only: a checkpoint is a pickle, and a pickle could run any program."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from edgemuse.engines.errors import ModelFolderError, one_line
from edgemuse.export.documents import blaming, mapping, text, whole
from edgemuse.export.pickles import MAX_PICKLE_BYTES, ForbiddenError, Stored, TorchFile, is_old
from edgemuse.runtime.model.checks import MAX_TEXT, short
from edgemuse.runtime.scan.stand_in import stand_in

WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")
"""Prefixes that torch.compile and DataParallel leave on the names of weights."""
FOLD = re.compile(r"fold_([0-9]{1,9}|all)")
SHOWN = 80
"""Characters of a name out of a checkpoint."""


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
        if instead := [what for fold in found if (what := stand_in(folder / f"fold_{fold}" / name))]:
            hint = f", only {instead[0]}"
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
        reason = stand_in(path) or "no such checkpoint; choose with --fold and --checkpoint"
        raise ModelFolderError(f"{path}: {reason}")
    with _reported(path), path.open("rb") as file:
        _check_kind(file, path)
        opened = TorchFile(file)
        with blaming(path):
            contents = mapping(opened.content, "a checkpoint")
            stored = _stored(mapping(contents["network_weights"], "network_weights"))
            configuration = text(mapping(contents["init_args"], "init_args")["configuration"], "configuration")
            mirror_axes = _mirror_axes(contents.get("inference_allowed_mirroring_axes"))
            trainer = text(contents["trainer_name"], "trainer_name")
        return Checkpoint(fold, opened.tensors(stored), configuration, mirror_axes, trainer, _sha256(file))


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside the block, as one ModelFolderError about `path`."""
    try:
        yield
    except ModelFolderError:
        raise
    except ForbiddenError as error:
        raise ModelFolderError(
            f"{path}: refused, as loading it would call {one_line(error)[:SHOWN]}, which no checkpoint of nnU-Net "
            "needs; nothing of it was run; get the checkpoint from its authors again"
        ) from error
    except Exception as error:  # a hostile or cut-off file makes pickle, zipfile and torch fail in any way
        reason = stand_in(path) or (
            f"not a whole checkpoint ({one_line(error)[:MAX_TEXT] or type(error).__name__}); copy or download it again"
        )
        raise ModelFolderError(f"{path}: {reason}") from error


def _check_kind(file: IO[bytes], path: Path) -> None:
    """Raise ModelFolderError, ForbiddenError or ValueError unless `file` begins as a zip file does."""
    head = file.read(2)
    if head == b"PK":
        return
    if not is_old(head + file.read(MAX_PICKLE_BYTES)):
        raise ValueError("it is no file of PyTorch")
    raise ModelFolderError(
        f"{path}: in PyTorch's format from before 1.6; if you trust it, load it with PyTorch and save it again"
    )


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def _stored(found: Mapping[str, Any]) -> dict[str, Stored]:
    weights = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise TypeError(f"network_weights must map names to tensors, found {short(name)}: {type(tensor).__name__}")
        if tensor.storage.type is None:
            raise TypeError(f"weight {short(name)} must be a plain tensor of real numbers")
        weights[WRAPPERS.sub("", name)] = tensor
    return weights


def _mirror_axes(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    what = "inference_allowed_mirroring_axes"
    if not isinstance(value, list | tuple):
        raise TypeError(f"{what} must be a list of axes, found {short(value)}")
    return tuple(sorted({whole(axis, 0, 2, what) for axis in value}))
