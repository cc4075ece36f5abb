"""Curves: every point is measured once, of what it says."""

import pytest
from bundles import CommandLine, tiny_bundle, write_scan

for package in ("matplotlib", "SimpleITK"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'edgemuse[dev]'")
pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'edgemuse[dev]'")

from edgemuse.bench import scaling
from edgemuse.bench.rows import read_rows
from edgemuse.bench.run import Subject, scans_in
from edgemuse.runtime.bundle import open_bundle
from edgemuse.runtime.scan import open_scan

OURS = "edgemuse/openvino/fp32/reference"


def test_points_vary_what_they_say(tmp_path):
    scan = write_scan(tmp_path / "data" / "a_T1w.nii.gz")
    subject = Subject(open_bundle(tiny_bundle(tmp_path / "tiny.bundle")), None, scans_in(scan.parent), None)
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


def test_curves_are_measured_once_and_drawn(tmp_path, capfd, monkeypatch):
    for name, values in (("SPACINGS", (2.0,)), ("CLASSES", (9,)), ("SCANS", (1, 3))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setattr(scaling, "cpu_cores", lambda: 1)
    scan = write_scan(tmp_path / "data" / "a_T1w.nii.gz")
    bundle = tiny_bundle(tmp_path / "tiny.bundle")
    arguments = ["bench", bundle, "--data", scan.parent, "-o", tmp_path / "report", "--systems", OURS, "--scaling"]
    command = CommandLine(capfd, tmp_path / "engines")
    ran = command(*arguments, "--repeats", 1)
    assert ran.code == 0, ran.err
    rows = read_rows(tmp_path / "report")
    found = scaling.curves(rows)
    assert {axis: [point[0] for point in curve] for axis, curve in found.items()} == {
        "spacing": [2.0], "classes": [9], "threads": [1], "scans": [1, 3]
    }  # fmt: skip
    assert [len(row["scan_seconds"]) for row in rows if row.get("axis") == "scans"] == [1, 3]
    assert (tmp_path / "report" / "figures" / "scaling.svg").exists()
    assert command(*arguments, "--repeats", 1).code == 0
    assert len(read_rows(tmp_path / "report")) == len(rows)
