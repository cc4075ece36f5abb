"""`edgemuse bids`: which images, which names, and that a BIDS validator takes what comes out."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, snapshot, tiny_bundle, write_scan

from edgemuse.runtime.batch.bids import find_jobs, segmentation_label
from edgemuse.runtime.regions import volumes
from edgemuse.runtime.results import files as outputs
from edgemuse.runtime.results.files import DLMUSE_CSV

IMAGES = ("sub-01/anat/sub-01", "sub-02/ses-a/anat/sub-02_ses-a", "sub-02/ses-b/anat/sub-02_ses-b_run-2")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A valid BIDS dataset of three T1w images, one of them not compressed, with other images beside them."""
    root = tmp_path / "data"
    for n, image in enumerate(IMAGES):
        write_scan(root / f"{image}_T1w.nii{'.gz' if n else ''}", head_image(seed=n))
    for image in IMAGES:
        (root / f"{image}_T1w.json").write_text("{}")
    write_scan(root / "sub-01/anat/sub-01_T2w.nii.gz")
    write_scan(root / "derivatives/other/sub-01/anat/sub-01_desc-x_T1w.nii.gz")
    description = {
        "Name": "heads",
        "BIDSVersion": "1.11.1",
        "DatasetType": "raw",
        "License": "CC0",
        "Authors": ["A", "B"],
    }
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / "README").write_text(
        "Ellipsoids with a core, made for tests; nobody was scanned for this dataset at all.\n"
    )
    (root / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\n")
    return root


def test_names_and_places(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = data / "derivatives" / "edgemuse"
    ran = cli("bids", data, out, "participant", "-m", model)
    assert ran.code == 0, ran.err
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    expected = {"dataset_description.json", ".bidsignore"}
    for image in IMAGES:
        stem = f"{image}_seg-tiny"
        expected |= {f"{stem}_{end}" for end in ("dseg.nii.gz", "dseg.tsv", "dseg.json", "volumes.tsv")}
        expected.add(f"{image[:6]}/figures/{Path(stem).name}_qc.png")
    assert found == expected
    assert {str(Path(line).relative_to(out)) for line in ran.out.splitlines()} == {
        name for name in expected if name.startswith("sub-")
    }
    sidecar = json.loads((out / f"{IMAGES[2]}_seg-tiny_dseg.json").read_text())
    assert sidecar["Sources"] == [f"bids:raw:{IMAGES[2]}_T1w.nii.gz"]
    assert sidecar["model"]["name"] == "tiny"
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "edgemuse"
    assert description["DatasetLinks"]["raw"] == data.resolve().as_uri()


def test_labels_are_those_of_segment(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert cli("bids", data, tmp_path / "out", "participant", "-m", model).code == 0
    assert cli("segment", data / f"{IMAGES[1]}_T1w.nii.gz", "-o", tmp_path / "plain", "-m", model).code == 0
    (plain,) = (tmp_path / "plain").glob("*_dseg.nii.gz")
    assert (tmp_path / "out" / f"{IMAGES[1]}_seg-tiny_dseg.nii.gz").read_bytes() == plain.read_bytes()


def test_a_second_run_and_a_second_model(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    before = snapshot(out)
    ran = cli("bids", data, out, "participant", "-m", model)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.count("done already") == len(IMAGES)
    assert snapshot(out) == before
    other = tiny_bundle(tmp_path / "other.bundle", seed=5)
    (other / "bundle.json").write_text((other / "bundle.json").read_text().replace('"tiny"', '"An other-1"'))
    assert cli("bids", data, out, "participant", "-m", other).code == 0
    assert (out / f"{IMAGES[0]}_seg-Another1_dseg.nii.gz").is_file()
    assert {name: content for name, content in snapshot(out).items() if name in before} == before


CHOICES = {
    "--participant-label 01": {0},
    "--participant_label 01 02": {0, 1, 2},
    "--participant-label sub-02": {1, 2},
    "--participant-label 02 --session-label b": {2},
    "--session-label a ses-b": {1, 2},
    "": {0, 1, 2},
}


@pytest.mark.parametrize("options", CHOICES)
def test_choice_of_participants(options: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("bids", data, tmp_path / "out", "participant", *options.split(), "-m", model, "--no-qc")
    assert ran.code == 0, ran.err
    maps = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*_dseg.nii.gz")}
    assert maps == {f"{IMAGES[n]}_seg-tiny_dseg.nii.gz" for n in CHOICES[options]}


EMPTY = {
    "--participant-label 01 07": ("sub-07", {0}),
    "--participant-label 03 01 04": ("sub-03, sub-04", {0}),
    "--session-label a 77": ("ses-77", {1}),
    "--participant-label 01 02 --session-label b ses-c": ("sub-01, ses-c", {2}),
}
"""Labels of which there is no T1w image, and the images of the others."""


@pytest.mark.parametrize("options", EMPTY)
def test_labels_without_an_image_are_named(
    options: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    names, images = EMPTY[options]
    write_scan(data / "sub-03/anat/sub-03_T2w.nii.gz")
    (data / "sub-04").mkdir()
    ran = cli("bids", data, tmp_path / "out", "participant", *options.split(), "-m", model, "--no-qc")
    assert ran.code == 0
    assert f"edgemuse: {data}: no T1w image of {names}; " in ran.err
    maps = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*_dseg.nii.gz")}
    assert maps == {f"{IMAGES[n]}_seg-tiny_dseg.nii.gz" for n in images}


def test_labels_without_volumes_are_named(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("bids", data, out, "participant", "-m", model, "--no-qc").code == 0
    ran = cli("bids", data, out, "group", "--participant-label", "01", "07", "--session-label", "a")
    assert (ran.code, ran.out) == (2, "")
    assert "no volumes of sub-01, sub-07, ses-a there; run" in ran.err
    ran = cli("bids", data, out, "group", "--participant-label", "01", "07")
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    assert ran.err == f"edgemuse: {out}: no volumes of sub-07; those of the others are merged\n"


def test_images_that_hold_no_magnitudes_are_left_out(data: Path, model: Path, tmp_path: Path) -> None:
    for part in ("mag", "phase", "real", "imag"):
        write_scan(data / f"sub-01/anat/sub-01_part-{part}_T1w.nii.gz")
    jobs = find_jobs(data, tmp_path, "DLMUSE", ("01",), ())
    assert [job.scan.name for job in jobs] == ["sub-01_T1w.nii", "sub-01_part-mag_T1w.nii.gz"]


def test_a_participant_may_be_a_link(data: Path, tmp_path: Path) -> None:
    (data / "sub-01").rename(tmp_path / "elsewhere")
    (data / "sub-01").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    jobs = find_jobs(data, tmp_path / "out", "DLMUSE", ("01",), ())
    assert [job.outputs["dseg.nii.gz"].name for job in jobs] == ["sub-01_seg-DLMUSE_dseg.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{data}", "{out}", "participant", "--participant-label", "07", "sub-08"], " of sub-07, sub-08\n"),
        (["{data}", "{out}", "participant", "--session-label", "77"], " of ses-77\n"),
        (["{data}", "{out}", "participant", "--participant-label", "../data/sub-01"], " of sub-../data/sub-01\n"),
        (["{data}", "{out}", "participant", "--participant-label"], "requires an argument"),
        (["{data}", "{out}", "participant", "--participant-label", "01", "--session-label", "a"], "no T1w image"),
        (["{data}/sub-01", "{out}", "participant"], "not the root of a BIDS dataset"),
        (["{data}/nowhere", "{out}", "participant"], "not the root of a BIDS dataset"),
        (["{data}", "{data}", "participant"], "a dataset that edgemuse did not make"),
        (["{data}", "{out}", "everything"], "'participant', 'group'"),
        (["{data}", "{out}", "group"], "participant' first"),
        (["{data}", "{out}", "group", "--shard", "1/2"], "are for participant"),
        (["{data}", "{data}", "group"], "a dataset that edgemuse did not make"),
    ],
)
def test_refusals(arguments: list[str], reason: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    ran = cli("bids", "-m", model, *(word.format(data=data, out=tmp_path / "out") for word in arguments))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert reason in ran.err
    assert snapshot(tmp_path) == before


def test_two_files_of_one_image(data: Path, tmp_path: Path, model: Path, cli: CommandLine) -> None:
    shutil.copy(data / f"{IMAGES[1]}_T1w.nii.gz", data / f"{IMAGES[0]}_T1w.nii.gz")
    ran = cli("bids", data, tmp_path / "out", "participant", "-m", model, "--no-qc")
    assert ran.code == 2
    assert "would both give sub-01_seg-tiny_*; they are not the same scan: rename or remove one" in ran.err
    assert "3 scans: 2 segmented, 1 failed" in ran.err


def test_group_merges_the_tables(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    ran = cli("bids", data, out, "group")
    assert (ran.code, ran.out, ran.err) == (0, f"{out}/group_seg-tiny_volumes.tsv\n", "")
    with (out / "group_seg-tiny_volumes.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 5 * len(IMAGES)
    assert [row["scan"] for row in rows[::5]] == [Path(image).name for image in IMAGES]
    assert [(row["participant_id"], row["session_id"]) for row in rows[::5]] == [
        ("sub-01", "n/a"),
        ("sub-02", "ses-a"),
        ("sub-02", "ses-b"),
    ]
    for row in rows:
        image = next(image for image in IMAGES if Path(image).name == row["scan"])
        labels = np.asanyarray(nib.load(out / f"{image}_seg-tiny_dseg.nii.gz").dataobj)
        assert int(row["voxels"]) == (labels == int(row["index"])).sum()
    assert cli("bids", data, out, "group", "--participant-label", "01").code == 0
    assert len((out / "group_seg-tiny_volumes.tsv").read_text().splitlines()) == 6
    assert cli("bids", data, out, "group", "--session-label", "a").code == 0
    with (out / "group_seg-tiny_volumes.tsv").open(newline="") as file:
        assert {row["session_id"] for row in csv.DictReader(file, delimiter="\t")} == {"ses-a"}


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (lambda path: path.symlink_to("../.git/annex/objects/MD5E-s9--a"), "a pointer of git-annex"),
        (lambda path: path.symlink_to("gone"), "a link to gone, which is not there"),
        (lambda path: path.write_text("/annex/objects/MD5E-s9--a\n"), "a pointer of git-annex"),
        (lambda path: path.write_text("x" * 200_000), "cannot be read (field larger than field limit (131072))"),
        (lambda path: path.mkdir(), "cannot be read ("),
    ],
    ids=["link of git-annex", "link to nothing", "pointer of git-annex", "endless", "folder"],
)
def test_group_refuses_a_table_that_is_not_here(
    put: Callable[[Path], Any], said: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    path = out / f"{IMAGES[0]}_seg-tiny_volumes.tsv"
    path.unlink()
    put(path)
    before = set(out.rglob("*"))
    ran = cli("bids", data, out, "group")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"edgemuse: {path}: {said}")
    assert set(out.rglob("*")) == before


def test_group_replaces_its_own_tables_alone(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Neither one made by hand, nor one corrected since, nor one for which there is a link."""
    out, table = tmp_path / "out", tmp_path / "out" / "group_seg-tiny_volumes.tsv"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    table.write_text("my own table")
    for _ in range(2):
        before = snapshot(out)
        ran = cli("bids", data, out, "group")
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert f"{table} exists and is not as 'edgemuse bids' wrote it" in ran.err
        assert "--overwrite" in ran.err
        assert snapshot(out) == before
        assert cli("bids", data, out, "group", "--overwrite").code == 0
        assert cli("bids", data, out, "group", "--participant-label", "01").code == 0
        assert cli("bids", data, out, "group").code == 0
        assert table.read_text().startswith("participant_id")
        with table.open("a") as file:
            file.write("corrected")
    table.rename(tmp_path / "elsewhere")
    table.symlink_to(tmp_path / "elsewhere")
    assert cli("bids", data, out, "group").code == 2
    assert table.is_symlink()


@pytest.mark.parametrize("written", ["record alone", "all"])
def test_group_goes_on_after_a_kill(
    written: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the note of the hashes and before the table, or after both."""
    out, table = tmp_path / "out", tmp_path / "out" / "group_seg-tiny_volumes.tsv"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    assert cli("bids", data, out, "group", "--participant-label", "01").code == 0
    before = table.read_bytes()
    assert cli("bids", data, out, "group").code == 0
    if written == "record alone":
        table.write_bytes(before)
    assert cli("bids", data, out, "group", "--participant-label", "02").code == 0


@pytest.mark.parametrize("name", ["dataset_description.json", ".bidsignore"])
def test_files_of_a_dataset_that_appear_meanwhile_stay(
    name: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process starts the same dataset; or a person does, and then it is none of edgemuse."""
    out, ours = tmp_path / "out", '{"GeneratedBy": [{"Name": "edgemuse"}]}'
    real = outputs.write_files

    def later(contents: Any, *rest: Any, **named: Any) -> None:
        for path in contents:
            if path.name == name:
                path.write_text(ours)
        real(contents, *rest, **named)

    monkeypatch.setattr(outputs, "write_files", later)
    ran = cli("bids", data, out, "participant", "-m", model)
    assert ran.code == 0, ran.err
    assert (out / name).read_text() == ours


def test_group_merges_tables_of_dlmuse(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("bids", data, out, "participant", "-m", model).code == 0
    written = [volumes.dlmuse_csv(Path(image).name, {4: n, 11: 7}, 1.5) for n, image in enumerate(IMAGES)]
    for image, text in zip(IMAGES, written, strict=True):
        (out / f"{image}_seg-DLMUSE_{DLMUSE_CSV}").write_text(text)
    assert cli("bids", data, out, "group").code == 0
    merged = (out / f"group_seg-DLMUSE_{DLMUSE_CSV}").read_text().splitlines()
    assert merged == [written[0].splitlines()[0], *(text.splitlines()[1] for text in written)]
    (out / f"{IMAGES[1]}_seg-DLMUSE_{DLMUSE_CSV}").write_text("MRID,4\nx,1\n")
    ran = cli("bids", data, out, "group")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "not a table like" in ran.err


@pytest.mark.parametrize(
    ("name", "label"), [("DLMUSE", "DLMUSE"), ("edgemuse-t1 v2", "edgemuset1v2"), ("脑", "edgemuse")]
)
def test_label_of_the_model(name: str, label: str) -> None:
    assert segmentation_label(name) == label


def test_bad_image_is_skipped(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    (data / f"{IMAGES[1]}_T1w.nii.gz").write_bytes(b"")
    ran = cli("bids", data, tmp_path / "out", "participant", "-m", model)
    assert ran.code == 2
    assert "the file is empty" in ran.err
    assert len(list((tmp_path / "out").rglob("*_dseg.nii.gz"))) == 2


def test_jobs_without_running(data: Path, tmp_path: Path) -> None:
    jobs = find_jobs(data, tmp_path, "DLMUSE", (), ())
    assert [str(job.scan.relative_to(data)).partition("_T1w")[0] for job in jobs] == list(IMAGES)


def validator() -> str:
    command = shutil.which("bids-validator-deno") or shutil.which(
        str(Path(sys.executable).with_name("bids-validator-deno"))
    )
    if command is None:
        pytest.skip("no BIDS validator here: pip install bids-validator-deno deno")
    return command


@pytest.mark.slow
def test_a_bids_validator_takes_input_and_output(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    command, out = validator(), tmp_path / "out"

    def errors(dataset: Path) -> list[str]:
        done = subprocess.run(
            [command, "--json", str(dataset)], capture_output=True, text=True, check=False, timeout=300
        )
        issues = json.loads(done.stdout)["issues"]["issues"]
        return [f"{issue['code']} {issue.get('location')}" for issue in issues if issue["severity"] == "error"]

    assert cli("bids", data, out, "participant", "-m", model).code == 0
    assert cli("bids", data, out, "group").code == 0
    shutil.rmtree(data / "derivatives")
    assert errors(data) == []
    assert errors(out) == []
    dseg = out / f"{IMAGES[0]}_seg-tiny_dseg.nii.gz"
    dseg.rename(dseg.with_name("sub-01_seg-tiny_labels.nii.gz"))
    assert errors(out) != []  # it does look at names
