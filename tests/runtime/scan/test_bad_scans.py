"""Scans that cannot be segmented: each is refused with one line that says why, and nothing is left behind.

Scans that merely look odd and can be segmented are here too.
"""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, run_process, snapshot, write_scan
from nibabel.nifti1 import header_dtype

from edgemuse.engines.errors import InputError
from edgemuse.engines.hardware import peak_memory
from edgemuse.runtime.results.files import nifti_bytes
from edgemuse.runtime.scan.nifti import read_image, reading

HEADER = 348
RESULTS = {f"sub-01_{name}" for name in ("dseg.nii.gz", "dseg.tsv", "volumes.tsv", "provenance.json", "qc.png")}


def edit_header(path: Path, edit: Callable[[Any], None]) -> Path:
    """Change the raw NIfTI header of `path` in place: `edit` gets it as a structured scalar."""
    zipped = path.name.endswith(".gz")
    raw = bytearray(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    edit(np.frombuffer(raw, header_dtype, 1)[0:1])
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    return path


def header_case(field: str, at: int | None, value: Any, sform: int = 1, qform: int = 1) -> Callable[[Path], Path]:
    """A builder of a scan whose header has `value` in `field`, and these sform and qform codes."""

    def edit(header: Any) -> None:
        header["sform_code"], header["qform_code"] = sform, qform
        if at is None:
            header[field] = value
        else:
            header[field][0, at] = value

    return lambda folder: edit_header(write_scan(folder / "bad.nii.gz"), edit)


def content_case(name: str, content: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def voxel_case(make: Callable[[], np.ndarray]) -> Callable[[Path], Path]:
    return lambda folder: write_scan(folder / "bad.nii.gz", make())


def forms_case(sform: np.ndarray, qform: np.ndarray) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        image = nib.Nifti1Image(head_image(), sform)
        image.header.set_sform(sform, 1)
        image.header.set_qform(qform, 1)
        nib.save(image, folder / "bad.nii.gz")
        return folder / "bad.nii.gz"

    return build


def with_voxel(value: float) -> np.ndarray:
    data = head_image().astype(np.float32)
    data[3, 4, 5] = value
    return data


def color_image() -> np.ndarray:
    data = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    data["R"] = 7
    return data


def cut(name: str, keep: float) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = write_scan(folder / name)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * keep)])
        return path

    return build


def renamed(written: str, name: str) -> Callable[[Path], Path]:
    return lambda folder: write_scan(folder / written).rename(folder / name)


def flipped_bit(folder: Path) -> Path:
    """One bit of a stored, not deflated, gzip file: nothing but its checksum can tell."""
    path = write_scan(folder / "bad.nii")
    raw = bytearray(gzip.compress(path.read_bytes(), 0))
    path.unlink()
    raw[len(raw) // 2] ^= 4
    return content_case("bad.nii.gz", bytes(raw))(folder)


def followed(more: bytes) -> Callable[[Path], Path]:
    """A compressed file that something follows."""

    def build(folder: Path) -> Path:
        path = write_scan(folder / "scan.nii.gz")
        path.write_bytes(path.read_bytes() + more)
        return path

    return build


def pipe(folder: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with names")
    os.mkfifo(folder / "bad.nii")
    return folder / "bad.nii"


def damaged_deflate(folder: Path) -> Path:
    """A deflated stream that goes wrong in its middle, long before its checksum."""
    path = write_scan(folder / "bad.nii.gz")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\xff" * 40
    path.write_bytes(raw)
    return path


def terabyte(name: str) -> Callable[[Path], Path]:
    """Only a header: 30000 x 30000 x 600 voxels of int16."""

    def build(folder: Path) -> Path:
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16)
        header.set_data_shape((30000, 30000, 600))
        header.set_sform(np.eye(4), 1)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        raw = header.binaryblock + bytes(4)
        return content_case(name, gzip.compress(raw) if name.endswith(".gz") else raw)(folder)

    return build


def rotation(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine


NOISE = random.Random(0).randbytes(4000)
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489") + NOISE
MIRROR = np.diag([-1.0, 1, 1, 1])
SWAPPED = np.eye(4)[[1, 0, 2, 3]] * np.array([[1.0], [-1], [1], [1]])

BAD = {
    "missing": (lambda folder: folder / "bad.nii.gz", "no such file"),
    "name too long": (lambda folder: folder / ("x" * 300 + ".nii.gz"), "cannot be read"),
    "empty": (content_case("bad.nii.gz", b""), "empty"),
    "cut .nii.gz": (cut("bad.nii.gz", 0.5), "cut off or damaged"),
    "cut .nii": (cut("bad.nii", 0.5), "cut off or damaged"),
    "cut header": (content_case("bad.nii", bytes(100)), "not a readable NIfTI"),
    "cut NIfTI-2 header": (content_case("bad.nii", nib.Nifti2Header().binaryblock[:500]), "not a readable NIfTI"),
    "second member cut": (lambda folder: followed(gzip.compress(NOISE)[:-9])(folder), "cut off or damaged"),
    "pipe": (pipe, "a pipe or a device"),
    "checksum cut off": (lambda folder: cut("bad.nii.gz", 0.9995)(folder), "cut off or damaged"),
    "flipped bit": (flipped_bit, "damaged"),
    "damaged deflate": (damaged_deflate, "damaged"),
    ".gz but not gzip": (renamed("x.nii", "bad.nii.gz"), "should end in .nii:"),
    "gzip named .nii": (renamed("x.nii.gz", "bad.nii"), "should end in .nii.gz"),
    "random bytes": (content_case("bad.nii", NOISE), "not a readable NIfTI"),
    "random bytes in gzip": (content_case("bad.nii.gz", gzip.compress(NOISE)), "not a readable NIfTI"),
    "broken gzip": (content_case("bad.nii.gz", b"\x1f\x8b" + NOISE), "damaged"),
    "text": (content_case("bad.nii", b"subject,age\n01,64\n" * 40), "not a readable NIfTI"),
    "png": (content_case("bad.nii", PNG), "not a readable NIfTI"),
    "dicom": (content_case("bad.dcm", bytes(128) + b"DICM"), "dcm2niix"),
    "mgh": (content_case("bad.mgz", gzip.compress(NOISE)), "reads NIfTI"),
    "no suffix": (content_case("bad", NOISE), "reads NIfTI"),
    "series": (voxel_case(lambda: np.stack([head_image()] * 3, axis=-1)), "a series of shape"),
    "slices in time": (voxel_case(lambda: head_image()[:, :, None, :]), "slices that lost their places; convert"),
    "slices in the fifth dimension": (voxel_case(lambda: head_image()[:, :, None, None, :]), "lost their places"),
    "vectors": (voxel_case(lambda: np.stack([head_image()] * 3, axis=-1)[:, :, :, None]), "a series of shape"),
    "color": (voxel_case(color_image), "RGB"),
    "complex": (voxel_case(lambda: head_image().astype(np.complex64)), "complex"),
    "one slice": (voxel_case(lambda: head_image((24, 28, 1))), "not a volume"),
    "two dimensions": (voxel_case(lambda: head_image((24, 28, 20))[:, :, 9]), "not a volume"),
    "NaN": (voxel_case(lambda: with_voxel(np.nan)), "1 voxels are NaN or infinite"),
    "infinity": (voxel_case(lambda: with_voxel(np.inf)), "1 voxels are NaN or infinite"),
    "more than can be squared": (voxel_case(lambda: head_image() * np.float32(1e17)), "cannot be normalised; mend"),
    "less than can be told apart": (voxel_case(lambda: head_image() * np.float32(1e-13)), "to 8.25e-11, which cannot"),
    "beyond float32": (voxel_case(lambda: head_image() * 1e300), "NaN or infinite"),
    "slope of infinity": (header_case("scl_slope", None, 3e38), "NaN or infinite"),
    "all zero": (voxel_case(lambda: np.zeros((16, 16, 16), np.int16)), "every voxel is 0"),
    "constant": (voxel_case(lambda: np.full((16, 16, 16), 7, np.int16)), "every voxel is 7"),
    "zero spacing": (header_case("pixdim", 1, 0), "voxel size 0 x 1 x 1 mm"),
    "zero spacing, qform only": (header_case("pixdim", 2, 0, sform=0), "voxel size 1 x 0 x 1 mm"),
    "negative spacing": (header_case("pixdim", 3, -1), "voxel size 1 x 1 x -1 mm"),
    "NaN spacing": (header_case("pixdim", 1, np.nan), "voxel size nan"),
    "infinite spacing, qform only": (header_case("pixdim", 1, np.inf, sform=0), "voxel size inf"),
    "spacing in metres": (header_case("pixdim", 1, 0.001), "voxel size 0.001"),
    "spacing in micrometres": (header_case("pixdim", 1, 1000), "voxel size 1000"),
    "spacing and sform differ": (header_case("pixdim", 1, 1.5), "make them agree"),
    "singular sform": (header_case("srow_x", None, 0), "singular"),
    "NaN sform": (header_case("srow_x", 0, np.nan), "singular"),
    "infinite sform": (header_case("srow_y", 3, np.inf), "singular"),
    "invalid quaternion": (header_case("quatern_b", None, 2, sform=0), "the qform is not valid (w2 should be positive"),
    "invalid quaternion beside sform": (header_case("quatern_b", None, 2), "the qform is not valid"),
    "NaN quaternion": (header_case("quatern_b", None, np.nan, sform=0), "singular"),
    "NaN quaternion beside sform": (header_case("quatern_b", None, np.nan), "the qform is not valid"),
    "neither sform nor qform": (header_case("sform_code", None, 0, sform=0, qform=0), "left and right are unknown"),
    "mirrored qform": (forms_case(np.eye(4), MIRROR), "sform says RAS and qform LAS"),
    "other axes in qform": (forms_case(np.eye(4), SWAPPED), "left and right are in doubt"),
    "terabyte .nii": (terabyte("bad.nii"), "30000 x 30000 x 600 voxels need"),
    "terabyte .nii.gz": (terabyte("bad.nii.gz"), "30000 x 30000 x 600 voxels need"),
    "negative size": (header_case("dim", 1, -24), "not a volume"),
    "no voxels": (header_case("dim", 2, 0), "not a volume"),
    "nine dimensions": (header_case("dim", 0, 9), "not a readable NIfTI"),
    "unknown voxel type": (header_case("datatype", None, 77), "not a readable NIfTI"),
    "header of a pair": (header_case("magic", None, b"ni1"), "give it its name back and convert the pair"),
    "CIFTI": (header_case("intent_code", None, 3006), "CIFTI, values on surfaces"),
    "invalid scaling": (header_case("scl_inter", None, np.inf), "not a readable NIfTI"),
    "offset beyond the end": (header_case("vox_offset", None, 1e9), "(vox_offset), more than any header takes"),
    "infinite offset": (header_case("vox_offset", None, np.inf), "not a readable NIfTI"),
    "NaN offset": (header_case("vox_offset", None, np.nan), "not a readable NIfTI"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_scan_is_refused_in_one_line(name: str, tmp_path: Path, model: Path, cli: CommandLine) -> None:
    build, reason = BAD[name]
    scan = build(tmp_path)
    before, memory = snapshot(tmp_path), peak_memory()
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith(f"edgemuse: {scan}")
    assert reason in ran.err
    assert snapshot(tmp_path) == before | {"out": "folder"}
    assert peak_memory() - memory < 200 << 20


def big_endian(folder: Path) -> Path:
    image = nib.Nifti1Image(head_image(), np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(image, folder / "odd.nii")
    return folder / "odd.nii"


def second_version(folder: Path) -> Path:
    nib.save(nib.Nifti2Image(head_image(), np.eye(4)), folder / "odd.nii.gz")
    return folder / "odd.nii.gz"


def longer(folder: Path) -> Path:
    path = write_scan(folder / "odd.nii")
    path.write_bytes(path.read_bytes() + NOISE)
    return path


def of_type(dtype: str) -> Callable[[Path], Path]:
    return lambda folder: write_scan(folder / "odd.nii.gz", (head_image() // 10).astype(dtype))


ODD: dict[str, Callable[[Path], Path]] = {
    "four dimensions, one volume": voxel_case(lambda: head_image()[..., None]),
    "five dimensions, one volume": voxel_case(lambda: head_image()[..., None, None]),
    "rotated a little between sform and qform": forms_case(rotation(4), np.eye(4)),
    "near 45 degrees, where axis codes jump": forms_case(rotation(46), rotation(44)),
    "oblique": lambda folder: write_scan(folder / "odd.nii", affine=rotation(30)),
    "upper case suffix": renamed("x.nii.gz", "odd.NII.GZ"),
    "negative intensities": voxel_case(lambda: head_image() - np.int16(500)),
    "scaled": header_case("scl_slope", None, 0.25),
    "slope 0 means unscaled": header_case("scl_slope", None, 0),
    "qform only": header_case("sform_code", None, 0, sform=0),
    "sform only": header_case("qform_code", None, 0, qform=0),
    "bad quaternion of an unused qform": header_case("quatern_b", None, 9, qform=0),
    "two slices": voxel_case(lambda: head_image((24, 28, 20))[:, :, 9:11]),
    "fine and coarse": lambda folder: write_scan(folder / "odd.nii", spacing=(0.5, 0.5, 6.0)),
    "extra bytes at the end": longer,
    "zeros behind the compressed content": followed(bytes(70_000)),
    "garbage behind the compressed content": followed(b"# end of file"),
    "another member behind the compressed content": followed(gzip.compress(NOISE)),
    "big-endian": big_endian,
    "NIfTI-2": second_version,
    **{f"type {dtype}": of_type(dtype) for dtype in ("i1", "u1", "u2", "i4", "u4", "i8", "f4", "f8")},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_scan_is_segmented_on_its_own_grid(name: str, tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scan = ODD[name](tmp_path)
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    given, labels = nib.load(scan), nib.load(ran.out.splitlines()[0])
    assert labels.shape == given.shape[:3]
    np.testing.assert_array_equal(labels.affine, given.affine)
    assert len(np.unique(np.asanyarray(labels.dataobj))) > 1


def refused_before_work(cli: CommandLine, folder: Path, *arguments: object) -> str:
    """Run `segment`, see that it is refused in a line and that no file under `folder` changes; returns the line."""
    before = snapshot(folder)
    ran = cli("segment", *arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert ran.err.startswith("edgemuse: ")
    assert "Traceback" not in ran.err
    assert snapshot(folder) == before
    return ran.err


@pytest.mark.parametrize("output", ["taken", "taken/below"])
def test_file_in_the_way_of_the_output_folder(output: str, tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "taken").write_text("a file")
    line = refused_before_work(cli, tmp_path, scan, "-m", model, "-o", tmp_path / output)
    assert f"{tmp_path / output}: cannot write there" in line


def test_folder_in_the_way_of_a_result(tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "out" / "sub-01_volumes.tsv").mkdir(parents=True)
    line = refused_before_work(cli, tmp_path, scan, "-m", model, "-o", tmp_path / "out", "--overwrite")
    assert "sub-01_volumes.tsv is a folder" in line


def test_name_too_long_for_some_results(tmp_path: Path, model: Path, cli: CommandLine) -> None:
    """`_dseg.nii.gz` would fit and longer names not: neither is left."""
    scan = write_scan(tmp_path / ("x" * 241 + ".nii.gz"))
    before = snapshot(tmp_path)
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert "DLMUSE_Volumes.csv: cannot be written (File name too long)" in ran.err
    assert snapshot(tmp_path) == before | {"out": "folder"}


def test_two_scans_that_would_give_the_same_files(tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scans = [write_scan(tmp_path / folder / "sub-01_T1w.nii.gz") for folder in ("a", "b")]
    line = refused_before_work(cli, tmp_path, *scans, "-m", model, "-o", tmp_path / "out")
    assert f"{scans[0]} and {scans[1]} would both give sub-01_*" in line


def test_results_are_replaced_only_when_told_to(tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "sub-01_volumes.tsv"
    old.write_text("of an earlier run")
    line = refused_before_work(cli, tmp_path, scan, "-m", model, "-o", tmp_path / "out")
    assert f"{old} exists; choose another folder, or segment this scan again with --overwrite" in line
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "--overwrite")
    assert (ran.code, ran.err) == (0, "")
    assert old.read_text().startswith("index\tname")
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULTS


def test_one_bad_scan_does_not_stop_the_others(tmp_path: Path, model: Path, cli: CommandLine) -> None:
    scans = [write_scan(tmp_path / f"{name}.nii.gz") for name in "ac"]
    scans.insert(1, content_case("b.nii.gz", b"")(tmp_path))
    ran = cli("segment", *scans, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 2
    first, second, third, last = ran.err.splitlines()
    assert first.startswith(f"edgemuse: 1/3 {scans[0]}: ")
    assert second == f"edgemuse: {scans[1]}: the file is empty; copy it again"
    assert third.startswith(f"edgemuse: 3/3 {scans[2]}: ")
    assert last.startswith("edgemuse: 3 scans: 2 segmented, 1 failed; ")
    assert [Path(line).name[0] for line in ran.out.splitlines()] == ["a"] * 5 + ["c"] * 5
    assert all(Path(line).is_file() for line in ran.out.splitlines())
    assert len(list((tmp_path / "out").iterdir())) == 10


def test_full_disk_leaves_nothing_behind(tmp_path: Path, model: Path, cli: CommandLine, cache_dir: Path) -> None:
    """The kernel refuses to write beyond 600 bytes a file, as a full disk would."""
    pytest.importorskip("resource", reason="file size limits are POSIX's")
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    assert cli("segment", scan, "-m", model, "-o", tmp_path / "first").code == 0  # so that the engine is cached
    before = snapshot(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))"
    ran = run_process("segment", scan, "-m", model, "-o", tmp_path / "out", cache_dir=cache_dir, prelude=limit)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"edgemuse: {tmp_path}/out/sub-01_provenance.json: cannot be written (File too large); nothing was changed\n"
    )
    assert snapshot(tmp_path) == before | {"out": "folder"}


@pytest.mark.parametrize("name", ["missing", "cut .nii.gz", "zero spacing", "infinite spacing, qform only", "text"])
def test_a_fresh_process_says_nothing_more(name: str, tmp_path: Path, model: Path, cache_dir: Path) -> None:
    """Libraries that log or warn on their own would add lines that the caught streams of a test might not show."""
    build, reason = BAD[name]
    scan = build(tmp_path)
    ran = run_process("segment", scan, "-m", model, "-o", tmp_path / "out", cache_dir=cache_dir)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
    assert ran.err.startswith(f"edgemuse: {scan}")
    assert reason in ran.err


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_damaged_headers_raise_input_error_or_are_read(suffix: str, tmp_path: Path) -> None:
    """Random bytes anywhere in the header, 200 times: refused as input, or read whole. Nothing else, and soon."""
    rng = random.Random(20)
    whole = nib.Nifti1Image(head_image((6, 7, 8)), np.eye(4)).to_bytes()
    outcomes, memory = [], peak_memory()
    for case in range(200):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(HEADER)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path = tmp_path / f"{case}{suffix}"
        path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
        outcomes.append(outcome(path))
    assert peak_memory() - memory < 500 << 20
    assert 20 < outcomes.count("read") < 180
    assert set(outcomes) == {"read", "refused"}


def outcome(path: Path) -> str:
    try:
        with reading(path) as (scan, source):
            if np.prod(scan.shape, dtype=object) > 10_000_000:
                return "refused"  # by the memory plan, before anything is read
            image, _ = read_image(scan, source)
    except InputError as error:
        return "refused" if str(error).startswith(f"{path}: ") and "\n" not in str(error) else str(error)
    assert image.shape == scan.shape
    assert image.dtype == np.float32
    labels = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(np.zeros(scan.shape, np.uint8), scan)))
    assert labels.shape == scan.shape
    np.testing.assert_allclose(labels.affine, scan.affine)
    return "read"
