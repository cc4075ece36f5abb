"""Time, memory and accuracy of every way to run a network.

Every run is a process of its own, measured from its start to its end, with its files on disk. The first run of a system
finds no compiled engine; the later ones, interleaved with all other systems, do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from edgemuse.bench.measure import cases, scans
from edgemuse.bench.measure.cases import SMALL_RAM, Case
from edgemuse.bench.measure.models import Progress
from edgemuse.bench.measure.process import ProcessFailure, measure
from edgemuse.bench.measure.roofline import operations, peaks
from edgemuse.bench.measure.rows import Row, state
from edgemuse.bench.pages.page import joined, named, parted, parts_of
from edgemuse.bench.pages.performance_report import INTRODUCTION, network_part
from edgemuse.bench.pages.program import EXISTING, Workplace, page_options, say
from edgemuse.calibration import gate
from edgemuse.calibration.evaluate import Setting, settings
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.precision import stored_precision
from edgemuse.runtime.regions.agreement import dice, mean_dice
from edgemuse.runtime.regions.labels import to_indices
from edgemuse.runtime.results.files import output_paths
from edgemuse.runtime.scan.nifti import scan_stem

LONG = 150.0
"""A system that takes more seconds than this runs once."""
NNUNET = """
import sys, numpy as np
from pathlib import Path
from edgemuse.bench.measure.reference import Reference
labels = Reference(Path(sys.argv[1]), mirroring=sys.argv[4] == "on").labels(Path(sys.argv[2]))
np.save(sys.argv[3], labels.astype(np.uint16))
"""


@dataclass(frozen=True)
class Part:
    """A part of the page: its title, what makes its network and scans, and how often each system runs warm."""

    title: str
    make: Callable[[Path, Path, Progress], Case]
    repeats: int


PARTS = {
    "development": Part("Development model", cases.development, 3),
    "built-in": Part("Built-in model", cases.built_in, 3),
    "dlmuse": Part("DLMUSE's network, random weights", cases.dlmuse, 1),
}


@dataclass(frozen=True)
class System:
    """A way to run a network: `arguments` of `edgemuse segment`, or `nnunet`, whose mirroring is `on` or `off`."""

    name: str
    arguments: tuple[str, ...] = ()
    nnunet: str = ""
    repeats: int = 1

    @property
    def folder(self) -> str:
        """The name of a folder for its files."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:12]


def systems(case: Case, bundle: Bundle, repeats: int) -> list[System]:
    """List every system for `case`; the first is what the others are compared with.

    Backends that `auto` would not take run once and without the profile `reference`. If no truth is known they run in
    fp32 alone: the other networks show that another precision saves them nothing.
    """
    found = [setting for setting in settings(bundle) if (setting.backend, setting.precision) != ("onnxruntime", "fp16")]
    ours = [
        system for setting in found for system in _ways(case, setting, setting.backend == found[0].backend, repeats)
    ]
    ours.sort(key=lambda system: not system.name.startswith("reference"))
    if case.folder is None:
        return ours
    mirrors = ("off", "on") if bundle.manifest.network.mirror_axes else ("off",)
    return ours + [System(f"nnU-Net, mirroring {on} | PyTorch | fp32", nnunet=on, repeats=repeats) for on in mirrors]


def _ways(case: Case, setting: Setting, preferred: bool, repeats: int) -> Iterator[System]:
    """List the systems of one setting: as it is, unmirrored, with little memory; `auto` takes a `preferred` backend."""
    if not preferred and (setting.profile == "reference" or (setting.precision != "fp32" and not case.truth)):
        return
    where = f"{setting.backend} | {setting.precision}"
    options = ("--backend", setting.backend, "--device", setting.device, "--precision", setting.precision)
    arguments = ("--profile", setting.profile, *options)
    times = repeats if preferred else 0
    yield System(f"{setting.profile} | {where}", arguments, repeats=times)
    if (setting.profile, setting.precision) == ("reference", "fp32") and case.unmirrored:
        unmirrored = (*arguments, "--model", str(case.unmirrored))
        yield System(f"reference, mirroring off | {where}", unmirrored, repeats=times)
    if (setting.profile, setting.precision) == ("fast", "int8") and preferred and not case.truth:
        yield System(f"fast, --max-ram {SMALL_RAM} | {where}", (*arguments, "--max-ram", SMALL_RAM), repeats=times)


@dataclass(frozen=True)
class Bench:
    """A case being measured: its opened bundle, its systems, where files and rows go, and which systems failed."""

    case: Case
    bundle: Bundle
    systems: Sequence[System]
    place: Workplace
    failed: dict[System, str] = field(default_factory=dict)

    def run_all(self) -> None:
        """Measure all scans and systems, the timed scan last, round by round; a system that fails is left out."""
        for scan in self.case.others:
            for system in self.systems:
                if not system.nnunet:
                    self.row(system, scan, 0)
        for number in range(1 + max(system.repeats for system in self.systems)):
            for system in self.systems:
                first = self.place.of(**self.key(system, self.case.timed, 0))
                if number == 0 or (number <= system.repeats and first and first[0]["seconds"] < LONG):
                    self.row(system, self.case.timed, number)

    def key(self, system: System, scan: Path, number: int) -> Row:
        """Return the fields that tell one run from the others."""
        names = {"case": self.case.name, "bundle": self.bundle.sha256, "system": system.name}
        return names | {"scan": scan.name, "number": number}

    def row(self, system: System, scan: Path, number: int) -> None:
        """Measure one run, unless that was done and its files are still there."""
        key, labels = self.key(system, scan, number), self.labels_path(system, scan)
        if system in self.failed or (self.place.of(**key) and labels.exists()):
            return
        labels.parent.mkdir(parents=True, exist_ok=True)
        cache = labels.parent / "cache"
        if number == 0:
            shutil.rmtree(cache, ignore_errors=True)
        try:
            run = measure(self.command(system, scan), os.environ | {"EDGEMUSE_CACHE_DIR": str(cache)})
        except ProcessFailure as error:
            self.failed[system] = str(error)
            say(f"{self.case.name}: {system.name}: left out: {error}")
            return
        row = key | {"seconds": run.seconds, "peak": run.peak} | self.made(system, scan) | self.scores(system, scan)
        self.place.add(row)
        say(f"{self.case.name}: {system.name}, {scan.name}, run {number}: {run.seconds:.1f} s, {run.peak / 1e9:.2f} GB")

    def labels_path(self, system: System, scan: Path) -> Path:
        """Return where the labels of `system` for `scan` go."""
        folder = self.place.folder / "out" / system.folder
        return folder / f"{scan.name}.npy" if system.nnunet else output_paths(folder, scan_stem(scan))["dseg.nii.gz"]

    def command(self, system: System, scan: Path) -> list[str]:
        """Return the command that segments `scan` with `system`."""
        labels = self.labels_path(system, scan)
        if system.nnunet:
            return [sys.executable, "-c", NNUNET, str(self.case.folder), str(scan), str(labels), system.nnunet]
        command = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", str(scan), "-m", str(self.case.bundle)]
        return [*command, "-o", str(labels.parent), "--overwrite", "--no-postprocess", *system.arguments]

    def made(self, system: System, scan: Path) -> Row:
        """Return what the provenance of a run says."""
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
        """Read the label numbers (i, j, k) that `system` gave."""
        path = self.labels_path(system, scan)
        return to_indices(np.load(path), self.bundle.manifest.labels) if system.nnunet else scans.labels_of(path)

    def scores(self, system: System, scan: Path) -> Row:
        """Return mean Dice with the first system's labels, and with the truth over the structures in it."""
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
        """Read the truth, with only the label numbers that the model knows; None if there is none."""
        if scan != self.case.timed or self.case.truth is None:
            return None
        truth = scans.labels_of(self.case.truth)
        truth[~np.isin(truth, [label.index for label in self.bundle.manifest.labels])] = 0
        return truth

    def verdict(self, system: System, precision: str) -> str:
        """Return what the accuracy gate says of `system` on all scans; nothing if no truth is known."""
        if self.case.truth is None:
            return ""
        found = [
            gate.Case(self.labels(self.systems[0], scan), self.labels(system, scan), self.truth(scan))
            for scan in (self.case.timed, *self.case.others)
        ]
        return "; ".join(gate.failures(gate.measure(found), precision)) or "passed"


def summarise(bench: Bench) -> list[Row]:
    """Sum up each system: medians of its warm runs, and what the first run took."""
    summaries = []
    for system in bench.systems:
        if system in bench.failed:
            continue
        runs = bench.place.of(case=bench.case.name, bundle=bench.bundle.sha256, system=system.name)
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


def measured(name: str, shared: Path, place: Workplace, model_folder: Path | None) -> str:
    """Measure the part called `name` and write its text; nnU-Net runs `model_folder` if the case has none."""
    part = PARTS[name]
    case = part.make(shared, place.folder, say)
    case = replace(case, folder=model_folder or case.folder)
    bundle = open_bundle(case.bundle)
    bench = Bench(case, bundle, systems(case, bundle, part.repeats), place)
    bench.run_all()
    left_out = {system.name: reason for system, reason in bench.failed.items()}
    say("measuring the peak of the processor")
    text = network_part(summarise(bench), left_out, peaks(), place.machine)
    return joined(place.age([named(case.name, bundle.sha256)], f"performance-{name}"), text)


@click.command()
@page_options("performance")
@click.option("--part", "names", multiple=True, type=click.Choice(list(PARTS)), default=list(PARTS), help="Measure "
              "only this; the page keeps what it says of the rest.  [default: all]")  # fmt: skip
@click.option("--built-in-folder", type=EXISTING, help="The model folder that the built-in model was exported from, to "
              "run nnU-Net on it.")  # fmt: skip
def main(shared: Path, output: Path, work: Path, names: tuple[str, ...], built_in_folder: Path | None) -> None:
    """Measure every system on three networks, one after the other."""
    for name in names:
        place = Workplace(work / name, state())
        text = measured(name, shared, place, built_in_folder if name == "built-in" else None)
        parts = parts_of(output.read_text(encoding="utf-8") if output.exists() else "") | {PARTS[name].title: text}
        known = {part.title: parts[part.title] for part in PARTS.values() if part.title in parts}
        place.publish(output, parted("performance", "Performance", INTRODUCTION, known))


if __name__ == "__main__":
    main()
