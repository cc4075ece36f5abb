"""Checkpoints are data: hostile ones run nothing, damaged ones are one clear line, nnU-Net's own load."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading checkpoints needs PyTorch")

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.checkpoint import find_folds, read_checkpoint, read_checkpoints

Make = Callable[..., Path]


@pytest.fixture
def content(nnunet_models: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = nnunet_models.checkpoint(nnunet_models.ModelOptions(), seed=0)
    return found


def save(folder: Path, content: Any) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return path


class Command:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Evaluation(Command):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


def test_the_numbers_of_nnunets_log_load(content: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(content["_best_ema"], np.float64)
    assert isinstance(content["logging"]["train_losses"][0], np.float32)
    found = read_checkpoint(save(tmp_path, content), "0")
    assert found.configuration == "3d_fullres"
    assert found.trainer == "nnUNetTrainer"
    assert found.mirror_axes == (0, 1, 2)
    assert found.weights.keys() == content["network_weights"].keys()


def test_the_name_that_numpy_1_gave_its_scalars_loads(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw
    path.write_bytes(raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(path, "0").weights.keys() == content["network_weights"].keys()


@pytest.mark.parametrize("hostile", [Command, Evaluation])
@pytest.mark.parametrize("save_as", ["zip", "legacy", "pickle"])
def test_hostile_checkpoint_runs_nothing(
    content: dict[str, Any], tmp_path: Path, hostile: type[Command], save_as: str
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    content["logging"] = hostile(marker)
    if save_as == "pickle":
        path.write_bytes(pickle.dumps(content["logging"]))
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the attack itself does not work, so this test would prove nothing"
        marker.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save_as == "zip")
    with pytest.raises(ModelFolderError) as caught:
        read_checkpoint(path, "0")
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    if save_as != "pickle":
        assert "refused" in str(caught.value)
        assert "system" in str(caught.value) or "eval" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_cut_off(content: dict[str, Any], tmp_path: Path, keep: float) -> None:
    path = save(tmp_path, content)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelFolderError, match="not a whole checkpoint") as caught:
        read_checkpoint(path, "0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"hello world", b"\x80\x02]q\x00.", b"PK\x03\x04" + bytes(100)])
def test_not_a_checkpoint(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(raw)
    with pytest.raises(ModelFolderError):
        read_checkpoint(path, "0")


@pytest.mark.parametrize("key", ["network_weights", "init_args", "trainer_name"])
def test_missing_key(content: dict[str, Any], tmp_path: Path, key: str) -> None:
    del content[key]
    with pytest.raises(ModelFolderError, match=f"'{key}' is missing"):
        read_checkpoint(save(tmp_path, content), "0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network_weights", [1]),
        ("network_weights", {"a": 1}),
        ("network_weights", {1: torch.zeros(1)}),
        ("network_weights", {"a": torch.zeros(1, dtype=torch.int64)}),
        ("init_args", {"configuration": 3}),
        ("inference_allowed_mirroring_axes", (0, 3)),
        ("inference_allowed_mirroring_axes", 1),
        ("inference_allowed_mirroring_axes", "012"),
    ],
)
def test_values_of_a_wrong_kind(content: dict[str, Any], tmp_path: Path, key: str, value: Any) -> None:
    content[key] = value
    with pytest.raises(ModelFolderError, match=r"checkpoint\.pth"):
        read_checkpoint(save(tmp_path, content), "0")


@pytest.mark.parametrize(("axes", "expected"), [("absent", ()), (None, ()), ((0, 1), (0, 1)), ([2, 0], (0, 2))])
def test_mirror_axes(nnunet_models: ModuleType, tmp_path: Path, axes: Any, expected: tuple[int, ...]) -> None:
    options = nnunet_models.ModelOptions(mirror_axes=axes)
    assert read_checkpoint(save(tmp_path, nnunet_models.checkpoint(options, 0)), "0").mirror_axes == expected


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_are_stripped(nnunet_models: ModuleType, tmp_path: Path, prefix: str) -> None:
    plain = nnunet_models.checkpoint(nnunet_models.ModelOptions(), 0)["network_weights"]
    wrapped = nnunet_models.checkpoint(nnunet_models.ModelOptions(prefix=prefix), 0)
    assert read_checkpoint(save(tmp_path, wrapped), "0").weights.keys() == plain.keys()


def test_folds_are_found_in_order(model_folder: Make) -> None:
    folder = model_folder(folds=("10", "2", "all"))
    assert find_folds(folder, "checkpoint_final.pth") == ("2", "10")
    (folder / "fold_2" / "checkpoint_final.pth").unlink()
    assert find_folds(folder, "checkpoint_final.pth") == ("10",)
    (folder / "fold_10" / "checkpoint_final.pth").unlink()
    assert find_folds(folder, "checkpoint_final.pth") == ("all",)


def test_no_fold_has_the_checkpoint(model_folder: Make) -> None:
    folder = model_folder(checkpoint="checkpoint_best.pth")
    with pytest.raises(ModelFolderError, match=r"there is fold_0.checkpoint_best\.pth: choose with --checkpoint"):
        find_folds(folder, "checkpoint_final.pth")
    with pytest.raises(ModelFolderError, match="no such checkpoint"):
        read_checkpoints(folder, ("7",), "checkpoint_best.pth")


@pytest.mark.parametrize("change", [{"mirror_axes": (0,)}, {"configuration": "3d_lowres"}])
def test_folds_must_agree(nnunet_models: ModuleType, model_folder: Make, change: dict[str, Any]) -> None:
    folder = model_folder(folds=("0", "1"))
    other = nnunet_models.checkpoint(nnunet_models.ModelOptions(**change), 1)
    torch.save(other, folder / "fold_1" / "checkpoint_final.pth")
    with pytest.raises(ModelFolderError, match=f"differ in {next(iter(change))}"):
        read_checkpoints(folder, ("0", "1"), "checkpoint_final.pth")
