"""Which precision runs: what was asked for, or the fastest that passed; never one that did not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import BundleError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.model import precision
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.cascade import CASCADE, Cascade
from edgemuse.runtime.model.manifest import GateRow
from edgemuse.runtime.model.precision import choose_engine, verdict
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
from edgemuse.runtime.pipeline.options import Options

AUTO = EngineOptions(backend="openvino", precision="auto")
OFFERED = ("fp32", "int8")
"""By OpenVINO, in these tests."""


def fake_choose(options: EngineOptions, refused: object = None) -> tuple[None, EngineOptions]:
    """The registry on a machine whose only device offers `OFFERED`."""
    if options.precision not in OFFERED:
        raise precision.BackendError(f"no {options.precision}")
    backend = "openvino" if options.backend == "auto" else options.backend
    return None, EngineOptions(backend, options.precision, "CPU", options.threads, options.cache_dir)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle whose int8 and fp16 graphs are its fp32 one."""
    folder = tiny_bundle(tmp_path / "tiny.bundle")
    for name in ("int8.onnx", "fp16.onnx"):
        replace_file(folder, name, tiny_graph())
    return edit_manifest(folder, graphs={"fp32": "fp32.onnx", "int8": "int8.onnx", "fp16": "fp16.onnx"})


def with_gate(path: Path, *rows: GateRow, **changes: Any) -> Bundle:
    return open_bundle(edit_manifest(path, gate=[asdict(row) for row in rows], **changes))


FP32 = gate_row(precision="fp32", seconds=3.0)


def chosen(bundle: Bundle, profile: str = "balanced") -> str:
    return choose_engine(bundle, profile, AUTO).precision


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "choose", fake_choose)


def test_auto_takes_what_passed_and_is_faster(path: Path) -> None:
    assert chosen(with_gate(path, FP32, gate_row())) == "int8"


@pytest.mark.parametrize("passed", [(), ("mask",), ("regions",), ("mask", "regions")], ids="+".join)
def test_each_network_of_a_cascade_runs_in_what_passed_for_it(passed: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny_cascade(tmp_path / "tiny.bundle")
    for role in Cascade.STAGES:
        replace_file(model / role, "int8.onnx", (model / role / "fp32.onnx").read_bytes())
        rows = FP32, gate_row(failures=() if role in passed else ("too far",))
        with_gate(model / role, *rows, graphs={"fp32": "fp32.onnx", "int8": "int8.onnx"})
    manifest = json.loads((model / CASCADE).read_text())
    stages = {role: open_bundle(model / role).sha256 for role in Cascade.STAGES}
    (model / CASCADE).write_text(json.dumps(manifest | {"stages": stages}))
    with CascadeSegmenter(Cascade(model), Options("balanced", "openvino", cache_dir=None)) as segmenter:
        found = {role: getattr(segmenter, role).chosen.precision for role in Cascade.STAGES}
    assert found == {role: "int8" if role in passed else "fp32" for role in Cascade.STAGES}


@pytest.mark.parametrize(
    "row",
    [
        gate_row(failures=("too far",)),
        gate_row(seconds=3.5),
        gate_row(backend="onnxruntime"),
        gate_row(device="GPU"),
        gate_row(profile="other"),
        gate_row(precision="fp16"),
    ],
    ids=["failed", "slower", "other backend", "other device", "other profile", "not offered here"],
)
def test_auto_stays_with_fp32_otherwise(row: GateRow, path: Path) -> None:
    assert chosen(with_gate(path, FP32, row)) == "fp32"


def test_auto_is_fp32_without_a_gate(path: Path) -> None:
    assert chosen(with_gate(path)) == "fp32"


def test_auto_is_fp32_where_that_was_not_timed(path: Path) -> None:
    assert chosen(with_gate(path, gate_row())) == "fp32"


def test_auto_is_fp32_where_the_graph_is_missing(path: Path) -> None:
    assert chosen(with_gate(path, FP32, gate_row(), graphs={"fp32": "fp32.onnx"})) == "fp32"


def test_reference_is_always_fp32(path: Path) -> None:
    rows = [gate_row(precision="fp32", seconds=3.0, profile="reference"), gate_row(profile="reference")]
    assert chosen(with_gate(path, *rows), "reference") == "fp32"


ROWS = st.lists(
    st.builds(
        gate_row,
        precision=st.sampled_from(["fp32", "bf16", "fp16", "int8"]),
        backend=st.sampled_from(["openvino", "onnxruntime"]),
        profile=st.sampled_from(["reference", "balanced"]),
        seconds=st.floats(0.1, 9),
        failures=st.sampled_from([(), ("too far",)]),
    ),
    max_size=8,
)


@given(ROWS, st.sampled_from(["reference", "balanced"]))
def test_auto_never_takes_what_did_not_pass(rows: list[GateRow], profile: str) -> None:
    bundle = _Stub(tuple(rows))
    found = choose_engine(bundle, profile, AUTO).precision  # type: ignore[arg-type]
    if found != "fp32":
        assert profile == "balanced"
        assert any(
            row.passed and (row.backend, row.precision, row.profile) == ("openvino", found, profile) for row in rows
        )


class _Stub:
    """A bundle as far as the choice looks at it."""

    sha256 = "0" * 64

    def __init__(self, gate: tuple[GateRow, ...]) -> None:
        self.manifest = self
        self.gate = gate
        self.graphs = {"fp32": "a", "fp16": "b", "int8": "c"}


def test_what_is_asked_for_is_used_even_if_it_failed(path: Path) -> None:
    bundle = with_gate(path, FP32, gate_row(failures=("too far",)))
    options = choose_engine(bundle, "balanced", EngineOptions("openvino", "int8"))
    assert options.precision == "int8"
    assert verdict(bundle, "balanced", options) == "failed: too far"
    assert verdict(bundle, "reference", options) == "not measured"


def test_precision_without_a_graph_is_refused_before_any_work(path: Path) -> None:
    bundle = with_gate(path, graphs={"fp32": "fp32.onnx"})
    with pytest.raises(BundleError, match="no int8 graph is stored, only fp32; 'edgemuse calibrate' adds others"):
        choose_engine(bundle, "balanced", EngineOptions("openvino", "int8"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


@pytest.mark.parametrize(
    ("failures", "warning"),
    [
        ((), ""),
        (
            ("agreement 0.9 is below 0.98",),
            "int8 with the profile balanced is not proven for tiny and this backend: failed: agreement 0.9 is below",
        ),
    ],
    ids=["passed", "failed"],
)
def test_failed_precision_warns_and_is_recorded(
    failures: tuple[str, ...], warning: str, path: Path, cli: CommandLine, tmp_path: Path
) -> None:
    with_gate(path, FP32, gate_row(failures=failures))
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    ran = cli("segment", scan, "-m", path, "-o", tmp_path, "--profile", "balanced", "--precision", "int8")
    assert ran.code == 0, ran.err
    assert ran.err.count("\n") == bool(warning)
    assert warning in ran.err
    backend = json.loads((tmp_path / "a_provenance.json").read_text())["backend"]
    assert backend["precision"] == "int8"
    assert backend["gate"] == ("passed" if not failures else f"failed: {failures[0]}")


@pytest.mark.parametrize("measured", [True, False])
def test_fp32_warns_only_if_it_failed(measured: bool, path: Path, cli: CommandLine, tmp_path: Path) -> None:
    """As it may where the profile changes what is computed."""
    with_gate(path, *[gate_row(precision="fp32", failures=("agreement 0.7 is below 0.98",))] * measured)
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    ran = cli("segment", scan, "-m", path, "-o", tmp_path, "--profile", "balanced")
    assert ran.code == 0, ran.err
    assert ran.err.count("\n") == measured
    assert ("fp32 with the profile balanced is not proven" in ran.err) == measured


def test_info_shows_the_table(path: Path, cli: CommandLine) -> None:
    with_gate(path, FP32, gate_row(failures=("agreement 0.9 is below 0.98",)))
    ran = cli("info", path)
    assert ran.code == 0
    lines = [line.split() for line in ran.out.splitlines()]
    start = lines.index(["accuracy", "gate"])
    assert lines[start + 2][:7] == ["balanced", "openvino", "CPU", "fp32", "3.00", "0.9870", "0.7000"]
    assert lines[start + 3][-6:] == ["failed:", "agreement", "0.9", "is", "below", "0.98"]


def test_info_says_that_nothing_was_measured(cli: CommandLine, tmp_path: Path) -> None:
    assert "accuracy gate: not measured" in cli("info", tiny_bundle(tmp_path / "plain")).out
