"""Results: named after the scan, on its grid, all of them or none."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import head_image, snapshot, write_scan

from edgemuse.engines.errors import OutputError
from edgemuse.runtime.results import files as outputs
from edgemuse.runtime.results.files import (
    NAMES,
    OLD,
    PROVENANCE,
    Appeared,
    discard_parts,
    free,
    nifti_bytes,
    not_ours,
    output_paths,
    prepare_folder,
    present,
    write_file,
    write_files,
)
from edgemuse.runtime.scan.nifti import open_scan, scan_stem

AFFINE = np.array([[0, 0.1, -2.0, 11], [-1.2, 0, 0, -22.5], [0, 1.5, 0.1, 33], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("sub-01_T1w.nii.gz", "sub-01"),
        ("sub-01_T1w.nii", "sub-01"),
        ("sub-01_run-2_T1w.nii.gz", "sub-01_run-2"),
        ("brain.nii.gz", "brain"),
        ("brain.v2.nii", "brain.v2"),
        ("SCAN_T1w.NII.GZ", "SCAN"),
        ("T1w.nii.gz", "T1w"),
        ("_T1w.nii.gz", "_T1w"),
        ("a.nii.nii.gz", "a.nii"),
    ],
)
def test_stem(name: str, stem: str) -> None:
    assert scan_stem(Path("folder.nii") / name) == stem


def test_paths_of_the_results() -> None:
    paths = output_paths(Path("out"), "sub-01")
    assert [str(path) for path in paths.values()] == [
        "out/sub-01_dseg.nii.gz",
        "out/sub-01_dseg.tsv",
        "out/sub-01_volumes.tsv",
        "out/sub-01_DLMUSE_Volumes.csv",
        "out/sub-01_provenance.json",
        "out/sub-01_qc.png",
    ]
    assert tuple(paths) == NAMES


def test_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "x" / "y")
    assert snapshot(tmp_path) == {"x": "folder", "x/y": "folder"}


def test_what_is_there_is_found(tmp_path: Path) -> None:
    paths = output_paths(tmp_path, "a")
    assert present(paths) == []
    paths["dseg.tsv"].write_text("mine")
    paths["qc.png"].symlink_to(tmp_path / "nowhere")
    assert present(paths) == ["dseg.tsv", "qc.png"]
    paths["volumes.tsv"].mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        present(paths)


def test_leftovers_of_a_killed_process_go_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # killed: nothing is tidied
    for name in ("a", "ab"):
        with pytest.raises(KeyboardInterrupt):
            write_files({tmp_path / name: b"1"})
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    discard_parts([tmp_path / "a"])
    (left,) = tmp_path.iterdir()
    discard_parts([tmp_path / "ab"])
    assert not left.exists()


def test_parts_of_another_machine_stay_until_they_are_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still be writing them, where locks do not reach it."""
    monkeypatch.setattr(outputs, "_machine", lambda: "elsewhere")
    part = outputs._beside(tmp_path / "a")
    monkeypatch.undo()
    part.write_bytes(b"1")
    discard_parts([tmp_path / "a"])
    assert part.exists()
    os.utime(part, (time.time() - 2 * OLD,) * 2)
    discard_parts([tmp_path / "a"])
    assert not part.exists()


def label_map(shape: tuple[int, ...], dtype: str, highest: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, highest, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize(("dtype", "highest"), [("u1", 255), ("u2", 65535), ("u4", 2**32 - 1)])
@pytest.mark.parametrize("trailing", [0, 1, 2])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_label_map_lies_on_the_grid_of_the_scan(
    kind: type, trailing: int, dtype: str, highest: int, tmp_path: Path
) -> None:
    data = head_image().reshape(24, 28, 20, *[1] * trailing)
    image = kind(data, AFFINE)
    image.header.set_qform(AFFINE, 3)
    image.header.set_sform(AFFINE, 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(0.5, 3)
    image.header["cal_max"] = 700
    image.header["descrip"] = b"acquired by somebody"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    nib.save(image, tmp_path / "scan.nii.gz")
    scan, labels = open_scan(tmp_path / "scan.nii.gz"), label_map((24, 28, 20), dtype, highest)

    content = nifti_bytes(labels, scan)
    (tmp_path / "dseg.nii.gz").write_bytes(content)
    found = nib.load(tmp_path / "dseg.nii.gz")

    assert isinstance(found, kind)
    assert found.get_data_dtype() == np.dtype(dtype)
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), labels)
    given = nib.load(tmp_path / "scan.nii.gz")
    for found_form, given_form in (
        (found.get_sform(coded=True), given.get_sform(coded=True)),
        (found.get_qform(coded=True), given.get_qform(coded=True)),
    ):
        np.testing.assert_array_equal(found_form[0], given_form[0])
        assert found_form[1] == given_form[1]
    assert found.header.get_zooms() == given.header.get_zooms()[:3]
    assert found.header.get_xyzt_units()[0] == "mm"
    assert found.header.get_intent()[0] == "label"
    assert (found.header["cal_min"], found.header["cal_max"]) == (0, 0)
    assert not found.header.extensions
    assert b"patient" not in gzip.decompress(content)
    assert b"somebody" not in gzip.decompress(content)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_of_the_scans_header_only_the_grid_reaches_the_label_map(kind: type, tmp_path: Path) -> None:
    """Whatever else a header holds, and in whichever byte order, the label map is the same."""
    maps = []
    for endianness in "<>":
        for says in (False, True):
            image = kind(head_image(), AFFINE, kind.header_class(endianness=endianness))
            image.header.set_qform(AFFINE, 3)
            image.header.set_sform(AFFINE, 4)
            image.header["xyzt_units"] = 2 | 8 * says
            for field in image.header.keys() if says else ():
                if field not in GRID:
                    fill(image.header, field)
            path = tmp_path / f"{endianness == '<'}_{says}.nii"
            path.write_bytes(image.header.binaryblock + bytes(4) + head_image().tobytes(order="F"))
            maps.append(gzip.decompress(nifti_bytes(np.ones((24, 28, 20), np.uint8), open_scan(path))))
    assert len(set(maps)) == 1
    assert b"somebody" not in maps[0]


GRID = {
    "sizeof_hdr", "magic", "eol_check", "dim", "datatype", "bitpix", "vox_offset", "pixdim", "xyzt_units",
    "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
}  # fmt: skip


def fill(header: Any, field: str) -> None:
    """Put something into a field."""
    if header[field].dtype.kind == "S":
        header[field] = b"somebody"[: header[field].dtype.itemsize]
    else:
        header[field] = 1 if field == "intent_code" else 7


def test_unset_forms_of_a_scan_do_not_reach_the_label_map(tmp_path: Path) -> None:
    image = nib.Nifti1Image(head_image(), AFFINE)
    image.header.set_sform(AFFINE, 1)
    image.header["qform_code"], image.header["quatern_b"], image.header["qoffset_x"] = 0, 0.25, 99
    image.header["xyzt_units"] = 7  # no unit of length
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4) + head_image().tobytes(order="F"))
    content = gzip.decompress(nifti_bytes(np.ones((24, 28, 20), np.uint8), open_scan(tmp_path / "a.nii")))
    found = nib.Nifti1Image.from_bytes(content).header
    assert (found["quatern_b"], found["qoffset_x"], found["xyzt_units"]) == (0, 0, 0)


def test_scan_is_not_changed_by_its_label_map(tmp_path: Path) -> None:
    scan = open_scan(write_scan(tmp_path / "scan.nii"))
    before = scan.header.binaryblock
    nifti_bytes(np.zeros(scan.shape, np.uint8), scan)
    assert scan.header.binaryblock == before


def test_label_map_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    scan = open_scan(write_scan(tmp_path / "scan.nii"))
    labels = label_map(scan.shape, "u1", 5)
    content = nifti_bytes(labels, scan)
    assert content == nifti_bytes(np.asfortranarray(labels), scan)
    assert content[4:8] == bytes(4)  # gzip's time of writing


def test_files_appear_with_the_usual_rights(tmp_path: Path) -> None:
    write_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"12"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "usual"}
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_files_are_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "b").write_text("old")
    write_files({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "elsewhere").read_text() == "precious"
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_none_of_the_files_is_left_if_one_fails(
    step: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], getattr(os, step)

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, step, failing)
    (tmp_path / "other").write_text("mine")
    before = snapshot(tmp_path)
    names = ["a", "b", "c"]
    with pytest.raises(OutputError) as caught:
        write_files({tmp_path / name: b"x" * 10 for name in names})
    failed = tmp_path / names[at - 1]
    assert str(caught.value) == f"{failed}: cannot be written (No space left on device); nothing was changed"
    assert snapshot(tmp_path) == before


def test_folder_that_went_away(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_files({tmp_path / "gone" / "a": b"1"})


@pytest.mark.parametrize("at", range(1, 7))
def test_earlier_results_are_put_back_if_one_fails(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], os.replace

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise PermissionError(13, "Permission denied")
        real(*arguments)

    for name in "abc":
        (tmp_path / name).write_text("old")
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="nothing was changed"):
        write_files({tmp_path / name: b"new" for name in "abc"})
    assert snapshot(tmp_path) == before


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Of files that were to be new, all are withdrawn; one that was to be removed stays as well."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "b").write_text("mine")
    (tmp_path / "gone").write_text("mine too")
    before = snapshot(tmp_path)
    new = [tmp_path / name for name in ("a", "b", "gone")]
    with pytest.raises(Appeared, match=r"b was put there meanwhile; nothing was changed"):
        write_files({tmp_path / name: b"new" for name in ("old", "a", "b")}, [tmp_path / "gone"], new)
    assert snapshot(tmp_path) == before
    (tmp_path / "b").unlink()
    write_files({tmp_path / name: b"new" for name in ("old", "a", "b")}, [tmp_path / "gone"], new)
    content = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert content == {"old": "new", "a": "new", "b": "new", "gone": "mine too"}


def test_whose_results_they_are(tmp_path: Path) -> None:
    paths = output_paths(tmp_path, "a")
    assert not_ours(paths) is None
    assert free(paths) == {*paths.values()}
    content = {"dseg.tsv": b"1", "volumes.tsv": b"2"}
    record = json.dumps({"files": {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}})
    write_files({paths[PROVENANCE]: record.encode(), **{paths[name]: data for name, data in content.items()}})
    assert not_ours(paths) is None
    assert free(paths) == {paths[name] for name in NAMES} - {paths[name] for name in (*content, PROVENANCE)}
    paths["qc.png"].write_bytes(b"mine")
    assert not_ours(paths) == paths["qc.png"]
    paths["qc.png"].unlink()
    paths["volumes.tsv"].write_bytes(b"corrected")
    assert not_ours(paths) == paths["volumes.tsv"]
    paths[PROVENANCE].write_text('{"files": [1]}')
    assert not_ours(paths) == paths["dseg.tsv"]
    paths[PROVENANCE].unlink()
    assert not_ours(paths) == paths["dseg.tsv"]


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synced elsewhere")
def test_folders_are_synced_after_the_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    replace, link, fsync = os.replace, os.link, os.fsync

    def noted(name: str, real: Any) -> Any:
        def step(*arguments: Any, **named: Any) -> Any:
            steps.append(name)
            return real(*arguments, **named)

        return step

    def synced(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", noted("rename", replace))
    monkeypatch.setattr(os, "link", noted("rename", link))
    monkeypatch.setattr(os, "fsync", synced)
    (tmp_path / "x").mkdir()
    write_files({tmp_path / "a": b"1", tmp_path / "x" / "b": b"2"}, new=[tmp_path / "a"])
    assert steps == ["file", "file", "rename", "rename", "folder", "folder"]
    steps.clear()
    write_file(tmp_path / "c", b"3")
    assert steps == ["file", "rename", "folder"]
