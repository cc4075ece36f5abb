"""Installed in an environment of its own: what is there, no PyTorch, and the same files as beside PyTorch."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = CHECKOUT.parent / "shared" / "data"

FOLDERS = ("bench", "calibration", "engines", "export", "runtime")

pytestmark = pytest.mark.slow
needs_scans = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with real scans and a trained model is absent")


def copy_of_the_source(folder):
    """Without what earlier builds left."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(CHECKOUT, folder / "source", ignore=ignored, symlinks=True)


def modules_of(source):
    """Every file of Python in the sub-packages that are installed, as it is named inside `edgemuse/`."""
    return {path.relative_to(source).as_posix() for folder in FOLDERS for path in (source / folder).rglob("*.py")}


def in_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    return {name.removeprefix("edgemuse/") for name in names if name.startswith("edgemuse/") and name.endswith(".py")}


def pip(python, *arguments):
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def new_python(folder):
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_the_wheel_holds_every_module_and_nothing_that_was_deleted(tmp_path):
    """A folder `build` stays behind in the source; a module that was there once must not come back from it."""
    source = copy_of_the_source(tmp_path)
    gone = source / "runtime" / "gone.py"
    gone.write_text('"""Deleted before the second build."""\n')
    pip(sys.executable, "wheel", "--no-deps", "-w", tmp_path / "first", source)
    assert (source / "build" / "lib" / "edgemuse" / "runtime" / "gone.py").exists()
    gone.unlink()
    pip(sys.executable, "wheel", "--no-deps", "-w", tmp_path / "second", source)
    first, second = (in_wheel(next((tmp_path / name).glob("*.whl"))) for name in ("first", "second"))
    assert first - second == {"runtime/gone.py"}
    assert second == modules_of(source)


def test_an_editable_install_finds_every_package(tmp_path):
    source, python = copy_of_the_source(tmp_path), new_python(tmp_path / "venv")
    pip(python, "install", "--no-deps", "-e", source)
    packages = {f"edgemuse.{Path(name).parent.as_posix().replace('/', '.')}" for name in modules_of(source)}
    code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if not u.find_spec(n)))"
    ran = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    assert ran.stdout == "\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
    from edgemuse.export.exporter import ExportOptions, export_model

    options = ExportOptions(orientation="LPS", labels=SHARED / "devmodel" / "labels.tsv")
    return export_model(SHARED / "devmodel", tmp_path_factory.mktemp("model") / "dev.bundle", options)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with nothing but edgemuse and what it requires, by `pip install .`."""
    folder = tmp_path_factory.mktemp("bare")
    python = new_python(folder / "venv")
    pip(python, "install", copy_of_the_source(folder))
    return python


def test_torch_cannot_be_imported(bare_python):
    ran = subprocess.run([bare_python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in ran.stderr


def test_training_stays_outside(bare_python):
    ran = subprocess.run([bare_python, "-c", "import edgemuse.training"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in ran.stderr


@needs_scans
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
