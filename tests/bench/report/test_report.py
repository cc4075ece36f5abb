"""Checks that can fail: what is broken is flagged, what is twice as slow is said to be. Synthetic rows, no clock."""

import html
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from bundles import CommandLine, head_image, tiny_bundle, write_scan
from hypothesis import given
from hypothesis import strategies as st

for package in ("matplotlib", "SimpleITK"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[dev]'")

from edgemuse.bench.measure.accuracy import Structure, compare
from edgemuse.bench.measure.rows import CONTEXT, Results
from edgemuse.bench.measure.run import label_path
from edgemuse.bench.pages.document import PARTS, age_of, document, part_of
from edgemuse.bench.report import figures
from edgemuse.bench.report.report import sections, write_report
from edgemuse.bench.report.summary import ratios, summarise
from edgemuse.calibration.scans import Source
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter

BASE, OTHER = "edgemuse/openvino/fp32/reference", "edgemuse/openvino/bf16/reference"
MACHINE = {"cpu": "none", "cores": 2, "memory_bytes": 0, "system": "none"}
PAIR = ("one", "two")
AGED = "*Measured on 2026-01-02 at commit abc: network 123. Written by `x`.*"
SHARED = dict.fromkeys(CONTEXT, "x") | {"machine": MACHINE, "versions": {}, "threads": None}
STRUCTURES = [Structure(f"ball {n}", (n,), (n,)) for n in range(1, 9)]


def run_row(system, seconds, round=1, scan="a", **fields):
    row = {"kind": "run", "system": system, "scan": scan, "scan_sha256": [scan], "round": round, "seconds": seconds}
    row |= {"stages": {"infer": seconds}, "peak_bytes": 10**9, "joules": None, "failed": False}
    return SHARED | row | {"scan_seconds": [seconds]} | fields


def score_rows(system, found, truth, base, scan="a", structures=STRUCTURES):
    return [
        SHARED | {"kind": "accuracy", "system": system, "scan": scan, "against": against}
        | compare(found, other, structures, np.eye(4)).fields()
        for against, other in (("truth", truth), (BASE, base))
    ]  # fmt: skip


def balls(seed=None):
    """Eight balls of radius 6; with a seed, one voxel of each surface is missing, another one for another seed."""
    labels = np.zeros((32, 32, 32), np.int64)
    grid = np.stack(np.meshgrid(*[np.arange(16.0)] * 3, indexing="ij")) - 7.5
    ball = np.linalg.norm(grid, axis=0) < 6
    if seed is not None:
        ball.flat[np.flatnonzero(ball)[seed]] = False
    for number, corner in enumerate(np.ndindex(2, 2, 2), 1):
        where = tuple(slice(16 * side, 16 * side + 16) for side in corner)
        labels[where][ball] = number
    return labels


def flags(found):
    truth, base = balls(), balls(1)
    rows = [run_row(BASE, 1.0), run_row(OTHER, 1.0)]
    rows += score_rows(BASE, base, truth, base) + score_rows(OTHER, found, truth, base)
    return rows, summarise(rows)[1].flags


def test_rounding_is_not_flagged():
    assert not np.array_equal(balls(1), balls(2))
    assert flags(balls(2))[1] == ()


def test_two_channels_swapped_are_flagged(tmp_path):
    found = balls(2)
    found[balls(2) == 3], found[balls(2) == 5] = 5, 3
    rows, flagged = flags(found)
    assert all(any(f"ball {n}" in flag for flag in flagged) for n in (3, 5))
    assert not any("ball 4" in flag for flag in flagged)
    write_report(tmp_path, rows)
    for name in ("report.md", "report.html"):
        assert f"{OTHER}: displaced from the baseline's by: ball 3" in html.unescape((tmp_path / name).read_text())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_structure_shifted_by_a_voxel_is_flagged(axis):
    found = np.where(balls(2) == 4, 0, balls(2))
    found[np.roll(balls(2) == 4, 1, axis)] = 4
    assert any(re.search(r"displaced .*ball 4 \((0\.9\d|1\.0\d) voxels\)", flag) for flag in flags(found)[1])


def test_a_lower_dice_against_the_truth_is_flagged_although_the_labels_nearly_agree():
    found = balls(1)
    found[found == 2] = np.where(np.arange((found == 2).sum()) % 14 == 0, 0, 2)
    flagged = flags(found)[1]
    assert any(flag.startswith("Dice lower than the baseline's by: ball 2") for flag in flagged)
    assert any("is below 99.9%" in flag for flag in flagged)


def test_an_engine_with_two_channels_swapped_is_flagged(tmp_path):
    scan = write_scan(tmp_path / "a_T1w.nii.gz", head_image())
    bundle = open_bundle(tiny_bundle(tmp_path / "tiny.bundle", deferred=False))
    options = Options("reference", "openvino", cache_dir=None)

    def classes(swap):
        with Segmenter(bundle, options) as segmenter:
            engine = segmenter.engine(bundle.manifest.network.patch)
            infer = engine.infer
            engine.infer = lambda tile: infer(tile)[:, [0, 2, 1, 3, 4, 5]] if swap else infer(tile)
            return segmenter.segment(scan).classes.astype(np.int64)

    right, wrong = classes(swap=False), classes(swap=True)
    assert {1, 2} & set(np.unique(right))
    structures = [Structure(f"s{n}", (n,), (n,)) for n in range(1, 6)]
    rows = [run_row(BASE, 1.0), run_row(OTHER, 1.0)]
    rows += score_rows(BASE, right, right, right, structures=structures)
    rows += score_rows(OTHER, wrong, right, right, structures=structures)
    summaries = summarise(rows)
    assert summaries[0].flags == ()
    assert any("s1" in flag or "s2" in flag for flag in summaries[1].flags)
    same = rows[:3] + [row | {"system": OTHER} for row in rows[2:4]]
    assert summarise(same)[1].flags == ()


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8), st.floats(0.1, 10))
def test_ratios_are_taken_pair_by_pair(times, factor):
    rows = [run_row(BASE, 99.0, round=0), run_row(OTHER, 1.0, round=0)]
    for n, seconds in enumerate(times, 1):
        rows += [run_row(BASE, seconds, round=n), run_row(OTHER, factor * seconds, round=n)]
    rows.append(run_row(OTHER, 5.0, scan="only here"))
    assert ratios(rows, OTHER, BASE) == pytest.approx([factor] * len(times))


def test_twice_the_time_is_reported_as_twice_as_slow(tmp_path):
    # The machine slows down threefold on the way, which pairs must not care about.
    rows = [run_row(BASE, 50.0, round=0), run_row(OTHER, 1.0, round=0)]
    for n, seconds in enumerate((1.0, 1.1, 3.0, 3.2), 1):
        rows += [run_row(BASE, seconds, round=n), run_row(OTHER, 2 * seconds, round=n)]
    write_report(tmp_path, rows)
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith(f"| {OTHER}"))
    cells = [cell.strip() for cell in line.split("|")]
    assert "2.00 (2.00–2.00)" in cells
    assert "4.10 (2.06–6.28)" in cells
    assert "1.00" in cells  # cold, and in no other column


def test_scores_of_a_truth_that_was_mended_replace_the_old():
    rows = [
        run_row(BASE, 1.0),
        *score_rows(BASE, balls(), balls(1), balls()),
        *score_rows(BASE, balls(), balls(), balls()),
    ]
    truth = summarise(rows)[0].truth
    assert (truth.dice, len(truth.scans)) == (1, 1)


def test_a_failed_system_is_in_the_report(tmp_path):
    failed = run_row(OTHER, 0.0, round=0) | {"failed": True, "error": "no <memory> left"}
    point = SHARED | {"kind": "scaling", "system": BASE, "axis": "threads", "value": 2, "failed": True, "error": "why"}
    scenario = SHARED | {"kind": "mlperf", "system": BASE, "scenario": "Offline", "error": "why not"}
    scenario |= {"against": "truth", "failed": True}
    write_report(tmp_path, [run_row(BASE, 1.0), failed, point, scenario])
    assert f"{BASE} failed, threads 2: why\n" in (tmp_path / "report.md").read_text()
    assert f"{BASE} failed, Offline: why not\n" in (tmp_path / "report.md").read_text()
    assert f"{OTHER} failed on a: no <memory> left" in (tmp_path / "report.md").read_text()
    assert "no &lt;memory&gt; left" in (tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_from_outside(tmp_path):
    scan = write_scan(tmp_path / "a_T1w.nii.gz", np.pad(head_image((20, 20, 20)), 6))
    labels = balls(1).astype(np.uint8)
    for system in (BASE, OTHER):
        write_scan(label_path(tmp_path, system, scan), labels)
    rows = [run_row(BASE, 1.0), run_row(OTHER, 1.5)]
    rows += score_rows(BASE, balls(1), balls(), balls(1)) + score_rows(OTHER, balls(2), balls(), balls(1))
    page = write_report(tmp_path, rows, [Source(scan, "", None)]).read_text()
    assert page.count("<svg") == 5
    for reference in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert reference.startswith(("#", "data:"))
    assert "<script" not in page
    assert "import" not in re.findall(r"<style>(.*?)</style>", page, re.DOTALL)[0]
    text = (tmp_path / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:  # as many cells in every row as in the header
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"<svg")


def test_names_on_figures_are_names(tmp_path):
    name = "a $\\alpha$ $cost$ $_{\x1b[2J"
    scan = write_scan(tmp_path / f"{name}_T1w.nii.gz".replace("\x1b", "b"), np.pad(head_image((20, 20, 20)), 6))
    maps = [(name, write_scan(tmp_path / f"{n}.nii.gz", balls(n).astype(np.uint8))) for n in (1, 2)]
    structures = [Structure(f"{name} {n}", (n,), (n,)) for n in range(1, 9)]
    rows = [run_row(BASE, 1.0), run_row(OTHER, 1.5)]
    for system, found in ((BASE, balls(1)), (OTHER, balls(2))):
        rows += score_rows(system, found, balls(), balls(1), structures=structures)
    summaries = summarise(rows)
    for drawn in (figures.worst_slices(scan, maps), figures.structures(summaries), figures.bland_altman(summaries[1])):
        ElementTree.fromstring(drawn)
        assert b"mathdefault" not in drawn
    drawn = figures.structures(summaries).decode()
    assert all(html.escape(rf"a $\alpha$ $cost$ $_{{\x1b[2J {n}", quote=False) in drawn for n in range(1, 9))
    assert r"a $\alpha$ $cost$ $_{\x1b[2J" in figures.worst_slices(scan, maps).decode()


@pytest.fixture
def reports(tmp_path):
    for name, commit, factor in (("a", "one", 1.0), ("b", "two", 2.0)):
        results = Results(tmp_path / name, SHARED | {"commit": commit})
        for n in (1, 2, 3):
            results.add(**run_row(BASE, factor * (1 + n / 100), round=n) | {"commit": commit})
    return tmp_path


def test_reports_are_compared(reports, capfd):
    ran = CommandLine(capfd, reports / "cache")("bench", "compare", reports / "a", reports / "b")
    assert ran.code == 0
    assert "commit: one and two" in ran.out
    assert f"| {BASE} | 1.02 | 2.04 | 2.00 |" in ran.out
    same = CommandLine(capfd, reports / "cache")("bench", "compare", reports / "a", reports / "a")
    assert f"| {BASE} | 1.02 | 1.02 | 1.00 (overlap) |" in same.out


def test_reports_on_other_scans_or_systems_are_not_compared(reports, capfd):
    command = CommandLine(capfd, reports / "cache")
    Results(reports / "c", SHARED).add(**run_row(BASE, 1.0, scan="b"))
    Results(reports / "d", SHARED).add(**run_row(OTHER, 1.0))
    for name, reason in (("c", "different scans"), ("d", "no system in common")):
        ran = command("bench", "compare", reports / "a", reports / name)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert reason in ran.err


def document_of(monkeypatch, tmp_path, names):
    """Two parts with the same rows and the figures `pareto` and `bland_altman`; a report on those of `names`."""
    rows = [run_row(BASE, 1.0), run_row(OTHER, 1.5)]
    rows += score_rows(BASE, balls(1), balls(), balls(1)) + score_rows(OTHER, balls(2), balls(), balls(1))
    parts = {name: replace(PARTS["development"], title=name.title(), figures=("pareto", "bland")) for name in PAIR}
    monkeypatch.setattr("edgemuse.bench.pages.document.PARTS", parts)
    target, report = tmp_path / "benchmark.md", list(sections(tmp_path, rows, [], ""))
    found = {name: part_of(name, AGED, report, "benchmark") for name in names}
    figures = {tmp_path / "benchmark" / name: data for _, each in found.values() for name, data in each.items()}
    text = document({name: text for name, (text, _) in found.items()}, target)
    return figures | {target: text.encode()}


def test_the_document_shows_chosen_figures_and_links_to_no_other(tmp_path, monkeypatch):
    contents = document_of(monkeypatch, tmp_path, PAIR)
    text = contents.pop(tmp_path / "benchmark.md").decode()
    assert {path.name for path in contents} == {f"{n}_{f}.svg" for n in PAIR for f in ("pareto", "bland_altman")}
    assert {tmp_path / link for link in re.findall(r"\]\((.*?)\)", text)} == set(contents)
    assert text.count("# How it was measured") == 1
    headings = re.findall(r"^(#+) ", text, re.MULTILINE)
    assert [len(mark) for mark in headings if len(mark) < 3] == [1, 2, 2, 2]
    assert all(f"## {name.title()}\n\n{AGED}\n\n" in text for name in PAIR)


def test_a_part_is_as_old_as_its_last_run():
    rows = [run_row(BASE, 1.0, created=f"2026-01-0{day}T10:00:00+00:00") for day in (1, 3, 2)]
    rows.append(SHARED | {"kind": "installed", "system": BASE, "bytes": 1})
    rows = [row | {"commit": "abc", "bundle_sha256": "0123456789abcdef"} for row in rows]
    line = age_of("built-in", rows)
    assert line.startswith("*Measured on 2026-01-03 at commit abc: built-in model 0123456789ab. Written by `")
    assert line.endswith(" --part benchmark-built-in`.*")


def test_the_document_keeps_a_part_that_is_not_measured_again(tmp_path, monkeypatch):
    page = tmp_path / "benchmark.md"
    whole = document_of(monkeypatch, tmp_path, PAIR)[page].decode()
    page.write_text(whole.replace("## One\n", "## One\n\nMeasured before.\n"))
    again = document_of(monkeypatch, tmp_path, ["two"])
    assert {path.name for path in again} == {"benchmark.md", "two_pareto.svg", "two_bland_altman.svg"}
    assert again[page].decode() == page.read_text()
