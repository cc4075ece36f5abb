"""`edgemuse calibrate` from a bundle to a gated one; what goes wrong costs one line and no file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CommandLine, head_image, replace_graph, snapshot, tiny_bundle, write_scan, zip_bundle
from unets import unet

pytest.importorskip("nncf", reason="NNCF is not installed: pip install '.[calibrate]'")

from edgemuse.calibration import calibrate as module
from edgemuse.calibration import evaluate
from edgemuse.calibration.graphs import graph_bytes
from edgemuse.calibration.scans import find_scans
from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import statuses
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.selftest import SELFTEST, measure, read_selftest, ways
from edgemuse.runtime.scan.nifti import file_sha256

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        write_scan(folder / f"sub-{number}_T1w.nii.gz", head_image(seed=number))
    return folder


def bundle_at(path: Path, **changes: Any) -> Path:
    return replace_graph(tiny_bundle(path, stride=(2, 2, 2), **changes), graph_bytes(unet()))


@pytest.fixture(scope="module")
def calibrated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A bundle that was calibrated, and what was said on the way."""
    folder = tmp_path_factory.mktemp("calibrated")
    heard: list[str] = []
    source = bundle_at(folder / "tiny.bundle", mirror_axes=(0,))
    return module.calibrate(source, data, folder / "new.bundle", heard.append), heard


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(capfd, tmp_path_factory.mktemp("cache"))


def test_source_is_left_alone_and_kept_whole(calibrated: tuple[Path, list[str]]) -> None:
    old, new = open_bundle(calibrated[0].with_name("tiny.bundle")), open_bundle(calibrated[0])
    new.verify()
    assert set(old.manifest.graphs) == {"fp32"}
    assert set(new.manifest.graphs) == {"fp32", "int8", "fp16"}
    assert all(new.read(name) == old.read(name) for name in old.manifest.files)
    added = {"graphs", "files", "gate", "calibration"}
    assert {k: v for k, v in vars(new.manifest).items() if k not in added} == {
        k: v for k, v in vars(old.manifest).items() if k not in added
    }
    assert {path.name for path in calibrated[0].parent.iterdir()} == {"tiny.bundle", "new.bundle"}


def test_a_tile_is_stored_with_what_each_graph_must_make_of_it(calibrated: tuple[Path, list[str]]) -> None:
    old, new = open_bundle(calibrated[0].with_name("tiny.bundle")), open_bundle(calibrated[0])
    assert SELFTEST not in old.manifest.files
    stored = read_selftest(new)
    assert stored is not None
    assert stored.features.keys() == {"fp32", "int8"}
    found = {(way.backend, way.precision): measure(new, way) for way in ways(new, EngineOptions())}
    assert {precision for _, precision in found} >= {"fp32", "int8", "fp16"}
    assert all(verdict is not None and verdict.passed for verdict in found.values()), found


def test_scans_are_recorded_and_disjoint(calibrated: tuple[Path, list[str]], data: Path) -> None:
    record = open_bundle(calibrated[0]).manifest.calibration
    names = [[scan["name"] for scan in record[key]] for key in ("calibrated_on", "evaluated_on")]
    assert names == [["sub-0_T1w.nii.gz"], ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]]
    for scan in (*record["calibrated_on"], *record["evaluated_on"]):
        assert scan["sha256"] == file_sha256(data / scan["name"])


def test_everything_that_runs_here_was_measured(calibrated: tuple[Path, list[str]]) -> None:
    bundle = open_bundle(calibrated[0])
    found = {(row.backend, row.device, row.precision, row.profile) for row in bundle.manifest.gate}
    assert len(found) == len(bundle.manifest.gate)
    expected = {
        (status.backend.name, device, precision, profile)
        for status in statuses()
        for device, precisions in status.devices.items()
        for precision in precisions
        for profile in evaluate.PROFILES
        if precision == "fp32" or profile != "reference"
    }
    assert found == expected
    for row in bundle.manifest.gate:
        assert row.scans == 2
        assert row.agreement is not None
        # Random weights on noise leave logits nearly tied, so that nothing but the reference itself need pass.
        assert row.passed or (row.precision, row.profile) != ("fp32", "reference")
        assert row.agreement < 1 or (row.precision, row.profile) == ("fp32", "reference")


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_segmenting_uses_the_new_graph(
    precision: str, calibrated: tuple[Path, list[str]], data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    arguments = ["-m", calibrated[0], "--profile", "balanced", "--backend", "onnxruntime", "--precision", precision]
    ran = cli("segment", data / "sub-1_T1w.nii.gz", "-o", tmp_path, *arguments)
    assert ran.code == 0, ran.err
    backend = json.loads((tmp_path / "sub-1_provenance.json").read_text())["backend"]
    row = next(
        row
        for row in open_bundle(calibrated[0]).manifest.gate
        if (row.backend, row.precision, row.profile) == ("onnxruntime", precision, "balanced")
    )
    assert backend["precision"] == precision
    assert backend["gate"].split(":")[0] == ("passed" if row.passed else "failed")
    assert bool(ran.err) != row.passed


@pytest.mark.usefixtures("only_fp32")
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_in_place(zipped: bool, data: Path, cli: CommandLine, tmp_path: Path) -> None:
    path = bundle_at(tmp_path / "tiny.bundle")
    if zipped:
        path = zip_bundle(path, tmp_path / "zipped.bundle")  # a zip by its content, not by its name
    before = {entry.name for entry in tmp_path.iterdir()}
    ran = cli("calibrate", path, "--data", data)
    assert (ran.code, ran.out) == (0, f"{path}\n"), ran.err
    assert {entry.name for entry in tmp_path.iterdir()} == before
    assert path.is_file() == zipped
    bundle = open_bundle(path)
    bundle.verify()
    assert set(bundle.manifest.graphs) == {"fp32", "int8", "fp16"}
    assert "accuracy gate\n" in cli("info", path).out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "--data", "DATA"], "no such bundle"),
        (["tiny.bundle", "--data", "nowhere"], "no such folder"),
        (["tiny.bundle", "--data", "."], "no scans found, at least 2 are needed"),
        (["tiny.bundle", "--data", "DATA", "-o", "there"], "already exists"),
        (["tiny.bundle", "--data", "DATA", "-o", "no/folder"], "no such folder"),
        (["mixed.bundle", "--data", "DATA"], "replacing it would delete notes.txt"),
        (["tiny.bundle"], "Missing option '--data'"),
    ],
)
def test_refusals_change_nothing(
    arguments: list[str], reason: str, data: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_at(tmp_path / "tiny.bundle")
    (bundle_at(tmp_path / "mixed.bundle") / "notes.txt").write_text("mine")
    (tmp_path / "there").mkdir()
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = cli("calibrate", *(str(data) if argument == "DATA" else argument for argument in arguments))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert reason in ran.err
    assert snapshot(tmp_path) == before


def test_failure_on_the_way_leaves_the_bundle_as_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_at(tmp_path / "tiny.bundle")
    before = snapshot(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgemuse.export.writer._write_folder", fail)
    with pytest.raises(Exception, match="No space left on device"):
        module.calibrate(path, data, path, lambda _: None)
    assert snapshot(tmp_path) == before


def test_missing_extra_names_the_pip_command(
    data: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("calibrate", "quantise"):
        monkeypatch.delitem(sys.modules, f"edgemuse.calibration.{name}", raising=False)
        monkeypatch.delattr(f"edgemuse.calibration.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "nncf", None)
    ran = cli("calibrate", bundle_at(tmp_path / "tiny.bundle"), "--data", data)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert 'calibrating needs nncf, which is missing here or does not load; run: pip install ".[calibrate]"' in (
        ran.err
    )


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Makes int8 fail its first so many evaluations; returns the list of settings evaluated."""

    def make(fail: int) -> list[str]:
        seen: list[str] = []
        real = module.evaluate

        def judge(bundle: Any, setting: Any, expected: Any, progress: Any) -> Any:
            row = real(bundle, setting, expected, progress)
            seen.append(str(setting))
            failures = ("planted",) if setting.precision == "int8" and len(seen) <= fail else ()
            return replace(row, failures=failures)

        monkeypatch.setattr(module, "evaluate", judge)
        return seen

    return make


@pytest.mark.parametrize(("fail", "left_out"), [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_layers_that_cost_most_are_left_out_until_it_passes(
    fail: int, left_out: int, judged: Callable[[int], list[str]], data: Path, tmp_path: Path
) -> None:
    seen = judged(fail)
    heard: list[str] = []
    bundle = open_bundle(module.calibrate(bundle_at(tmp_path / "tiny"), data, tmp_path / "new", heard.append))
    record = bundle.manifest.calibration["int8"]
    assert record["convolutions"] == 4
    assert (record["left_in_fp32"] == "none") == (left_out == 0)
    if left_out:
        assert len(record["left_in_fp32"]) == left_out
    graph = module.quantise.__globals__["read_graph"](bundle.graph("int8"))
    made = {name: node.op_type for node in graph.graph.node for name in node.output}
    in_int8 = [n.name for n in graph.graph.node if n.op_type == "Conv" and made.get(n.input[0]) == "DequantizeLinear"]
    assert len(in_int8) == 4 - left_out
    assert seen.count(seen[0]) == min(fail, module.ATTEMPTS) + 1
    row = next(row for row in bundle.manifest.gate if row.precision == "int8")
    assert row.passed == (fail <= module.ATTEMPTS)


def test_a_backend_that_fails_is_a_row_that_failed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the features is reported so by the pipeline."""
    real = evaluate._segment

    def segment(bundle: Any, setting: Any, *rest: Any) -> Any:
        if (setting.backend, setting.precision) == ("onnxruntime", "int8"):
            raise BackendError("the network returned NaN\nor infinity\0")
        return real(bundle, setting, *rest)

    monkeypatch.setattr(evaluate, "_segment", segment)
    bundle = open_bundle(module.calibrate(bundle_at(tmp_path / "tiny"), data, tmp_path / "new", lambda _: None))
    rows = [row for row in bundle.manifest.gate if (row.backend, row.precision) == ("onnxruntime", "int8")]
    assert rows
    for row in rows:
        wanted = (None, None, (r"the network returned NaN or infinity\x00",))
        assert (row.agreement, row.seconds, row.failures) == wanted


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with real scans and a trained model is absent")
def test_trained_model_passes_in_int8_and_fp16(tmp_path: Path) -> None:
    """On real scans, one of them with truth; calibrated on another."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
    from edgemuse.export.exporter import ExportOptions, export_model

    options = ExportOptions(orientation="LPS", labels=SHARED / "devmodel" / "labels.tsv")
    source = export_model(SHARED / "devmodel", tmp_path / "dev.bundle", options)
    bundle = open_bundle(module.calibrate(source, SHARED / "t1", tmp_path / "calibrated.zip", lambda _: None))
    assert len(find_scans(SHARED / "t1")) == 3
    rows = {(row.backend, row.precision): row for row in bundle.manifest.gate if row.profile == "balanced"}
    assert {("openvino", "int8"), ("openvino", "fp32")} <= rows.keys()
    assert all(row.passed for row in rows.values()), rows
    assert bundle.manifest.calibration["int8"]["left_in_fp32"] == "none"
    reference = next(row for row in bundle.manifest.gate if (row.backend, row.profile) == ("openvino", "reference"))
    np.testing.assert_allclose([row.reference_dice for row in rows.values()], reference.dice)
