import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from edgemuse.training import sample
from edgemuse.training.labelmaps import INDICES


def test_a_scan_and_its_truth_share_numbers_and_grid(head):
    image, truth = sample.make_scan(head, seed=3, stripped=False)
    assert image.shape == truth.shape
    assert set(np.unique(truth)) <= set(INDICES)
    assert image[truth == 2].mean() > image[truth == 3].mean() > image[truth == 24].mean() > 0


def test_stripped_scans_are_empty_outside(head):
    image, truth = sample.make_scan(head, seed=3, stripped=True)
    assert (image == 0).mean() > (truth == 0).mean() - 0.1
    whole, _ = sample.make_scan(head, seed=3, stripped=False)
    assert (whole > 0).sum() > 1.1 * (image > 0).sum()


def test_the_left_hand_side_is_the_patients_left(head, tmp_path):
    _, truth = sample.make_scan(head, seed=3, stripped=False)
    image = nib.load(sample.save_scan(tmp_path / "truth.nii.gz", truth))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    numbers = np.asanyarray(image.dataobj)
    assert np.argwhere(numbers == 10)[:, 0].mean() < np.argwhere(numbers == 49)[:, 0].mean()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_command_writes_both_files(seed, head, tmp_path):
    nib.save(nib.Nifti1Image(head.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1])), tmp_path / "seg_17.nii.gz")
    ran = CliRunner().invoke(sample.main, [str(tmp_path), "-o", str(tmp_path), "--seed", seed])
    assert ran.exit_code == 0, ran.output
    scan, truth = (nib.load(tmp_path / f"sample_{name}.nii.gz") for name in ("T1w", "dseg"))
    assert scan.shape == truth.shape
