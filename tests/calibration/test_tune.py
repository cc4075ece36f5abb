"""Tuning remembers the fastest engine that passed, and `segment` takes it where it may choose."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
from bundles import (
    CommandLine,
    edit_manifest,
    gate_row,
    replace_file,
    tiny_bundle,
    tiny_cascade,
    tiny_graph,
    write_scan,
)

from edgemuse.calibration import tune
from edgemuse.engines.cache import cache_key
from edgemuse.engines.errors import BackendError
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.cascade import Cascade, open_model
from edgemuse.runtime.model.precision import choose_engine
from edgemuse.runtime.model.tuned import Timing, Tuned, keep, outdated, recall, timed, tuned_path
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.scan.nifti import open_scan

pytest.importorskip("onnxruntime", reason="two backends are needed: pip install '.[onnxruntime]'")

AUTO = EngineOptions(precision="auto")
PASSED = ("openvino", "int8", "fast"), ("onnxruntime", "int8", "fast"), ("onnxruntime", "fp32", "fast")
SECONDS = {("openvino", "fp32"): 4.0, ("openvino", "int8"): 3.0, ("onnxruntime", "fp32"): 2.0}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """int8 passed with both backends for the profile `fast`, and failed with ONNX Runtime for `balanced`."""
    folder = replace_file(tiny_bundle(tmp_path / "tiny.bundle"), "int8.onnx", tiny_graph())
    rows = [gate_row(backend=backend, precision=of, profile=profile) for backend, of, profile in PASSED]
    rows.append(gate_row(backend="onnxruntime", profile="balanced", failures=("too far",)))
    graphs = {"fp32": "fp32.onnx", "int8": "int8.onnx"}
    return edit_manifest(folder, graphs=graphs, gate=[asdict(row) for row in rows])


class Clock:
    """Stands for segmenting: each way takes what `SECONDS` says, the first time ten times as long."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []

    def __call__(self, bundle: Bundle, options: Options, scan: Path) -> float:
        engine = options.engine
        call = engine.backend, engine.precision, options.profile
        first = call not in self.calls
        self.calls.append(call)
        return SECONDS.get(call[:2], 1.0) * (10 if first else 1)


def measured(bundle: Path) -> tuple[Tuned, Clock]:
    clock = Clock()
    return tune.measure_all(open_bundle(bundle), Path("a_T1w.nii.gz"), lambda line: None, clock), clock


def timing(backend: str = "onnxruntime", precision: str = "fp32", seconds: float = 1.0, **changes: str) -> Timing:
    """With the profile `balanced`, as measured here and now."""
    return replace(timed(EngineOptions(backend, precision, "CPU"), "balanced", seconds), **changes)


def remember(bundle: Path, folder: Path, tuned: Tuned) -> Bundle:
    opened = open_bundle(bundle)
    keep(folder, opened.sha256, tuned)
    return opened


def test_medians_of_what_passed_are_remembered_and_nothing_else(bundle: Path) -> None:
    tuned = measured(bundle)[0]
    found = {(t.backend, t.precision, t.profile): t.seconds for t in tuned.timings}
    assert found[("onnxruntime", "int8", "fast")] == 1.0
    assert found[("openvino", "fp32", "reference")] == 4.0
    assert found[("openvino", "int8", "fast")] == 3.0
    assert not [key for key in found if key[1] == "int8" and key[2] != "fast"]
    assert [t.seconds for t in tuned.timings] == sorted(t.seconds for t in tuned.timings)


def test_candidates_take_turns(bundle: Path) -> None:
    _, clock = measured(bundle)
    count = len(set(clock.calls))
    assert clock.calls == clock.calls[:count] * (1 + tune.ROUNDS)


def test_a_backend_that_fails_is_left_out(bundle: Path) -> None:
    def failing(opened: Bundle, options: Options, scan: Path) -> float:
        if options.engine.backend == "onnxruntime":
            raise BackendError("out of order")
        return 1.0

    lines: list[str] = []
    tuned = tune.measure_all(open_bundle(bundle), Path("a.nii"), lines.append, failing)
    assert {timing.backend for timing in tuned.timings} == {"openvino"}
    assert any("onnxruntime" in line and "left out: out of order" in line for line in lines)


def test_segment_takes_the_fastest_that_fits_what_was_asked(bundle: Path, tmp_path: Path) -> None:
    opened = remember(bundle, tmp_path / "cache", measured(bundle)[0])
    here = replace(AUTO, cache_dir=tmp_path / "cache")

    def chosen(profile: str, **asked: str) -> tuple[str, str]:
        options = choose_engine(opened, profile, replace(here, **asked))
        return options.backend, options.precision

    assert chosen("fast") == ("onnxruntime", "int8")
    assert chosen("fast", backend="openvino") == ("openvino", "int8")
    assert chosen("fast", precision="fp32") == ("onnxruntime", "fp32")
    assert chosen("fast", backend="openvino", precision="fp32") == ("openvino", "fp32")
    assert chosen("reference") == ("onnxruntime", "fp32")
    untuned = choose_engine(opened, "fast", AUTO)
    assert untuned.backend == "openvino"


def test_what_no_longer_passes_or_works_is_not_taken(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(timing(precision=name, seconds=0.1) for name in ("int8", "bf16"))
    gone = timing(backend="openvino", device="GPU", seconds=0.1)
    opened = remember(bundle, tmp_path / "cache", Tuned("tiny", "a", (*rows, gone)))
    options = choose_engine(opened, "balanced", replace(AUTO, cache_dir=tmp_path / "cache"))
    assert (options.backend, options.device, options.precision) == ("openvino", "CPU", "fp32")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"name": 1}', '{"name": "a", "scan": "b", "timings": [{}]}', "nan", "\x00", '{"a": ' * 9999],
)
def test_a_damaged_file_is_passed_over_with_a_warning(
    text: str, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = remember(bundle, tmp_path / "cache", Tuned("tiny", "a", ()))
    tuned_path(tmp_path / "cache", opened.sha256).write_text(text)
    assert choose_engine(opened, "fast", replace(AUTO, cache_dir=tmp_path / "cache")).backend == "openvino"
    assert "run 'edgemuse tune' again" in caplog.text


@pytest.mark.parametrize("what", ["version", "processor"])
def test_another_version_or_processor_is_not_taken_and_said(
    what: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = timing(seconds=0.1, **{what: "another"}), timing(seconds=0.2, backend="openvino"), timing(seconds=0.3)
    opened = remember(bundle, tmp_path / "cache", Tuned("tiny", "a", rows))
    chosen = choose_engine(opened, "balanced", replace(AUTO, cache_dir=tmp_path / "cache"))
    assert (chosen.backend, chosen.precision) == ("openvino", "fp32")
    cli = CommandLine(capfd, tmp_path / "cache")
    for out in (cli("info", bundle).out, cli("devices").out):
        lines = [line for line in out.splitlines() if "balanced" in line and line.endswith(("again", "fastest", " s"))]
        assert "not used: it was on another" in lines[0] or "not used: it was onnxruntime another, now" in lines[0]
        assert [line.endswith("fastest") for line in lines] == [False, True, False]


def test_a_backend_that_is_gone_is_said(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = timing()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgemuse.engines.onnxruntime", raising=False)
    assert "onnxruntime: it is not installed" in outdated(row)


def test_what_was_measured_before_versions_were_noted_is_not_taken(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither read nor complained of: it lies under another name."""
    old = {"cpu": cpu_name(), "cores": cpu_cores(), "edgemuse": version("edgemuse")}
    row = {"backend": "onnxruntime", "device": "CPU", "precision": "fp32", "profile": "balanced", "seconds": 0.1}
    text = json.dumps({"name": "tiny", "scan": "a", "timings": [row], "machine": old})
    opened = remember(bundle, tmp_path / "cache", Tuned("tiny", "a", ()))
    path = tuned_path(tmp_path / "cache", opened.sha256)
    path.with_name(cache_key({"bundle": opened.sha256, **old}) + ".tuned.json").write_text(text)
    path.unlink()
    chosen = choose_engine(opened, "balanced", replace(AUTO, cache_dir=tmp_path / "cache"))
    assert chosen.backend == "openvino"
    ran = CommandLine(capfd, tmp_path / "cache")("devices")
    assert (ran.err, caplog.text) == ("", "")
    assert "tuned on this machine" not in ran.out


def test_another_machine_knows_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = remember(bundle, tmp_path / "cache", measured(bundle)[0])
    assert recall(tmp_path / "cache", opened.sha256)
    monkeypatch.setattr("edgemuse.runtime.model.tuned.cpu_cores", lambda: 999)
    assert recall(tmp_path / "cache", opened.sha256) is None


def test_the_command_and_what_is_said_of_it(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli, clock = CommandLine(capfd, tmp_path / "cache"), Clock()
    scan = write_scan(tmp_path / "data" / "a_T1w.nii.gz")
    monkeypatch.setattr(tune, "seconds_of", clock)
    assert "not tuned on this machine" in cli("info", bundle).out
    ran = cli("tune", bundle, "--data", tmp_path / "data")
    assert ran.code == 0, ran.err
    assert "onnxruntime CPU int8, profile fast: round 3 of 3" in ran.err
    line = next(line for line in ran.out.splitlines() if line.endswith("fastest") and line.split()[0] == "fast")
    assert line.split()[1:4] == ["onnxruntime", "CPU", "int8"]
    assert line in cli("info", bundle).out
    assert "tuned on this machine, with a_T1w.nii.gz" in cli("devices").out
    ran = cli("segment", scan, "-m", bundle, "-o", tmp_path, "--profile", "fast")
    assert ran.code == 0, ran.err
    backend = json.loads((tmp_path / "a_provenance.json").read_text())["backend"]
    assert (backend["name"], backend["precision"], backend["gate"]) == ("onnxruntime", "int8", "passed")


def test_segmenting_is_what_is_timed(bundle: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    options = Options("fast", "openvino", "fp32", "CPU", cache_dir=None)
    assert tune.seconds_of(open_bundle(bundle), options, scan) > 0


def test_no_scans_is_one_line(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    ran = CommandLine(capfd, tmp_path / "cache")("tune", bundle, "--data", tmp_path / "empty")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "no scans there" in ran.err


def test_both_networks_of_a_cascade_are_tuned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on what it gets, and kept under its own hash."""
    cascade = tiny_cascade(tmp_path / "both.bundle")
    seen = {}

    def timed(bundle: Bundle, options: Options, scan: Path) -> float:
        seen[bundle.sha256] = open_scan(scan).shape
        return 1.0

    monkeypatch.setattr(tune, "seconds_of", timed)
    scan = write_scan(tmp_path / "data" / "a_T1w.nii.gz")
    ran = CommandLine(capfd, tmp_path / "cache")("tune", cascade, "--data", tmp_path / "data")
    assert ran.code == 0, ran.err
    assert {line.partition(":")[0] for line in ran.out.splitlines()} == {"mask", "regions"}
    opened = open_model(cascade)
    assert isinstance(opened, Cascade)
    mask, regions = opened.mask, opened.regions
    assert set(seen) == {mask.sha256, regions.sha256}
    assert seen[mask.sha256] == open_scan(scan).shape != seen[regions.sha256]
    assert all(recall(tmp_path / "cache", bundle.sha256) for bundle in (mask, regions))
