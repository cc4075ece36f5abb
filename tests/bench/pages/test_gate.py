"""The page of the accuracy gate says what the calibrated bundle stores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from bundles import edit_manifest, tiny_bundle

for library in ("torch", "nncf", "nnunetv2"):
    pytest.importorskip(library, reason=f"needs {library}: pip install '.[bench,calibrate]'")

from edgemuse.bench.pages.gate import section
from edgemuse.runtime.cli.describe import GATE_HEADER
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.manifest import GateRow

PASSED = GateRow("openvino", "1", "CPU", "int8", "balanced", "a processor", 2, 1.5, 0.987, 0.75, 0.76, 0.01, "pons")
FAILED = GateRow("onnxruntime", "1", "CPU", "fp16", "fast", "a processor", 2, failures=("NaN",))


def test_every_row_of_the_gate_is_shown(tmp_path: Path) -> None:
    record = {
        "calibrated_on": [{"name": "a_T1w.nii.gz"}],
        "evaluated_on": [{"name": "b_T1w.nii.gz"}, {"name": "c_T1w.nii.gz"}],
        "int8": {"left_in_fp32": {"conv_7": "error alone 0.02"}},
    }
    path = edit_manifest(tiny_bundle(tmp_path / "b"), gate=[asdict(PASSED), asdict(FAILED)], calibration=record)
    lines = section("A model", open_bundle(path)).splitlines()
    assert "## A model" in lines
    assert (
        "Calibrated on a_T1w.nii.gz, judged on b_T1w.nii.gz, c_T1w.nii.gz; convolutions left in fp32: conv_7." in lines
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == list(GATE_HEADER)
    assert rows[1] == ["balanced", "openvino CPU", "int8", "1.50", "0.9870", "0.7500", "0.7600", "0.010 pons", "passed"]
    assert rows[2][:3] == ["fast", "onnxruntime CPU", "fp16"]
    assert rows[2][-1] == "failed: NaN"
