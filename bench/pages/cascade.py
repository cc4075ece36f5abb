"""A whole cascade of DLMUSE's size on a whole head.

Both networks have DLMUSE's plans, DLICV being of the same family, and random weights, because upstream's may not be
passed on. So that the mask is a brain all the same, all but the brain that the built-in model finds is darkened in
the scan, and one channel of the mask network hands the intensities on to its last layer. Times and memory are those of
the real networks; the labels mean nothing.

nnU-Net's predictor takes the same two steps on the same arrays, mirroring off, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import nibabel as nib
import numpy as np
import torch

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.cases import SMALL_RAM
from edgemuse.bench.measure.models import exported, random_dlmuse, random_model, save_fold
from edgemuse.bench.measure.process import Run, measure
from edgemuse.bench.measure.rows import state
from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.calibration.calibrate import Work
from edgemuse.engines.hardware import peak_memory
from edgemuse.export.cascade import manifest_of
from edgemuse.export.checkpoint import read_checkpoint
from edgemuse.export.writer import write_bundle, write_cascade
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.cascade import open_model
from edgemuse.runtime.pipeline.crop import masked_crop, padded_box
from edgemuse.runtime.pipeline.open import segment
from edgemuse.runtime.results.islands import largest_component
from edgemuse.runtime.scan.nifti import open_scan, read_scan

NNUNET = """
import json, sys
from pathlib import Path
from edgemuse.bench.pages.cascade import nnunet_steps
Path(sys.argv[4]).write_text(json.dumps(nnunet_steps(*map(Path, sys.argv[1:4]))))
"""
REPEATS = 3
"""How many runs count, after a first that does not."""
GOAL_BYTES = 2e9
"""Memory that `fast` in int8 may take if `--max-ram` asks it to be sparing."""


@dataclass(frozen=True)
class Setting:
    """How a cascade is run: profile, precision, `--max-ram` in GiB or nothing, and how many runs count."""

    profile: str
    precision: str
    max_ram: str = ""
    repeats: int = REPEATS

    @property
    def title(self) -> str:
        """What stands above its column."""
        return f"edgemuse `{self.profile}` {self.precision}" + (f", `--max-ram {self.max_ram}`" * bool(self.max_ram))


SMALL = Setting("fast", "int8", SMALL_RAM)
SETTINGS = (Setting("reference", "fp32", repeats=1), Setting("balanced", "int8"), Setting("fast", "int8"), SMALL)
LEAST = 0.1
"""What the channel that is handed on must exceed inside the mask; outside it is below 0."""
LINEAR = 4
"""Added after a normalisation: what the next leaky ReLU gets is then above 0."""
STAGES = ("load", "preprocess", "engine", "infer", "restore", "postprocess", "crop", "paste", "quality", "write")


def darkened(scan: Path, target: Path) -> Path:
    """Copy `scan` with the brain that the built-in model finds at 950 to 1050, and everything else at 0 to 30."""
    brain = largest_component(segment(scan, BUILT_IN).classes > 0)
    return scans.changed(
        scan, target, lambda image: np.where(brain, 950 + 100 * image / image.max(), 30 * image / image.max())
    )


def hand_on(folder: Path) -> None:
    """Let the first channel of the finest skip connection carry the intensities to the last layer of two classes."""
    weights = dict(read_checkpoint(folder / "fold_0" / "checkpoint_final.pth", "0").weights)
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.seg_layers"))
    skipped = weights["encoder.stages.0.0.convs.0.conv.bias"].numel()
    finest = f"decoder.stages.{levels - 1}.convs."
    final = max(name.removeprefix(finest).split(".")[0] for name in weights if name.startswith(finest))
    for name, weight in weights.items():
        if "encoder.stages.0.0." not in name and not name.startswith(finest):
            continue
        weight[0] = 0
        if weight.ndim == 5:  # what comes from below precedes what is skipped
            weight[0, skipped if name.startswith(f"{finest}0.") else 0, 1, 1, 1] = 1
        elif name.endswith(("norm.weight", "all_modules.1.weight")):
            weight[0] = 1
        elif name.endswith(("norm.bias", "all_modules.1.bias")) and not name.startswith(finest + final):
            weight[0] = LINEAR
    last = f"decoder.seg_layers.{levels - 1}"
    weights[f"{last}.weight"].zero_()[1, 0] = 1
    weights[f"{last}.bias"].copy_(torch.tensor([0, -LEAST]))
    save_fold(weights, None, folder / "fold_0")


def quantised(bundle: Bundle, target: Path) -> Bundle:
    """Add an int8 graph to `bundle` that was not calibrated; it is as fast as one that was."""
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    work = Work(bundle, target.parent, files, lambda line: None)
    return open_bundle(write_bundle(target, *work.draft({"int8": to_int8(bundle.graph("fp32"))})))


def prepare(shared: Path, work: Path) -> tuple[Path, Path, Path]:
    """Make two model folders, the cascade of them, and the scan in `work`; returns their paths."""
    facts = shared / "data" / "dlmuse"
    upright = scans.reoriented(shared / "data" / "t1" / "crop_T1w.nii.gz", work / "upright.nii.gz", "LPS")
    scan = darkened(upright, work / "head_T1w.nii.gz")
    models = work / "models"
    hand_on(random_model(facts / "plans.json", facts / "dataset.json", 2, models / "mask", seed=1))
    random_dlmuse(shared, models / "regions")
    stages = {}
    for role in ("mask", "regions"):
        plain = exported(models / role, work / f"{role}.bundle")
        stages[role] = quantised(open_bundle(plain), work / f"{role}-int8.bundle")
    manifest = manifest_of(stages["mask"], stages["regions"])
    return models, write_cascade(work / "cascade.bundle", manifest, stages["mask"], stages["regions"]), scan


def nnunet_steps(models: Path, scan: Path, work: Path) -> dict[str, Any]:
    """Measure nnU-Net's seconds for the mask of `scan` and for the regions inside it; `work` is for the crop."""
    from edgemuse.bench.measure.reference import Reference

    start = time.perf_counter()
    mask = largest_component(Reference(models / "mask", mirroring=False).labels(scan) == 1)
    between = time.perf_counter()
    nifti: Any = nib.load(scan)
    box = padded_box(mask, 10)
    crop = masked_crop(read_scan(scan)[1], mask, box)
    nib.save(nib.Nifti1Image(crop, nifti.affine), work / "crop.nii.gz")
    Reference(models / "regions", mirroring=False).labels(work / "crop.nii.gz")
    seconds = {"mask": between - start, "regions": time.perf_counter() - between}
    return {"seconds": seconds, "mask_voxels": int(mask.sum()), "crop": crop.shape, "peak": peak_memory()}


def nnunet_apart(models: Path, scan: Path, work: Path) -> dict[str, Any]:
    """Run `nnunet_steps` in a process of its own."""
    result = work / "nnunet.json"
    subprocess.run([sys.executable, "-c", NNUNET, *map(str, (models, scan, work, result))], check=True)
    found: dict[str, Any] = json.loads(result.read_text())
    say(f"nnU-Net: {sum(found['seconds'].values()):.1f} s")
    return found


def edgemuse_steps(cascade: Path, scan: Path, work: Path, setting: Setting) -> dict[str, Any]:
    """Measure whole runs of the command line: one that compiles the engines, and those that count."""
    command = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", str(scan), "-m", str(cascade), "-o", str(work)]
    command += ["--overwrite", "--profile", setting.profile, "--precision", setting.precision]
    command += ["--max-ram", setting.max_ram] if setting.max_ram else []
    runs: list[Run] = []
    records: list[dict[str, Any]] = []
    for _ in range(setting.repeats + 1):
        runs.append(measure(command, os.environ | {"EDGEMUSE_CACHE_DIR": str(work / "cache")}))
        records.append(json.loads((work / "head_provenance.json").read_text()))
        say(f"{setting.title}: {runs[-1].seconds:.1f} s, {runs[-1].peak / 1e9:.2f} GB")
    return {
        "cold": runs[0].seconds,
        "wall": median(run.seconds for run in runs[1:]),
        "peak": max(run.peak for run in runs),
        "seconds": {name: median(r["seconds"].get(name, 0.0) for r in records[1:]) for name in records[0]["seconds"]},
        "tiles": {role: stage["profile"]["tiles"] for role, stage in records[0]["stages"].items()},
        "mask_voxels": records[0]["mask"]["voxels"],
        "crop": [stop - first for first, stop in records[0]["mask"]["crop"]],
    }


@click.command()
@page_options("cascade")
def main(shared: Path, output: Path, work: Path) -> None:
    """Measure the cascade in each of `SETTINGS` and in nnU-Net; exit code 1 where little memory does not suffice."""
    place = Workplace(work, state())
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        models, cascade, scan = prepare(shared, made)
        theirs = place.once("nnU-Net", partial(nnunet_apart, models, scan, made))
        ours = [place.once(s.title, partial(edgemuse_steps, cascade, scan, made, s)) for s in SETTINGS]
        shape, sha256 = open_scan(scan).shape, open_model(cascade).sha256
    first = place.age([named("cascade of DLMUSE's size, random weights", sha256)], "cascade")
    place.publish(output, joined(first, report(shape, ours, theirs), place.machine))
    raise SystemExit(0 if ours[SETTINGS.index(SMALL)]["peak"] <= GOAL_BYTES else 1)


def report(shape: Sequence[int], ours: Sequence[Mapping[str, Any]], theirs: Mapping[str, Any]) -> str:
    """Write the page without its first line; `ours` is in the order of `SETTINGS`, `theirs` is nnU-Net's."""
    text = (
        "A mask network of two classes and a region network of 152, both with DLMUSE's plans; a head of "
        f"{' x '.join(map(str, shape))} voxels of 1 mm, of which the mask takes "
        f"{ours[0]['mask_voxels'] / 1e6:.2f} million and the crop is {' x '.join(map(str, ours[0]['crop']))}. Medians "
        "of whole processes; the int8 graphs are not calibrated, which their speed does not depend on."
    )
    header = ["", *(setting.title for setting in SETTINGS), "nnU-Net, no mirroring"]
    rows = [*_overview(ours, theirs), *_roles(ours, theirs), *_stages(ours)]
    return joined("# A cascade of DLMUSE's size on a whole head", text, table(header, rows))


def _overview(ours: Sequence[Mapping[str, Any]], theirs: Mapping[str, Any]) -> list[list[str]]:
    total = sum(theirs["seconds"].values())

    def row(name: str, cell: Callable[[Mapping[str, Any]], str], other: str) -> list[str]:
        return [name, *map(cell, ours), other]

    return [
        row("whole run, engines cached", lambda run: f"**{run['wall']:.1f} s**", f"{total:.1f} s"),
        row("ratio to nnU-Net", lambda run: f"{total / run['wall']:.1f}", "1"),
        row("first run, engines compiled", lambda run: f"{run['cold']:.1f} s", ""),
        row("peak memory", lambda run: f"{run['peak'] / 1e9:.2f} GB", f"{theirs['peak'] / 1e9:.2f} GB"),
    ]


def _roles(ours: Sequence[Mapping[str, Any]], theirs: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for role in ("mask", "regions"):
        spent = [sum(value for name, value in run["seconds"].items() if name.startswith(f"{role} ")) for run in ours]
        tiles = [f"{seconds:.1f} s, {run['tiles'][role]} tiles" for seconds, run in zip(spent, ours, strict=True)]
        rows.append([role, *tiles, f"{theirs['seconds'][role]:.1f} s"])
    return rows


def _stages(ours: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    def place(name: str) -> tuple[str, int]:
        role, _, stage = name.rpartition(" ")
        return role, STAGES.index(stage)

    names = sorted({name for run in ours for name in run["seconds"]}, key=place)
    return [[name, *(f"{run['seconds'].get(name, 0.0):.2f} s" for run in ours), ""] for name in names]


if __name__ == "__main__":
    main()
