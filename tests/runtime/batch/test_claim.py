"""Claims: one process at a time, and a lock file that only edgemuse's own code can have made is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from bundles import CommandLine, snapshot, write_scan

from edgemuse.engines.errors import OutputError
from edgemuse.runtime.batch.claim import Claim
from edgemuse.runtime.results.files import PROVENANCE, output_paths

posix = pytest.mark.skipif(os.name != "posix", reason="links and pipes of other systems need rights")


def test_one_at_a_time(tmp_path: Path) -> None:
    first, second = Claim(tmp_path / "a"), Claim(tmp_path / "a")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def link_to_a_file(path: Path) -> None:
    path.symlink_to(path.with_name("precious"))


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def pipe(path: Path) -> None:
    os.mkfifo(path)


@posix
@pytest.mark.parametrize("plant", [link_to_a_file, link_to_nothing, pipe])
def test_what_is_planted_in_its_place_is_not_opened(plant: Any, tmp_path: Path, model: Path, cli: CommandLine) -> None:
    out, scan = tmp_path / "out", write_scan(tmp_path / "a_T1w.nii.gz")
    out.mkdir()
    (out / "precious").write_text("mine")
    claim = Claim(output_paths(out, "a")[PROVENANCE])
    plant(claim.path)
    with pytest.raises(OutputError, match=r"is no lock of edgemuse; remove it"):
        claim.acquire()
    claim.release()
    names = sorted(path.name for path in out.iterdir())
    ran = cli("segment", scan, "-m", model, "-o", out)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{claim.path} is a link" in ran.err
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "precious").read_text() == "mine"
    claim.path.unlink()
    before = snapshot(out)
    assert cli("segment", scan, "-m", model, "-o", out).code == 0
    assert before.items() <= snapshot(out).items()
