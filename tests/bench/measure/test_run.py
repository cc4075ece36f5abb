"""Measuring: what is run in which order, what is kept, what a second run finds. No test looks at the clock."""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from bundles import CommandLine, edit_manifest, head_image, tiny_bundle, tiny_cascade, write_scan

for package in ("matplotlib", "SimpleITK", "onnx"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")

from edgemuse.bench.measure.accuracy import read_labels
from edgemuse.bench.measure.process import ProcessFailure, joules_between, measure
from edgemuse.bench.measure.rows import CONTEXT, NAME, Results, read_rows
from edgemuse.bench.measure.run import Checkpoints, Subject, measure_all, scans_in, schedule, source_of
from edgemuse.bench.measure.systems import System, all_systems, baseline, parse_system, select
from edgemuse.bench.measure.worker import STAGES, Stages
from edgemuse.calibration.scans import Source
from edgemuse.engines.errors import InputError, OutputError
from edgemuse.runtime.model.bundle import open_bundle

OURS, PEER = "edgemuse/openvino/fp32/reference", "plain/openvino"


@pytest.fixture
def command(capfd, tmp_path):
    return CommandLine(capfd, tmp_path / "engines")


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate("ab"):
        image = head_image(seed=seed)
        write_scan(tmp_path / "data" / f"{name}_T1w.nii.gz", image)
        write_scan(tmp_path / "data" / f"{name}_dseg.nii.gz", (image > 100).astype(np.uint8) * 10)
    return tmp_path / "data"


def test_a_run_measures_everything_and_a_second_finds_it_done(command, data, tmp_path):
    report = tmp_path / "report"
    bundle = tiny_bundle(tmp_path / "tiny.bundle")
    arguments = ["bench", bundle, "--data", data, "-o", report, "--systems", OURS, "--systems", PEER]
    arguments += ["--repeats", "1", "--threads", "1"]
    ran = command(*arguments)
    assert ran.code == 0, ran.err
    rows = read_rows(report)
    runs = [(row["scan"], row["round"], row["system"]) for row in rows if row["kind"] == "run"]
    assert runs == [(scan, n, system) for scan in "ab" for n in (0, 1) for system in (OURS, PEER)]
    assert [row["system"] for row in rows if row["kind"] == "batch"] == [OURS, PEER]
    for row in rows:
        assert set(CONTEXT) <= set(row)
        if row["kind"] in ("run", "batch"):
            assert set(STAGES) == set(row["stages"])
            assert sum(row["stages"].values()) == pytest.approx(row["seconds"])
            assert row["peak_bytes"] > 10e6
            assert row["engine"]["threads"] == 1
    ours, theirs = (read_labels(report / "labels" / s.replace("/", "_") / "a_dseg.nii.gz")[0] for s in (OURS, PEER))
    assert len(np.unique(ours)) > 2
    assert (ours == theirs).mean() > 0.999  # the same network, its head first or last
    scores = {(row["system"], row["scan"], row["against"]) for row in rows if row["kind"] == "accuracy"}
    assert scores == {(system, scan, to) for system in (OURS, PEER) for scan in "ab" for to in ("truth", OURS)}

    before = (report / NAME).read_text()
    with (report / NAME).open("a") as file:
        file.write('{"kind": "run", "half')  # as an interrupted run leaves it
    assert command(*arguments).code == 0
    assert (report / NAME).read_text() == before

    fewer = command("bench", bundle, "--data", data, "-o", report, "--systems", PEER, *arguments[-4:])
    assert fewer.code == 0, fewer.err
    assert (report / NAME).read_text() == before  # the baseline is still the report's, not the only one asked for

    write_scan(data / "a_T1w.nii.gz", head_image(seed=7))
    for options, reason in ((arguments, "another a_T1w.nii.gz"), ([*arguments[:-1], "2"], "threads")):
        refused = command(*options)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert reason in refused.err
    assert (report / NAME).read_text() == before


def test_rounds_that_are_added_later_are_warm_too(data, tmp_path, monkeypatch):
    taken = []

    def run_step(step, subject, work, cache):
        taken.append((step.round, cache.exists()))
        write_scan(work / "output" / "a_dseg.nii.gz")
        return {"failed": False, "seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr("edgemuse.bench.measure.run.run_step", run_step)
    subject = Subject(open_bundle(tiny_bundle(tmp_path / "tiny.bundle")), None, scans_in(data)[:1], None)
    results = Results(tmp_path / "report", dict.fromkeys(CONTEXT, "x"))
    for repeats in (1, 2):
        measure_all(subject, schedule([parse_system(OURS)], subject.scans, repeats, batch=False), results, print)
    assert taken == [(0, False), (1, True), (0, False), (2, True)]
    assert [row["round"] for row in results.rows] == [0, 1, 2]


def test_a_truth_of_another_protocol_is_refused_before_anything_is_measured(command, data, tmp_path):
    write_scan(data / "b_dseg.nii.gz", np.full((24, 28, 20), 3, np.uint8))
    refused = command("bench", tiny_bundle(tmp_path / "tiny.bundle"), "--data", data, "-o", tmp_path / "report")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--mapping" in refused.err
    assert not (tmp_path / "report").exists()


def test_a_system_that_fails_is_a_row_with_its_reason(command, data, tmp_path):
    bundle = tiny_bundle(tmp_path / "tiny.bundle")
    write_scan(data / "b_T1w.nii.gz", np.full((24, 28, 20), 7, np.int16))
    ran = command("bench", bundle, "--data", data, "-o", tmp_path / "r", "--systems", OURS, "--repeats", 1)
    assert ran.code == 0, ran.err
    runs = [(row["scan"], row["round"], row["failed"]) for row in read_rows(tmp_path / "r") if row["kind"] == "run"]
    assert runs == [("a", 0, False), ("a", 1, False), ("b", 0, True)]
    assert "every voxel is 7" in (tmp_path / "r" / "report.md").read_text()


def test_nnunets_own_predictor_is_the_baseline(command, data, tmp_path, model_folder):
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install '.[dev]'")
    from edgemuse.export.exporter import ExportOptions, export_model

    folder = model_folder(mirror_axes=None)
    bundle = export_model(folder, tmp_path / "model.bundle", ExportOptions(orientation="LPS"))
    (data / "b_T1w.nii.gz").unlink()
    for name in ("a", "b"):
        (data / f"{name}_dseg.nii.gz").unlink()
    report = tmp_path / "report"
    arguments = ["bench", bundle, "--data", data, "-o", report, "--reference", folder, "--repeats", 1, "--threads", 1]
    ran = command(*arguments, "--systems", "nnunet/eager", "--systems", OURS)
    assert ran.code == 0, ran.err
    rows = read_rows(report)
    for row in rows:
        if row["kind"] == "run":
            assert min(row["stages"].values()) >= 0
            assert row["stages"]["infer"] > 0
    same = {row["system"]: row["agreement"] for row in rows if row["kind"] == "accuracy"}
    assert set(same) == {"nnunet/eager", OURS}
    assert min(same.values()) > 0.99  # nnU-Net sums in half precision
    assert len(np.unique(read_labels(report / "labels" / "nnunet_eager" / "a_dseg.nii.gz")[0])) > 3


def test_the_reference_must_be_what_the_bundle_was_exported_from(tmp_path):
    folder = tmp_path / "model"
    for fold, data in (("0", b"zero"), ("1", b"one")):
        (folder / f"fold_{fold}").mkdir(parents=True)
        (folder / f"fold_{fold}" / "checkpoint_best.pth").write_bytes(data)
        (folder / f"fold_{fold}" / "checkpoint_final.pth").write_bytes(data + b", later")

    def source(**digests):
        path = tiny_bundle(tmp_path / f"{len(list(tmp_path.iterdir()))}.bundle")
        return open_bundle(edit_manifest(path, source={"checkpoint_sha256": digests}))

    one = hashlib.sha256(b"one").hexdigest()
    assert source_of(source(**{"1": one}), folder) == Checkpoints(folder, ("1",), "checkpoint_best.pth")
    for bundle, reason in ((source(**{"0": one}), "no checkpoint of fold 0"), (source(), "export it again")):
        with pytest.raises(InputError, match=reason):
            source_of(bundle, folder)


def test_a_cascade_is_measured(command, data, tmp_path):
    cascade, report = tiny_cascade(tmp_path / "tiny.cascade"), tmp_path / "report"
    (data / "b_T1w.nii.gz").unlink()
    (data / "b_dseg.nii.gz").unlink()
    arguments = ["bench", cascade, "--data", data, "-o", report, "--systems", OURS, "--repeats", 1]
    ran = command(*arguments)
    assert ran.code == 0, ran.err
    row = next(row for row in read_rows(report) if row["kind"] == "run")
    assert set(row["engine"]) == {"mask", "regions"}
    assert set(row["stages"]) == set(STAGES)
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"])
    refused = command(*arguments, "--reference", tmp_path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "cascade" in refused.err


def test_a_stage_that_several_threads_are_in_counts_once():
    from threading import Barrier

    stages = Stages()
    barrier = Barrier(3)

    def work():
        if barrier.wait(10) == 0:
            clock[0] += 1
        barrier.wait(10)

    def now():
        return clock[0]

    clock = [0.0]
    with mock.patch("edgemuse.bench.measure.worker.time.perf_counter", now):
        timed = stages.timed("head", work)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: timed(), range(3)))
    assert stages.seconds == {"head": 1.0}


def test_rounds_take_the_systems_in_turn(tmp_path):
    a, b = System("plain", ("a",)), System("plain", ("b",))
    steps = schedule([a, b], [Source(tmp_path / "x.nii", "", None)], 2, batch=True)
    assert [(step.system, step.round) for step in steps] == [(a, 0), (b, 0), (a, 1), (b, 1), (a, 2), (b, 2)]


def test_systems_are_selected_by_the_beginning_of_their_name(tmp_path):
    systems = all_systems(open_bundle(tiny_bundle(tmp_path / "tiny.bundle", mirror_axes=(0,))), with_reference=True)
    assert systems[0] == baseline(systems) == System("nnunet", ("eager", "mirrored"))
    assert all(parse_system(system.name) == system for system in systems)
    nnunet = {f"nnunet/{variant}" for variant in ("eager/mirrored", "eager", "compile", "channels-last", "bf16")}
    profiles = {f"edgemuse/openvino/fp32/{profile}" for profile in ("reference", "balanced", "fast")}
    assert {system.name for system in systems} >= nnunet | profiles | {"plain/openvino"}
    assert {system.family for system in select(systems, ["plain", "edgemuse/openvino"])} == {"plain", "edgemuse"}
    with pytest.raises(InputError, match="plain/openvino"):
        select(systems, ["plain/open"])


def test_scans_and_their_truth(data, tmp_path):
    write_scan(data / "c.nii", head_image(seed=2))
    truths = {source.path.name: source.truth and source.truth.name for source in scans_in(data)}
    assert truths == {"a_T1w.nii.gz": "a_dseg.nii.gz", "b_T1w.nii.gz": "b_dseg.nii.gz", "c.nii": None}
    write_scan(data / "c_T1w.nii.gz", head_image(seed=3))
    with pytest.raises(InputError, match="same name"):
        scans_in(data)


def test_peak_memory_is_that_of_the_whole_tree():
    child = "import time; x = bytearray(150 << 20); time.sleep(0.5)"
    code = f"import subprocess, sys; y = bytearray(60 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    alone = measure([sys.executable, "-c", child], {}).peak
    assert measure([sys.executable, "-c", code], {}).peak - alone > 55 << 20


def test_a_process_that_fails_says_why():
    with pytest.raises(ProcessFailure, match=r"exit code 3: why"):
        measure([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"], {})


def test_energy_counters_that_start_again():
    assert joules_between({"a": (100, 1000), "b": (0, 1000)}, {"a": (50, 1000), "b": (10, 1000)}) == 960e-6
    assert joules_between({}, {}) is None


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="no results"):
        read_rows(tmp_path)
    for text, reason in (("{}\n", "not a measurement"), ("x\n", "not JSON"), ("[]\n", "not a measurement")):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(InputError, match=reason):
            read_rows(tmp_path)


def test_a_half_line_alone_is_dropped(tmp_path):
    (tmp_path / NAME).write_text('{"kind": "r')
    shared = dict.fromkeys(CONTEXT, "x")
    Results(tmp_path, shared).add(kind="run", system="s")
    assert [row["system"] for row in read_rows(tmp_path)] == ["s"]


@pytest.mark.parametrize("name", ["report.html", "report.md", "figures"])
def test_a_folder_that_holds_another_report_is_left_alone(name, tmp_path):
    """Before anything is measured; what a report of its own holds is replaced."""
    (tmp_path / name).write_text("mine")
    shared = dict.fromkeys(CONTEXT, "x")
    with pytest.raises(OutputError, match=f"{name} is not of a report of 'edgemuse bench'"):
        Results(tmp_path, shared)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).unlink()
    Results(tmp_path, shared).add(kind="run", system="s")
    (tmp_path / name).touch()
    assert len(Results(tmp_path, shared).rows) == 1


def test_rows_of_another_machine_are_not_gone_on_with(tmp_path):
    shared = dict.fromkeys(CONTEXT, "x")
    Results(tmp_path, shared).add(kind="run", system="s")
    assert Results(tmp_path, shared).find(system="s") is not None
    with pytest.raises(OutputError, match="differ in machine"):
        Results(tmp_path, shared | {"machine": "y"})
    assert json.loads((tmp_path / NAME).read_text())["machine"] == "x"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["-o", "r", "--data", "empty"], "no scan"), (["-o", "r", "--systems", "nnunet"], "choose from"),
     (["-o", "r", "--data", "nowhere"], "nowhere"), ([], "--output"), (["none.bundle", "-o", "r"], "none.bundle")],
)  # fmt: skip
def test_bad_usage_costs_one_line(arguments, reason, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    ran = command("bench", *arguments) if arguments else command("bench", "run")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert reason in ran.err
    assert not (tmp_path / "r").exists()
