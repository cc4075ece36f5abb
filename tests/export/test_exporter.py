"""From model folder to bundle: what the bundle says, and that failures leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exporting needs PyTorch")
pytest.importorskip("onnx", reason="exporting needs onnx")

from edgemuse.engines.errors import (
    MemoryLimitError,
    ModelFolderError,
    OutputError,
    VerificationError,
)
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import open_engine
from edgemuse.export import exporter, verify, writer
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.selftest import measure, read_selftest, ways

Make = Callable[..., Path]


def test_the_bundle_describes_the_model(exported: Any) -> None:
    options, manifest = exported.options, exported.bundle.manifest
    network = manifest.network
    total = tuple(math.prod(axis) for axis in zip(*options.strides, strict=True))
    assert (network.patch, network.stride, network.spacing) == (options.patch, total, options.spacing)
    assert network.transpose == options.transpose
    assert network.mirror_axes == (() if options.mirror_axes == "absent" else options.mirror_axes)
    assert network.orientation == ("RAS" if "Reorient" in options.reader else None)
    assert network.normalization.scheme == ("ct" if "CT" in options.normalization else "zscore")
    assert network.deferred_head == (4 * len(options.folds) < options.classes)
    assert [label.name for label in manifest.labels][:2] == ["background", "region 1"]
    assert len(manifest.labels) == network.classes == options.classes
    assert 4 * 4 < network.activation_bytes < 4 * 100


def test_the_bundle_records_where_it_came_from(exported: Any) -> None:
    source = exported.bundle.manifest.source
    assert source["dataset_name"] == exported.bundle.manifest.name == "Dataset999_Tiny"
    assert source["folds"] == list(exported.options.folds)
    for fold in exported.options.folds:
        raw = (exported.folder / f"fold_{fold}" / "checkpoint_final.pth").read_bytes()
        assert source["checkpoint_sha256"][fold] == hashlib.sha256(raw).hexdigest()
    assert source["trainer"] == "nnUNetTrainer"
    assert source["versions"]["torch"] == torch.__version__
    assert str(exported.folder) not in json.dumps([dict(source), dict(exported.bundle.manifest.verification)])


def test_verification_is_recorded_for_every_backend(exported: Any) -> None:
    engines = exported.bundle.manifest.verification["engines"]
    assert [engine["backend"] for engine in engines] == verify.backends()
    for engine in engines:
        assert engine["patches"] == 4
        assert 0 < engine["max_abs_error"] <= engine["tolerance"]
        assert engine["label_agreement"] > 0.999


def test_the_bundle_gives_the_mean_of_nnunets_logits_at_any_size(exported: Any, nnunet_models: Any) -> None:
    options, network = exported.options, exported.bundle.manifest.network
    image = np.random.default_rng(0).normal(size=(1, 1, 16, 20, 24)).astype(np.float32)
    engine = open_engine(exported.bundle.graph("fp32"), image.shape, EngineOptions("openvino"))
    output = engine.infer(image)
    assert output.shape == (1, network.channels_out, 16, 20, 24)
    head = exported.bundle.head()
    if head is not None:
        output = np.einsum("cf,nfdhw->ncdhw", head.weight, output) + head.bias[:, None, None, None]
    with torch.inference_mode():
        folds = [nnunet_models.build(options, seed).eval() for seed in range(len(options.folds))]
        expected = torch.stack([fold(torch.from_numpy(image))[0] for fold in folds]).mean(0).numpy()
    np.testing.assert_allclose(output, expected, atol=1e-4 * expected.std())
    engine.close()


def test_a_tile_is_stored_with_what_pytorch_makes_of_it(exported: Any, nnunet_models: Any) -> None:
    options, network = exported.options, exported.bundle.manifest.network
    stored = read_selftest(exported.bundle)
    assert stored is not None
    assert all(
        0 < side <= patch and side % stride == 0
        for side, patch, stride in zip(stored.tile.shape[2:], network.patch, network.stride, strict=True)
    )
    with torch.inference_mode():
        folds = [nnunet_models.build(options, seed).eval() for seed in range(len(options.folds))]
        expected = torch.stack([fold(torch.from_numpy(stored.tile))[0] for fold in folds]).mean(0)[0].flatten(1).numpy()
    head, features = exported.bundle.head(), stored.features["fp32"]
    logits = features if head is None else head.weight @ features + head.bias[:, None]
    np.testing.assert_allclose(logits, expected[:, stored.places], atol=1e-4 * expected.std())
    for way in ways(exported.bundle, EngineOptions()):
        found = measure(exported.bundle, way)
        assert found is not None
        assert found.passed, (way, found)


def test_directory_or_zip(exported: Any) -> None:
    path, names = exported.bundle.path, {"bundle.json", *exported.bundle.manifest.files}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert set(archive.namelist()) == names
            assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    else:
        assert {file.name for file in path.iterdir()} == names
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


def test_chosen_options_reach_the_bundle(model_folder: Make, tmp_path: Path) -> None:
    folder = model_folder(folds=("0", "1", "all"), classes=2, checkpoint="checkpoint_best.pth", reader="NibabelIO")
    table = tmp_path / "labels.csv"
    table.write_text("class,index,name\n0,0,Outside\n1,42,Inside\n")
    lines: list[str] = []
    options = ExportOptions(
        folds=("1",), checkpoint="checkpoint_best.pth", orientation="LPS", labels=table, name="Tiny",
        license="CC0-1.0", progress=lines.append,
    )  # fmt: skip
    manifest = open_bundle(export_model(folder, tmp_path / "bundle", options)).manifest
    assert (manifest.name, manifest.license, manifest.network.orientation) == ("Tiny", "CC0-1.0", "LPS")
    assert [(label.index, label.name) for label in manifest.labels] == [(0, "Outside"), (42, "Inside")]
    assert manifest.source["folds"] == ["1"]
    assert not manifest.network.deferred_head
    assert len(lines) >= 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"orientation": "LPX"}, "three axis codes"),
        ({"folds": ("../../etc",)}, "neither a number"),
        ({"folds": ("5",)}, "no such checkpoint"),
        ({"checkpoint": "../fold_0/checkpoint_final.pth"}, "must be a file name"),
        ({"configuration": "2d"}, "is 2D"),
        ({"labels": Path("missing.csv")}, "cannot be read"),
    ],
)
def test_options_that_cannot_be(model_folder: Make, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    folder = model_folder()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelFolderError, match=reason):
        export_model(folder, tmp_path / "bundle", ExportOptions(**options))
    assert sorted(tmp_path.iterdir()) == before


def test_region_labels_are_refused(model_folder: Make, tmp_path: Path) -> None:
    folder = model_folder()
    data = json.loads((folder / "dataset.json").read_text())
    data |= {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3]}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(data))
    with pytest.raises(ModelFolderError, match="overlapping regions"):
        export_model(folder, tmp_path / "bundle")


def _traced(monkeypatch: pytest.MonkeyPatch, exported: Any) -> None:
    """Skip the slow tracing: the graph of the same model was made before."""
    monkeypatch.setattr(exporter, "export_graph", lambda *_: exported.bundle.graph("fp32"))


@pytest.mark.parametrize("output", ["bundle", "bundle.zip"])
def test_failed_verification_leaves_nothing(
    exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str
) -> None:
    _traced(monkeypatch, exported)
    monkeypatch.setattr(verify, "TOLERANCE", 1e-9)
    with pytest.raises(VerificationError, match="no bundle was written"):
        export_model(exported.folder, tmp_path / output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["bundle", "bundle.zip"])
def test_failed_writing_leaves_nothing(
    exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr("edgemuse.export.writer.place_new", full)
    with pytest.raises(OutputError, match="No space left"):
        writer.write_bundle(tmp_path / output, exported.bundle.manifest, _files(exported))
    assert list(tmp_path.iterdir()) == []


def _files(exported: Any) -> dict[str, bytes]:
    return {name: exported.bundle.read(name) for name in exported.bundle.manifest.files}


@pytest.mark.parametrize("output", ["bundle", "bundle.zip"])
def test_same_content_same_bytes(exported: Any, tmp_path: Path, output: str) -> None:
    first, second = (
        writer.write_bundle(tmp_path / f"{name}-{output}", exported.bundle.manifest, _files(exported)) for name in "ab"
    )
    files = ["."] if first.is_file() else sorted(file.name for file in first.iterdir())
    assert files
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    again = exporter.head_bytes(exported.bundle.head()) if exported.bundle.head() else None
    assert again is None or again == exported.bundle.read("head.npz")


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(model_folder: Make, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("precious")
    elif kind == "folder":
        output.mkdir()
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="already exists; remove it or choose another name"):
        export_model(model_folder(), output)
    assert output.is_symlink() if kind == "link" else output.exists()


def test_missing_parent(model_folder: Make, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder; make it first"):
        export_model(model_folder(), tmp_path / "nowhere" / "bundle")


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such file"):
        export_model(tmp_path, tmp_path / "bundle")


def test_patch_beyond_memory(exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _traced(monkeypatch, exported)
    monkeypatch.setattr(exporter, "available_memory", lambda: 1000)
    with pytest.raises(MemoryLimitError, match="more memory"):
        export_model(exported.folder, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
