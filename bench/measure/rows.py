"""Rows of measurements in a file, appended as they are made, so that an interrupted run can go on.

A report's rows lie in `results.jsonl`; each says by itself in which state it was measured.
"""

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
"""Fields that are the same in all rows of a report; figures that differ in them are not compared as one."""
KINDS = ("run", "batch", "accuracy", "installed", "scaling", "mlperf")
WRITTEN = ("report.html", "report.md", "figures")
"""What is made of the rows when all are there, and then replaced."""
REQUIRED = ("kind", "system", *CONTEXT)


def state(**versions: str) -> Row:
    """Return what figures depend on besides the model; `versions` are of packages that `PACKAGES` does not name."""
    known = {"python": platform.python_version()} | dict(_versions())
    return {"commit": commit(), "machine": machine(), "versions": known | versions}


def machine_text(row: Row) -> str:
    """Describe the machine in a row or state."""
    machine = row["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}"


def versions_text(row: Row) -> str:
    """List the versions in a row or state."""
    return ", ".join(f"{name} {number}" for name, number in row["versions"].items())


def context(threads: int | None, bundle_sha256: str) -> Row:
    """Return the fields of `CONTEXT` as they are now."""
    return state() | {"cpu_flags": cpu_flags(), "threads": threads, "bundle_sha256": bundle_sha256}


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def commit() -> str:
    """Name the commit that runs, `-dirty` if files outside `docs/` were changed; without git, edgemuse's version."""
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
    """List the instruction sets of the processor, if the system names them."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return sorted(line.split(":", 1)[1].split())
    except OSError:
        pass
    return []


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of a report in the order in which they were made; raises InputError if there are none."""
    path = folder / NAME
    try:
        lines = whole_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no results to read; name a folder that 'edgemuse bench' wrote") from error
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def whole_lines(path: Path) -> list[str]:
    """Read the lines of a file of rows, without a last one that an interrupted run left half written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def rewrite(path: Path) -> None:
    """Drop a half-written last line from the file of rows at `path`."""
    write_file(path, "".join(whole_lines(path)).encode())


def append(path: Path, line: str) -> None:
    """Add `line` to the file of rows at `path` and wait until it is on the disk."""
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
        """Go on with the report in `folder`; raises OutputError if its rows differ from `shared`."""
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
        """Return the first row with these fields; None if there is none."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in fields.items())), None)

    def add(self, **fields: Any) -> Row:
        """Append a row."""
        row = fields | self.shared
        append(self.folder / NAME, json.dumps(row, allow_nan=False))
        self.rows.append(row)
        return row
