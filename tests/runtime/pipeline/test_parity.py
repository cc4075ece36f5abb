"""The whole path against nnU-Net's own predictor: export a model folder, segment a scan, compare the labels.

`reference` repeats nnU-Net's sums in half precision. The other profiles are held against nnU-Net with float32 sums, so
that what is left is edgemuse's doing.
"""

from pathlib import Path

import numpy as np
import pytest
from bundles import write_scan

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install '.[dev]'")

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.reference import Reference
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.regions.agreement import agreement, mean_dice

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with real scans and a trained model is absent")


def segment(bundle, scan, backend="openvino", profile="reference"):
    with Segmenter(open_bundle(bundle), Options(profile, backend, "fp32", cache_dir=None)) as segmenter:
        return segmenter.segment(scan).classes


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.add.outer(np.sin(np.arange(33) / 5), np.cos(np.arange(25) / 4)), np.sin(np.arange(31) / 3))
    image = (100 * (smooth + 3) + rng.normal(0, 10, smooth.shape)).astype(np.float32)
    image[:4] = image[:, :, 28:] = 0
    return write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", image, (1.0, 1.2, 0.9))


MODELS = [
    dict(),
    dict(network="ResidualEncoderUNet"),
    dict(folds=("0", "1"), classes=12),
    dict(mirror_axes=None),
    dict(mirror_axes=(2,), transpose=(1, 2, 0)),
    dict(spacing=(1.0, 1.0, 4.0)),
    dict(classes=2),
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def small(request, nnunet_models, scan, tmp_path_factory):
    """A bundle of random weights, and what nnU-Net gives for `scan`: as it is, and unmirrored with float32 sums."""
    place = tmp_path_factory.mktemp("small")
    folder = nnunet_models.make_model_folder(place / "model", **request.param)
    bundle = export_model(folder, place / "model.bundle")
    return (
        bundle,
        Reference(folder, mirroring=True).labels(scan),
        Reference(folder, mirroring=False).labels(scan, torch.float),
    )


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_labels_of_small_networks(backend, small, scan):
    """Random weights: logits are nearly tied, so a voxel in a thousand may differ by rounding alone."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    bundle, stock, single = small
    assert len(np.unique(stock)) > 1
    assert agreement(segment(bundle, scan, backend), stock) >= 0.999
    assert agreement(segment(bundle, scan, backend, "balanced"), single) >= 0.999


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained network's bundle, a real scan at its spacing, and what nnU-Net gives for it."""
    place = tmp_path_factory.mktemp("trained")
    upright = scans.reoriented(SHARED / "t1" / "vxm_T1w.nii.gz", place / "upright.nii.gz", "LPS")
    coarse = scans.resampled(upright, place / "coarse.nii.gz", (2, 2, 2))
    bundle = export_model(SHARED / "devmodel", place / "model.bundle", ExportOptions(orientation="LPS"))
    return bundle, coarse, Reference(SHARED / "devmodel", mirroring=False).labels(coarse)


@needs_shared
@pytest.mark.parametrize("stored", ["LPS", "RAS", "PIR"])
def test_labels_of_the_trained_network_on_a_real_scan(stored, trained, tmp_path):
    bundle, coarse, expected = trained
    given = scans.reoriented(coarse, tmp_path / "given.nii.gz", stored)
    scans.save(segment(bundle, given).astype(np.int16), given, tmp_path / "labels.nii.gz")
    back = scans.labels_of(scans.reoriented(tmp_path / "labels.nii.gz", tmp_path / "back.nii.gz", "LPS"))
    assert agreement(back, expected) >= 0.99999
    assert mean_dice(back, expected) >= 0.9999
