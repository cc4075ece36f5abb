"""Many scans at once: `python -m edgemuse.bench.pages.many SHARED -o docs/measured/many.md`.

Makes a BIDS dataset of 26 scans out of the T1 scans in SHARED (several orientations and spacings; two files are
damaged) and segments it with `edgemuse bids`: by one process, by two that share the folder of results, by one that is
killed and started again, by two of which one is killed, and, where Dask is installed, by a cluster of two workers of
which one is killed. The label maps and tables must be the same each time, and the two damaged files reported.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click
import psutil

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.process import resident
from edgemuse.bench.measure.rows import commit
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.runtime.model.builtin import BUILT_IN

Change = Callable[[Path, Path], Path]
CHANGES: dict[str, Change] = {
    "as it is": lambda scan, target: Path(shutil.copy(scan, target)),
    "LPS": partial(scans.reoriented, codes="LPS"),
    "PIR": partial(scans.reoriented, codes="PIR"),
    "ASL": partial(scans.reoriented, codes="ASL"),
    "1.5 mm": partial(scans.resampled, spacing=(1.5, 1.5, 1.5)),
    "2 mm": partial(scans.resampled, spacing=(2.0, 2.0, 2.0)),
    "1.2 x 1.2 x 3 mm": partial(scans.resampled, spacing=(1.2, 1.2, 3.0)),
    "oblique": partial(scans.oblique, degrees=20),
}
LEAST = 24
"""Scans that can be segmented."""
WORKERS = 2
INTERVAL = 0.05
"""Seconds between two looks at a process."""


@dataclass(frozen=True)
class Ran:
    """What processes that ran together did.

    Attributes:
        seconds: wall time of all.
        codes: exit codes.
        said: what they wrote to stderr, all together.
        memory: resident bytes of the larger process, the highest in each third of the time.
    """

    seconds: float
    codes: list[int]
    said: str
    memory: tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """A line of the report, and what was wrong, if anything."""

    name: str
    ran: Ran
    segmented: int
    wrong: tuple[str, ...]


def make_dataset(shared: Path, root: Path) -> tuple[int, list[Path]]:
    """Write the dataset into the new `root`; returns how many scans are good, and the damaged files."""
    sources = sorted((shared / "data" / "t1").glob("*_T1w.nii.gz"))
    rounds = itertools.cycle(itertools.product(CHANGES.values(), sources))
    count = max(LEAST, len(CHANGES) * len(sources)) if sources else 0
    if not count:
        raise click.UsageError(f"{shared}/data/t1 holds no *_T1w.nii.gz")
    for number, (change, source) in enumerate(itertools.islice(rounds, count)):
        change(source, _place(root, number))
    cut, empty = _place(root, count), _place(root, count + 1)
    whole = sources[0].read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    description = {"Name": "Copies of T1 scans", "BIDSVersion": "1.11.1", "DatasetType": "raw"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    return count, [cut, empty]


def _place(root: Path, number: int) -> Path:
    """Two sessions a participant."""
    subject, session = f"sub-{number // 2 + 1:02}", f"ses-{number % 2 + 1}"
    folder = root / subject / session / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{subject}_{session}_T1w.nii.gz"


@dataclass(frozen=True)
class Bench:
    """The dataset, the model and how to run."""

    data: Path
    model: Path
    profile: str
    precision: str
    work: Path

    def run(self, out: Path, processes: int, kill_after: int | None = None, cluster: Cluster | None = None) -> Ran:
        """Segment the dataset into `out`.

        As soon as `kill_after` scans are done, the first process is killed, or the first worker of `cluster`.
        """
        with self._started(out, processes, cluster.address if cluster else None) as running:
            begin, samples = time.perf_counter(), list[tuple[float, int]]()
            workers = cluster.workers() if cluster else [psutil.Process(process.pid) for process in running]
            while any(process.poll() is None for process in running):
                time.sleep(INTERVAL)
                samples.append((time.perf_counter() - begin, max(map(resident, workers))))
                if kill_after is not None and done(out) >= kill_after:
                    (workers[0] if cluster else running[0]).kill()
                    kill_after = None
            seconds = time.perf_counter() - begin
        said = "".join(path.read_text() for path in sorted(self.work.glob("*.log")))
        return Ran(seconds, [process.returncode for process in running], said, thirds(samples, seconds))

    @contextmanager
    def _started(self, out: Path, count: int, scheduler: str | None) -> Iterator[list[subprocess.Popen[bytes]]]:
        command = [sys.executable, "-m", "edgemuse.runtime.cli", "bids", str(self.data), str(out), "participant"]
        command += ["-m", str(self.model), "--profile", self.profile, "--precision", self.precision, "--threads"]
        command += [str(max(cpu_cores() // (WORKERS if scheduler else count), 1))]
        command += ["--scheduler", scheduler] if scheduler else []
        environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(self.work / "cache")}
        for path in self.work.glob("*.log"):
            path.unlink()
        running = list[subprocess.Popen[bytes]]()
        try:
            for number in range(count):
                with (self.work / f"{number}.log").open("wb") as log:
                    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
                    running.append(started)
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


@dataclass(frozen=True)
class Cluster:
    """A Dask scheduler's address, and the processes that watch over its workers."""

    address: str
    nannies: list[subprocess.Popen[bytes]]

    def workers(self) -> list[psutil.Process]:
        """The process of each worker: of a nanny's children, the largest."""
        children = [psutil.Process(nanny.pid).children(recursive=True) for nanny in self.nannies]
        return [max(found, key=resident) for found in children]


@contextmanager
def dask_cluster(folder: Path, preload: str = "") -> Iterator[Cluster]:
    """A scheduler and `WORKERS` workers, each a process, with their files in `folder`.

    `preload`: code that the workers run first.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "preload.py").write_text(preload)
    found = place / "scheduler.json"
    common = ["--scheduler-file", str(found), "--no-dashboard", "--host", "127.0.0.1"]
    worker = ["--nthreads", "1", "--memory-limit", "0", "--local-directory", str(place)]
    commands = [["dask_scheduler", "--port", "0", *common]]
    commands += [["dask_worker", *common, *worker, "--preload", str(place / "preload.py")]] * WORKERS
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(folder / "cache")}
    running = list[subprocess.Popen[bytes]]()
    try:
        for name, *options in commands:
            with (place / "dask.txt").open("ab") as log:
                command = [sys.executable, "-m", f"distributed.cli.{name}", *options]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        _wait_for(lambda: (place / "dask.txt").read_text().count("Registered to:") >= WORKERS, "Dask's workers")
        yield Cluster(json.loads(found.read_text())["address"], running[1:])
    finally:
        for process in reversed(running):  # a nanny ends its worker
            process.terminate()
        for process in running:
            process.wait()


def _wait_for(ready: Callable[[], bool], what: str) -> None:
    for _ in range(1200):
        if ready():
            return
        time.sleep(INTERVAL)
    raise click.ClickException(f"{what} did not start within a minute")


def thirds(samples: list[tuple[float, int]], seconds: float) -> tuple[float, float, float]:
    """The highest of the (time, bytes) samples in each third of `seconds`."""
    parts: list[float] = [0, 0, 0]
    for when, size in samples:
        part = min(int(3 * when / seconds), 2)
        parts[part] = max(parts[part], size)
    return parts[0], parts[1], parts[2]


def done(out: Path) -> int:
    """Scans whose results are in `out`."""
    return len(list(out.glob("sub-*/ses-*/anat/*_volumes.tsv")))


def results(out: Path) -> dict[str, bytes]:
    """The label maps and tables in `out`."""
    paths = [path for path in out.glob("sub-*/ses-*/anat/*") if path.name.endswith((".nii.gz", ".tsv"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def judge(
    ran: Ran, out: Path, codes: list[int], good: int, damaged: list[Path], expected: dict[str, bytes]
) -> list[str]:
    """What is wrong with a run."""
    found = results(out)
    wrong = []
    if ran.codes != codes:
        wrong.append(f"exit codes {ran.codes}, not {codes}")
    if done(out) != good:
        wrong.append(f"{done(out)} of {good} scans done")
    wrong += [f"{path.name} not reported" for path in damaged if f"edgemuse: {path}: the file is" not in ran.said]
    if expected and found != expected:
        wrong.append(f"{sum(found.get(name) != data for name, data in expected.items())} files differ")
    if list(out.rglob("*.part")) or list(out.rglob("*.lock")):
        wrong.append("temporary files left")
    return wrong


def measure(bench: Bench, good: int, damaged: list[Path]) -> Iterator[Row]:
    """Every run, one after the other."""
    outs = {name: bench.work / name for name in ("one", "two", "again", "survivor")}
    for processes in (1, 2):  # so that the engines are cached
        bench.run(bench.work / f"warm{processes}", processes, kill_after=1)
    ran = bench.run(outs["one"], 1)
    expected = results(outs["one"])
    yield Row("one process", ran, good, tuple(judge(ran, outs["one"], [2], good, damaged, expected)))
    ran = bench.run(outs["two"], 2)
    yield Row("two processes, one folder", ran, good, tuple(judge(ran, outs["two"], [2, 2], good, damaged, expected)))
    ran = bench.run(outs["again"], 1, kill_after=good // 3)
    before = done(outs["again"])
    wrong = () if ran.codes == [-9] and 0 < before < good else (f"not killed halfway: {before} of {good} done",)
    yield Row("killed by SIGKILL", ran, before, wrong)
    ran = bench.run(outs["again"], 1)
    skipped = ran.said.count("done already, skipped")
    wrong_again = judge(ran, outs["again"], [2], good, damaged, expected)
    if skipped not in (before, before - 1):  # the last one may have been written in part
        wrong_again.append(f"{skipped} of {before} skipped")
    yield Row("the same, started again", ran, good - skipped, tuple(wrong_again))
    ran = bench.run(outs["survivor"], 2, kill_after=good // 3)
    yield Row(
        "two processes, one killed", ran, good, tuple(judge(ran, outs["survivor"], [-9, 2], good, damaged, expected))
    )
    if find_spec("distributed"):
        out, lost = bench.work / "dask", bench.work / "dask-killed"
        with dask_cluster(bench.work) as cluster:
            ran = bench.run(out, 1, cluster=cluster)
        yield Row("Dask, two workers", ran, good, tuple(judge(ran, out, [2], good, damaged, expected)))
        with dask_cluster(bench.work) as cluster:
            ran = bench.run(lost, 1, kill_after=good // 3, cluster=cluster)
        yield Row("Dask, one of two workers killed", ran, good, tuple(judge(ran, lost, [2], good, damaged, expected)))


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option("-m", "--model", type=click.Path(path_type=Path, exists=True), default=BUILT_IN, help="Bundle.")
@click.option("--profile", default="balanced", show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="int8 depends on the number of threads a little.")
def main(shared: Path, output: Path, model: Path, profile: str, precision: str) -> None:
    """Measure runs over many scans; exit code 1 if results differ, a failure is not reported or something is lost."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        good, damaged = make_dataset(shared, work / "data")
        click.echo(f"{good} scans and {len(damaged)} damaged files", err=True)
        rows = []
        for row in measure(Bench(work / "data", model, profile, precision, work), good, damaged):
            click.echo(f"{row.name}: {row.ran.seconds:.1f} s, {'; '.join(row.wrong) or 'right'}", err=True)
            rows.append(row)
    output.write_text(report(rows, good, len(damaged), f"{model.stem}, `{profile}`, {precision}"), encoding="utf-8")
    click.echo(output.read_text(encoding="utf-8"))
    raise SystemExit(1 if any(row.wrong for row in rows) else 0)


def report(rows: list[Row], good: int, damaged: int, what: str) -> str:
    """The table, and what it says."""
    lines = [
        "<!-- Written by: python -m edgemuse.bench.pages.many SHARED -o docs/measured/many.md -->",
        "# Many scans",
        "",
        "A BIDS dataset made of three T1 scans in several orientations and spacings, segmented with `edgemuse bids`.",
        "",
        f"| {good} scans and {damaged} damaged files | scans segmented | wall time | scans an hour | memory of a "
        "process, highest in each third of the run | results |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = ", ".join(f"{size / 1e9:.2f}" for size in row.ran.memory)
        rate = row.segmented / row.ran.seconds * 3600
        cells = (row.name, row.segmented, f"{row.ran.seconds:.0f} s", f"{rate:.0f}", f"{memory} GB")
        lines.append(f"| {' | '.join(map(str, cells))} | {'; '.join(row.wrong) or 'right'} |")
    return "\n".join(
        [
            *lines,
            "",
            "Right: the same bytes in every label map and table as from one process, the damaged files reported and "
            "the exit code 2, nothing left over; after SIGKILL, what was done is skipped, and of two processes the "
            f"other does the rest. {what}; {cpu_name()}, {cpu_cores()} cores, shared by processes that run together; "
            f"commit {commit()}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
