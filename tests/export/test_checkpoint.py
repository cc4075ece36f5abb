"""Checkpoints are data: hostile ones run nothing, damaged ones are one clear line, nnU-Net's own load."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from bundles import little_memory
from hostile import overlapping

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


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint at `path` with every part as `change` makes it of its name and content; returns `path`."""
    with zipfile.ZipFile(path) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(name, data))
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    """The checkpoint at `path` with the pickle `data`."""
    return rewritten(path, lambda name, part: data if name.endswith("data.pkl") else part)


def test_the_name_that_numpy_1_gave_its_scalars_loads(content: dict[str, Any], tmp_path: Path) -> None:
    found = []

    def older(name: str, data: bytes) -> bytes:
        found.append(data.count(b"cnumpy._core.multiarray\n"))
        return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")

    path = rewritten(save(tmp_path, content), older)
    assert sum(found)
    assert read_checkpoint(path, "0").weights.keys() == content["network_weights"].keys()


def test_weights_are_those_that_pytorch_reads(content: dict[str, Any], tmp_path: Path) -> None:
    """Of every type, shared, turned, and as parameters."""
    name, weight = next(iter(content["network_weights"].items()))
    content["network_weights"] |= {
        "half": weight.half(), "double": weight.double(), "bfloat16": weight.bfloat16(), "again": weight,
        "turned": weight.to(memory_format=torch.channels_last_3d), "part": weight[1:, :, 1],
        "parameter": torch.nn.Parameter(weight.clone()), "module.number": torch.tensor(1.5), "none": torch.zeros(0, 3),
    }  # fmt: skip
    path = save(tmp_path, content)
    loaded = torch.load(path, weights_only=False)["network_weights"]
    found = read_checkpoint(path, "0")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(found.weights) == len(loaded)
    for name, tensor in loaded.items():
        mine = found.weights[name.removeprefix("module.")]
        assert (mine.dtype, mine.shape, mine.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(mine, tensor.detach())


def test_log_of_a_long_training_is_passed_over(content: dict[str, Any], tmp_path: Path) -> None:
    content["logging"]["dice_per_class_or_region"] = [[np.float64(0.5 + i / 7) for i in range(150)] for _ in range(300)]
    content["logging"]["lrs"] = [1e-2 / (i + 1) for i in range(20_000)]
    assert read_checkpoint(save(tmp_path, content), "0").trainer == "nnUNetTrainer"


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
    assert "refused, as loading it would call" in str(caught.value)
    assert "system" in str(caught.value) or "eval" in str(caught.value)


@pytest.mark.parametrize("keep", [1, 100, 0.5, 0.9, -1])
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


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "an empty file; copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 22\n", "get that with 'git lfs pull'"),
        (b"../../.git/annex/objects/aa/bb/SHA256E-s22--0a.pth", "get that with 'git annex get'"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not the file itself"),
        (b"\x80\x02\x82\x01.", "not a whole checkpoint"),
    ],
)
def test_what_is_there_instead_is_named(raw: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(raw)
    with pytest.raises(ModelFolderError, match=reason) as caught:
        read_checkpoint(path, "0")
    assert "weights_only" not in str(caught.value)


def test_link_into_an_annex(model_folder: Make) -> None:
    folder = model_folder()
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.unlink()
    path.symlink_to("../.git/annex/objects/aa/bb/SHA256E-s22--0a.pth")
    for read in (lambda: find_folds(folder, path.name), lambda: read_checkpoint(path, "0")):
        with pytest.raises(ModelFolderError, match="git annex get"):
            read()


def test_old_format_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFolderError, match=r"format from before 1\.6; if you trust it"):
        read_checkpoint(path, "0")


PICKLES = {
    "unknown instruction": b"\x80\x02\x82\x01.",
    "huge number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 10 + b".",
    "huge text": b"\x80\x02X\xff\xff\xff\xffa.",
    "huge bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "many": b"\x80\x02" + b"}" * (1 << 20) + b".",
    "doubled": b"\x80\x02]q\x00" + b"".join(
        b"](" + (b"h" + bytes([i - 1])) * 10 + b"eq" + bytes([i]) for i in range(1, 60)
    ) + b".",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "storage": b"\x80\x02ctorch\nUntypedStorage\nJ\x00\x00\x00\x40\x85R.",
    "tensor": b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x40\x85R.",
    "text again and again": b"\x80\x02c_codecs\nencode\nq\x01X\x00\x00\x10\x00" + b"a" * (1 << 20)
    + b"X\x06\x00\x00\x00utf-32\x86q\x020](" + b"h\x01h\x02R" * 1000 + b"e.",
    "state of a class": b"\x80\x02ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsK\x01sb.",
    "another name": b"\x80\x02cnumpy\nload\nX\x0b\x00\x00\x00/etc/passwd\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_that_would_take_memory(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    path = with_pickle(save(tmp_path, content), PICKLES[name])
    with little_memory(16 << 20), pytest.raises(ModelFolderError) as caught:
        read_checkpoint(path, "0")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_compressed_checkpoint_is_not_unpacked(content: dict[str, Any], tmp_path: Path) -> None:
    """300 MB of zeros in 300 KB."""

    def zeros(name: str, data: bytes) -> bytes:
        return bytes(300 << 20) if name.endswith("data/0") else data

    path = rewritten(save(tmp_path, content), zeros, zipfile.ZIP_DEFLATED)
    with little_memory(), pytest.raises(ModelFolderError, match="compressed, which PyTorch does not do"):
        read_checkpoint(path, "0")


def test_parts_that_share_their_bytes(content: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, content)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
    with pytest.raises(ModelFolderError, match="files that overlap"):
        read_checkpoint(overlapping(path, name, 50), "0")


def test_weights_beyond_the_file(content: dict[str, Any], tmp_path: Path) -> None:
    """One number that a stride of 0 makes 4 TB."""
    content["network_weights"]["wide"] = torch.zeros(1).expand(1_000_000, 1_000_000)
    with little_memory(), pytest.raises(ModelFolderError, match="more than the file itself"):
        read_checkpoint(save(tmp_path, content), "0")


def test_weights_that_overlap_count_each(content: dict[str, Any], tmp_path: Path) -> None:
    long = torch.zeros(100_000)
    content["network_weights"] |= {f"w{start}": long[start : start + 50_000] for start in range(40)}
    with pytest.raises(ModelFolderError, match="more than the file itself"):
        read_checkpoint(save(tmp_path, content), "0")


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.empty(10**9, 10**6, device="meta"),
        lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**9,)),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.zeros(3, dtype=torch.bool),
        lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    ],
)
def test_odd_tensors_are_refused(odd: Callable[[], Any], content: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content["network_weights"]["odd"] = odd()
        path = save(tmp_path, content)
    with little_memory(), pytest.raises(ModelFolderError, match=r"refused|must be a plain tensor|must map names"):
        read_checkpoint(path, "0")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"X\x01\x00\x00\x000", b"X\x02\x00\x00\x00.."),  # the part of the file that a storage lies in
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00torrage"),
        (b"cpuq", b"cpqq"),
    ],
)
def test_storage_that_is_not_there(old: bytes, new: bytes, content: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, content)
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert old in data
    try:
        read_checkpoint(with_pickle(path, data.replace(old, new, 1)), "0")
    except ModelFolderError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert old == b"cpuq"  # where it was is of no interest


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
