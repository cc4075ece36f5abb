"""What is installed with edgemuse: a model that is free to use, and a sample scan with known truth."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine

from edgemuse.runtime.cli import sample
from edgemuse.runtime.model.builtin import BUILT_IN, SAMPLE_SCAN, SAMPLE_TRUTH
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.results.files import DLMUSE_CSV, NAMES

WRITTEN = tuple(name for name in NAMES if name != DLMUSE_CSV)
LARGEST_BUNDLE = 20_000_000


@pytest.fixture(scope="module")
def built_in() -> Bundle:
    return open_bundle(BUILT_IN)


def test_the_bundle_is_whole_small_and_free(built_in: Bundle) -> None:
    built_in.verify()
    assert BUILT_IN.stat().st_size <= LARGEST_BUNDLE
    assert built_in.manifest.license == "Apache-2.0"
    assert built_in.manifest.network.orientation == "LPS"


def test_the_sample_has_a_truth_in_the_models_numbers(built_in: Bundle) -> None:
    scan, truth = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_TRUTH)
    assert scan.shape == truth.shape
    assert np.array_equal(scan.affine, truth.affine)
    indices = {label.index for label in built_in.manifest.labels}
    assert set(np.unique(np.asanyarray(truth.dataobj))) == indices
    assert {index for structure in sample.SHOWN.values() for index in structure} <= indices


def test_info_without_a_bundle_is_about_the_built_in_model(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ran = CommandLine(capfd, tmp_path)("info")
    assert (ran.code, ran.err) == (0, "")
    assert all(word in ran.out for word in ("edgemuse-t1", "Apache-2.0", "left_hippocampus"))


@pytest.mark.slow
def test_demo(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first command of a new user; its Dice is what the installed model reaches on the sample."""
    ran = CommandLine(capfd, tmp_path)("demo", "-o", tmp_path / "demo")
    assert ran.code == 0
    assert ran.out.splitlines() == [f"{tmp_path}/demo/sample_{name}" for name in WRITTEN]
    rows = [line.split() for line in ran.err.splitlines()]
    mean = next(float(row[-1]) for row in rows if row[:1] == ["mean"])
    found = nib.load(tmp_path / "demo" / "sample_dseg.nii.gz").get_fdata()
    truth = nib.load(SAMPLE_TRUTH).get_fdata()
    scores = [
        2 * ((found == n) & (truth == n)).sum() / ((found == n).sum() + (truth == n).sum())
        for n in np.unique(truth)[1:]
    ]
    assert mean == pytest.approx(np.mean(scores), abs=0.006)
    assert mean > 0.5


def test_every_backend_computes_it_rightly_here(cli: CommandLine) -> None:
    ran = cli("devices", "--check")
    assert ran.code == 0, ran.out
    assert ran.out.count("passed") >= 2
    assert "not checked" not in ran.out
