"""The measurement over many scans, on scans so small that it takes seconds."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import head_image, tiny_bundle, write_scan
from click.testing import CliRunner

from edgemuse.bench.pages import many
from edgemuse.bench.pages.many import Bench, judge, make_dataset, results, thirds


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    for n in range(3):
        write_scan(tmp_path / "shared" / "data" / "t1" / f"{n}_T1w.nii.gz", head_image((30, 28, 26), seed=n))
    return tmp_path / "shared"


def test_dataset(shared: Path, tmp_path: Path) -> None:
    data = make_dataset(shared, tmp_path / "data")
    files = list((tmp_path / "data").glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    assert (data.good, len(data.damaged), len(files)) == (24, 2, 26)
    assert len({path.read_bytes() for path in files}) == 26


def test_a_run_is_judged(shared: Path, tmp_path: Path) -> None:
    data = make_dataset(shared, tmp_path / "data")
    (tmp_path / "work").mkdir()
    out = tmp_path / "out"
    ran = Bench(data, tiny_bundle(tmp_path / "b"), tmp_path / "work").run(out, 1)
    expected = results(out)
    assert judge(ran, out, [2], data, expected) == []
    assert min(ran.memory) > 50 << 20
    assert judge(replace(ran, codes=[0]), out, [2], data, expected) == ["exit codes [0], not [2]"]
    assert len(judge(replace(ran, said=""), out, [2], data, expected)) == 2
    name = next(name for name in expected if name.endswith("_volumes.tsv"))
    assert judge(ran, out, [2], data, expected | {name: b""}) == ["1 files differ"]
    (out / name).unlink()
    assert judge(ran, out, [2], data, expected) == ["23 of 24 scans done", "1 files differ"]


def test_thirds() -> None:
    assert thirds([(0.1, 5), (0.9, 9), (1.5, 4), (2.9, 2), (3.0, 3)], 3.0) == [9, 4, 3]


@pytest.mark.slow
def test_the_whole_measurement(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("SIGKILL is POSIX's")
    monkeypatch.setattr(many, "BUILT_IN", tiny_bundle(tmp_path / "b"))
    page, work = tmp_path / "many.md", tmp_path / "work"
    done = CliRunner().invoke(many.main, [str(shared), "-o", str(page), "--work", str(work)])
    assert done.exit_code == 0, done.output
    rows = 7 if importlib.util.find_spec("distributed") else 5
    assert page.read_text().count("| right |") == rows
