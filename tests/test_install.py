"""The wheel in an environment of its own: no PyTorch, no checkout, and the same files as beside PyTorch."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = CHECKOUT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with real scans and a trained model is absent"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'edgemuse[dev]'")
    from edgemuse.export.exporter import ExportOptions, export_model

    options = ExportOptions(orientation="LPS", labels=SHARED / "devmodel" / "labels.tsv")
    return export_model(SHARED / "devmodel", tmp_path_factory.mktemp("model") / "dev.bundle", options)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with nothing but the wheel and what it requires. Built from a copy, so that no stale build/ is used."""
    folder = tmp_path_factory.mktemp("bare")
    source = shutil.copytree(CHECKOUT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", source], check=True)
    return python


def test_torch_cannot_be_imported(bare_python):
    ran = subprocess.run([bare_python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in ran.stderr


def test_training_stays_outside(bare_python):
    ran = subprocess.run([bare_python, "-c", "import edgemuse.training"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in ran.stderr


@pytest.mark.parametrize("name", ["chris", "crop", "vxm"])
def test_the_same_file_without_torch(name, bare_python, bundle, tmp_path):
    scan = SHARED / "t1" / f"{name}_T1w.nii.gz"
    digests = []
    for python, folder in ((sys.executable, tmp_path / "beside"), (bare_python, tmp_path / "bare")):
        command = [python, "-m", "edgemuse.runtime.cli", "segment", scan, "--model", bundle, "-o", folder]
        environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(folder / "cache")}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        digests.append(hashlib.sha256((folder / f"{name}_dseg.nii.gz").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
