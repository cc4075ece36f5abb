"""The whole path against nnU-Net's own predictor: export a model folder, segment a scan, compare the labels.

nnU-Net adds its tiles up in half precision; its sums are set to float32 here, so that what is left is edgemuse's doing.
"""

from pathlib import Path

import numpy as np
import pytest
from bundles import write_scan

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'edgemuse[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install 'edgemuse[dev]'")

from edgemuse.bench import scans
from edgemuse.bench.reference import Reference
from edgemuse.engines.protocol import EngineOptions
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.runtime.agreement import agreement, mean_dice
from edgemuse.runtime.bundle import open_bundle
from edgemuse.runtime.pipeline import Options, Segmenter

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with real scans and a trained model is absent")


def segment(folder, scan, tmp_path, backend="openvino", orientation=None):
    bundle = export_model(folder, tmp_path / "model.bundle", ExportOptions(orientation=orientation))
    with Segmenter(open_bundle(bundle), Options("reference", EngineOptions(backend, "fp32"))) as segmenter:
        return segmenter.segment(scan).classes


@pytest.fixture
def scan(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.add.outer(np.sin(np.arange(41) / 5), np.cos(np.arange(37) / 4)), np.sin(np.arange(33) / 3))
    image = (100 * (smooth + 3) + rng.normal(0, 10, smooth.shape)).astype(np.float32)
    image[:4] = image[:, :, 30:] = 0
    return write_scan(tmp_path / "scan.nii.gz", image, (1.0, 1.2, 0.9))


MODELS = [
    dict(),
    dict(network="ResidualEncoderUNet"),
    dict(folds=("0", "1"), classes=12),
    dict(mirror_axes=(0, 1, 2)),
    dict(mirror_axes=(2,), transpose=(1, 2, 0)),
    dict(spacing=(1.0, 1.0, 4.0)),
    dict(classes=2),
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_labels_of_small_networks(options, backend, scan, model_folder, tmp_path):
    """Random weights: logits are nearly tied, so a voxel in a thousand may differ by rounding alone."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    folder = model_folder(**options)
    expected = Reference(folder, mirroring=True).labels(scan, torch.float)
    labels = segment(folder, scan, tmp_path, backend)
    assert len(np.unique(expected)) > 1
    assert agreement(labels, expected) >= 0.999


@needs_shared
@pytest.mark.parametrize("stored", ["LPS", "RAS", "PIR"])
def test_labels_of_the_trained_network_on_a_real_scan(stored, tmp_path):
    upright = scans.reoriented(SHARED / "t1" / "vxm_T1w.nii.gz", tmp_path / "upright.nii.gz", "LPS")
    coarse = scans.resampled(upright, tmp_path / "coarse.nii.gz", (2, 2, 2))
    given = scans.reoriented(coarse, tmp_path / "given.nii.gz", stored)
    expected = Reference(SHARED / "devmodel", mirroring=False).labels(coarse, torch.float)
    labels = segment(SHARED / "devmodel", given, tmp_path, orientation="LPS")
    scans.save(labels.astype(np.int16), given, tmp_path / "labels.nii.gz")
    back = scans.labels_of(scans.reoriented(tmp_path / "labels.nii.gz", tmp_path / "back.nii.gz", "LPS"))
    assert agreement(back, expected) >= 0.9999
    assert mean_dice(back, expected) >= 0.9999
