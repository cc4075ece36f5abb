"""Time, memory and accuracy of every way to run a network.

`python -m edgemuse.bench.pages.performance SHARED -o docs/measured/performance.md`

Every run is a process of its own, measured from its start to its end, with its files on disk. The first run of a system
finds no compiled engine; the later ones, interleaved with all other systems, do. What a run gave is appended to a file
of rows beside the report at once, so that a command that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import click
import numpy as np
import platformdirs

from edgemuse.bench.measure import cases, scans
from edgemuse.bench.measure.cases import Case
from edgemuse.bench.measure.process import ProcessFailure, measure
from edgemuse.bench.measure.roofline import operations, peaks
from edgemuse.bench.measure.rows import Row, append, commit, rewrite, whole_lines
from edgemuse.bench.pages.performance_report import network_part, page, parts_of
from edgemuse.calibration import gate
from edgemuse.calibration.evaluate import settings
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.precision import stored_precision
from edgemuse.runtime.regions.agreement import dice, mean_dice
from edgemuse.runtime.regions.labels import to_indices
from edgemuse.runtime.results.files import output_paths
from edgemuse.runtime.scan.nifti import scan_stem

PARTS = {
    "dev": "Development model",
    "builtin": "Built-in model",
    "dlmuse": "DLMUSE's network, random weights",
}
"""Titles of the parts of the page."""
LONG = 150.0
"""Seconds; what takes longer runs once."""
SMALL_RAM = "2.1"
"""GiB, for `fast` in int8 on a machine with little memory: less than is planned for one pass."""
NNUNET = """
import sys, numpy as np
from pathlib import Path
from edgemuse.bench.measure.reference import Reference
labels = Reference(Path(sys.argv[1]), mirroring=sys.argv[4] == "on").labels(Path(sys.argv[2]))
np.save(sys.argv[3], labels.astype(np.uint16))
"""
Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class System:
    """A way to run a network: `arguments` of `edgemuse segment`, or `nnunet`, whose mirroring is `on` or `off`."""

    name: str
    arguments: tuple[str, ...] = ()
    nnunet: str = ""
    repeats: int = 1

    @property
    def folder(self) -> str:
        """Name of a folder for its files."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]


class RowCache:
    """Rows measured earlier, on disk in `path`, so that they need not be measured again.

    Those of another context are passed over, where `rows.Results`, of which a report is made, refuses them.
    """

    def __init__(self, path: Path, context: Row, progress: Progress) -> None:
        self.path, self.context = path, context
        stored = [json.loads(line) for line in whole_lines(path)] if path.exists() else []
        self.rows = [row for row in stored if row["context"] == context]
        if stored:
            progress(
                f"{path}: going on after {len(self.rows)} rows; {len(stored) - len(self.rows)} are of another state"
            )
        if path.exists():
            rewrite(path)

    def add(self, row: Row) -> None:
        """Append `row`."""
        self.rows.append(row | {"context": self.context})
        append(self.path, json.dumps(self.rows[-1]))

    def of(self, **fields: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in fields.items())]


def context() -> Row:
    """What rows of one report have in common."""
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "versions": {
            name: version(name) for name in ("edgemuse", "openvino", "onnxruntime", "numpy", "torch", "nnunetv2")
        },
    }


def systems(case: Case, bundle: Bundle, repeats: int) -> list[System]:
    """Every system for `case`, the one that the others are compared with first.

    Backends that `auto` would not take run once, without the profile `reference`, and where no truth is known in fp32
    alone: that another precision saves them nothing shows on the other networks.
    """
    found = [setting for setting in settings(bundle) if (setting.backend, setting.precision) != ("onnxruntime", "fp16")]
    preferred = found[0].backend
    ours = []
    for setting in found:
        other = setting.backend != preferred
        if other and (setting.profile == "reference" or (setting.precision != "fp32" and not case.truth)):
            continue
        options = ("--backend", setting.backend, "--device", setting.device, "--precision", setting.precision)
        name = f"{setting.profile} | {setting.backend} | {setting.precision}"
        times = 0 if other else repeats
        ours.append(System(name, ("--profile", setting.profile, *options), repeats=times))
        if (setting.profile, setting.precision) == ("reference", "fp32") and case.unmirrored:
            arguments = (*ours[-1].arguments, "--model", str(case.unmirrored))
            ours.append(System(f"reference, mirroring off | {setting.backend} | fp32", arguments, repeats=times))
        if (setting.precision, setting.profile, setting.backend) == ("int8", "fast", preferred) and not case.truth:
            limited = (*ours[-1].arguments, "--max-ram", SMALL_RAM)
            ours.append(System(f"fast, --max-ram {SMALL_RAM} | {setting.backend} | int8", limited, repeats=repeats))
    ours.sort(key=lambda system: not system.name.startswith("reference"))
    if case.folder is None:
        return ours
    mirrors = ("off", "on") if bundle.manifest.network.mirror_axes else ("off",)
    return ours + [System(f"nnU-Net, mirroring {on} | PyTorch | fp32", nnunet=on, repeats=repeats) for on in mirrors]


@dataclass(frozen=True)
class Bench:
    """A case being measured: its opened bundle, its systems, where files go and what is known already."""

    case: Case
    bundle: Bundle
    systems: Sequence[System]
    work: Path
    rows: RowCache
    progress: Progress
    failed: dict[System, str] = field(default_factory=dict)

    def run_all(self) -> None:
        """All scans and systems, the timed scan last round by round; a system that fails is left out."""
        for scan in self.case.others:
            for system in self.systems:
                if not system.nnunet:
                    self.row(system, scan, 0)
        for number in range(1 + max(system.repeats for system in self.systems)):
            for system in self.systems:
                first = self.rows.of(**self.key(system, self.case.timed, 0))
                if number == 0 or (number <= system.repeats and first and first[0]["seconds"] < LONG):
                    self.row(system, self.case.timed, number)

    def key(self, system: System, scan: Path, number: int) -> Row:
        """What tells one run from the others."""
        names = {"case": self.case.name, "bundle": self.bundle.sha256, "system": system.name}
        return names | {"scan": scan.name, "number": number}

    def row(self, system: System, scan: Path, number: int) -> None:
        """Measure one run, unless that was done and its files are still there."""
        key, labels = self.key(system, scan, number), self.labels_path(system, scan)
        if system in self.failed or (self.rows.of(**key) and labels.exists()):
            return
        labels.parent.mkdir(parents=True, exist_ok=True)
        cache = labels.parent / "cache"
        if number == 0:
            shutil.rmtree(cache, ignore_errors=True)
        try:
            run = measure(self.command(system, scan), os.environ | {"EDGEMUSE_CACHE_DIR": str(cache)})
        except ProcessFailure as error:
            self.failed[system] = str(error)
            self.progress(f"{self.case.name}: {system.name}: left out: {error}")
            return
        row = key | {"seconds": run.seconds, "peak": run.peak} | self.made(system, scan) | self.scores(system, scan)
        self.rows.add(row)
        self.progress(
            f"{self.case.name}: {system.name}, {scan.name}, run {number}: {run.seconds:.1f} s, {run.peak / 1e9:.2f} GB"
        )

    def labels_path(self, system: System, scan: Path) -> Path:
        """Where the labels of `system` for `scan` go."""
        folder = self.work / "out" / system.folder
        return folder / f"{scan.name}.npy" if system.nnunet else output_paths(folder, scan_stem(scan))["dseg.nii.gz"]

    def command(self, system: System, scan: Path) -> list[str]:
        """What is run."""
        labels = self.labels_path(system, scan)
        if system.nnunet:
            return [sys.executable, "-c", NNUNET, str(self.case.folder), str(scan), str(labels), system.nnunet]
        command = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", str(scan), "-m", str(self.case.bundle)]
        return [*command, "-o", str(labels.parent), "--overwrite", "--no-postprocess", *system.arguments]

    def made(self, system: System, scan: Path) -> Row:
        """What the provenance of a run says."""
        if system.nnunet:
            return {}
        paths = output_paths(self.labels_path(system, scan).parent, scan_stem(scan))
        record = json.loads(paths["provenance.json"].read_text())
        profile, backend = record["profile"], record["backend"]
        copies = 2 ** len(profile["mirrored_axes"])
        graph = self.bundle.graph(stored_precision(backend["precision"]))
        return {
            "stages": record["seconds"],
            "tiles": profile["tiles"],
            "tile": profile["tile"],
            "copies": copies,
            "operations": operations(graph, profile["tile"]) * profile["tiles"] * copies,
            "precision": backend["precision"],
            "backend": backend["name"],
            "planned": record["memory"]["planned_bytes"],
        }

    def labels(self, system: System, scan: Path) -> Any:
        """(i, j, k) label numbers that `system` gave."""
        path = self.labels_path(system, scan)
        return to_indices(np.load(path), self.bundle.manifest.labels) if system.nnunet else scans.labels_of(path)

    def scores(self, system: System, scan: Path) -> Row:
        """Mean Dice with the first system's labels, and with the truth over the structures in it."""
        found = self.labels(system, scan)
        scores = {"agreement": mean_dice(found, self.labels(self.systems[0], scan))}
        truth = self.truth(scan)
        if truth is None:
            return scores
        each = dice(truth, found.astype(truth.dtype))
        return scores | {
            "dice": float(np.mean([each[structure] for structure in np.unique(truth[truth > 0]).tolist()]))
        }

    def truth(self, scan: Path) -> Any:
        """(i, j, k) label numbers that the model knows, or None."""
        if scan != self.case.timed or self.case.truth is None:
            return None
        truth = scans.labels_of(self.case.truth)
        truth[~np.isin(truth, [label.index for label in self.bundle.manifest.labels])] = 0
        return truth

    def verdict(self, system: System, precision: str) -> str:
        """What the accuracy gate says of `system` on all scans; nothing where no truth is known."""
        if self.case.truth is None:
            return ""
        found = [
            gate.Case(self.labels(self.systems[0], scan), self.labels(system, scan), self.truth(scan))
            for scan in (self.case.timed, *self.case.others)
        ]
        return "; ".join(gate.failures(gate.measure(found), precision)) or "passed"


def summarise(bench: Bench) -> list[Row]:
    """A row for each system: medians of its warm runs, and what the first one took."""
    summaries = []
    for system in bench.systems:
        if system in bench.failed:
            continue
        runs = bench.rows.of(case=bench.case.name, bundle=bench.bundle.sha256, system=system.name)
        timed = sorted((row for row in runs if row["scan"] == bench.case.timed.name), key=lambda row: row["number"])
        later = timed[1:] or timed
        warm = later if not system.nnunet else timed
        stages = {name: median(row["stages"][name] for row in warm) for name in warm[0].get("stages", {})}
        summaries.append(
            warm[-1]
            | {
                "seconds": median(row["seconds"] for row in warm),
                "runs": len(warm),
                "cold": None if system.nnunet else timed[0]["seconds"],
                "peak": max(row["peak"] for row in timed),
                "agreement": float(np.mean([row["agreement"] for row in {row["scan"]: row for row in runs}.values()])),
                "stages": stages,
                "nnunet": system.nnunet,
                "gate": "" if system.nnunet else bench.verdict(system, warm[-1]["precision"]),
            }
        )
    return summaries


def quick(case: Case, every: Iterable[System]) -> tuple[Case, list[System]]:
    """A case and systems that are done in a minute."""
    few = [system for system in every if "openvino" in system.name or system.nnunet]
    return Case(case.name, case.bundle, case.folder, case.timed, (), case.truth), few


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option("--repeats", default=3, show_default=True, help="Warm runs of each system, in turn.")
@click.option("--quick", "fast", is_flag=True, help="The development model and OpenVINO alone, one warm run.")
@click.option("--part", "names", multiple=True, type=click.Choice(list(PARTS)), default=list(PARTS), help="Measure "
              "only this; the page keeps what it says of the rest.  [default: all]")  # fmt: skip
@click.option("--built-in-folder", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="The model folder that the built-in model was exported from, to run nnU-Net on it.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), help="Folder for models, labels and engines.  [default: in "
              "the user's cache]")  # fmt: skip
def main(
    shared: Path,
    output: Path,
    repeats: int,
    fast: bool,
    names: tuple[str, ...],
    built_in_folder: Path | None,
    work: Path | None,
) -> None:
    """Measure all systems; 45 minutes or more on two idle cores, half of it nnU-Net. Interrupted, it goes on."""
    progress = partial(click.echo, err=True)
    folder = work or Path(platformdirs.user_cache_dir("edgemuse", appauthor=False)) / "performance"
    rows = RowCache(output.with_suffix(".jsonl"), context(), progress)
    makers: dict[str, Callable[[Path, Path, Progress], Case]] = {
        "dev": cases.development,
        "builtin": partial(cases.built_in, folder=built_in_folder),
        "dlmuse": cases.dlmuse,
    }
    parts = parts_of(output.read_text(encoding="utf-8") if output.exists() else "")
    chosen = ["dev"] if fast else [name for name in makers if name in names]
    progress("measuring the peak of the processor")
    best = peaks()
    for name in chosen:
        (folder / name).mkdir(parents=True, exist_ok=True)
        case = makers[name](shared, folder / name, progress)
        bundle = open_bundle(case.bundle)
        every = systems(case, bundle, 1 if fast else repeats)
        case, every = quick(case, every) if fast else (case, every)
        bench = Bench(case, bundle, every, folder / name, rows, progress)
        bench.run_all()
        left_out = {system.name: reason for system, reason in bench.failed.items()}
        parts[PARTS[name]] = network_part(summarise(bench), left_out, best, rows.context)
    output.write_text(page({title: parts[title] for title in PARTS.values() if title in parts}), encoding="utf-8")
    click.echo(output)


if __name__ == "__main__":
    main()
