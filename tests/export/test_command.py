"""`edgemuse export` on the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgemuse.engines.errors import BackendError, ModelFolderError
from edgemuse.export.command import export
from edgemuse.runtime.model.bundle import open_bundle

Make = Callable[..., Path]


def test_bundle_on_stdout_progress_on_stderr(model_folder: Make, tmp_path: Path) -> None:
    bundle = tmp_path / "tiny.zip"
    arguments = [
        str(model_folder(folds=("0", "1"))),
        "-o",
        str(bundle),
        "--fold",
        "1",
        "--orientation",
        "lps",
    ]
    result = CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{bundle}\n"
    assert "comparing openvino" in result.stderr
    manifest = open_bundle(bundle).manifest
    assert manifest.source["folds"] == ["1"]
    assert manifest.network.orientation == "LPS"


def test_errors_are_left_to_the_main_program(model_folder: Make, tmp_path: Path) -> None:
    result = CliRunner().invoke(export, [str(model_folder()), "-o", str(tmp_path / "b"), "--fold", "9"])
    assert isinstance(result.exception, ModelFolderError)


@pytest.mark.parametrize("missing", ["torch", "onnx", "onnxscript", "dynamic_network_architectures"])
def test_missing_extra_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(sys.modules):
        if name.startswith("edgemuse.export.") and name != "edgemuse.export.command":
            # Both places that know a module are restored afterwards, so that no test sees it twice.
            monkeypatch.delattr(name, raising=False)
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "dynamic_network_architectures":
        monkeypatch.setitem(sys.modules, f"{missing}.architectures.unet", None)
    result = CliRunner().invoke(export, [str(tmp_path), "-o", str(tmp_path / "b")])
    assert isinstance(result.exception, BackendError)
    assert missing in str(result.exception)
    assert 'pip install ".[export]"' in str(result.exception)


def test_help_needs_no_pytorch() -> None:
    code = (
        "import sys; from edgemuse.export.command import export; "
        "export.main(['--help'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in (
        "MODEL_FOLDER",
        "plans.json",
        "--fold",
        "--orientation",
        "LPS",
        "--labels",
        "--scan",
        "--license",
    ):
        assert word in done.stdout


def test_a_bug_is_not_called_a_missing_package(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "edgemuse.export.exporter", None)
    monkeypatch.delattr("edgemuse.export.exporter", raising=False)
    result = CliRunner().invoke(export, [str(tmp_path), "-o", str(tmp_path / "b")])
    assert isinstance(result.exception, ImportError)
