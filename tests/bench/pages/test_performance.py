"""The performance page: what is run, what goes on after an interruption, and what the tables say."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from bundles import CommandLine, edit_manifest, replace_file, tiny_bundle, tiny_graph, write_scan
from click.testing import CliRunner

for library in ("torch", "nnunetv2", "nncf"):
    pytest.importorskip(library, reason=f"needs {library}: pip install '.[bench,calibrate]'")

from edgemuse.bench.measure.cases import Case, without_mirroring
from edgemuse.bench.measure.process import ProcessFailure, Run
from edgemuse.bench.pages import performance
from edgemuse.bench.pages.page import AGE
from edgemuse.bench.pages.performance import PARTS, Bench, Part, summarise, systems
from edgemuse.bench.pages.performance_report import network_part
from edgemuse.bench.pages.program import Workplace
from edgemuse.runtime.model.bundle import open_bundle

STATE = {"commit": "abc", "machine": {"cpu": "a processor"}, "versions": {"openvino": "1"}}
MACHINE = {"cpu": "a processor", "cores": 2, "memory_bytes": 0, "system": "none"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A tiny bundle with int8, and a truth that is what fp32 gives but for one structure that the model lacks."""
    bundle = replace_file(tiny_bundle(tmp_path / "tiny.bundle", mirror_axes=(0,)), "int8.onnx", tiny_graph())
    edit_manifest(bundle, graphs={"fp32": "fp32.onnx", "int8": "int8.onnx"})
    return Case("tiny", bundle, None, write_scan(tmp_path / "a_T1w.nii.gz"))


@pytest.fixture
def bench(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Measured without processes: every run takes a second more than the one before."""
    runs = iter(range(1, 1000))

    def measure(command: list[str], environment: dict[str, str]) -> Run:
        with mock.patch.dict(os.environ, environment):
            ran = CommandLine(capfd, Path(environment["EDGEMUSE_CACHE_DIR"]))(*command[3:])
        assert ran.code == 0, ran.err
        return Run(float(next(runs)), 10**9, None)

    monkeypatch.setattr(performance, "measure", measure)
    bundle = open_bundle(case.bundle)
    few = [system for system in systems(case, bundle, 2) if "openvino" in system.name]
    return Bench(case, bundle, few, Workplace(tmp_path / "work", STATE))


def test_systems_begin_with_what_the_others_are_compared_with(case: Case) -> None:
    names = [system.name for system in systems(case, open_bundle(case.bundle), 3)]
    assert names[0] == "reference | openvino | fp32"
    assert {"balanced | openvino | int8", "fast | openvino | int8", "fast | onnxruntime | fp32"} <= set(names)
    assert not [name for name in names if name.startswith("reference") and "fp32" not in name]
    assert not [name for name in names if "nnU-Net" in name]
    case = Case(case.name, case.bundle, Path("folder"), case.timed)
    modes = [system.nnunet for system in systems(case, open_bundle(case.bundle), 3) if system.nnunet]
    assert modes == ["off", "on"]


def test_reference_is_measured_without_mirroring_too(bench: Bench, tmp_path: Path) -> None:
    """On a copy of the bundle; what the others are compared with still comes first."""
    plain = without_mirroring(bench.case.bundle, tmp_path / "unmirrored.bundle")
    case = replace(bench.case, unmirrored=plain)
    every = systems(case, bench.bundle, 1)[:2]
    assert [system.name for system in every] == [f"reference{how} | openvino | fp32" for how in ("", ", mirroring off")]
    bench = replace(bench, case=case, systems=every)
    bench.run_all()
    assert [row["copies"] for row in bench.place.of(number=0)] == [2, 1]


def test_first_runs_are_cold_and_the_others_take_turns(bench: Bench) -> None:
    bench.run_all()
    rows = bench.place.rows
    numbers = [row["number"] for row in rows]
    assert numbers == sorted(numbers)
    assert numbers.count(0) == numbers.count(1) == numbers.count(2) == len(bench.systems)
    first = summarise(bench)[0]
    assert first["cold"] == rows[0]["seconds"]
    assert first["seconds"] == np.median([row["seconds"] for row in rows if row["system"] == first["system"]][1:])
    assert first["agreement"] == 1.0
    assert first["operations"] == 2 * 27 * 4 * 16**3 * first["tiles"] * 2  # of the 3x3x3 convolution, mirrored once


def test_what_is_slow_runs_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "LONG", 0.0)
    bench.run_all()
    assert len(bench.place.rows) == len(bench.systems)


def test_an_interrupted_command_goes_on(bench: Bench, tmp_path: Path) -> None:
    bench.run_all()
    path = bench.place.folder / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    place = Workplace(tmp_path / "work", STATE)
    assert len(place.rows) == 3
    Bench(bench.case, bench.bundle, bench.systems, place).run_all()
    done = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["system"], row["number"]) for row in done] == [
        (row["system"], row["number"]) for row in map(json.loads, lines)
    ]


def test_dice_is_over_the_structures_of_the_truth_that_the_model_knows(bench: Bench, tmp_path: Path) -> None:
    system = bench.systems[0]
    bench.row(system, bench.case.timed, 0)
    labels = bench.labels(system, bench.case.timed)
    truth = labels.copy()
    truth[truth == labels.max()] = 999
    truth[0] = 777
    write_scan(tmp_path / "truth.nii.gz", truth.astype(np.int16))
    known = Case("tiny", bench.case.bundle, None, bench.case.timed, (), tmp_path / "truth.nii.gz")
    scored = Bench(known, bench.bundle, bench.systems, bench.place)
    dice = scored.scores(system, bench.case.timed)["dice"]
    others = [n for n in np.unique(labels[1:]) if n not in (0, labels.max())]
    expected = [2 * (labels[1:] == n).sum() / ((labels[1:] == n).sum() + (labels == n).sum()) for n in others]
    assert dice == pytest.approx(np.mean(expected))
    assert scored.verdict(system, "fp32") == "passed"
    moved = scored.labels_path(scored.systems[1], known.timed)
    moved.parent.mkdir(parents=True, exist_ok=True)
    write_scan(moved, np.roll(labels, 1, axis=0).astype(np.int16))
    assert scored.verdict(scored.systems[1], "int8").startswith("agreement 0.")
    assert bench.verdict(system, "fp32") == ""  # without a truth


def test_a_part_has_three_rows_for_every_system(bench: Bench) -> None:
    bench.run_all()
    part = network_part(summarise(bench), {"a": "why"}, {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}, "a processor")
    for system in bench.systems:
        assert part.count(f"| {system.name} |") == 3  # time, stages, share of the peak
    lines = part.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| profile |"))
    assert lines[header + 2].startswith(f"| {bench.systems[0].name} |")
    assert lines[header + 2].count("|") == lines[header].count("|")
    assert "fp32 100, bf16 200, int8 400" in part
    assert "Did not run: a: why" in part
    assert part.startswith("a processor\n")


def test_a_part_is_written_into_the_page(
    case: Case, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age first; the part that is not measured again stays, in its place, and its rows are not used again."""
    page, seen = tmp_path / "performance.md", list[Case]()
    kept = f"## {PARTS['dlmuse'].title}\n\n*Measured on 2026-01-02 at commit def: network 1. Written by `x`.*\n"
    page.write_text(f"# Performance\n\n{kept}")

    def run_all(self: Bench) -> None:
        seen.append(self.case)
        self.row(self.systems[0], self.case.timed, 0)

    monkeypatch.setattr(Bench, "run_all", run_all)
    monkeypatch.setitem(PARTS, "built-in", Part("Built-in model", lambda *arguments: case, 1))
    monkeypatch.setattr(performance, "summarise", lambda bench: [])
    monkeypatch.setattr(performance, "peaks", dict)
    monkeypatch.setattr(performance, "state", lambda: {"commit": "abc", "machine": MACHINE, "versions": {}})
    arguments = [str(tmp_path), "-o", str(page), "--work", str(tmp_path / "other"), "--part", "built-in"]
    (tmp_path / "m").mkdir()
    for folder in (tmp_path / "m", None):
        done = CliRunner().invoke(performance.main, [*arguments, *(["--built-in-folder", str(folder)] * bool(folder))])
        assert done.exit_code == 0, done.output
        assert seen[-1].folder == folder
    text = page.read_text()
    age = AGE.search(text)
    assert age is not None
    assert age.group(2, 3) == ("abc", f"tiny {bench.bundle.sha256[:12]}")
    assert text.index("a processor") > text.index("## Built-in model\n\n*Measured on")
    assert text.endswith(kept)
    assert text.startswith("*Measured a part at a time, the oldest on 2026-01-02, the newest on ")


def test_a_system_that_fails_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    worst, works = bench.systems[-1], performance.measure

    def measure(command: list[str], environment: dict[str, str]) -> Run:
        if tuple(command[-len(worst.arguments) :]) == worst.arguments:
            raise ProcessFailure("exit code 2: too little memory")
        return works(command, environment)

    monkeypatch.setattr(performance, "measure", measure)
    bench.run_all()
    assert bench.failed == {worst: "exit code 2: too little memory"}
    assert [row["system"] for row in summarise(bench)] == [system.name for system in bench.systems[:-1]]
