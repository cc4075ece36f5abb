"""Which scans are found, and where their results go."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import InputError
from edgemuse.runtime.batch.jobs import Job, find_jobs, read_list, shard
from edgemuse.runtime.batch.kinds import may_be_t1
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
        ("BraTS-GLI-00000-000-t1n.nii.gz", True),
        ("BraTS20_Training_001_t1.nii.gz", True),
        ("sub-01_acq-mask_T1w.nii.gz", True),
        ("sub-01_part-mag_T1w.nii.gz", True),
        ("sub-01_ce-gadolinium_T1w.nii.gz", True),
        ("sub-01_T1w_brain.nii.gz", True),
        ("T1_CUBE.nii", True),
        ("PD_07.nii.gz", True),
        ("sub-PD.nii.gz", True),
        ("sub-01_ses-T2.nii.gz", True),
        ("scan_2.nii", True),
        ("7.nii", True),
        ("_.nii", True),
        ("T1w 脑.nii", True),
        ("BraTS-GLI-00000-000-t1c.nii.gz", False),
        ("BraTS-GLI-00000-000-t2f.nii.gz", False),
        ("BraTS-GLI-00000-000-t2w.nii.gz", False),
        ("BraTS20_Training_001_t1ce.nii.gz", False),
        ("BraTS20_Training_001_seg.nii.gz", False),
        ("IXI002-Guys-0828-MRA.nii.gz", False),
        ("IXI002-Guys-0828-DTI-00.nii.gz", False),
        ("IXI002-Guys-0828-PD.nii.gz", False),
        ("sub-01_part-phase_T1w.nii.gz", False),
        ("sub-01_part-real_T1w.nii.gz", False),
        ("sub-01_part-imag_T1w.nii", False),
        ("sub-01_mod-T1w_defacemask.nii.gz", False),
        ("sub-01_space-T1w_dseg.nii.gz", False),
        ("sub-01_label-GM_probseg.nii.gz", False),
        ("sub-01_T1map.nii.gz", False),
        ("sub-01_inv-1_part-mag_MP2RAGE.nii.gz", False),
        ("aparc+aseg.nii.gz", False),
        ("aparc.a2009s+aseg.nii.gz", False),
        ("aseg.nii", False),
        ("wmparc.nii.gz", False),
        ("lh.ribbon.nii.gz", False),
        ("T1_brainmask.nii.gz", False),
        ("T1_brain_pve_0.nii.gz", False),
        ("sub-01_T1_DLMUSE.nii.gz", False),
        ("sub-01_T1_DLICV.nii.gz", False),
        ("sub-01_DLICV_mask.nii.gz", False),
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
    touch(tmp_path / "a_dseg.nii.gz", tmp_path / "b" / "c_dseg.nii.gz", tmp_path / "d_FLAIR.nii")
    with pytest.raises(InputError, match=r"without T1 scans .*only others by their names \(2 label map, 1 FLAIR\)"):
        find_jobs([tmp_path], tmp_path / "out")
    with pytest.raises(InputError, match="no scans are named"):
        find_jobs([], tmp_path / "out")


def scans_of(jobs: list[Job], top: Path) -> set[str]:
    return {job.scan.relative_to(top).as_posix() for job in jobs if not job.refused}


def linked(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no symbolic links here ({error})")


def test_links_to_folders_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, store = tmp_path / "data", tmp_path / "store"
    touch(data / "z.nii", store / "one" / "a.nii", store / "deep" / "two" / "b.nii", store / "inner" / "c.nii")
    linked(data / "sub-01", store / "one")
    linked(data / "sub-02", store / "deep")
    linked(store / "deep" / "three", store / "inner")
    linked(data / ".hidden", store)
    jobs = find_jobs([data], tmp_path / "out")
    assert scans_of(jobs, data) == {"z.nii", "sub-01/a.nii", "sub-02/two/b.nii", "sub-02/three/c.nii"}
    assert {job.outputs["dseg.tsv"].parent for job in jobs} == {
        tmp_path / "out" / place for place in (".", "sub-01", "sub-02/two", "sub-02/three")
    }
    assert not caplog.records


def test_links_that_lead_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    touch(data / "b" / "a.nii", tmp_path / "beside" / "secret.nii")
    linked(data / "a", data / "b")  # before it by name, and yet where the folder really is counts
    linked(data / "b" / "round", data)
    linked(data / "b" / "up", tmp_path)
    linked(data / "b" / "self", data / "b" / "self")
    assert scans_of(find_jobs([data], tmp_path / "out"), data) == {"b/a.nii"}
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [
        f"{data / 'a'} leads to {data / 'b'}, whose scans are taken once",
        f"{data / 'b' / 'round'} leads to {data}, whose scans are taken once",
        f"{data / 'b' / 'up'} leads to {tmp_path}, which {data} is part of, so it is not followed",
    ]


def test_many_links_among_each_other_end(tmp_path: Path) -> None:
    """Without a memory of what was entered there would be as many ways as permutations."""
    folders = [tmp_path / "store" / str(n) for n in range(9)]
    for folder in folders:
        touch(folder / "a.nii")
    for folder in folders:
        for other in folders:
            linked(folder / f"to{other.name}", other)
    linked(tmp_path / "data", folders[0])
    assert len(find_jobs([tmp_path / "data"], tmp_path / "out")) == len(folders)


def test_the_results_are_not_entered_by_a_link(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    touch(data / "a.nii", out / "b.nii")
    linked(data / "results", out)
    assert scans_of(find_jobs([data], out), data) == {"a.nii"}
    assert scans_of(find_jobs([data], data), data) == {"a.nii", "results/b.nii"}


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.nii", tmp_path / "closed" / "b.nii")
    before = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return before(path)

    monkeypatch.setattr("os.scandir", scandir)
    assert scans_of(find_jobs([tmp_path], tmp_path / "out"), tmp_path) == {"a.nii"}
    assert "closed: cannot be read (Permission denied), so its scans are left out" in caplog.text


def test_equal_names_do_not_stop_the_others(tmp_path: Path) -> None:
    for name, content in {"a.nii": b"one", "a_T1w.nii": b"two", "b.nii": b"three"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"other"))
    refused, other = find_jobs([tmp_path], tmp_path / "out")
    assert other.scan.name == "b.nii"
    assert refused.refused == (
        f"{tmp_path / 'a.nii.gz'} and {tmp_path / 'a.nii'} and 1 more would all give a_*; they are not the same "
        "scan: rename or remove one"
    )


def test_one_scan_zipped_and_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.nii").write_bytes(b"x" * (3 << 20))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"x" * (3 << 20)))
    (job,) = find_jobs([tmp_path], tmp_path / "out")
    assert (job.scan.name, job.refused) == ("a.nii.gz", "")
    assert f"{tmp_path / 'a.nii'} holds the same scan as {tmp_path / 'a.nii.gz'}, which is taken" in caplog.text
    for name, content in (("a.nii", b"x" * (3 << 20) + b"y"), ("a.nii.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="would both give a_"):
            find_jobs([tmp_path], tmp_path / "out")


def test_advice_on_equal_names(tmp_path: Path) -> None:
    files = [tmp_path / folder / "s" / "T1.nii" for folder in ("one", "two")]
    touch(*files)  # that they are equal does not make them one: people may have been mixed up
    with pytest.raises(InputError, match="name the folder that holds them instead of the files"):
        find_jobs(files, tmp_path / "out")
    assert scans_of(find_jobs([tmp_path], tmp_path / "out"), tmp_path) == {"one/s/T1.nii", "two/s/T1.nii"}  # it helps
    with pytest.raises(InputError, match="segment each folder into one of its own"):
        find_jobs([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_of_the_same_name_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nii")
    touch(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="would both give a_"):
        find_jobs([tmp_path], tmp_path / "out")


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
