"""Scans for calibration: found, checked, never used for both purposes; truth read into the network's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import head_image, write_scan
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.calibration.scans import (
    PATCHES,
    Source,
    calibration_patches,
    find_scans,
    read_truth,
    split,
    structures,
)
from edgemuse.engines.errors import InputError
from edgemuse.runtime.model.manifest import Network, Normalization, Resampling
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.nifti import file_sha256

LABELS = (Label(0, 0, "background"), Label(1, 10, "left"), Label(2, 20, "right"), Label(3, 10, "left again"))


def write_truth(path: Path, like: Path, indices: Any, affine: Any = None) -> Path:
    nifti: Any = nib.load(like)
    shape = nifti.shape
    image = nib.Nifti1Image(np.resize(np.asarray(indices), shape), nifti.affine if affine is None else affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three scans, the first with a truth; and what is none."""
    for number in range(3):
        write_scan(tmp_path / f"sub-{number}_T1w.nii.gz", head_image(seed=number))
    write_truth(tmp_path / "sub-0_dseg.nii.gz", tmp_path / "sub-0_T1w.nii.gz", np.array([0, 10, 20], np.uint8))
    (tmp_path / "notes.txt").write_text("not a scan")
    (tmp_path / "more").mkdir()
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        split(find_scans(folder), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scans_and_their_truth_are_found(folder: Path) -> None:
    found = find_scans(folder)
    assert [source.path.name for source in found] == [f"sub-{number}_T1w.nii.gz" for number in range(3)]
    assert [source.truth for source in found] == [folder / "sub-0_dseg.nii.gz", None, None]
    assert [source.sha256 for source in found] == [file_sha256(source.path) for source in found]


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_no_scan_is_used_twice(with_truth: list[bool]) -> None:
    sources = [Source(Path(f"{n}.nii"), f"{n}", Path("t.nii") if truth else None) for n, truth in enumerate(with_truth)]
    calibration, evaluation = split(sources, Path("data"))
    assert calibration
    assert evaluation
    assert len(calibration) <= max(len(sources) // 3, 1)
    assert sorted(one.sha256 for one in (*calibration, *evaluation)) == sorted(one.sha256 for one in sources)
    if any(with_truth):
        assert any(source.truth for source in evaluation)


def test_too_few_scans_say_how_many_are_needed(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"sub-{number}_T1w.nii.gz").unlink()
    assert "1 scan found, at least 2 are needed: one to calibrate on and another to evaluate on" in refusal(folder)
    (folder / "sub-0_T1w.nii.gz").unlink()
    assert "no scans found, at least 2 are needed" in refusal(folder)


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_the_same_scan_twice(folder: Path) -> None:
    (folder / "sub-9_T1w.nii.gz").write_bytes((folder / "sub-1_T1w.nii.gz").read_bytes())
    assert "sub-9_T1w.nii.gz: the same file as sub-1_T1w.nii.gz; remove one" in refusal(folder)


def test_bad_scan_is_named(folder: Path) -> None:
    (folder / "sub-1_T1w.nii.gz").write_bytes(b"")
    assert "sub-1_T1w.nii.gz: the file is empty" in refusal(folder)


def test_truth_on_another_grid(folder: Path) -> None:
    truth = folder / "sub-0_dseg.nii.gz"
    affine = np.array(nib.load(truth).affine)  # type: ignore[attr-defined]
    affine[0, 3] += 1
    write_truth(truth, folder / "sub-0_T1w.nii.gz", np.array([0, 10], np.uint8), affine)
    assert "sub-0_dseg.nii.gz: its grid is not that of sub-0_T1w.nii.gz" in refusal(folder)


def test_truth_becomes_classes(folder: Path) -> None:
    """Classes that share an index are one; what the network does not know is background."""
    indices = np.array([0, 10, 20, 99, 10], np.int16)
    path = write_truth(folder / "sub-0_dseg.nii.gz", folder / "sub-0_T1w.nii.gz", indices)
    assert read_truth(path, LABELS).ravel()[:5].tolist() == [0, 1, 2, 0, 1]
    assert structures(np.array([0, 1, 2, 3], np.uint8), LABELS).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        (np.array([0, 10.5], np.float32), "between whole numbers"),
        (np.array([0, 77], np.uint8), "none of the model's structures"),
        (np.array([0, 0], np.uint8), "every voxel is 0"),
    ],
)
def test_truth_that_is_none(indices: Any, reason: str, folder: Path) -> None:
    path = write_truth(folder / "sub-0_dseg.nii.gz", folder / "sub-0_T1w.nii.gz", indices)
    with pytest.raises(InputError, match=reason):
        read_truth(path, LABELS)


@pytest.mark.parametrize("patch", [(8, 8, 8), (16, 16, 16), (64, 8, 8)], ids=str)
def test_patches_are_normalised_tiles(patch: tuple[int, int, int], folder: Path) -> None:
    resampling = Resampling(3, 0)
    network = Network(
        "LPS", (0, 1, 2), (2.0, 2.0, 2.0), patch, (1, 1, 1), (), Normalization("zscore"), resampling,
        Resampling(1, 0), 1, 2, False, 8,
    )  # fmt: skip
    sources = find_scans(folder)
    patches = calibration_patches(sources, network)
    assert len(sources) <= len(patches) <= PATCHES
    assert {one.shape for one in patches} == {(1, 1, *patch)}
    assert all(one.dtype == np.float32 and one.flags.c_contiguous for one in patches)
    assert len({one.tobytes() for one in patches}) == len(patches)
    everything = np.concatenate([one.ravel() for one in patches])
    assert abs(everything.mean()) < 1
    assert 0.2 < everything.std() < 2
