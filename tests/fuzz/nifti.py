"""NIfTI files that are wrong in every way: extreme headers, lying extensions, cuts, damage, foreign data."""

from __future__ import annotations

import functools
import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from bundles import head_image, tiny_bundle, write_scan

from edgemuse.runtime.pipeline.open import open_segmenter
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.write import write
from edgemuse.runtime.results.files import output_paths

SEED = 20260101
MAX_RAM = 0.7
"""GiB that are allowed for each case."""
WRITTEN = 5
"""Of every so many results one is written to files as well."""
FLOATS = (0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45, 352.0, 351.0, 1e9, 2.0**31, 0.1, 20.01)
INTEGERS = (0, 1, -1, 2, 7, 8, 255, 348, 540, 32767, -32768, 2**31 - 1, -(2**31), 2**62)
SIZES = (0, 1, 2, 20, 24, 28, 300, 1000, 2000, 32767, -1)
DTYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 255, 3)
EXTENSION_SIZES = (0, 7, 8, 16, 17, 32, 1024, 1 << 20, -8, -16, 2**31 - 1, -(2**31))
BODIES = (b"", b"\xff" * 24, b"A" * 1000, b"<CIFTI Version='2'/>", b"<!DOCTYPE a [<!ENTITY b 'c'>]>")
Random = random.Random
Raw = bytearray


def scan(rng: Random, version: int = 1, kind: str = "") -> tuple[Raw, Any]:
    """A whole file, uncompressed, and its header, which can be written to."""
    image = (nib.Nifti1Image, nib.Nifti2Image)[version - 1](
        head_image().astype(kind or rng.choice(["i2", "f4", "u1", "f8", "i4"])), np.diag([1.0, 1, 1, 1])
    )
    image.header.set_qform(image.affine, 1)
    raw = Raw(image.to_bytes())
    return raw, np.frombuffer(raw, image.header.template_dtype, 1)[0:1]


def set_field(header: Any, name: str, value: float) -> None:
    """Put `value` into a number of the header as a C program would: cut to its bits."""
    field = header[name].reshape(-1)
    with np.errstate(all="ignore"):
        if field.dtype.kind == "f":
            field[random.Random(name).randrange(field.size)] = value
        elif field.dtype.kind in "iu":
            bits = int(value) & (1 << 8 * field.dtype.itemsize) - 1
            field[:1] = np.array(bits, f"u{field.dtype.itemsize}").view(field.dtype)


def flipped(rng: Random) -> Raw:
    raw, header = scan(rng)
    for _ in range(rng.choice([1, 2, 5, 20])):
        raw[rng.randrange(header.itemsize + 4)] ^= 1 << rng.randrange(8)
    return raw


def overwritten(rng: Random) -> Raw:
    raw, header = scan(rng)
    for _ in range(rng.choice([1, 3, 30])):
        raw[rng.randrange(header.itemsize + 4)] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    return raw


def extreme(rng: Random) -> Raw:
    raw, header = scan(rng, rng.choice([1, 1, 2]))
    for name in rng.sample([name for name in header.dtype.names if header[name].dtype.kind in "iuf"], 3):
        kind = header[name].dtype.kind
        set_field(header, name, rng.choice(FLOATS if kind == "f" else INTEGERS))
    return raw


def shapes(rng: Random) -> Raw:
    raw, header = scan(rng, rng.choice([1, 2]))
    header["dim"] = [rng.choice([3, 3, 3, 4, 5, 7, 0, 8, -1]), *rng.choices(SIZES, k=7)]
    if rng.random() < 0.5:
        header["datatype"] = rng.choice(DTYPES)
    return raw


def voxel_types(rng: Random) -> Raw:
    raw, header = scan(rng)
    header["datatype"], header["bitpix"] = rng.choice(DTYPES), rng.choice([0, 8, 16, 32, 64, 128, -8])
    return raw + bytes(rng.randrange(400_000))


def scaled(rng: Random) -> Raw:
    raw, header = scan(rng)
    header["scl_slope"], header["scl_inter"] = rng.choice(FLOATS), rng.choice(FLOATS)
    return raw


def offsets(rng: Random) -> Raw:
    raw, header = scan(rng, rng.choice([1, 2]))
    set_field(header, "vox_offset", rng.choice([0, 16, 352, 353, 400, 1e4, 3e4, 4e9, -352, 2**24 + 2]))
    return raw


def extensions(rng: Random) -> Raw:
    """Their sizes lie."""
    version = rng.choice([1, 2])
    raw, header = scan(rng, version)
    start, added = header.itemsize + 4, b""
    for _ in range(rng.choice([1, 1, 2, 5])):
        size, body = rng.choice(EXTENSION_SIZES), rng.choice(BODIES)
        length = max(0, min(size - 8, 1 << 20))
        added += struct.pack("<ii", size, rng.choice([0, 2, 4, 6, 32, 44, -1, 99999])) + (body + bytes(length))[:length]
    header["vox_offset"] = rng.choice([start + len(added), start, start + 16, 1e6])
    header["intent_code"] = rng.choice([0, 0, 3001, 3006, 1002])
    raw[start - 4] = rng.choice([1, 1, 0, 2, 255])
    return raw[:start] + added + raw[start:]


def bomb(rng: Random) -> Raw:
    """A small compressed file with an extension that seems to reach to the end of gigabytes."""
    raw, header = scan(rng, rng.choice([1, 2]))
    start = header.itemsize + 4
    header["vox_offset"], raw[start - 4] = start + 16, 1
    extension = struct.pack("<ii8x", rng.choice([0, 7, -1, 2**31 - 1]), 6)
    return Raw(gzip.compress(raw[:start] + extension + raw[start:], 1) + zeros() * 25)


@functools.cache
def zeros() -> bytes:
    """64 MiB of them, compressed."""
    return gzip.compress(bytes(64 << 20), 9)


def cut(rng: Random) -> Raw:
    raw, _ = scan(rng)
    return raw[: rng.randrange(len(raw))]


def big_endian(rng: Random) -> Raw:
    image = nib.Nifti1Image(head_image(), np.diag([1.0, 1, 1, 1]), nib.Nifti1Header(endianness=">"))
    raw = Raw(image.to_bytes())
    for _ in range(rng.choice([0, 1, 3])):
        raw[rng.randrange(352)] ^= 1 << rng.randrange(8)
    return raw


def foreign(rng: Random) -> Raw:
    raw, header = scan(rng)
    header["magic"] = rng.choice([b"ni1", b"", b"n+2", b"n+1"])
    noise = rng.randbytes(rng.choice([0, 1, 2, 347, 348, 352, 5000]))
    others = [raw, noise, b"MGH" + noise, bytes(128) + b"DICM" + noise, b"<!doctype html>" + noise, raw[:348][::-1]]
    return Raw(rng.choice([*others, gzip.compress(raw, 1), b"PK\3\4" + noise, b"version https://git-lfs.github.com/"]))


def voxels(rng: Random) -> Raw:
    kind = rng.choice(["f4", "f8"])
    raw, _ = scan(rng, kind=kind)
    values = np.frombuffer(raw, kind, offset=352)
    value = rng.choice([np.nan, np.inf, -np.inf, 1e38, 3e38, 1e-40, 1e300 if kind == "f8" else 1e30])
    values[rng.sample(range(values.size), rng.choice([1, 100, values.size - 1, values.size]))] = value
    return raw


def damaged_gzip(rng: Random) -> Raw:
    """A compressed file that is damaged, or that more follows."""
    raw = Raw(gzip.compress(scan(rng)[0], 1))
    place = rng.randrange(10, len(raw))
    how = rng.randrange(6)
    if how == 0:
        return raw[:place]
    if how == 1:
        raw[place] ^= 1 << rng.randrange(8)
    elif how == 2:
        raw += rng.choice([b"x" * 10, bytes(70_000), bytes(raw), b"\x1f\x8b", gzip.compress(bytes(10))])
    elif how == 3:
        raw[rng.randrange(2, 10)] ^= 1 << rng.randrange(8)
    elif how == 4:
        raw[-8:] = rng.randbytes(8)
    else:
        raw[place : place + 50] = rng.randbytes(50)
    return raw


WAYS: tuple[Callable[[Random], Raw], ...] = (
    flipped, overwritten, extreme, extreme, shapes, voxel_types, scaled, offsets, extensions, cut, big_endian, foreign,
    voxels, damaged_gzip, bomb,
)  # fmt: skip


def case(number: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a case."""
    rng = random.Random(f"{SEED} {number}")
    way = WAYS[number % len(WAYS)]
    raw = bytes(way(rng))
    if way in (damaged_gzip, bomb):
        return ".nii.gz", raw
    return (".nii.gz", gzip.compress(raw, 1)) if rng.random() < 0.6 else (".nii", raw)


def prepare(folder: Path) -> Callable[[int], None]:
    """A function that segments a case."""
    options = Options(threads=1, max_ram=MAX_RAM, cache_dir=folder / "cache")
    segmenter = open_segmenter(tiny_bundle(folder / "tiny.bundle"), options)
    segmenter.segment(write_scan(folder / "whole.nii.gz"))

    def attempt(number: int) -> None:
        suffix, content = case(number)
        path = folder / f"case{suffix}"
        path.write_bytes(content)
        result = segmenter.segment(path)
        if number % WRITTEN == 0:
            write(result, output_paths(folder, "case"))

    return attempt
