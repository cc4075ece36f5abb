"""Many scans at once.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import psutil

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.dask_cluster import WORKERS, Cluster, dask_cluster
from edgemuse.bench.measure.process import INTERVAL, resident
from edgemuse.bench.measure.rows import state
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.engines.hardware import cpu_cores
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle

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
"""The fewest scans of the dataset that can be segmented."""
PROFILE, PRECISION = "balanced", "fp32"
"""int8 would not do: its results depend on the number of threads a little."""


@dataclass(frozen=True)
class Dataset:
    """A BIDS dataset: its folder, how many of its scans can be segmented, and the files that are damaged."""

    root: Path
    good: int
    damaged: tuple[Path, ...]


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
    codes: Sequence[int]
    said: str
    memory: Sequence[float]


@dataclass(frozen=True)
class Row:
    """A line of the table, and what was wrong, if anything."""

    name: str
    seconds: float
    memory: Sequence[float]
    segmented: int
    wrong: Sequence[str]


def make_dataset(shared: Path, root: Path) -> Dataset:
    """Write the dataset into the new folder `root`."""
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
    return Dataset(root, count, (cut, empty))


def _place(root: Path, number: int) -> Path:
    """Return where scan `number` lies; each participant has two visits."""
    subject, visit = f"sub-{number // 2 + 1:02}", f"ses-{number % 2 + 1}"
    folder = root / subject / visit / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{subject}_{visit}_T1w.nii.gz"


@dataclass(frozen=True)
class Bench:
    """The dataset, the model, and the folder that results go into."""

    data: Dataset
    model: Path
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
        environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(self.work / "cache")}
        for path in self.work.glob("*.log"):
            path.unlink()
        running = list[subprocess.Popen[bytes]]()
        try:
            for number in range(count):
                with (self.work / f"{number}.log").open("wb") as log:
                    command = self._command(out, count, scheduler)
                    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
                    running.append(started)
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()

    def _command(self, out: Path, count: int, scheduler: str | None) -> list[str]:
        threads = max(cpu_cores() // (WORKERS if scheduler else count), 1)
        command = [sys.executable, "-m", "edgemuse.runtime.cli", "bids", str(self.data.root), str(out), "participant"]
        command += ["-m", str(self.model), "--profile", PROFILE, "--precision", PRECISION, "--threads", str(threads)]
        return [*command, "--scheduler", scheduler] if scheduler else command

    def judged(self, name: str, ran: Ran, codes: Sequence[int], out: Path) -> Row:
        """Return the line for a run that should have ended with `codes` and with all results in `out`."""
        expected = results(self.work / "one")
        return Row(name, ran.seconds, ran.memory, self.data.good, judge(ran, out, codes, self.data, expected))


def thirds(samples: list[tuple[float, int]], seconds: float) -> list[float]:
    """Return the highest of the (time, bytes) samples in each third of `seconds`."""
    parts: list[float] = [0, 0, 0]
    for when, size in samples:
        part = min(int(3 * when / seconds), 2)
        parts[part] = max(parts[part], size)
    return parts


def done(out: Path) -> int:
    """Count the scans whose results are in `out`."""
    return len(list(out.glob("sub-*/ses-*/anat/*_volumes.tsv")))


def results(out: Path) -> dict[str, bytes]:
    """Read the label maps and tables in `out`."""
    paths = [path for path in out.glob("sub-*/ses-*/anat/*") if path.name.endswith((".nii.gz", ".tsv"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def judge(ran: Ran, out: Path, codes: Sequence[int], data: Dataset, expected: dict[str, bytes]) -> list[str]:
    """Return what is wrong with a run whose results should be `expected`."""
    found = results(out)
    wrong = []
    if list(ran.codes) != list(codes):
        wrong.append(f"exit codes {ran.codes}, not {codes}")
    if done(out) != data.good:
        wrong.append(f"{done(out)} of {data.good} scans done")
    wrong += [f"{path.name} not reported" for path in data.damaged if f"edgemuse: {path}: the file is" not in ran.said]
    if found != expected:
        wrong.append(f"{sum(found.get(name) != data for name, data in expected.items())} files differ")
    if list(out.rglob("*.part")) or list(out.rglob("*.lock")):
        wrong.append("temporary files left")
    return wrong


def one_process(bench: Bench, out: Path) -> Iterator[Row]:
    """Run one process, after two that cache the engines; its results are what the others must give."""
    for processes in (1, 2):
        bench.run(out.with_name(f"warm{processes}"), processes, kill_after=1)
    yield bench.judged("one process", bench.run(out, 1), [2], out)


def two_processes(bench: Bench, out: Path) -> Iterator[Row]:
    """Run two processes that share a folder."""
    yield bench.judged("two processes, one folder", bench.run(out, 2), [2, 2], out)


def started_again(bench: Bench, out: Path) -> Iterator[Row]:
    """Run a process that is killed, and one that goes on."""
    good = bench.data.good
    ran = bench.run(out, 1, kill_after=good // 3)
    before = done(out)
    halfway = ran.codes == [-9] and 0 < before < good
    wrong = [] if halfway else [f"not killed halfway: {before} of {good} done"]
    yield Row("killed by SIGKILL", ran.seconds, ran.memory, before, wrong)
    ran = bench.run(out, 1)
    skipped = ran.said.count("done already, skipped")
    row = bench.judged("the same, started again", ran, [2], out)
    wrong = list(row.wrong)
    if skipped not in (before, before - 1):  # the last one may have been written in part
        wrong.append(f"{skipped} of {before} skipped")
    yield Row(row.name, row.seconds, row.memory, good - skipped, wrong)


def survivor(bench: Bench, out: Path) -> Iterator[Row]:
    """Run two processes of which one is killed."""
    ran = bench.run(out, 2, kill_after=bench.data.good // 3)
    yield bench.judged("two processes, one killed", ran, [-9, 2], out)


def on_dask(bench: Bench, out: Path) -> Iterator[Row]:
    """Run a cluster of two workers."""
    with dask_cluster(bench.work) as cluster:
        ran = bench.run(out, 1, cluster=cluster)
    yield bench.judged("Dask, two workers", ran, [2], out)


def on_dask_killed(bench: Bench, out: Path) -> Iterator[Row]:
    """Run a cluster of which one worker is killed."""
    with dask_cluster(bench.work) as cluster:
        ran = bench.run(out, 1, kill_after=bench.data.good // 3, cluster=cluster)
    yield bench.judged("Dask, one of two workers killed", ran, [2], out)


STEPS: dict[str, Callable[[Bench, Path], Iterator[Row]]] = {
    "one": one_process,
    "two": two_processes,
    "again": started_again,
    "survivor": survivor,
    "dask": on_dask,
    "dask-killed": on_dask_killed,
}
"""Steps by the folder for their results; those of the first are compared with all others."""


def rows_of(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Take the step `name`; returns the fields of its rows."""
    out = bench.work / name
    shutil.rmtree(out, ignore_errors=True)  # of an interrupted run
    rows = list(STEPS[name](bench, out))
    for row in rows:
        say(f"{row.name}: {row.seconds:.1f} s, {'; '.join(row.wrong) or 'right'}")
    return [asdict(row) for row in rows]


@click.command()
@page_options("many")
def main(shared: Path, output: Path, work: Path) -> None:
    """Measure runs over many scans; exit code 1 if results differ, a failure is not reported or something is lost."""
    place = Workplace(work, state())
    names = [name for name in STEPS if find_spec("distributed") or not name.startswith("dask")]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(make_dataset(shared, Path(folder)), BUILT_IN, place.folder)
        found = [place.once(name, partial(rows_of, bench, name)) for name in names]
    rows = [Row(**fields) for each in found for fields in each]
    first = place.age([named("built-in model", open_bundle(BUILT_IN).sha256)], "many")
    place.publish(output, joined(first, report(rows, bench.data), place.machine))
    raise SystemExit(1 if any(row.wrong for row in rows) else 0)


INTRODUCTION = """# Many scans

A BIDS dataset made of three T1 scans in several orientations and spacings, segmented with `edgemuse bids`.
"""
RIGHT = f"""Right: the same bytes in every label map and table as from one process, the damaged files reported and the
exit code 2, nothing left over; after SIGKILL, what was done is skipped, and of two processes the other does the rest.
`{PROFILE}`, {PRECISION}; processes that run together share the cores."""


def report(rows: Sequence[Row], data: Dataset) -> str:
    """Write the page without its first and last line."""
    header = [f"{data.good} scans and {len(data.damaged)} damaged files", "scans segmented", "wall time"]
    header += ["scans an hour", "memory of a process, highest in each third of the run", "results"]
    return joined(INTRODUCTION, table(header, map(_cells, rows)), RIGHT)


def _cells(row: Row) -> list[str]:
    memory = ", ".join(f"{size / 1e9:.2f}" for size in row.memory)
    rate = row.segmented / row.seconds * 3600
    cells = [row.name, str(row.segmented), f"{row.seconds:.0f} s", f"{rate:.0f}", f"{memory} GB"]
    return [*cells, "; ".join(row.wrong) or "right"]


if __name__ == "__main__":
    main()
