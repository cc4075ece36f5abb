"""The mask network that is made for the measurement finds what is bright, whatever its other weights are."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install '.[dev]'")

from edgemuse.bench.measure.reference import Reference
from edgemuse.bench.pages.cascade import hand_on


def test_bright_voxels_are_the_mask(model_folder, tmp_path):
    rng = np.random.default_rng(2)
    inside = np.zeros((20, 18, 24), bool)
    inside[5:14, 4:13, 6:17] = True
    image = np.where(inside, rng.uniform(950, 1050, inside.shape), rng.uniform(1, 30, inside.shape))
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), path)
    folder = model_folder(classes=2, spacing=(1.0, 1.0, 1.0))
    hand_on(folder)
    np.testing.assert_array_equal(Reference(folder, mirroring=False).labels(path) == 1, inside)
