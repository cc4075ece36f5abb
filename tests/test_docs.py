"""The documentation: links lead somewhere, command lines and messages are those of the code, and examples run."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edgemuse.runtime.cli.group import cli
from edgemuse.runtime.model.builtin import SAMPLE_SCAN

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = ROOT / "docs" / "guide"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
MODULE = re.compile(r"python -m (edgemuse[\w.]*\w)")
SOURCE = re.compile(r"`((?:\.ci|engines|runtime|export|calibration|bench|training|tests|docs)/[\w./-]*)`")
FIRST_CELL = re.compile(r"^\| `([^|]+)` \|", re.MULTILINE)
SHELL = {"&", "&&", "|", ";", ">"}
"""Words at which a command ends."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_blocks(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def section(page: Path, heading: str) -> str:
    """What stands below the heading, up to the next of any level."""
    return without_blocks(page).partition(f"# {heading}\n")[2].partition("\n#")[0]


def links(page: Path) -> list[str]:
    """The targets of all links and images, without those in code."""
    return LINK.findall(CODE.sub("", without_blocks(page)))


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the page's headings; a second heading of the same words gets a number."""
    found = set[str]()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{words}-{number}" if number else words) in found:
            number += 1
        found.add(name)
    return found


def broken_links(page: Path) -> Iterator[str]:
    """The page's links to files and headings of this project that are not there."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    good = ("b.md", "b.md#one-two", "b.md#one-two-1", "#there", "https://a.example/c.md#no")
    bad = ("c.md", "b.md#three", "#no", "c.png")
    (tmp_path / "b.md").write_text("# One, two\n\n# One two\n\n```\n# Three\n```\n")
    (tmp_path / "a.md").write_text("# There\n" + "".join(f"![x]({link})\n" for link in good + bad) + "`[x](d.md)`\n")
    assert [line.partition(":")[0] for line in broken_links(tmp_path / "a.md")] == [*bad]


def test_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {index.parent / link.partition("#")[0] for link in links(index)}
    assert listed == {page for page in PAGES if page.is_relative_to(index.parent)} - {index}


def test_files_that_contributing_names_exist() -> None:
    names = SOURCE.findall(text_of(ROOT / "CONTRIBUTING.md"))
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


def commands(page: Path) -> Iterator[str]:
    """The command lines in the page's blocks that run edgemuse, without the environment variables before them."""
    for _, block in FENCE.findall(text_of(page)):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found = re.match(r"\s*(?:\w+=\S+ )*(edgemuse( .*)?)$", line)
            if found:
                yield found[1]


def parse(line: str) -> None:
    """Have click read the command line as if to run it; raises where it refuses."""
    words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
    end = next((place for place, word in enumerate(words) if word in SHELL), len(words))
    cli.main(words[1:end], "edgemuse", standalone_mode=False)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are found and their options read, files that are named need not exist, and no command is run."""
    monkeypatch.setattr(click.Command, "invoke", lambda command, context: None)
    for kind in (click.Path, click.File):
        monkeypatch.setattr(kind, "convert", lambda kind, value, parameter, context: value)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_command_lines_are_right(page: Path) -> None:
    for line in commands(page):
        try:
            parse(line)
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "line",
    [
        "edgemuse segmen a.nii.gz",
        "edgemuse segment a.nii.gz -o out --profil fast",
        "edgemuse segment a.nii.gz -o out --profile faster",
        "edgemuse segment a.nii.gz",
        "edgemuse models fetch other",
        "edgemuse bench compare a",
        "edgemuse info a b",
    ],
)
def test_wrong_command_lines_are_found(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line)


def test_pages_have_command_lines() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 30


def is_runnable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    if spec is None:
        return False
    return spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_modules_exist(page: Path) -> None:
    named = dict.fromkeys(MODULE.findall(text_of(page)))
    assert [module for module in named if not is_runnable(module)] == []
    assert not is_runnable("edgemuse.bench.nothing")
    assert not is_runnable("edgemuse.bench")


def test_readme_works_in_powershell() -> None:
    """Older PowerShells know no `&&`, and none goes on after a backslash."""
    for _, block in FENCE.findall(text_of(ROOT / "README.md")):
        assert "&&" not in block
        assert not [line for line in block.splitlines() if line.endswith("\\")]


def constants() -> str:
    """All texts in the source, parts of f-strings among them, a line each."""
    files = (path for folder in ("engines", "runtime", "export") for path in (ROOT / folder).rglob("*.py"))
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_messages_are_those_of_the_code() -> None:
    table = section(GUIDE / "first-scan.md", "When something goes wrong").partition("These come from the system")[0]
    messages, known = FIRST_CELL.findall(table), constants()
    assert len(messages) > 20
    assert [text for text in messages if any(part.strip() not in known for part in text.split("..."))] == []


def test_flags_are_those_of_the_code() -> None:
    tree = ast.parse((ROOT / "runtime" / "results" / "quality.py").read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    flags = {ast.literal_eval(call.args[0]) for call in calls if call.func.id == "Flag"}
    assert set(FIRST_CELL.findall(section(GUIDE / "first-scan.md", "Flags"))) == flags


def test_python_examples_run(tmp_path: Path) -> None:
    """All blocks of the page, in order, as one program on the sample scan."""
    examples = [block for language, block in FENCE.findall(text_of(GUIDE / "python.md")) if language == "python"]
    assert len(examples) > 5
    (tmp_path / "examples.py").write_text("\n".join(examples), encoding="utf-8")
    shutil.copyfile(SAMPLE_SCAN, tmp_path / "T1.nii.gz")
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "examples.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "missing.nii.gz: no such file" in ran.stdout
    assert (tmp_path / "results" / "T1_qc.png").is_file()
    assert (tmp_path / "T1_labels.nii.gz").is_file()
