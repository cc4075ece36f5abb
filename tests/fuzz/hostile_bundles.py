"""Bundles that are wrong in every way: values and text of the manifest, graphs, heads, zip files, folders, cascades."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bundles import edit_manifest, npz_bytes, replace_file, tiny_bundle, tiny_cascade, write_scan, zip_bundle
from hostile import GRAPHS, overlapping, zip64
from unets import unet

from edgemuse.runtime.cli.describe import describe_model
from edgemuse.runtime.model.cascade import open_model
from edgemuse.runtime.model.manifest import MANIFEST
from edgemuse.runtime.model.store import Entry, inspect
from edgemuse.runtime.pipeline.open import segmenter_of
from edgemuse.runtime.pipeline.options import Options

SEED = 20260102
MAX_RAM = 0.7
"""GiB that are allowed for each case."""
BACKENDS = [name for name in ("openvino", "onnxruntime") if importlib.util.find_spec(name)]
VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", "a", "../x",
    "/etc/passwd", "\x1b[2J", "a\nb", "\ud800", "é" * 1000, "x" * 100_000, [], {}, [[]], [None], {"a": 1}, [1, 2, 3],
    [0, 0, 0], [4096] * 3, [1e-3] * 3, "NaN", 0.5, [[[[]]]], ["x"] * 3, 65_536, 4096,
)  # fmt: skip
HEAD, BIAS = np.ones((6, 4), np.float32), np.zeros(6, np.float32)
HEADERS = (
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (900000000L, 1L), }",
    b"(" * 5000,
    b"[" * 300 + b"]" * 300,
    b"__import__('os').abort()",
)
Random = random.Random


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `document`."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(document: Any, path: tuple[Any, ...], rng: Random) -> None:
    """Replace the value at `path` by any, or take it away."""
    for key in path[:-1]:
        document = document[key]
    if rng.random() < 0.15:
        del document[path[-1]]
    else:
        document[path[-1]] = copy.deepcopy(rng.choice(VALUES))


def values(rng: Random, folder: Path) -> Path:
    """Any value in any place of the manifest."""
    document = json.loads((folder / MANIFEST).read_text())
    for _ in range(rng.choice([1, 1, 1, 2])):
        put(document, rng.choice(list(places(document))), rng)
    (folder / MANIFEST).write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    return folder


def text(rng: Random, folder: Path) -> Path:
    """What is no manifest, or a huge one."""
    raw = (folder / MANIFEST).read_bytes()
    depth = rng.choice([33, 300, 990, 100_000])
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    others = [
        deep,
        b"[" * depth + b"]" * depth,
        raw[: rng.randrange(len(raw))],
        bytes(17 << 20),
        raw.decode().encode("utf-16"),
    ]
    others += [b"\xff\xfe" + raw, b'{"a": [' + b"{}," * (5 << 20) + b"0]}", raw.replace(b'"tests/bundles.py"', deep)]
    others += [raw.replace(b'"tests/bundles.py"', rng.choice([b'"\\u001b[2J"', b"[[1]]", b'{"a": {"b": []}}']))]
    (folder / MANIFEST).write_bytes(rng.choice(others))
    return folder


def graphs(rng: Random, folder: Path) -> Path:
    """Graphs that edgemuse does not run."""
    return replace_file(folder, "fp32.onnx", GRAPHS[rng.choice(list(GRAPHS))][0]().SerializeToString())


def damaged_graphs(rng: Random, folder: Path) -> Path:
    """A graph with bits flipped, or cut, or none at all."""
    raw = bytearray(rng.choice([(folder / "fp32.onnx").read_bytes(), unet().SerializeToString()]))
    how = rng.randrange(8)
    if how == 0:
        raw = raw[: rng.randrange(len(raw))]
    elif how == 1:
        raw = bytearray(rng.randbytes(rng.choice([0, 1, 10, 5000])))
    else:
        for _ in range(rng.choice([1, 1, 3])):
            raw[rng.randrange(rng.choice([len(raw), min(len(raw), 1500)]))] ^= 1 << rng.randrange(8)
    network = json.loads((folder / MANIFEST).read_text())["network"] | {"activation_bytes": 1000}
    return edit_manifest(replace_file(folder, "fp32.onnx", bytes(raw)), network=network)


def npz(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """An `.npz` file of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def npy(header: bytes) -> bytes:
    """An array of 24 zeros under any header."""
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(96)


def heads(rng: Random, folder: Path) -> Path:
    """Heads of other shapes and types, with headers that lie, damaged, packed, double."""
    whole = npz_bytes(weight=HEAD, bias=BIAS)
    parts = [(member.filename, zipfile.ZipFile(io.BytesIO(whole)).read(member)) for member in
             zipfile.ZipFile(io.BytesIO(whole)).infolist()]  # fmt: skip
    flipped = bytearray(whole)
    for _ in range(rng.choice([1, 4])):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    shape = rng.choice([(4, 6), (6,), (0, 4), (6, 4, 1), (3, 6), (2, 6), (7, 6)])
    strange = np.ones(shape, rng.choice(["f4", "f4", "f8", "i4", "c8", "S4", "f2"]))
    choices = [
        npz_bytes(weight=strange, bias=BIAS), npz_bytes(weight=HEAD, bias=BIAS, fold_bias=strange),
        npz_bytes(weight=HEAD * np.nan, bias=BIAS), npz_bytes(weight=HEAD), parts[0][1], rng.randbytes(300),
        npz(*parts, method=zipfile.ZIP_DEFLATED), npz(*parts, ("more.npy", bytes(10))),
        *(npz(("weight.npy", npy(header)), parts[1]) for header in rng.sample(HEADERS, 2)),
        bytes(flipped), bytes(flipped), whole[: rng.randrange(len(whole))],
    ]  # fmt: skip
    return replace_file(folder, "head.npz", rng.choice(choices))


def zips(rng: Random, folder: Path) -> Path:
    """Zip files whose list lies, that are damaged, or hold more than they should."""
    whole = zip_bundle(folder, folder.with_suffix(".zip"), rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    how = rng.randrange(9)
    if how == 0:
        return zip64(whole, rng.choice([0, 100, 1 << 33, (1 << 64) - 1]))
    if how == 1:
        return overlapping(whole, rng.choice(["fp32.onnx", MANIFEST]), rng.choice([1, 100]))
    if how in (2, 3):
        with zipfile.ZipFile(whole, "a", zipfile.ZIP_DEFLATED) as archive:
            for index in range(1 if how == 2 else 3000):
                archive.writestr(f"more{index}", bytes(64 << 20 if how == 2 else 0))
        return whole
    if how == 4:
        shutil.move(folder / "fp32.onnx", folder / rng.choice(["FP32.onnx", "a\nb"]))
        return zip_bundle(folder, whole, rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_STORED]))
    raw = bytearray(whole.read_bytes())
    if how == 5:
        raw = raw[: rng.randrange(len(raw))]
    else:
        for _ in range(rng.choice([1, 3, 10])):
            raw[rng.choice([rng.randrange(len(raw)), -1 - rng.randrange(min(300, len(raw)))])] ^= 1 << rng.randrange(8)
    whole.write_bytes(raw)
    return whole


def folders(rng: Random, folder: Path) -> Path:
    """Links, pipes, folders and pointers in place of files."""
    name = rng.choice([MANIFEST, "fp32.onnx", "head.npz"])
    path = folder / name
    path.unlink()
    how = rng.randrange(5)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.write_bytes(
            rng.choice([b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"/annex/objects/x"])
        )
    elif how == 2 and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    else:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/etc/passwd", name, ".", "nowhere"]))
    return folder


def cascades(rng: Random, folder: Path) -> Path:
    """Any value in any place of what describes a cascade, or one of its bundles in another way."""
    path = tiny_cascade(folder.with_name("cascade"))
    if rng.random() < 0.5:
        return _inside(path, rng.choice([values, graphs, heads, folders]), rng)
    document = json.loads((path / "cascade.json").read_text())
    put(document, rng.choice(list(places(document))), rng)
    (path / "cascade.json").write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    return path


def _inside(path: Path, way: Callable[[Random, Path], Path], rng: Random) -> Path:
    way(rng, path / "regions")
    return path


WAYS = (values, values, graphs, damaged_graphs, text, heads, zips, zips, folders, cascades)


def case(number: int, folder: Path) -> Path:
    """The bundle of a case, inside `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(f"{SEED} {number}")
    return WAYS[number % len(WAYS)](rng, tiny_bundle(folder / "tiny.bundle"))


def prepare(folder: Path) -> Callable[[int], None]:
    """A function that opens a case, describes and checks it, and segments with it."""
    scan = write_scan(folder / "whole.nii.gz")
    options = [Options(threads=1, max_ram=MAX_RAM, backend=backend, cache_dir=None) for backend in BACKENDS]
    attempt = partial(_use, scan=scan, options=options)
    for path in (tiny_bundle(folder / "whole"), tiny_cascade(folder / "both")):
        attempt(path)
    return lambda number: attempt(case(number, folder / "case"))


def _use(path: Path, scan: Path, options: list[Options]) -> None:
    inspect(Entry("x", path))
    model = open_model(path)
    try:
        describe_model(model)
        for chosen in options:
            with segmenter_of(model, chosen) as segmenter:
                segmenter.segment(scan)
    finally:
        model.close()
