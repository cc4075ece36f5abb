"""`--scheduler`: a real Dask cluster of processes does what one process does, also when a worker is killed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from bundles import CommandLine, Ran, head_image, run_process, write_scan

from edgemuse.bench.measure.dask_cluster import dask_cluster

SCANS = 6
DIES_ONCE = """
import os, pathlib, signal
from edgemuse.runtime.pipeline.segmenter import Segmenter
died = pathlib.Path({died!r})
def killed(self, scan, *arguments, run=Segmenter.run):
    if scan.path.name.startswith("sub-3") and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, scan, *arguments)
Segmenter.run = killed
"""
distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for n in range(SCANS):
        write_scan(tmp_path / "data" / f"sub-{n}_T1w.nii.gz", head_image((24 + 2 * n, 28, 20), seed=n))
    (tmp_path / "data" / "sub-5_T1w.nii.gz").write_bytes(b"")
    return tmp_path / "data"


def segment(data: Path, model: Path, out: Path, scheduler: str) -> Ran:
    return run_process("segment", data, "-m", model, "-o", out, "--scheduler", scheduler, cache_dir=out / "cache")


def labels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".gz", ".tsv")}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_a_cluster_does_what_one_process_does_though_a_worker_is_killed(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    assert cli("segment", data, "-m", model, "-o", tmp_path / "alone").code == 2
    out, died = tmp_path / "out", tmp_path / "died"
    with dask_cluster(tmp_path, DIES_ONCE.format(died=str(died))) as cluster:
        ran = segment(data, model, out, cluster.address)
        again = segment(data, model, out, cluster.address)
    assert died.exists()
    assert ran.code == 2, ran.err
    assert ran.err.count("sub-5_T1w.nii.gz: the file is empty") == 1
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (segmented|done|failed)", ran.err)}
    # what a worker did just before it died is found done by the other
    assert (counts["segmented"] + counts.get("done", 0), counts["failed"]) == (SCANS - 1, 1)
    written = ran.out.splitlines()
    assert len(written) == len(set(written)) == 5 * counts["segmented"]
    assert counts["segmented"] > 2
    assert labels(out) == labels(tmp_path / "alone")
    assert not list(out.glob(".*"))
    assert len(ran.flags) == counts["segmented"]  # what workers say is said here
    assert (again.code, again.out) == (2, "")
    assert again.err.count("done already") == SCANS - 1


def test_no_scheduler_there(data: Path, model: Path, tmp_path: Path) -> None:
    prelude = "from edgemuse.runtime.batch import cluster\ncluster.CONNECT = '1s'"
    arguments = ("segment", data, "-m", model, "-o", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    ran = run_process(*arguments, cache_dir=tmp_path / "cache", prelude=prelude)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("edgemuse: no Dask scheduler at tcp://127.0.0.1:9 (")
    assert len(ran.err.splitlines()) == 1


def test_without_dask(data: Path, model: Path, tmp_path: Path) -> None:
    arguments = ("segment", data, "-m", model, "-o", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    prelude = "import sys\nsys.modules['distributed'] = None"
    ran = run_process(*arguments, cache_dir=tmp_path / "cache", prelude=prelude)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert 'pip install ".[cluster]"' in ran.err
