"""What all pages have in common: the line that says how old figures are, parts, and what an interruption leaves."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgemuse.bench.pages.page import AGE, age, joined, named, parted, parts_of
from edgemuse.bench.pages.program import Workplace, page_options
from edgemuse.bench.report.render import table

STATE = {
    "commit": "abc",
    "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 8e9, "system": "a system"},
    "versions": {"python": "3", "openvino": "1"},
}


def test_the_age_line_is_read_back() -> None:
    line = age("2026-01-02", "abc-dirty", [named("a model, random weights", "0123456789abcdef"), "another 1"], "gate")
    found = AGE.search(f"\n{line}\n")
    assert found is not None
    models = "a model, random weights 0123456789ab; another 1"
    command = "python -m edgemuse.bench.pages.all ../shared --part gate"
    assert found.groups() == ("2026-01-02", "abc-dirty", models, command)


def test_a_page_gives_its_parts_back() -> None:
    dates = ("2026-01-03", "2026-01-02", "2026-01-04")
    parts = {f"Part {n}": f"{age(date, 'abc', ['m'], 'x')}\n\n### Below\n\n| a |\n" for n, date in enumerate(dates)}
    text = parted("x", "Title", "What it is.", parts, "The end.")
    assert list(parts_of(text)) == list(parts)
    assert parted("x", "Title", "What it is.", parts_of(text.removesuffix("The end.\n")), "The end.") == text
    first, _, rest = text.partition("\n")
    assert "the oldest on 2026-01-02, the newest on 2026-01-04" in first
    assert rest.startswith("\n# Title\n\nWhat it is.\n\n## Part 0\n\n*Measured on 2026-01-03 ")
    assert parts_of("") == {}


def test_a_table_has_as_many_columns_as_its_header() -> None:
    text = table(("a | b", "c"), [["1 | 2", "3"], ["4 | 5", ""]])
    assert {line.count("|") for line in text.splitlines()} == {4}
    assert joined(" x\n", "", text) == f"x\n\n{text}"


def test_an_interrupted_program_goes_on(tmp_path: Path) -> None:
    place = Workplace(tmp_path, STATE)
    (place.folder / "a file").write_text("kept")
    assert place.once("a", lambda: {1: (2, 3)}) == {"1": [2, 3]}
    assert place.once("a", lambda: pytest.fail("measured twice")) == {"1": [2, 3]}
    again = Workplace(tmp_path, STATE)
    assert again.once("a", lambda: pytest.fail("measured twice")) == {"1": [2, 3]}
    assert (again.folder / "a file").read_text() == "kept"
    assert re.fullmatch(r"\*Measured on \d{4}-\d\d-\d\d at commit abc: m\. .*", again.age(["m"], "x"))
    assert again.machine == "a processor, 2 cores, 8 GB, a system; python 3, openvino 1."


@pytest.mark.parametrize(
    "other", [STATE | {"commit": "def"}, STATE | {"versions": {"python": "4"}}, STATE | {"machine": {}}]
)
def test_what_was_measured_in_another_state_does_not_count(tmp_path: Path, other: dict[str, object]) -> None:
    place = Workplace(tmp_path, STATE)
    place.add({"a": 1})
    (place.folder / "a file").write_text("gone")
    later = Workplace(tmp_path, other)
    assert later.rows == []
    assert not (later.folder / "a file").exists()


def test_changes_that_are_not_committed_are_a_new_state_each_time(tmp_path: Path) -> None:
    dirty = STATE | {"commit": "abc-dirty"}
    Workplace(tmp_path, dirty).add({"a": 1})
    assert Workplace(tmp_path, dirty).rows == []


def test_a_program_that_wrote_its_page_begins_anew(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "work", STATE)
    place.add({"a": 1})
    place.publish(tmp_path / "page.md", "text", {tmp_path / "figure.svg": b"<svg"})
    assert (tmp_path / "page.md").read_text() == "text"
    assert (tmp_path / "figure.svg").read_bytes() == b"<svg"
    assert Workplace(tmp_path / "work", STATE).rows == []


def test_a_page_in_a_folder_that_is_absent_is_refused_at_once(tmp_path: Path) -> None:
    @click.command()
    @page_options("a page")
    def main(shared: Path, output: Path, work: Path) -> None:
        click.echo(f"{output} {work}")

    refused = CliRunner().invoke(main, [str(tmp_path), "-o", str(tmp_path / "absent" / "page.md")])
    assert (refused.exit_code, "run this in the root of a checkout" in refused.output) == (2, True)
    done = CliRunner().invoke(main, [str(tmp_path), "-o", str(tmp_path / "page.md"), "--work", str(tmp_path / "w")])
    assert done.output == f"{tmp_path / 'page.md'} {tmp_path / 'w'}\n"
