"""The steps between two networks: properties, and equality with NiChart_DLMUSE's functions on the same arrays."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import nichart
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgemuse.runtime.pipeline.crop import (
    fill,
    largest_component,
    masked_crop,
    padded_box,
    paste,
    turn_to,
    turned_affine,
)
from edgemuse.runtime.regions.labels import Label, to_indices
from edgemuse.runtime.regions.muse import cortical_csf, is_muse, muse_labels, region_voxels, regions

SHAPE = (30, 26, 34)
GRID = np.diag([1.0, 1.0, 1.0, 1.0])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
masks = arrays.arrays(bool, st.tuples(*[st.integers(1, 9)] * 3))
CODES = ["LPS", "RAS", "PIR", "ASL", "SRA", "LIA"]


def ball(centre: tuple[int, int, int], radius: float) -> np.ndarray:
    grid = np.ogrid[tuple(slice(0, size) for size in SHAPE)]
    return sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2


def block(*sides: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


MASKS = {
    "one component": ball((15, 13, 17), 9),
    "several components": ball((20, 13, 20), 8) | ball((3, 3, 3), 2) | ball((27, 24, 2), 1),
    "two of one size": block((2, 9), (2, 9), (2, 9)) | block((15, 22), (15, 22), (15, 22)),
    "joined by an edge only": block((2, 12), (2, 12), (2, 12)) | block((12, 20), (12, 20), (2, 12)),
    "touches the border": ball((4, 13, 30), 11),
    "everything": np.ones(SHAPE, bool),
    "padding of half a voxel": block((3, 19), (4, 20), (4, 30)),
}
"""Of masks whose padding is at least a voxel: see `test_upstream_cuts_a_small_mask`."""
boxes_of_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def image_and_classes(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(100, 30, SHAPE).astype(np.float32), rng.integers(0, 152, SHAPE).astype(np.uint8)


def save(path: Path, data: np.ndarray, affine: np.ndarray = LPS) -> Path:
    nib.save(nib.Nifti1Image(data, affine, dtype=data.dtype), path)
    return path


def load(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


@given(masks)
def test_box_holds_the_largest_component(mask: np.ndarray) -> None:
    if not mask.any():
        with pytest.raises(ValueError, match="empty"):
            padded_box(mask, 10)
        return
    component, box = largest_component(mask), padded_box(mask, 10)
    assert not (component & ~mask).any()
    inside = np.zeros_like(mask)
    inside[box] = True
    assert not (component & ~inside).any()
    wider = padded_box(mask, 30)
    assert all(w.start <= n.start and n.stop <= w.stop for w, n in zip(wider, box, strict=True))


@given(masks, st.integers(0, 40))
def test_crop_and_paste_round_trip(mask: np.ndarray, percent: int) -> None:
    if not mask.any():
        return
    image = np.random.default_rng(0).normal(5, 1, mask.shape).astype(np.float32)
    box = padded_box(mask, percent)
    back = paste(masked_crop(image, mask, box), box, mask.shape)
    inside = paste(np.ones([side.stop - side.start for side in box], bool), box, mask.shape)
    np.testing.assert_array_equal(back, np.where(mask & inside, image, 0))


@given(arrays.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3)), arrays.arrays(bool, (3, 4, 5)))
def test_fill_changes_the_mask_where_nothing_is_labelled(classes: np.ndarray, mask: np.ndarray) -> None:
    labels = [Label(0, 0, "background"), Label(1, 5, "a"), Label(2, 0, "also nothing"), Label(3, 700, "b")]
    filled = fill(classes, mask, labels, 4)
    empty = np.isin(classes, (0, 2))
    assert (filled[empty & mask] == 4).all()
    np.testing.assert_array_equal(filled[~(empty & mask)], classes[~(empty & mask)])


def test_fill_needs_not_fit_the_type_of_the_classes() -> None:
    labels = muse_labels()
    assert fill(np.zeros((2, 2, 2), np.uint8), np.ones((2, 2, 2), bool), labels, 300).max() == 300


@pytest.mark.parametrize("codes", CODES)
def test_turned_grid_is_nibabels(codes: str) -> None:
    affine = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)),
        SHAPE,
    ) @ np.array([[0.9, 0.1, 0, 5], [-0.1, 1.1, 0, 6], [0, 0, 1.5, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE), affine)
    turn = turn_to(affine, "LPS")
    ornt = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LPS"))
    expected = image.as_reoriented(ornt)
    turned = turn.apply(np.asanyarray(image.dataobj))
    np.testing.assert_array_equal(turned, np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(turned_affine(affine, SHAPE, turn), expected.affine, atol=1e-10)
    np.testing.assert_array_equal(turn.undo(turned), np.asanyarray(image.dataobj))


@boxes_of_masks
def test_box_is_upstreams(mask: np.ndarray) -> None:
    upstream = nichart.module("MaskImage").calc_bbox_with_padding(mask)
    assert [[side.start, side.stop] for side in padded_box(mask, 10)] == upstream.tolist()


@boxes_of_masks
def test_masked_crop_is_upstreams(mask: np.ndarray, tmp_path: Path) -> None:
    """Stored as float32: into an int16 file upstream's nibabel call rounds the intensities, as tested below."""
    image, _ = image_and_classes()
    paths = save(tmp_path / "t1.nii.gz", image), save(tmp_path / "mask.nii.gz", mask.astype(np.uint8))
    nichart.module("MaskImage").mask_img(*map(str, paths), str(tmp_path / "out.nii.gz"))
    np.testing.assert_array_equal(masked_crop(image, mask, padded_box(mask, 10)), load(tmp_path / "out.nii.gz"))


def test_upstream_rounds_the_intensities_of_integer_scans(tmp_path: Path) -> None:
    """It writes float64 values with the header of the int16 scan, so they are stretched over the type's range."""
    image, mask = (image_and_classes()[0] * 10).astype(np.int16), MASKS["one component"]
    paths = save(tmp_path / "t1.nii.gz", image), save(tmp_path / "mask.nii.gz", mask.astype(np.uint8))
    nichart.module("MaskImage").mask_img(*map(str, paths), str(tmp_path / "out.nii.gz"))
    theirs, ours = load(tmp_path / "out.nii.gz"), masked_crop(image.astype(np.float32), mask, padded_box(mask, 10))
    assert (theirs != ours).any()
    step = (ours.max() - min(ours.min(), 0)) / 65535
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=step)


@boxes_of_masks
def test_labels_are_upstreams(mask: np.ndarray, tmp_path: Path) -> None:
    """Relabelled, pasted, filled: upstream relabels first, which gives the same."""
    _, classes = image_and_classes()
    box = padded_box(mask, 10)
    paths = save(tmp_path / "classes.nii.gz", classes[box]), save(tmp_path / "mask.nii.gz", mask.astype(np.uint8))
    relabelled, combined = str(tmp_path / "relabelled.nii.gz"), str(tmp_path / "combined.nii.gz")
    mapping = str(nichart.table("MUSE_mapping_consecutive_indices.csv"))
    nichart.module("RelabelROI").relabel_rois(str(paths[0]), mapping, "IndexConsecutive", "IndexMUSE", relabelled)
    nichart.module("MaskImage").combine_masks(relabelled, str(paths[1]), combined)

    labels = (*muse_labels(), cortical_csf(152))
    ours = to_indices(fill(paste(classes[box], box, SHAPE), mask, labels, 152), labels)
    np.testing.assert_array_equal(to_indices(classes[box], labels), load(Path(relabelled)))
    np.testing.assert_array_equal(ours, load(Path(combined)))


@pytest.mark.parametrize("codes", CODES)
def test_way_back_is_upstreams(codes: str, tmp_path: Path) -> None:
    _, classes = image_and_classes()
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    scan = nib.Nifti1Image(classes, GRID).as_reoriented(ornt)
    reorient = nichart.module("ReorientImage").reorient_img
    nib.save(scan, tmp_path / "scan.nii.gz")
    reorient(str(tmp_path / "scan.nii.gz"), "LPS", str(tmp_path / "lps.nii.gz"))
    reorient(str(tmp_path / "lps.nii.gz"), str(tmp_path / "scan.nii.gz"), str(tmp_path / "back.nii.gz"))
    turn = turn_to(scan.affine, "LPS")
    turned = turn.apply(np.asanyarray(scan.dataobj))
    np.testing.assert_array_equal(turned, load(tmp_path / "lps.nii.gz"))
    np.testing.assert_array_equal(turn.undo(turned), load(tmp_path / "back.nii.gz"))


def test_upstream_cuts_a_small_mask() -> None:
    """Where the padding is 0, its box ends before the last voxel of the mask; ours holds it."""
    mask = block((10, 14), (10, 14), (10, 14))
    assert nichart.module("MaskImage").calc_bbox_with_padding(mask).tolist() == [[10, 13]] * 3
    assert padded_box(mask, 10) == (slice(10, 14),) * 3


def test_upstream_takes_the_whole_volume_for_an_empty_mask() -> None:
    upstream = nichart.module("MaskImage").calc_bbox_with_padding(np.zeros(SHAPE, bool))
    assert upstream.tolist() == [[0, size] for size in SHAPE]


def test_upstream_wraps_labels_over_255(tmp_path: Path) -> None:
    """It stores every label map as uint8: 702 becomes 190. Ours take the type that holds them."""
    mapping = tmp_path / "map.csv"
    mapping.write_text("IndexMUSE,IndexConsecutive,ROINameMUSE\n0,0,none\n702,1,ICV\n")
    classes = np.array([[[0, 1]]], np.uint8)
    save(tmp_path / "in.nii.gz", classes)
    nichart.module("RelabelROI").relabel_rois(
        str(tmp_path / "in.nii.gz"), str(mapping), "IndexConsecutive", "IndexMUSE", str(tmp_path / "out.nii.gz")
    )
    assert load(tmp_path / "out.nii.gz").ravel().tolist() == [0, 190]
    assert to_indices(classes, [Label(0, 0, "none"), Label(1, 702, "ICV")]).ravel().tolist() == [0, 702]


def test_table_is_upstreams() -> None:
    with nichart.table("MUSE_mapping_consecutive_indices.csv").open() as file:
        mapping = {(int(row["IndexConsecutive"]), int(row["IndexMUSE"])) for row in csv.DictReader(file)}
    with nichart.table("MUSE_mapping_derived_rois.csv").open() as file:
        sums = [(int(row[0]), tuple(map(int, row[2:]))) for row in csv.reader(file) if row]
    assert {(label.number, label.index) for label in muse_labels()} == mapping
    assert [(region.index, region.parts) for region in regions() if region.parts] == sums


def test_table_is_consistent() -> None:
    """Parts exist, a region of the network is its own only part, left and right mirror each other, colours are set."""
    rows = {region.index: region for region in regions()}
    assert len(rows) == len(regions())
    assert [label.number for label in muse_labels()] == list(range(152))
    networks = {region.index for region in regions() if region.number is not None} | {1}
    assert {part for region in regions() for part in region.parts} <= networks
    assert all(region.parts in ((), (region.index,)) for region in regions() if region.index in networks)
    assert all(region.color for region in regions() if region.index in networks)
    names = [region.name for region in regions() if region.index in networks]
    assert len(set(names)) == len(names)
    assert sorted(name[5:] for name in names if name.startswith("Left ")) == sorted(
        name[6:] for name in names if name.startswith("Right ")
    )


def test_sums() -> None:
    voxels = {region.index: 1 for region in regions() if region.number} | {1: 10}
    found = region_voxels(voxels)
    assert found[600] == 10
    assert found[702] == 10 + 146  # without cerebral exterior, vessels, optic chiasm
    assert found[606] + found[613] == found[601] - 3  # the vermis has no side
    assert found[510] + found[518] == 4


def test_which_labels_are_muse() -> None:
    assert is_muse((*muse_labels(), cortical_csf(152)))
    assert not is_muse(muse_labels())
    assert not is_muse((*muse_labels()[:-1], cortical_csf(151)))
