"""The measurement over many scans, on scans so small that it takes seconds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import head_image, tiny_bundle, write_scan

from edgemuse.bench.pages.many import Bench, judge, make_dataset, results, thirds


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    for n in range(3):
        write_scan(tmp_path / "shared" / "data" / "t1" / f"{n}_T1w.nii.gz", head_image((30, 28, 26), seed=n))
    return tmp_path / "shared"


def test_dataset(shared: Path, tmp_path: Path) -> None:
    good, damaged = make_dataset(shared, tmp_path / "data")
    files = list((tmp_path / "data").glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    assert (good, len(damaged), len(files)) == (24, 2, 26)
    assert len({path.read_bytes() for path in files}) == 26


def test_a_run_is_judged(shared: Path, tmp_path: Path) -> None:
    good, damaged = make_dataset(shared, tmp_path / "data")
    (tmp_path / "work").mkdir()
    bench = Bench(tmp_path / "data", tiny_bundle(tmp_path / "b"), "balanced", "fp32", tmp_path / "work")
    out = tmp_path / "out"
    ran = bench.run(out, 1)
    expected = results(out)
    assert judge(ran, out, [2], good, damaged, expected) == []
    assert min(ran.memory) > 50 << 20
    assert judge(replace(ran, codes=[0]), out, [2], good, damaged, expected) == ["exit codes [0], not [2]"]
    assert len(judge(replace(ran, said=""), out, [2], good, damaged, expected)) == 2
    name = next(name for name in expected if name.endswith("_volumes.tsv"))
    assert judge(ran, out, [2], good, damaged, expected | {name: b""}) == ["1 files differ"]
    (out / name).unlink()
    assert judge(ran, out, [2], good, damaged, expected) == ["23 of 24 scans done", "1 files differ"]


def test_thirds() -> None:
    assert thirds([(0.1, 5), (0.9, 9), (1.5, 4), (2.9, 2), (3.0, 3)], 3.0) == (9, 4, 3)


@pytest.mark.slow
def test_the_whole_measurement(shared: Path, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("SIGKILL is POSIX's")
    command = [sys.executable, "-m", "edgemuse.bench.pages.many", shared, "-o", tmp_path / "many.md"]
    done = subprocess.run(
        [*command, "-m", tiny_bundle(tmp_path / "b")], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = 7 if importlib.util.find_spec("distributed") else 5
    assert (tmp_path / "many.md").read_text().count("| right |") == rows
