"""Verification accepts what is right, and notices every kind of wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference of verification is PyTorch")
onnx = pytest.importorskip("onnx", reason="graphs need onnx")

from edgemuse.engines.errors import InputError, VerificationError
from edgemuse.export.architecture import load_network
from edgemuse.export.checkpoint import read_checkpoints
from edgemuse.export.phantoms import synthetic_patches
from edgemuse.export.plans import read_plan
from edgemuse.export.verify import (
    TOLERANCE,
    compare,
    crop_patches,
    reference,
    scan_patches,
    small_shape,
    verify,
)
from edgemuse.runtime.model.bundle import Head


def quiet(_: str) -> None:
    pass


@pytest.fixture
def networks(exported: Any) -> list[Any]:
    architecture = read_plan(exported.folder, "3d_fullres").architecture
    checkpoints = read_checkpoints(exported.folder, exported.options.folds, "checkpoint_final.pth")
    return [load_network(architecture, found) for found in checkpoints]


@pytest.fixture
def patch(exported: Any) -> Any:
    return next(synthetic_patches(exported.options.patch, 1, seed=1))


def changed(raw: bytes, change: Callable[[Any], None]) -> bytes:
    model = onnx.load_model_from_string(raw)
    change(model.graph)
    data: bytes = model.SerializeToString()
    return data


def change_a_weight(graph: Any) -> None:
    """One number of one kernel; a factor on the whole kernel would be undone by the normalisation after it."""
    weight = next(w for w in graph.initializer if len(w.dims) == 5)
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[0] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def change_a_slope(graph: Any) -> None:
    node = next(node for node in graph.node if node.op_type == "LeakyRelu")
    node.attribute[0].f = 0.011


def test_reference_is_the_mean_of_whole_networks(networks: list[Any], patch: Any) -> None:
    found = reference(networks, patch)
    with torch.inference_mode():
        expected = torch.stack([network(torch.from_numpy(patch)) for network in networks]).mean(0).numpy()
    np.testing.assert_allclose(found.logits, expected, atol=1e-6)
    assert found.features.shape[1] == 4 * len(networks)


@pytest.mark.parametrize("change", [change_a_weight, change_a_slope])
def test_wrong_graph(exported: Any, networks: list[Any], patch: Any, change: Callable[[Any], None]) -> None:
    wrong = changed(exported.bundle.graph("fp32"), change)
    with pytest.raises(VerificationError, match="in the graph's output"):
        verify(networks, wrong, exported.bundle.head(), [patch], quiet)


def test_wrong_head(exported: Any, networks: list[Any], patch: Any) -> None:
    head = exported.bundle.head()
    if head is None:
        pytest.skip("this model's head is not deferred")
    for wrong in (
        Head(head.weight[:, ::-1].copy(), head.bias),
        Head(head.weight, head.bias + np.float32(0.1)),
    ):
        with pytest.raises(VerificationError, match="in the logits"):
            verify(networks, exported.bundle.graph("fp32"), wrong, [patch], quiet)


def test_graph_of_another_fold(exported: Any, networks: list[Any], patch: Any) -> None:
    if len(networks) == 1:
        pytest.skip("this model has one fold")
    with pytest.raises(VerificationError):
        verify(networks[::-1][:1] * 2, exported.bundle.graph("fp32"), exported.bundle.head(), [patch], quiet)


class Replay:
    """An engine that returns what it is given."""

    backend, version, device, precision = "replay", "1", "CPU", "fp32"

    def __init__(self, output: Any) -> None:
        self.output = output

    def infer(self, batch: Any) -> Any:
        return self.output

    def close(self) -> None:
        pass


def test_labels_may_differ_only_at_ties(networks: list[Any], patch: Any) -> None:
    ref = reference(networks, patch)
    flat = ref.logits.reshape(ref.logits.shape[1], -1)
    second, best = np.argsort(flat, axis=0)[-2:]
    voxels = np.arange(flat.shape[1])
    # Everywhere the second best logit is lifted just above the best: a tie where they were close, wrong elsewhere.
    lifted = flat.copy()
    lifted[second, voxels] = flat[best, voxels] + 1e-6
    found = compare(Replay(lifted.reshape(ref.logits.shape)), None, ref)
    margins = flat[best, voxels] - flat[second, voxels]
    allowed = 2 * TOLERANCE * flat.std()
    assert found.different == flat.shape[1]
    assert found.unexplained == (margins > allowed).sum() > 0
    ties = margins <= allowed / 4
    nearly = np.where(ties, lifted, flat).reshape(ref.logits.shape)
    found = compare(Replay(nearly), None, ref)
    assert (found.different, found.unexplained) == (ties.sum(), 0)
    assert found.logit_error <= found.logit_tolerance


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_never_passes(networks: list[Any], patch: Any, bad: float, monkeypatch: Any) -> None:
    ref = reference(networks, patch)
    output = ref.logits.copy()
    output[0, 0, 0, 0, 0] = bad
    monkeypatch.setattr("edgemuse.export.verify.open_engine", lambda *_: Replay(output))
    with np.errstate(invalid="ignore"), pytest.raises(VerificationError):
        verify(networks, b"", None, [patch], quiet)


def test_small_shape_is_never_the_patch(exported: Any) -> None:
    network = exported.bundle.manifest.network
    d, h, w = network.stride
    assert small_shape(network) == (3 * d, 2 * h, 2 * w)
    other = small_shape(replace(network, patch=(3 * d, 2 * h, 2 * w)))
    assert other == (3 * d, 2 * h, 3 * w)


def test_wrong_shape(networks: list[Any], patch: Any) -> None:
    ref = reference(networks, patch)
    with pytest.raises(VerificationError, match="the graph returns"):
        compare(Replay(ref.logits[:, :, 1:]), None, ref)


def test_synthetic_patches_differ_and_are_normalised() -> None:
    first, second = synthetic_patches((8, 10, 12), 2, seed=5)
    again = next(synthetic_patches((8, 10, 12), 1, seed=5))
    assert first.shape == (1, 1, 8, 10, 12)
    assert first.dtype == np.float32
    assert first.mean() == pytest.approx(0, abs=1e-5)
    assert first.std() == pytest.approx(1, abs=1e-5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 9, 10), (3, 20, 8), (30, 31, 32)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_crops_have_the_patchs_shape_and_lie_inside(shape: tuple[int, int, int], count: int) -> None:
    volume = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)
    crops = list(crop_patches(volume, (8, 8, 8), count))
    assert [crop.shape for crop in crops] == [(1, 1, 8, 8, 8)] * count
    inside = np.prod([min(side, 8) for side in shape])
    assert all(np.count_nonzero(crop) == inside for crop in crops)
    assert all(crop.flags.c_contiguous for crop in crops)


def test_scan_patches_are_what_the_network_sees(exported: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.normal(100, 20, (30, 28, 26)).astype(np.float32), np.eye(4))
    nib.save(image, tmp_path / "scan.nii.gz")
    network = replace(exported.bundle.manifest.network, spacing=(1.0, 1.0, 1.0))
    crops = list(scan_patches(tmp_path / "scan.nii.gz", network))
    assert crops
    assert all(crop.shape == (1, 1, *network.patch) for crop in crops)
    if network.normalization.scheme == "zscore":
        assert all(abs(crop.mean()) < 0.5 and 0.5 < crop.std() < 1.5 for crop in crops)
    with pytest.raises(InputError):
        list(scan_patches(tmp_path / "missing.nii.gz", network))
