"""Orientation: every way a scan can be stored leads to the same network input and back to its own grid."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.runtime.scan.geometry import in_memory_order, orientation, reorientation

CODES = [
    "".join(c)
    for axes in itertools.permutations([("R", "L"), ("A", "P"), ("S", "I")])
    for c in itertools.product(*axes)
]


def stored_as(codes, shape=(4, 5, 6)):
    """A volume whose voxels hold their own world position, stored with axes `codes`."""
    base = nib.Nifti1Image(np.arange(np.prod(shape)).reshape(shape).astype(np.int32), np.diag([1.0, 2.0, 3.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(base.affine), nib.orientations.axcodes2ornt(tuple(codes)))
    return base.as_reoriented(turn)


@pytest.mark.parametrize("codes", CODES)
def test_all_48_orientations_give_the_same_network_input(codes):
    scan = stored_as(codes)
    assert orientation(scan.affine) == codes
    expected = np.asarray(stored_as("LPS").dataobj).T
    turn = reorientation(scan.affine, "LPS", (0, 1, 2))
    np.testing.assert_array_equal(turn.apply(np.asarray(scan.dataobj)), expected)
    assert turn.spacing(nib.affines.voxel_sizes(scan.affine)) == pytest.approx((3, 2, 1))


@given(st.sampled_from(CODES), st.sampled_from([None, *CODES]), st.permutations([0, 1, 2]))
def test_undo_is_the_inverse_of_apply(stored, wanted, transpose):
    scan = np.asarray(stored_as(stored).dataobj)
    turn = reorientation(stored_as(stored).affine, wanted, tuple(transpose))
    np.testing.assert_array_equal(turn.undo(turn.apply(scan)), scan)


@pytest.mark.parametrize("transpose", list(itertools.permutations([0, 1, 2])))
def test_without_a_target_voxels_are_reversed_and_transposed_as_nnunet_does(transpose):
    scan = stored_as("PIR")
    turn = reorientation(scan.affine, None, transpose)
    data = np.asarray(scan.dataobj)
    np.testing.assert_array_equal(turn.apply(data), data.T.transpose(transpose))
    zooms = nib.affines.voxel_sizes(scan.affine)
    assert turn.spacing(zooms) == pytest.approx(tuple(zooms[::-1][axis] for axis in transpose))


def test_an_oblique_grid_counts_as_its_nearest_axes():
    turn = nib.eulerangles.euler2mat(np.deg2rad(25), 0, np.deg2rad(10))
    affine = np.array(stored_as("PIR").affine)
    affine[:3, :3] = turn @ affine[:3, :3]
    assert reorientation(affine, "LPS", (0, 1, 2)) == reorientation(stored_as("PIR").affine, "LPS", (0, 1, 2))


@given(st.permutations(range(3)), st.tuples(*[st.sampled_from((-1, 1))] * 3))
def test_in_memory_order_the_last_axis_lies_together(order, steps):
    stored = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    volume = stored.transpose(order)[tuple(slice(None, None, step) for step in steps)]
    turned, other = in_memory_order(volume, volume * 2)
    assert [abs(stride) for stride in turned.strides] == list(stored.strides)
    np.testing.assert_array_equal(other, turned * 2)
    assert sorted(turned.ravel()) == list(stored.ravel())
