"""Curves: every point is measured once, of what it says."""

from dataclasses import replace

import pytest
from bundles import tiny_bundle, write_scan

for package in ("matplotlib", "SimpleITK"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")
pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")

from edgemuse.bench.measure import scaling
from edgemuse.bench.measure.accuracy import read_labels
from edgemuse.bench.measure.rows import CONTEXT, Results
from edgemuse.bench.measure.run import Step, Subject, run_step, scans_in
from edgemuse.bench.measure.systems import parse_system
from edgemuse.bench.report import figures
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.scan.nifti import open_scan

OURS = parse_system("edgemuse/openvino/fp32/reference")


@pytest.fixture
def subject(tmp_path):
    scan = write_scan(tmp_path / "data" / "a_T1w.nii.gz")
    return Subject(open_bundle(tiny_bundle(tmp_path / "tiny.bundle")), None, scans_in(scan.parent), None)


def test_points_vary_what_they_say(subject, tmp_path):
    points = list(scaling.points(subject, tmp_path / "work"))
    assert {point.axis for point in points} == set(scaling.AXES)
    for point in points:
        if point.axis == "spacing":
            assert open_scan(point.scans[0].path).zooms == pytest.approx([point.value] * 3)
        elif point.axis == "classes":
            head = point.subject.model.head()
            assert point.subject.model.manifest.network.classes == len(head.weight) == point.value
        elif point.axis == "threads":
            assert point.subject.threads == point.value
        else:
            assert len(set(point.scans)) == point.value


def test_curves_are_measured_once_warm_and_drawn(subject, tmp_path, monkeypatch):
    taken = []

    def run_step(step, subject, work, cache):
        taken.append(len(step.scans))
        return {"failed": False, "seconds": len(step.scans), "peak_bytes": 10**9}

    monkeypatch.setattr(scaling, "run_step", run_step)
    results = Results(tmp_path / "report", dict.fromkeys(CONTEXT, "x"))
    for work in (tmp_path / "first", tmp_path / "second"):
        scaling.scale(subject, OURS, results, work, print)
    found = scaling.curves(results.rows)
    assert [value for value, _, _ in found["spacing"]] == sorted(scaling.SPACINGS)
    assert [point[:2] for point in found["scans"]] == [(count, count) for count in scaling.SCANS]
    assert taken[-2 * len(scaling.SCANS) :] == [n for count in scaling.SCANS for n in (1, count)]  # each after one
    assert len(taken) == 2 * len(results.rows)
    assert figures.scaling(found, scaling.AXES).startswith(b"<svg")


def test_a_network_of_other_classes_runs(subject, tmp_path):
    bundle = scaling.with_classes(subject.model, 9, tmp_path / "9.bundle")
    row = run_step(Step(OURS, subject.scans, 1, batch=True), replace(subject, model=bundle), tmp_path, tmp_path)
    assert not row["failed"], row
    assert read_labels(tmp_path / "output" / "a_dseg.nii.gz")[0].max() > 5  # as many as the tiny network has
