"""Which scans are found, and where their results go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import InputError
from edgemuse.runtime.batch.jobs import Job, find_jobs, may_be_t1, read_list, shard
from edgemuse.runtime.results.files import output_paths


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("sub-01_T1w.nii.gz", True),
        ("IXI002-Guys-0828-T1.nii", True),
        ("brain.NII.GZ", True),
        ("t1.nii", True),
        ("sub-01_dseg.nii.gz", False),
        ("sub-01_FLAIR.nii.gz", False),
        ("sub-01_desc-brain_mask.nii.gz", False),
        ("mask.nii.gz", False),
        (".hidden.nii.gz", False),
        ("sub-01_T1w.json", False),
        ("sub-01_T1w.nii.gz.part", False),
    ],
)
def test_what_a_folder_gives(name: str, taken: bool) -> None:
    assert may_be_t1(name) is taken


def test_folders_are_made_again_below_the_output(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "data" / "results"
    touch(data / "a.nii", data / "x" / "a.nii", data / "x" / "y" / "b_T1w.nii.gz", data / ".git" / "c.nii")
    touch(data / "x" / "a_dseg.nii.gz", out / "z.nii", tmp_path / "single_T1w.nii.gz")
    jobs = find_jobs([data, tmp_path / "single_T1w.nii.gz"], out)
    places = {str(job.scan.relative_to(tmp_path)): str(job.outputs["dseg.nii.gz"].relative_to(out)) for job in jobs}
    assert places == {
        "data/a.nii": "a_dseg.nii.gz",
        "data/x/a.nii": "x/a_dseg.nii.gz",
        "data/x/y/b_T1w.nii.gz": "x/y/b_dseg.nii.gz",
        "single_T1w.nii.gz": "single_dseg.nii.gz",
    }


def test_folder_without_scans(tmp_path: Path) -> None:
    touch(tmp_path / "a_dseg.nii.gz")
    with pytest.raises(InputError, match="without T1 scans"):
        find_jobs([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("other", ["a.nii.gz", "x/a.nii", "a_T1w.nii"])
def test_two_scans_of_one_name(other: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would both give a_"):
        find_jobs([Path("a.nii"), Path(other)], tmp_path)


def test_a_scan_that_is_named_twice_is_done_once(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii")
    jobs = find_jobs([tmp_path, tmp_path / "a.nii", tmp_path / "a.nii"], tmp_path / "out")
    assert [job.scan for job in jobs] == [tmp_path / "a.nii"]


def test_list() -> None:
    lines = ["# scans\n", "a b.nii.gz\r\n", "\n", "  folder/c.nii  \n", "#d.nii\n"]
    assert read_list(lines) == [Path("a b.nii.gz"), Path("folder/c.nii")]


@given(st.integers(0, 40), st.integers(1, 12))
def test_every_scan_is_in_one_shard(scans: int, count: int) -> None:
    jobs = [Job(Path(f"{n}.nii"), output_paths(Path("out"), str(n))) for n in range(scans)]
    parts = [shard(jobs, number, count) for number in range(1, count + 1)]
    assert sorted(job.scan for part in parts for job in part) == sorted(job.scan for job in jobs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
