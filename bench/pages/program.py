"""What the programs that write pages share: their command line, and what they keep when they are interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import click
import platformdirs

from edgemuse.bench.measure.rows import Row, append, machine_text, rewrite, versions_text, whole_lines
from edgemuse.bench.pages.page import MEASURED, age
from edgemuse.runtime.results.files import read_record, write_file, write_files

EXISTING = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
WORK = Path(platformdirs.user_cache_dir("edgemuse", appauthor=False), "pages")
"""Where programs keep what they make, each in a folder of its own, unless they are told otherwise."""
STATE, KEPT, ROWS = "state.json", "kept", "rows.jsonl"
"""In the folder of a program: the state in which it measures, a folder for the rest, and in that its rows."""
Program = TypeVar("Program", bound=Callable[..., Any])


def say(line: str) -> None:
    """Print what is being done to stderr."""
    click.echo(line, err=True)


def page_options(page: str) -> Callable[[Program], Program]:
    """Add the argument SHARED and the options `-o` and `--work` to the program that writes `page`."""

    def decorate(program: Program) -> Program:
        for option in (
            click.option("--work", type=FOLDER, default=WORK / page, help="Folder for what is made on the way; "
                         "an interrupted run goes on there.  [default: in the user's cache]"),
            click.option("-o", "--output", type=FILE, callback=_writable, default=MEASURED / f"{page}.md",
                         show_default=True, help="Markdown file to write."),
            click.argument("shared", type=EXISTING),
        ):  # fmt: skip
            program = option(program)
        return program

    return decorate


def _writable(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    """Refuse a page in a folder that does not exist before anything is measured."""
    if not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is no folder; run this in the root of a checkout")
    return path


class Workplace:
    """What a program has made and measured so far, on disk, so that it goes on after an interruption.

    What was left by a program that ended, or in another state, is removed. A checkout with changes that are not
    committed is a new state each time.

    Attributes:
        folder: for files.
        state: commit, machine and versions, as `rows.state` gives them.
        rows: what was measured.
    """

    def __init__(self, work: Path, state: Row) -> None:
        self.folder, self.state, self._record = work / KEPT, state, work / STATE
        if read_record(self._record) != state or state["commit"].endswith("-dirty"):
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self._record, json.dumps(state).encode())
        path = self.folder / ROWS
        self.rows: list[Row] = [json.loads(line) for line in whole_lines(path)] if path.exists() else []
        if path.exists():
            rewrite(path)
            say(f"going on after {len(self.rows)} measurements")

    def age(self, models: Iterable[str], part: str) -> str:
        """Write the line that says how old the figures are; the page or part called `part` begins with it."""
        return age(max(row["date"] for row in self.rows), self.state["commit"], models, part)

    @property
    def machine(self) -> str:
        """The line that says on which machine and with which versions it was measured."""
        return f"{machine_text(self.state)}; {versions_text(self.state)}."

    def add(self, row: Row) -> Row:
        """Append `row`; returns it as it is read back."""
        line = json.dumps(row | {"date": datetime.now(timezone.utc).date().isoformat()})
        append(self.folder / ROWS, line)
        self.rows.append(json.loads(line))
        return self.rows[-1]

    def of(self, **fields: Any) -> list[Row]:
        """Return the rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in fields.items())]

    def once(self, what: str, measure: Callable[[], Any]) -> Any:
        """Return what `measure` gives, or gave before an interruption, as JSON brings it back."""
        rows = self.of(what=what)
        return (rows[0] if rows else self.add({"what": what, "value": measure()}))["value"]

    def publish(self, page: Path, text: str, figures: Mapping[Path, bytes] | None = None) -> None:
        """Write the page and its figures; the program then begins anew when it is started again."""
        write_files({page: text.encode()} | dict(figures or {}))
        self._record.unlink()
        click.echo(page)
