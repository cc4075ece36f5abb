"""The judge: float64 sums are nnU-Net's own steps, and its error bound holds for half precision, not for more."""

import contextlib

import numpy as np
import pytest
from bundles import write_scan

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install '.[dev]'")

from edgemuse.bench.measure.reference import Reference
from edgemuse.bench.measure.scans import labels_of


@pytest.fixture
def scan(tmp_path):
    rng = np.random.default_rng(3)
    return write_scan(tmp_path / "scan.nii.gz", rng.normal(100, 30, (20, 18, 24)).astype(np.float32), (1.0, 1.1, 1.3))


@pytest.mark.parametrize(
    "options",
    [dict(mirror_axes=(0, 2)), dict(folds=("0", "1"), classes=9), dict(transpose=(2, 1, 0), spacing=(1.4, 1.0, 1.1))],
    ids=str,
)
def test_float64_sums_agree_with_double_precision_in_nnunets_own_code(options, scan, model_folder):
    reference = Reference(model_folder(**options), mirroring=True)
    exact, half = reference.exact(scan), reference.labels(scan)
    assert len(np.unique(exact.labels())) > 1
    np.testing.assert_array_equal(exact.labels(), reference.labels(scan, torch.double))
    assert exact.explained(half, exact.labels()) == 1.0


def test_a_wrong_label_is_not_explained_by_half_precision(scan, model_folder):
    exact = Reference(model_folder(), mirroring=False).exact(scan)
    labels = exact.labels()
    assert exact.explained((labels + 1) % 7, labels) < 0.5


@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler about itself
@pytest.mark.parametrize("variant", ["channels-last", "bf16", pytest.param("compile", marks=pytest.mark.slow)])
def test_variants_run_the_same_network(variant, scan, model_folder, tmp_path):
    folder, calls = model_folder(), []

    def timed(name, function):
        return lambda tile: calls.append(name) or function(tile)

    reference = Reference(folder, mirroring=False)
    expected = reference.labels(scan)
    reference.run_as(variant, timed)
    reference.segment(scan, tmp_path / "found.nii.gz", lambda name: contextlib.nullcontext())
    assert set(calls) == {"infer"}
    assert (labels_of(tmp_path / "found.nii.gz") == expected).mean() > (0.9 if variant == "bf16" else 0.999)
