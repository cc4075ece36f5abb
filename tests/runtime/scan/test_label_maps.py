"""Label maps are known by their content, scans are not taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, write_scan
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.engines.errors import LabelMapError
from edgemuse.runtime.batch.jobs import find_jobs
from edgemuse.runtime.pipeline.loading import load
from edgemuse.runtime.scan.label_maps import are_labels

SHARED = Path(__file__).parents[4] / "shared" / "data"
SHAPE = (40, 44, 36)


def patches(count: int, seed: int = 0, step: int = 1) -> NDArray[np.int16]:
    """A ball of `count` labels in patches: every voxel has the number of the nearest of as many points."""
    points = np.random.default_rng(seed).uniform(0, SHAPE, (count, 3))
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    nearest = np.linalg.norm(grid[..., None, :] - points, axis=-1).argmin(axis=-1)
    inside = np.linalg.norm(grid - np.array(SHAPE) / 2, axis=-1) < 17
    return np.where(inside, 1 + nearest * step, 0).astype(np.int16)


LABELS = {
    "a mask": patches(1),
    "tissues": patches(3),
    "tissues in random order": patches(200) % 4,
    "33 structures": patches(33, step=5),
    "regions with large numbers": patches(60, step=7) + 1000 * (patches(60) > 0),
    "an inverted mask": 1 - patches(1),
    "as float": patches(20, step=3).astype(np.float32),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_label_maps(kind: str, axes: tuple[int, int, int]) -> None:
    middle = np.transpose(LABELS[kind], axes)[:, :, 16:21]
    assert are_labels(middle.astype(np.float32))


def head(levels: int = 255) -> NDArray[np.float64]:
    """A head with noise, whole numbers up to `levels`."""
    image = head_image(SHAPE).astype(float)
    return np.rint(image / image.max() * levels)


SCANS: dict[str, NDArray[Any]] = {
    "16 bit": head(4000),
    "8 bit": head(),
    "smoothed": np.rint(ndimage.gaussian_filter(head(), 2)),
    "on a finer grid": np.rint(ndimage.zoom(head(), 2, order=1)),
    "voxels repeated": np.kron(head(), np.ones((2, 2, 2))),
    "float": head() * 1.7,
    "air with a few values": np.where(head() == 0, np.random.default_rng(0).integers(0, 3, SHAPE), head()),
    "air that is not 0": head() + 100,
}


@pytest.mark.parametrize("kind", SCANS)
def test_scans(kind: str) -> None:
    middle = SCANS[kind].shape[2] // 2
    assert not are_labels(SCANS[kind][:, :, middle - 2 : middle + 3].astype(np.float32))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")
def test_real_scans_and_their_label_maps() -> None:
    def middle(path: Path) -> NDArray[np.float32]:
        nifti: Any = nib.load(path)
        data = nifti.dataobj[:, :, nifti.shape[2] // 2 - 2 : nifti.shape[2] // 2 + 3]
        return np.asarray(data, np.float32)

    scans = [*(SHARED / "t1").glob("*_T1w.nii.gz"), *(SHARED / "fs").glob("*_T1w.nii.gz")]
    maps = [*(SHARED / "t1").glob("*_dseg.nii.gz"), *(SHARED / "labelmaps").glob("*.nii.gz")]
    scans += sorted((SHARED / "ixi" / "t1").glob("*.nii.gz"))[::10]
    maps += sorted((SHARED / "ixi" / "dlmuse").glob("*.nii.gz"))[::10]
    assert not [path.name for path in scans if are_labels(middle(path))]
    assert not [path.name for path in maps if not are_labels(middle(path))]


def test_intent_of_the_header(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nii.gz")
    nifti: Any = nib.load(path)
    nifti.header.set_intent("label")
    nib.save(nifti, tmp_path / "b.nii.gz")
    plan = Plan()
    with pytest.raises(LabelMapError, match="NIFTI_INTENT_LABEL; if that is wrong, set intent_code to 0"):
        load(tmp_path / "b.nii.gz", lambda _: plan, None)  # type: ignore[arg-type, return-value]


class Plan:
    """A scan that takes no memory."""

    total = ahead = 0


def test_named_it_is_refused_and_found_it_is_passed_over(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "result.nii.gz", patches(33, step=5))
    ran = cli("segment", tmp_path / "in" / "result.nii.gz", "-o", tmp_path / "out", "-m", model, "--no-qc")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "result.nii.gz: a label map and no T1 scan: patches of 16 whole numbers; give the scan" in ran.err
    ran = cli("segment", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--no-qc")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)  # nothing came of it
    write_scan(tmp_path / "in" / "t1.nii.gz")
    for said in ("1 segmented, 1 passed over; ", "1 done before, 1 passed over; "):
        ran = cli("segment", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--no-qc")
        assert ran.code == 0
        assert f"edgemuse: passed over: {tmp_path / 'in' / 'result.nii.gz'}: a label map and no T1 scan" in ran.err
        assert said in ran.err
    assert {path.name.partition("_")[0] for path in (tmp_path / "out").iterdir()} == {"t1"}


def test_what_cannot_be_read_goes_its_ordinary_way(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    path = write_scan(tmp_path / "in" / "result.nii.gz", patches(33))
    path.write_bytes(path.read_bytes()[:-100])
    (job,) = find_jobs([tmp_path / "in"], tmp_path / "out")
    assert job.walked
    ran = cli("segment", tmp_path / "in", "-o", tmp_path / "out", "-m", model)
    assert ran.code == 2
    assert "cut off or damaged" in ran.err
