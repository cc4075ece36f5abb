"""The page of the quality flags counts them, and the anatomy table is made from volumes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[bench]'")

from edgemuse.bench.pages.flags import anatomy, good_table, spoilt_table
from edgemuse.runtime.regions.anatomy import WHOLE, read_table


def test_good_scans_are_counted_once_and_by_flag() -> None:
    rows = [{"flags": []}, {"flags": ["noise", "border"]}, {"flags": ["noise"]}, {"flags": []}]
    lines = good_table(rows).splitlines()
    assert lines[0] == "| flag, of 4 good scans | scans | share |"
    assert lines[2:] == ["| any | 2 | 50.0% |", "| noise | 2 | 50.0% |", "| border | 1 | 25.0% |"]


def test_a_copy_is_named_right_only_by_the_flag_for_it() -> None:
    found = [("noise of 10 %", [["noise"], ["border"], []]), ("half a brain", [["asymmetry", "missing"]])]
    lines = spoilt_table(found).splitlines()
    assert lines[2] == "| noise of 10 % | noise | 1 of 3 | 2 of 3 | noise 1, border 1 |"
    assert lines[3].startswith("| half a brain | missing or asymmetry or volume | 1 of 1 | 1 of 1 |")


def test_ranges_are_wide_and_small_or_fluid_parts_have_none(tmp_path: Path) -> None:
    thalamus, fluid, accumbens = 10, 24, 26
    volumes = [{str(row.index): 5000.0 for row in read_table()} | {"26": 400.0}] * 2
    volumes[1] = volumes[1] | {str(thalamus): 8000.0}
    rows = list(csv.DictReader(anatomy({"FreeSurfer": volumes, "MUSE": volumes}).splitlines(), delimiter="\t"))
    found = {int(row["index"]): (row["least_mm3"], row["most_mm3"]) for row in rows if row["protocol"] == "FreeSurfer"}
    assert found[thalamus] == ("2500", "16000")
    assert found[fluid] == found[accumbens] == ("", "")
    brain = [row for row in read_table() if row.protocol == "FreeSurfer" and row.index not in (WHOLE, fluid, accumbens)]
    assert float(found[WHOLE][0]) == pytest.approx(0.85 * (5000 * len(brain) + 400), abs=1)
    assert [(row["protocol"], row["index"], row["name"]) for row in rows] == [
        (row.protocol, str(row.index), row.name) for row in read_table()
    ]
