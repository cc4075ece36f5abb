"""Each way to spoil a scan does what its name says, and needs a flag that exists."""

from __future__ import annotations

import ast
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[bench]'")

from edgemuse.bench.measure.spoilt import WAYS
from edgemuse.runtime.results import quality

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture
def head() -> np.ndarray:
    """A bright ball in the air, with a dark core."""
    distance = np.linalg.norm(np.indices((40, 44, 48)) - np.array([20, 22, 24])[:, None, None, None], axis=0)
    return np.select([distance < 8, distance < 16], [400.0, 1000.0], 0).astype(np.float32)


@pytest.mark.parametrize("name", WAYS)
def test_a_copy_differs_and_can_be_saved(name: str, head: np.ndarray, tmp_path: Path) -> None:
    kept = head.copy()
    data, affine = WAYS[name][0](head, AFFINE)
    assert np.array_equal(head, kept)
    assert data.shape != head.shape or not np.array_equal(data, head) or not np.allclose(affine, AFFINE)
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), affine), tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", [name for name in WAYS if name.startswith(("header", "axes"))])
def test_the_header_claims_what_the_name_says(name: str, head: np.ndarray) -> None:
    _, affine = WAYS[name][0](head, AFFINE)
    assert " ".join(nib.aff2axcodes(affine)) == name.partition(": ")[2]


def test_a_tilted_head_lies_where_its_header_says(head: np.ndarray) -> None:
    """Only the voxels are turned: in the scanner's coordinates the head is where it was."""
    head[30:, 20:24, 22:26] = 1000
    data, affine = WAYS["head turned by 40 degrees"][0](head, AFFINE)

    def centre(volume: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
        return nib.affines.apply_affine(to_mm, np.argwhere(volume > 700).mean(axis=0))

    np.testing.assert_allclose(centre(data, affine), centre(head, AFFINE), atol=1)
    assert np.degrees(nib.affines.obliquity(affine)).max() == pytest.approx(40, abs=0.1)


def test_contrast_is_inverted_inside_and_air_stays(head: np.ndarray) -> None:
    data, _ = WAYS["contrast inverted"][0](head, AFFINE)
    assert data[20, 22, 24] > data[20, 22, 36]
    assert data[0, 0, 0] == 0


def test_flags_that_are_wanted_exist() -> None:
    tree = ast.parse(Path(quality.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    flags = {ast.literal_eval(call.args[0]) for call in calls if call.func.id == "Flag"}
    assert {flag for _, wanted in WAYS.values() for flag in wanted} <= flags
