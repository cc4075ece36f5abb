"""Tables of volumes: sums that are true, and the columns and numbers of NiChart_DLMUSE."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import nibabel as nib
import nichart
import numpy as np
import pytest
from bundles import CommandLine, tiny_bundle, write_scan
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.runtime.regions.labels import Label, count_voxels, structure_voxels, to_indices
from edgemuse.runtime.regions.muse import cortical_csf, muse_labels, regions
from edgemuse.runtime.regions.volumes import dlmuse_csv, volumes_tsv

MUSE = (*muse_labels(), cortical_csf(152))
FLOAT32 = 2e-7
"""Relative: upstream's product of three voxel sizes is rounded to float32 three times."""


def rows(text: str, delimiter: str = "\t") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


def table_of(classes: np.ndarray, labels: tuple[Label, ...], voxel_mm3: float) -> dict[int, float]:
    voxels = structure_voxels(count_voxels(classes, labels), labels)
    return {int(row["index"]): float(row["volume_mm3"]) for row in rows(volumes_tsv(voxels, labels, voxel_mm3))}


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_every_sum_is_that_of_its_parts(seed: int, voxel_mm3: float) -> None:
    classes = np.random.default_rng(seed).integers(0, 153, (7, 8, 9)).astype(np.uint8)
    found = table_of(classes, MUSE, voxel_mm3)
    assert len(found) == 152 + 260 - 145 - 1 + 1  # labels, and sums that are not themselves labels
    for region in regions():
        if region.parts:
            parts = sum(found[part] for part in region.parts)
            assert found[region.index] == pytest.approx(parts, abs=0.001 * len(region.parts))
    inside = (classes > 0).sum() * voxel_mm3
    assert sum(found[label.index] for label in MUSE if label.index) == pytest.approx(inside, abs=0.2)


def test_other_models_get_no_sums() -> None:
    labels = Label(0, 0, "background"), Label(1, 4, "left lateral ventricle"), Label(2, 43, "right lateral ventricle")
    text = volumes_tsv({4: 10, 43: 0}, labels, 0.5)
    assert text == (
        "index\tname\tvoxels\tvolume_mm3\n"
        "4\tleft lateral ventricle\t10\t5.000\n"
        "43\tright lateral ventricle\t0\t0.000\n"
    )  # fmt: skip


def upstream(classes: np.ndarray, zooms: tuple[float, float, float], folder: Path) -> str:
    image = nib.Nifti1Image(to_indices(classes, MUSE), np.diag([*zooms, 1]))
    nib.save(image, folder / "dseg.nii.gz")
    nichart.module("CalcROIVol").create_roi_csv(
        "sub-01",
        str(folder / "dseg.nii.gz"),
        str(nichart.table("MUSE_mapping_consecutive_indices.csv")),
        str(nichart.table("MUSE_mapping_derived_rois.csv")),
        str(folder / "volumes.csv"),
    )
    return (folder / "volumes.csv").read_text()


@pytest.mark.parametrize("classes", [range(153), (0, 5, 152), (0, 1)], ids=["all", "few", "one"])
@pytest.mark.parametrize("zooms", [(1, 1, 1), (1, 1, 2.5), (0.9, 1.1, 1.3)])
def test_table_is_upstreams(
    zooms: tuple[float, float, float], classes: range | tuple[int, ...], tmp_path: Path
) -> None:
    volume = np.random.default_rng(1).choice(np.array(classes, np.uint8), (20, 21, 22))
    expected = upstream(volume, zooms, tmp_path)
    found = dlmuse_csv("sub-01", structure_voxels(count_voxels(volume, MUSE), MUSE), float(np.prod(zooms)))
    if zooms != (0.9, 1.1, 1.3):
        assert found == expected
    ours, theirs = rows(found, ","), rows(expected, ",")
    assert list(ours[0]) == list(theirs[0])
    assert ours[0].pop("MRID") == theirs[0].pop("MRID")
    np.testing.assert_allclose([*map(float, ours[0].values())], [*map(float, theirs[0].values())], rtol=FLOAT32)


def test_upstream_fails_where_nothing_is_labelled(tmp_path: Path) -> None:
    nothing = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="zero-size"):
        upstream(nothing, (1, 1, 1), tmp_path)
    found = rows(dlmuse_csv("sub-01", structure_voxels(count_voxels(nothing, MUSE), MUSE), 1.0), ",")[0]
    assert found.pop("MRID") == "sub-01"
    assert {float(volume) for volume in found.values()} == {0}


def test_files_of_a_dlmuse_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A cascade whose regions carry DLMUSE's labels writes both tables; its region network alone only the tidy one."""
    cli, scan = CommandLine(capfd, tmp_path / "cache"), write_scan(tmp_path / "sub-01_T1w.nii.gz", spacing=(1, 1, 2))
    mask = tiny_bundle(tmp_path / "mask.bundle", classes=2, deferred=False, threshold=True)
    regions_bundle = tiny_bundle(tmp_path / "regions.bundle", classes=152, labels=muse_labels())
    assert cli("cascade", mask, regions_bundle, "-o", tmp_path / "dlmuse.bundle").code == 0
    assert cli("segment", scan, "--model", tmp_path / "dlmuse.bundle", "-o", tmp_path / "out").code == 0
    assert cli("segment", scan, "--model", regions_bundle, "-o", tmp_path / "alone").code == 0
    found = rows((tmp_path / "out" / "sub-01_DLMUSE_Volumes.csv").read_text(), ",")[0]
    tidy = {row["index"]: row for row in rows((tmp_path / "out" / "sub-01_volumes.tsv").read_text())}
    labels = np.asanyarray(nib.load(tmp_path / "out" / "sub-01_dseg.nii.gz").dataobj)
    assert found["MRID"] == "sub-01"
    assert float(found["702"]) == float(tidy["702"]["volume_mm3"]) > 0
    assert float(found["4"]) == 2 * (labels == 4).sum()
    assert not (tmp_path / "alone" / "sub-01_DLMUSE_Volumes.csv").exists()
    assert (tmp_path / "alone" / "sub-01_volumes.tsv").exists()
