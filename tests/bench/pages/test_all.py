"""The program that writes all pages: what it runs, what it does when a part goes wrong, and which pages it knows."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgemuse.bench.pages import all as everything
from edgemuse.bench.pages.all import PARTS
from edgemuse.bench.pages.page import AGE, MEASURED, parts_of

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / MEASURED).glob("*.md"))
PROGRAMS = sorted((ROOT / "bench" / "pages").glob("*.py"))
RUN = re.compile(r"python -m (edgemuse(?:\.\w+)+)")
FIRST = re.compile(r"\*Measured a part at a time, the oldest on \S+, the newest on \S+: .* Written by `(.+)`\.\*")


class Calls:
    """Commands that were called instead of run; those that hold the word `wrong` fail."""

    def __init__(self) -> None:
        self.commands: list[Sequence[str]] = []
        self.wrong = "nothing is wrong"

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(command)
        return 3 if any(self.wrong in word for word in command) else 0

    def take(self) -> list[str]:
        """The modules that were run since the last time, without `edgemuse.`."""
        names = [command[2].removeprefix("edgemuse.") for command in self.commands]
        self.commands.clear()
        return names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(everything, "call", calls)
    monkeypatch.setattr(everything, "commit", lambda: "abc")
    return calls


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    def run(*parts: str) -> Result:
        options = [word for part in parts for word in ("--part", part)]
        where = ["-o", str(tmp_path), "--work", str(tmp_path / "work")]
        return CliRunner().invoke(everything.main, [str(tmp_path), *where, *options])

    return run


def test_every_part_is_run_once_with_its_name(calls: Calls, run: Any, tmp_path: Path) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    commands = [command for command in calls.commands if ".pages." in command[2]]
    assert [command[2].rpartition(".")[2] for command in commands] == [part.module for part in PARTS]
    for part, command in zip(PARTS, commands, strict=True):
        options = dict(zip(command[4::2], command[5::2], strict=True))
        assert options["-o"] == str(tmp_path / f"{part.page}.md")
        assert options.get("--part", "") == part.part
        assert f"{part.name} " in done.output
        assert f"about {part.minutes:2} min" in done.output
        assert f"{part.name}: written in 0.0 min" in done.output


def test_a_page_stands_for_its_parts(calls: Calls, run: Any) -> None:
    assert run("gate", "benchmark").exit_code == 0
    assert calls.take() == ["bench.pages.document"] * 4 + ["bench.pages.gate"]
    refused = run("nonsense")
    assert (refused.exit_code, calls.take()) == (2, [])


def test_what_a_part_needs_is_made_first(calls: Calls, run: Any, tmp_path: Path) -> None:
    assert run("model", "performance-built-in").exit_code == 0
    built_in, performance, sample, model = calls.commands
    assert built_in[2:4] == ["edgemuse.training.folder", "-o"]
    assert performance[-2:] == ["--built-in-folder", built_in[4]]
    assert sample[2:4] == ["edgemuse.training.sample", str(tmp_path / "data" / "labelmaps")]
    assert model[-2:] == ["--held-out", sample[5]]
    assert Path(sample[5]).is_dir()


@pytest.mark.parametrize(("wrong", "left"), [("parity", ["parity"]), ("training.sample", ["model"])])
def test_a_part_that_goes_wrong_does_not_stop_the_others(calls: Calls, run: Any, wrong: str, left: list[str]) -> None:
    calls.wrong = wrong
    done = run("parity", "gate", "model", "tensorrt")
    assert done.exit_code == 1
    assert done.output.endswith(f"went wrong: {', '.join(left)}\n")
    assert "bench.pages.tensorrt_builds" in calls.take()
    calls.wrong = "nothing is wrong"
    assert run("parity", "gate", "model", "tensorrt").exit_code == 0  # the same call does the rest
    rest = {"parity": ["bench.pages.parity"], "training.sample": ["training.sample", "bench.pages.builtin"]}
    assert calls.take() == rest[wrong]
    assert run("parity", "gate").exit_code == 0  # and when all is done, begins anew
    assert calls.take() == ["bench.pages.parity", "bench.pages.gate"]


def test_another_commit_and_other_parts_begin_anew(calls: Calls, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls.wrong = "parity"
    for commit, parts, expected in (
        ("abc", ("parity", "gate"), 2),
        ("abc", ("parity", "gate"), 1),
        ("abc", ("gate", "parity", "tensorrt"), 3),
        ("def", ("gate", "parity", "tensorrt"), 3),
        ("def-dirty", ("parity", "gate"), 2),
        ("def-dirty", ("parity", "gate"), 2),
    ):
        monkeypatch.setattr(everything, "commit", lambda commit=commit: commit)
        assert run(*parts).exit_code == 1
        assert len(calls.take()) == expected


def test_parts_are_listed_with_their_minutes() -> None:
    listed = CliRunner().invoke(everything.main, ["--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [*(part.name for part in PARTS), "all"]


def test_every_program_is_known() -> None:
    """A file that can be run writes a page, or is the program that runs them all."""
    runs = {path.stem for path in PROGRAMS if 'if __name__ == "__main__"' in path.read_text()}
    assert {part.module for part in PARTS} == runs - {"all"}


def test_every_part_of_a_page_is_known() -> None:
    for module in {part.module for part in PARTS if part.part}:
        tree = ast.parse((ROOT / "bench" / "pages" / f"{module}.py").read_text())
        tables = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
            if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PARTS"
        ]
        names = [ast.literal_eval(key) for key in tables[0].keys if key is not None]
        assert names == [part.part for part in PARTS if part.module == module]


def test_every_page_is_known() -> None:
    """One that is known may still wait for its first measurement."""
    assert {path.stem for path in PAGES} <= {part.page for part in PARTS}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_its_age(path: Path) -> None:
    """And so does each part of one; the command that it names exists and knows that page or part."""
    text = path.read_text()
    first = text.partition("\n")[0]
    parted = FIRST.fullmatch(first)
    found = [AGE.fullmatch(first)]
    if parted:
        parts = parts_of(text)
        parts.pop("How it was measured", None)
        found = [AGE.fullmatch(part.strip().partition("\n")[0]) for part in parts.values()]
    assert found
    commands = [parted.group(1)] if parted else []
    for age in found:
        assert age is not None
        commands.append(age.group(4))
    for command in commands:
        module, part = re.fullmatch(r"python -m (\S+) \.\./shared --part (\S+)", command).groups()  # type: ignore[union-attr]
        assert importlib.util.find_spec(module)
        assert everything.select([part])[0].page == path.stem
    assert all(importlib.util.find_spec(module) for module in RUN.findall(text))


CARD = ROOT / "runtime" / "data" / "model-card.md"


@pytest.mark.parametrize("path", [CARD, *sorted((ROOT / "bench").rglob("*.py"))], ids=lambda path: path.stem)
def test_commands_that_are_named_exist(path: Path) -> None:
    for module in RUN.findall(path.read_text()):
        assert importlib.util.find_spec(module)
