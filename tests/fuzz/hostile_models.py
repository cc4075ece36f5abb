"""nnU-Net model folders that are wrong in every way: plans, data set, checkpoints that would call or fill something."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nnunet_models
import torch
from fuzz.hostile_bundles import places, put
from hostile import overlapping, zip64

from edgemuse.export.exporter import export_model

SEED = 20260103
CHECKPOINT = "fold_0/checkpoint_final.pth"
NUMBERS = (0, -1, 1, 2, 3, 10**9, 2**63, 1e308, float("nan"), [], [[]], [16] * 3, [10**9] * 3, [4096] * 12, [64] * 3)
TINY: dict[str, Any] = {"features": (2, 4), "strides": ((1, 1, 1), (2, 2, 2)), "patch": (4, 4, 4), "classes": 3}
Random = random.Random


class Call:
    """Unpickled carelessly, it calls `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def read(path: Path) -> Any:
    """The content of a checkpoint that was made here."""
    return torch.load(path, weights_only=False)


def plans(rng: Random, folder: Path) -> None:
    """Any value in any place of the plans that count."""
    path = folder / "plans.json"
    document = json.loads(path.read_text())
    live = [place for place in places(document) if place[:2] != ("configurations", "2d")]
    if rng.random() < 0.5:
        put(document, rng.choice(live), rng)
    else:
        network = document["configurations"]["3d_fullres"]
        where = rng.choice([network, network["architecture"]["arch_kwargs"]])
        where[rng.choice(list(where))] = rng.choice(NUMBERS)
    path.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))


def dataset(rng: Random, folder: Path) -> None:
    """Any value in any place of the data set's description."""
    path = folder / "dataset.json"
    document = json.loads(path.read_text())
    put(document, rng.choice(list(places(document))), rng)
    path.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))


def text(rng: Random, folder: Path) -> None:
    """What is no JSON, or a huge one."""
    path = folder / rng.choice(["plans.json", "dataset.json"])
    raw = path.read_bytes()
    others = [b'{"a":' * 100_000, b"[]", b"", raw[: rng.randrange(len(raw))], raw.decode().encode("utf-16")]
    others += [b'{"a": [' + b"{}," * (5 << 20) + b"0]}", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"]
    path.write_bytes(rng.choice(others))


def calls(rng: Random, folder: Path) -> None:
    """A checkpoint that would run something, wherever it stands and however it is saved."""
    path, marker = folder / CHECKPOINT, folder.parent / "sprung"
    hostile = rng.choice([
        Call(os.system, f"touch {marker}"), Call(eval, f"open({str(marker)!r}, 'w')"), Call(open, str(marker), "w"),
        Call(os.mkdir, str(marker)), Call(getattr, "", "format"), Call(__import__, "this"), Call(bytearray, 1 << 33),
        Call(torch.load, "/etc/passwd"), Call(torch.zeros, 1 << 33), Call(torch.Tensor, 1 << 20, 1 << 20),
        Call(torch._utils._rebuild_tensor_v2, 1, 2, 3), Call(torch.Size, [2**62]), Call(torch.device, "cuda:99"),
    ])  # fmt: skip
    content = read(path)
    where = rng.choice([content, content["network_weights"], content["init_args"]])
    where[rng.choice(["evil", *where])] = hostile
    if rng.random() < 0.2:
        path.write_bytes(pickle.dumps(hostile, rng.choice([0, 2, 4])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)


def contents(rng: Random, folder: Path) -> None:
    """Checkpoints with other things in the place of what is needed, and odd weights."""
    path = folder / CHECKPOINT
    content = read(path)
    weights = content["network_weights"]
    name = rng.choice(list(weights))
    weight = weights[name]
    odd = [
        torch.zeros(1).expand(10**6, 10**6), torch.zeros(1).expand(weight.shape), weight.int(), weight * float("nan"),
        weight.half(), weight.double(), torch.empty(10**9, 10**6, device="meta"), [1, 2], None, weight.bool(),
        torch.sparse_coo_tensor([[0]], [1.0], (10**9,)), torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        torch.zeros(3, dtype=torch.complex64), torch.zeros(0), torch.zeros(()), torch.nn.Parameter(weight),
    ]  # fmt: skip
    if rng.random() < 0.6:
        weights[rng.choice([name, name, "more"])] = rng.choice(odd)
    else:
        put(content, (rng.choice([key for key in content if key != "optimizer_state"]),), rng)
    torch.save(content, path)


def files(rng: Random, folder: Path) -> None:
    """Checkpoints that are damaged, packed, cut, or something else."""
    path = folder / CHECKPOINT
    raw = bytearray(path.read_bytes())
    how = rng.randrange(8)
    if how == 0:
        path.write_bytes(raw[: rng.randrange(len(raw))])
    elif how == 1:
        path.write_bytes(rng.choice([b"", b"<html>", b"/annex/objects/x", b"\x80\x02\x82\x01.", rng.randbytes(5000)]))
    elif how == 2:
        with zipfile.ZipFile(path) as archive:
            parts = {member.filename: archive.read(member) for member in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in parts.items():
                archive.writestr(name, bytes(64 << 20) if name.endswith("data/0") else data)
    elif how == 3:
        overlapping(path, "checkpoint_final/data/0", rng.choice([1, 1000]))
    elif how == 4:
        zip64(path, rng.choice([1 << 33, (1 << 64) - 1]))
    elif how == 5:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", rng.choice(PICKLES))
    else:
        for _ in range(rng.choice([1, 5])):
            raw[rng.randrange(rng.choice([len(raw), 3000]))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)


PICKLES = (
    b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 10 + b".",
    b"\x80\x02X\xff\xff\xff\xffa.",
    b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    b"\x80\x02" + b"}" * (8 << 20) + b".",
    b"\x80\x02}X\x0f\x00\x00\x00network_weights" + b"(" * 50_000 + b"t" * 50_000 + b"s.",
    b"(S'true'\nios\nsystem\n.",
    b"\x80\x02ctorch\nTensor\n}X\x09\x00\x00\x00__class__X\x01\x00\x00\x00asb.",
)


def places_of_files(rng: Random, folder: Path) -> None:
    """Links, pipes and folders in place of files."""
    path = folder / rng.choice(["plans.json", "dataset.json", CHECKPOINT])
    path.unlink()
    how = rng.randrange(3)
    if how == 0:
        path.mkdir()
    elif how == 1 and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    else:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/etc/passwd", path.name, "../.git/annex/objects/a/b"]))


WAYS = (plans, plans, contents, files, calls, plans, dataset, contents, files, places_of_files, text, calls)


def case(number: int, whole: Path, folder: Path) -> Path:
    """The model folder of a case, made of the one at `whole`, in `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    model = shutil.copytree(whole, folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about what is saved
        WAYS[number % len(WAYS)](random.Random(f"{SEED} {number}"), model)
    return model


def prepare(folder: Path) -> Callable[[int], None]:
    """A function that exports a case."""
    torch.set_num_threads(1)
    whole = nnunet_models.make_model_folder(folder / "whole", **copy.deepcopy(TINY))
    attempt = partial(_export, folder=folder)
    attempt(whole)
    return lambda number: attempt(case(number, whole, folder / "case"))


def _export(model: Path, folder: Path) -> None:
    """Export `model`; what it would run leaves a trace, and a refusal must leave none."""
    output = folder / "output"
    output.mkdir()
    try:
        export_model(model, output / "b.bundle")
    except BaseException:
        left = [path.name for path in output.iterdir()]
        assert not left, f"a refusal left {left}"
        raise
    finally:
        shutil.rmtree(output)
        assert not (model.parent / "sprung").exists(), "something of the checkpoint was run"
