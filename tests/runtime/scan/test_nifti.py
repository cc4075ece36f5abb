"""Reading a scan: the voxels that nibabel gives, from one reading of the file, in the memory that is allowed."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import head_image, tiny_bundle, tiny_cascade, write_scan

from edgemuse.engines.errors import InputError
from edgemuse.runtime.network.memory import MemoryPlan
from edgemuse.runtime.pipeline.loading import load
from edgemuse.runtime.pipeline.open import open_segmenter
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.scan.nifti import Scan, file_sha256, open_scan, read_scan, read_voxels, reading

NOTHING = MemoryPlan(0, 0, 0, 0)
IMAGES = {1: nib.Nifti1Image, 2: nib.Nifti2Image}


def save(path: Path, dtype: str, slope: float, inter: float, version: int = 1, shape: Any = (24, 28, 20)) -> Path:
    header = IMAGES[version].header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    data = (head_image(shape) // 10).astype(dtype)
    image = IMAGES[version](data, np.eye(4), header)
    image.header["scl_slope"], image.header["scl_inter"] = slope, inter
    image.header["vox_offset"] = image.header.single_vox_offset
    raw = image.header.binaryblock + bytes(4) + data.tobytes(order="F")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "i8", "f4", ">f4", "f8"])
@pytest.mark.parametrize("version", IMAGES)
def test_voxels_are_nibabels(version: int, dtype: str, tmp_path: Path) -> None:
    for slope, inter in ((1, 0), (0, 0), (0.37, -12.5), (3, 0)):
        for name in ("a.nii", "a.nii.gz"):
            path = save(tmp_path / name, dtype, slope, inter, version)
            _, image = read_scan(path)
            expected = np.asanyarray(nib.load(path).dataobj).astype(np.float32)
            np.testing.assert_array_equal(image, expected)
            assert image.strides == expected.strides


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_of_several_blocks(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / name, "f8", 2, 1, shape=(90, 80, 70))
    np.testing.assert_array_equal(read_scan(path)[1], np.asanyarray(nib.load(path).dataobj).astype(np.float32))


def test_labels_that_float32_does_not_hold(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii.gz", np.full((4, 4, 4), 2**24 + 1, np.int32))
    with reading(path) as (scan, source):
        assert (read_voxels(scan, source, np.float64)[0] == 2**24 + 1).all()


def test_an_offset_of_zero_means_behind_the_header(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii")
    raw = bytearray(path.read_bytes())
    raw[108:112] = bytes(4)
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_scan(path)[1], head_image())


@pytest.mark.parametrize("kind", [tiny_bundle, tiny_cascade])
@pytest.mark.parametrize("name", ["a_T1w.nii", "a_T1w.nii.gz"])
def test_a_scan_is_opened_once(
    name: str, kind: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, opened, real = write_scan(tmp_path / name), [], os.open

    def listening(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(Path(path))
        return real(path, *arguments, **options)

    def open_file(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return open(self, mode, *arguments, opener=listening, **options)

    with open_segmenter(kind(tmp_path / "model"), Options(cache_dir=None)) as segmenter:
        monkeypatch.setattr(Path, "open", open_file)
        result = segmenter.segment(scan)
        monkeypatch.undo()
    assert opened.count(scan) == 1
    assert result.provenance["input"]["sha256"] == file_sha256(scan)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_header_voxels_and_hash_are_of_one_file(name: str, tmp_path: Path) -> None:
    """Another takes its place as soon as its header was read."""
    path = write_scan(tmp_path / name, head_image())
    other = write_scan(tmp_path / f"other_{name}", head_image((40, 30, 20), seed=3))
    sha256 = file_sha256(path)

    def replace(scan: Scan) -> MemoryPlan:
        os.replace(other, path)
        return NOTHING

    loaded, image = load(path, replace, None)
    assert loaded.sha256 == sha256 != file_sha256(path)
    np.testing.assert_array_equal(image, head_image())


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_scan_that_is_written_to_while_it_is_read_is_refused(name: str, tmp_path: Path) -> None:
    path = write_scan(tmp_path / name, head_image())
    os.utime(path, (0, 0))

    def rewrite(scan: Scan) -> MemoryPlan:
        write_scan(path, head_image(seed=3))
        return NOTHING

    with pytest.raises(InputError, match="was changed while it was read"):
        load(path, rewrite, None)


def test_voxels_are_not_those_of_a_file_that_changes_later(tmp_path: Path) -> None:
    """A file that was mapped into memory would show them, and one that is cut would kill the process."""
    path = write_scan(tmp_path / "a.nii", head_image((64, 64, 64)).astype(np.float32))
    _, image = read_scan(path)
    with path.open("r+b") as file:
        file.seek(352)
        file.write(b"\x7f" * 5000)
        file.truncate(4096)
    np.testing.assert_array_equal(image, head_image((64, 64, 64)))


def test_a_larger_scan_that_took_its_place_is_not_read_ahead(tmp_path: Path) -> None:
    """The room beside the network of another scan was left for the one that was looked at."""
    path = write_scan(tmp_path / "a.nii")
    plan = MemoryPlan(engine=10**6, scan=600, preprocessing=400, features=10**6)
    assert load(path, lambda scan: plan, None, room=1000)[0].scan.shape == (24, 28, 20)
    with pytest.raises(InputError, match=r"a\.nii: a larger scan took its place"):
        load(path, lambda scan: plan, None, room=999)


@pytest.mark.parametrize("size", [0, 7, 8, -1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("version", IMAGES)
def test_an_extension_is_passed_over_whatever_size_it_claims(
    version: int, name: str, size: int, tmp_path: Path
) -> None:
    image = IMAGES[version](head_image(), np.eye(4))
    image.header["vox_offset"] = image.header.single_vox_offset + 16
    extension = b"\1\0\0\0" + struct.pack("<ii8x", size, 6)
    raw = image.header.binaryblock + extension + head_image().tobytes(order="F")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    np.testing.assert_array_equal(read_scan(tmp_path / name)[1], head_image())


@pytest.mark.parametrize("offset", [352 + 16, 50 << 20, 1e9])
def test_a_small_file_that_unzips_to_much_takes_no_memory(offset: float, tmp_path: Path) -> None:
    """An extension that claims to go on to the end, before or behind the voxels."""
    image = nib.Nifti1Image(head_image(), np.eye(4))
    image.header["vox_offset"] = offset
    raw = image.header.binaryblock + b"\1\0\0\0" + struct.pack("<ii8x", 7, 6) + head_image().tobytes(order="F")
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(raw) + 3 * gzip.compress(bytes(50 << 20), 1))
    tracemalloc.start()
    with pytest.raises(InputError, match="more than"):
        read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert open_scan(path).shape == (24, 28, 20) if offset < 1e9 else True


def test_the_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    """As a second run will find it, to know that the scan is done."""
    path = write_scan(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes() + b"\0" * 70_000 + b"behind")
    loaded, _ = load(path, lambda scan: NOTHING, None)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
