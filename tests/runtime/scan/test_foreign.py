"""What is not NIfTI is named, and the command that makes NIfTI of it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image
from nibabel.cmdline import convert

from edgemuse.engines.errors import InputError
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.nifti import open_scan, read_scan

READS = "and edgemuse reads NIfTI (.nii or .nii.gz); "
DICOM = bytes(128) + b"DICM" + bytes(40)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANNEX = b"/annex/objects/MD5E-s12345--0123456789.nii.gz\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Log in</title>"
AFFINE = np.diag([-1.0, 1, 1, 1])

CONTENTS = {
    "a.nii.gz": [
        (LFS, "a pointer of Git LFS, not the file itself; get that with 'git lfs pull'"),
        (ANNEX, "a pointer of git-annex, not the file itself; get that with 'git annex get' or 'datalad get'"),
        (b"../../.git/annex/objects/x1/2X/MD5E-s1--a.nii.gz/MD5E-s1--a.nii.gz", "a pointer of git-annex"),
        (PAGE, "a web page, not the file itself"),
        (gzip.compress(PAGE, mtime=0), "a web page, not the file itself"),
        (DICOM, f"DICOM, {READS}convert it: dcm2niix -z y {{folder}}"),
    ],
    "a.nii": [(LFS, "'git lfs pull'"), (ANNEX, "'git annex get'"), (PAGE, "a web page"), (DICOM, "dcm2niix")],
    "IM0001": [(DICOM, f"DICOM, {READS}convert it: dcm2niix -z y {{folder}}"), (b"?", "convert DICOM with dcm2niix")],
    "a.dcm": [(b"?", "dcm2niix -z y {folder}")],
    "a.mgz": [(b"?", f"FreeSurfer's format, {READS}convert it: nib-convert {{folder}}/a.mgz {{folder}}/a.nii.gz")],
    "a.MGH": [(b"?", "nib-convert {folder}/a.MGH {folder}/a.nii.gz")],
    "a b.mgz": [(b"?", 'nib-convert "{folder}/a b.mgz" "{folder}/a b.nii.gz"')],
    "a.mnc": [(b"?", f"MINC, {READS}convert it: mnc2nii {{folder}}/a.mnc {{folder}}/a.nii")],
    "a.mnc.gz": [(b"?", "mnc2nii {folder}/a.mnc.gz {folder}/a.nii")],
    "a.nrrd": [(b"?", f"NRRD, {READS}convert it: c3d {{folder}}/a.nrrd -o {{folder}}/a.nii.gz")],
    "scan": [(b"NRRD0004\n", "c3d {folder}/scan -o {folder}/scan.nii.gz"), (b"CDF\1", "mnc2nii")],
    "a.mha": [(b"?", "MetaImage")],
    "a.mif": [(b"?", "mrconvert {folder}/a.mif {folder}/a.nii.gz")],
    "a+orig.BRIK.gz": [(b"?", "3dAFNItoNIFTI -prefix {folder}/a+orig.nii.gz {folder}/a+orig.BRIK.gz")],
    "a.PAR": [(b"?", "dcm2niix -z y {folder}/a.PAR")],
    "a.hdr": [(b"?", "Analyze does not say where left is")],
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *row) for name, rows in CONTENTS.items() for row in rows])
def test_message_names_the_format_and_the_command(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_scan(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert said.format(folder=tmp_path) in str(caught.value)


@pytest.mark.parametrize("target", ["../.git/annex/objects/a/b/MD5E-s9--c.nii.gz", r"..\.git\annex\objects\a.nii.gz"])
def test_link_of_git_annex_without_content(target: str, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(target)
    with pytest.raises(InputError, match=r"a\.nii\.gz: a pointer of git-annex, .*'git annex get'"):
        open_scan(tmp_path / "a.nii.gz")


def test_link_to_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to("gone.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz: a link to gone\.nii\.gz, which is not there"):
        open_scan(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["a.img", "a.hdr"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_command_for_a_pair_gives_the_same_scan(kind: type, name: str, tmp_path: Path) -> None:
    nib.save(kind(head_image(), AFFINE), tmp_path / "a.img")
    with pytest.raises(InputError) as caught:
        open_scan(tmp_path / name)
    check_conversion(str(caught.value), tmp_path)


def test_command_for_freesurfers_format_gives_the_same_scan(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(head_image(), AFFINE), tmp_path / "a.mgz")
    with pytest.raises(InputError) as caught:
        open_scan(tmp_path / "a.mgz")
    check_conversion(str(caught.value), tmp_path)


def check_conversion(message: str, folder: Path) -> None:
    program, *arguments = message.partition("convert it: ")[2].split()
    assert program == "nib-convert"  # comes with nibabel
    convert.main(arguments)
    scan, image = read_scan(folder / "a.nii.gz")
    np.testing.assert_array_equal(image, head_image())
    np.testing.assert_allclose(scan.affine, AFFINE)


def test_analyze_is_not_told_to_be_converted_by_what_makes_its_sides_up(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(head_image(), np.eye(4)), tmp_path / "a.img")
    with pytest.raises(InputError, match="Analyze does not say where left is: convert such a scan from DICOM again"):
        open_scan(tmp_path / "a.img")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("1/IM0001", DICOM, "a folder of DICOM, {reads}convert it: dcm2niix -z y {folder}"),
        ("T1.mgz", b"?", "a folder of FreeSurfer's format, {reads}convert it: nib-convert {folder}/T1.mgz"),
        ("t1.mnc", b"?", "mnc2nii {folder}/t1.mnc"),
        ("notes.txt", b"?", "a folder without T1 scans (.nii or .nii.gz); name the files themselves"),
    ],
)
def test_folder_without_nifti(
    name: str, content: bytes, said: str, tmp_path: Path, model: Path, cli: CommandLine
) -> None:
    folder = tmp_path / "data"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(content)
    ran = cli("segment", folder, "-m", model, "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert said.format(folder=folder, reads=READS) in ran.err


def test_only_so_many_files_of_a_folder_are_looked_at(tmp_path: Path) -> None:
    for number in range(foreign.LOOKED_AT):
        (tmp_path / f"{number:04}.txt").write_bytes(b"?")
    (tmp_path / "z.dcm").write_bytes(DICOM)
    assert foreign.of_folder(tmp_path) == ""
    os.remove(tmp_path / "0000.txt")
    assert "DICOM" in foreign.of_folder(tmp_path)
