"""LoadGen's scenarios: its accuracy log holds the labels that were measured, and its rule is kept or missed."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, tiny_bundle, write_scan

for package in ("matplotlib", "mlperf_loadgen", "SimpleITK"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")

from edgemuse.bench.benchmark import score_all
from edgemuse.bench.measure import mlperf
from edgemuse.bench.measure.accuracy import read_labels, same_protocol
from edgemuse.bench.measure.rows import CONTEXT, Results
from edgemuse.bench.measure.run import Subject, label_path, measure_all, scans_in, schedule
from edgemuse.bench.measure.scores import accuracy
from edgemuse.bench.measure.systems import parse_system
from edgemuse.bench.report.report import write_report
from edgemuse.engines.errors import BackendError
from edgemuse.runtime.model.bundle import open_bundle

OURS = parse_system("edgemuse/openvino/fp32/reference")
MACHINE = {"cpu": "none", "cores": 2, "memory_bytes": 0, "system": "none"}
SHARED = dict.fromkeys(CONTEXT, "x") | {"machine": MACHINE, "versions": {}, "threads": 1}


@pytest.fixture
def subject(tmp_path):
    for seed, name in enumerate("ab"):
        image = head_image(seed=seed)
        write_scan(tmp_path / "data" / f"{name}_T1w.nii.gz", image)
    write_scan(tmp_path / "data" / "a_dseg.nii.gz", (head_image() > 100).astype(np.uint8) * 10)
    bundle = open_bundle(tiny_bundle(tmp_path / "tiny.bundle"))
    return Subject(bundle, None, scans_in(tmp_path / "data"), 1)


def test_the_accuracy_log_holds_what_was_measured(subject, tmp_path):
    structures = same_protocol(subject.model.labels)
    results = Results(tmp_path / "report", SHARED)
    measure_all(subject, schedule([OURS], subject.scans, 0, batch=False), results, print)
    score_all(subject, results, structures, structures, print)
    judge = mlperf.judge_of(subject, results, structures, structures)
    assert (judge.against, [scan.path.name for scan in judge.others]) == ("truth", ["a_T1w.nii.gz"])
    mlperf.measure(subject, OURS, judge, results)
    found = mlperf.scenarios(results.rows)
    assert [scenario.scenario for scenario in found] == list(mlperf.SCENARIOS)
    for scenario in found:
        assert scenario.dice == accuracy(results.rows, OURS.name, "truth").dice
        assert scenario.share == 1
        assert scenario.queries >= len(subject.scans)
        assert scenario.result > 0
        log = results.folder / "mlperf" / OURS.name.replace("/", "_") / scenario.scenario / mlperf.ACCURACY_LOG
        for entry in json.loads(log.read_text()):
            kept = label_path(results.folder, OURS.name, subject.scans[entry["qsl_idx"]].path)
            logged = nib.Nifti1Image.from_bytes(gzip.decompress(bytes.fromhex(entry["data"])))
            np.testing.assert_array_equal(np.asanyarray(logged.dataobj), read_labels(kept)[0])
    count = len(results.rows)
    mlperf.measure(subject, OURS, judge, results)
    assert len(results.rows) == count
    text = write_report(results.folder, results.rows).with_suffix(".md").read_text()
    assert text.count("| 100.000% | kept | kept |") == 2


@pytest.mark.parametrize(
    ("share", "cells"), [(1.0, "kept | kept"), (0.995, "kept | missed"), (0.98, "missed | missed")]
)
def test_the_rule_is_kept_or_missed(share, cells, tmp_path):
    score = {"name": "s", "dice": 0.8, "hd95_mm": 1.0, "found_mm3": 9.0, "truth_mm3": 9.0, "shift_voxels": 0.0}
    run = {"kind": "run", "system": OURS.name, "scan": "a", "round": 1, "seconds": 1.0, "stages": {}, "failed": False}
    scored = {"kind": "accuracy", "system": OURS.name, "scan": "a", "against": "truth", "agreement": 1.0}
    logged = {"kind": "mlperf", "system": OURS.name, "scenario": "Offline", "against": "truth", "failed": False}
    rows = [
        SHARED | run | {"peak_bytes": 1, "joules": None},
        SHARED | scored | {"structures": [score], "absent_in_both": 0},
        SHARED | logged | {"dice": 0.8 * share, "result": 2.0, "queries": 3, "valid": True},
    ]
    text = write_report(tmp_path, rows).with_suffix(".md").read_text()
    assert f"| {cells} | valid |" in text
    assert ("of the baseline's Dice, less than 99%" in text) == (share < 0.99)


@pytest.mark.parametrize("indices", [[0], [0, 0], [0, 1, 1]])
def test_a_log_that_lacks_a_scan_or_repeats_one_is_refused(indices, subject, tmp_path):
    log = tmp_path / "log.json"
    log.write_text(json.dumps([{"seq_id": n, "qsl_idx": index, "data": ""} for n, index in enumerate(indices)]))
    judge = mlperf.Judge("truth", {}, same_protocol(subject.model.labels))
    with pytest.raises(BackendError, match="every scan once"):
        mlperf.logged_dice(log, OURS, subject, judge, tmp_path)


def test_loadgen_that_is_not_installed_costs_one_line(subject, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = CommandLine(capfd, tmp_path)("bench", subject.model.path, "-o", tmp_path / "report", "--mlperf")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "pip install mlcommons-loadgen" in ran.err
