"""Faults that were reported in public or found by attack: each script in shared/cases prints PASS or FAIL and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SHARED = CHECKOUT.parent / "shared"
CASES = SHARED / "cases"
HELPERS = ("common", "mkscans")
FUZZ = ("fuzz_bundles", "fuzz_checkpoints", "fuzz_nifti")
"""Long runs over mutated inputs, which `tests/fuzz` has in its own form."""
SCRIPTS = [path for path in sorted(CASES.rglob("*.py")) if path.stem not in (*HELPERS, *FUZZ)]
RUN = """
import importlib, runpy, sys
sys.modules["edgemuse.runtime.jobs"] = importlib.import_module("edgemuse.runtime.batch.kinds")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script that may name a module by the place where it lay when the script was written."""

pytestmark = [
    pytest.mark.cases,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} with the scripts is absent"),
    pytest.mark.skipif(sys.platform == "win32", reason="the scripts use POSIX's files and processes"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The program, a bundle of the development model, and folders of this test's own."""
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
    from edgemuse.export.exporter import ExportOptions, export_model

    folder, model = tmp_path_factory.mktemp("cases"), SHARED / "data" / "devmodel"
    bundle = export_model(model, folder / "dev.bundle", ExportOptions(orientation="LPS", labels=model / "labels.tsv"))
    program = str(Path(sys.executable).with_name("edgemuse"))
    places = {"WORK": str(folder / "work"), "TMPDIR": str(folder), "EDGEMUSE_CACHE_DIR": str(folder / "cache")}
    own = {"EDGEMUSE": program, "EDGEMUSE_EXPORT": program, "DEV_BUNDLE": str(bundle), "PROJECT": str(CHECKOUT)}
    return os.environ | places | own | {"PYTHONPATH": str(CASES / "faults")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_case(script: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", RUN, str(script)]
    ran = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    if "cannot be tried here" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert ran.stdout.splitlines()[-1:] == ["PASS"], f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
