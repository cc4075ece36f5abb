"""`results.jsonl`: one self-contained row per measurement, appended as it is made, so that a run can go on later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from edgemuse.engines.errors import InputError, OutputError
from edgemuse.engines.hardware import machine
from edgemuse.runtime.results.files import write_file

Row: TypeAlias = dict[str, Any]
NAME = "results.jsonl"
PACKAGES = ("edgemuse", "openvino", "onnxruntime", "numpy", "scipy", "nibabel", "torch", "nnunetv2")
CONTEXT = ("commit", "machine", "cpu_flags", "versions", "threads", "bundle_sha256")
"""What all rows of one report have in common: figures that differ in it must not be put side by side as one."""
KINDS = ("run", "batch", "accuracy", "installed", "scaling", "mlperf")
WRITTEN = ("report.html", "report.md", "figures")
"""What is made of the rows when all are there, and then replaced."""
REQUIRED = ("kind", "system", *CONTEXT)


def context(threads: int | None, bundle_sha256: str) -> Row:
    """The fields of `CONTEXT` here and now."""
    return {
        "commit": commit(),
        "machine": machine(),
        "cpu_flags": cpu_flags(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "threads": threads,
        "bundle_sha256": bundle_sha256,
    }


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def commit() -> str:
    """Of the checkout that runs, with `-dirty` if anything but `docs/` was changed since; else edgemuse's version."""
    try:
        name = _git("describe", "--always", "--abbrev=12", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)docs")
    except (OSError, subprocess.CalledProcessError):
        return version("edgemuse")
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu_flags() -> list[str]:
    """The instruction sets of the processor, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sorted(line.split(":", 1)[1].split())
    except OSError:
        pass
    return []


def read_rows(folder: Path) -> list[Row]:
    """The rows of a report, in the order in which they were made; raises InputError if there are none."""
    path = folder / NAME
    try:
        lines = whole_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no results to read; name a folder that 'edgemuse bench' wrote") from error
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of rows, but for a last one that an interrupted run left half written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def rewrite(path: Path) -> None:
    """Drop a half line from the file of rows at `path`, so that others can follow."""
    write_file(path, "".join(whole_lines(path)).encode())


def append(path: Path, line: str) -> None:
    """Add `line` to the file of rows at `path`; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict) or row.get("kind") not in KINDS or any(key not in row for key in REQUIRED):
        raise InputError(f"{path}, line {number}: not a measurement: expected {', '.join(REQUIRED)}")
    return row


class Results:
    """The rows of one report: those made earlier, and a file that new ones are appended to."""

    def __init__(self, folder: Path, shared: Row) -> None:
        """Go on with the report in `folder`; raises OutputError if it was made of or on something else."""
        self.folder, self.shared = folder, shared
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows = read_rows(folder) if (folder / NAME).exists() else []
        except OSError as error:
            raise OutputError(f"{folder}: cannot write there ({error.strerror})") from error
        for name in WRITTEN if not self.rows else ():
            if os.path.lexists(folder / name):
                raise OutputError(f"{folder / name} is not of a report of 'edgemuse bench'; choose another folder")
        for row in self.rows:
            changed = [key for key in CONTEXT if row[key] != shared[key]]
            if changed:
                raise OutputError(
                    f"{folder} holds measurements that differ in {', '.join(changed)}; choose another folder and "
                    "put the two side by side with 'edgemuse bench compare'"
                )
        if (folder / NAME).exists():
            rewrite(folder / NAME)

    def find(self, **fields: Any) -> Row | None:
        """A row with these fields, if there is one."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in fields.items())), None)

    def add(self, **fields: Any) -> Row:
        """Append a row."""
        row = fields | self.shared
        append(self.folder / NAME, json.dumps(row, allow_nan=False))
        self.rows.append(row)
        return row
