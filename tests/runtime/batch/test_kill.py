"""`edgemuse segment` is killed at random moments and goes on: nothing half, nothing lost, nothing of the user's gone.

Half of the moments are steps with files, one as likely as another, because that is where something can be torn; the
other half are points in time. The numbers are drawn from the test's seed, so a failure comes again.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundles import CommandLine, Ran, cached, head_image, run_process, snapshot, write_scan

from edgemuse.engines.cache import MODEL, PART
from edgemuse.runtime.results.files import PROVENANCE

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")

SCANS = 3
MINE = {"notes.txt": b"mine", "other_dseg.nii.gz": b"labels by hand", ".hidden.part": b"mine too", "sub/x.lock": b""}
"""Files of the user in the folder of the results."""
WATCHED = """
import os, signal, sys, threading
from edgemuse.runtime.batch.many import Batch
WITH_FILES = ("open", "os.", "tempfile.", "shutil.", "mmap.", "fcntl.")
steps, run = [0], Batch.run
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def count(event, arguments):
    if event.startswith(WITH_FILES):
        steps[0] += 1
        if steps[0] == {step}:
            kill()
def watched(*arguments):
    sys.addaudithook(count)
    if {seconds} is not None:
        timer = threading.Timer({seconds}, kill)
        timer.daemon = True
        timer.start()
    try:
        return run(*arguments)
    finally:
        print("steps", steps[0], file=sys.stderr)
        steps[0] = -1 << 30
Batch.run = watched
"""
"""Counts steps with files while scans are segmented; kills the process at one of them, or after some seconds."""


@dataclass(frozen=True)
class Whole:
    """A run that nobody interrupted: its folder, and how many steps and seconds it took."""

    folder: Path
    steps: int
    seconds: float


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(SCANS):
        write_scan(folder / f"sub-{number}_T1w.nii.gz", head_image((24 + 2 * number, 28, 20), seed=number))
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    ran = segment(data, model, folder / "out", folder / "cache")
    seconds = time.perf_counter() - start
    assert ran.code == 0, ran.err
    steps = next(int(line.split()[1]) for line in ran.err.splitlines() if line.startswith("steps "))
    return Whole(folder / "out", steps, seconds)


def segment(
    data: Path, model: Path, out: Path, cache: Path, *options: str, step: int = 0, seconds: float | None = None
) -> Ran:
    prelude = WATCHED.format(step=step, seconds=seconds)
    return run_process("segment", data, "-m", model, "-o", out, *options, cache_dir=cache, prelude=prelude)


def results(folder: Path) -> dict[str, bytes]:
    """What is the same whenever it is made: label maps and tables."""
    return {path.name: path.read_bytes() for path in folder.glob("sub-*") if path.suffix in (".gz", ".tsv")}


def check_nothing_is_half(out: Path, whole: Whole) -> None:
    """Of a killed run: every file that has the name of a result is one, and is as its provenance says."""
    made, wanted = results(out), results(whole.folder)
    assert all(wanted[name] == content for name, content in made.items())
    for path in out.glob(f"*_{PROVENANCE}"):
        files = json.loads(path.read_text())["files"]
        assert {"dseg.nii.gz", "dseg.tsv", "volumes.tsv", "qc.png"} == set(files)
        for name in ("dseg.nii.gz", "dseg.tsv", "volumes.tsv"):
            there = path.with_name(path.name.replace(PROVENANCE, name))
            assert not there.exists() or hashlib.sha256(there.read_bytes()).hexdigest() == files[name]


def check_all_is_there(out: Path, cache: Path, whole: Whole) -> None:
    """After it went on: what an uninterrupted run leaves and the user's own files, and nothing besides."""
    assert results(out) == results(whole.folder)
    names = {path.relative_to(whole.folder).as_posix() for path in whole.folder.rglob("*")}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == {*names, *MINE, "sub"}
    assert {name: (out / name).read_bytes() for name in MINE} == MINE
    assert all(MODEL.fullmatch(path.name) or PART.fullmatch(path.name) for path in cached(cache))


def kill_and_go_on(
    seed: int, data: Path, model: Path, whole: Whole, capfd: pytest.CaptureFixture[str], folder: Path
) -> bool:
    """Kill a run at a moment that `seed` gives, then have another go on; whether the kill came before the end.

    Every third run replaces earlier results, every third goes on after two kills.
    """
    draw, out, cache = random.Random(seed), folder / "out", folder / "cache"
    out.mkdir(parents=True)
    options = ("--overwrite",) if seed % 3 == 0 else ()
    if options:
        shutil.copytree(whole.folder, out, dirs_exist_ok=True)
    for name, content in MINE.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    killed = False
    for _ in range(2 if seed % 3 == 1 else 1):
        moment = {"step": draw.randint(1, whole.steps)} if draw.random() < 0.5 else {"seconds": draw.random()}
        if "seconds" in moment:
            moment["seconds"] *= whole.seconds / 2  # the first half is Python's own start
        ran = segment(data, model, out, cache, *options, **moment)  # type: ignore[arg-type]
        assert ran.code in (0, -9), ran.err
        killed = killed or ran.code == -9
        check_nothing_is_half(out, whole)
    ran = CommandLine(capfd, cache)("segment", data, "-m", model, "-o", out, *options)
    assert ran.code == 0, ran.err
    check_all_is_there(out, cache, whole)
    return killed


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_loses_nothing(
    seed: int, data: Path, model: Path, whole: Whole, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = snapshot(data)
    kill_and_go_on(seed, data, model, whole, capfd, tmp_path / "run")
    assert snapshot(data) == before


@pytest.mark.fuzz
def test_fifty_kills_lose_nothing(
    data: Path, model: Path, whole: Whole, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = snapshot(data)
    killed = [kill_and_go_on(seed, data, model, whole, capfd, tmp_path / str(seed)) for seed in range(100, 150)]
    assert sum(killed) > 10, "most of the runs had ended before"
    assert snapshot(data) == before
