"""A whole cascade of DLMUSE's size on a whole head.

`python -m edgemuse.bench.pages.cascade SHARED -o docs/measured/cascade.md`

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
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import click
import nibabel as nib
import numpy as np
import torch

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.models import random_dlmuse, random_model, save_fold
from edgemuse.bench.measure.process import Run, measure
from edgemuse.bench.measure.rows import commit
from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.bench.pages.performance import SMALL_RAM
from edgemuse.calibration.calibrate import Work
from edgemuse.engines.hardware import cpu_cores, cpu_name, peak_memory
from edgemuse.export.cascade import manifest_of
from edgemuse.export.checkpoint import read_checkpoint
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.export.writer import write_bundle, write_cascade
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.pipeline.cascade import segment
from edgemuse.runtime.pipeline.crop import masked_crop, padded_box
from edgemuse.runtime.results.islands import largest_component
from edgemuse.runtime.scan.nifti import open_scan, read_image

NNUNET = """
import json, sys
from pathlib import Path
from edgemuse.bench.pages.cascade import nnunet_steps
Path(sys.argv[4]).write_text(json.dumps(nnunet_steps(*map(Path, sys.argv[1:4]))))
"""
LEAST = 0.1
"""What the channel that is handed on must exceed inside the mask; outside it is below 0."""
GOAL_SECONDS, GOAL_BYTES = 8.0, 2e9
Setting: TypeAlias = tuple[str, str, str]
"""Profile, precision and `--max-ram` in GiB, or nothing."""
SETTINGS: tuple[Setting, ...] = (
    ("reference", "fp32", ""),
    ("balanced", "int8", ""),
    ("fast", "int8", ""),
    ("fast", "int8", SMALL_RAM),
)
LINEAR = 4
"""Added after a normalisation: what the next leaky ReLU gets is then above 0."""
STAGES = ("load", "preprocess", "engine", "infer", "restore", "postprocess", "crop", "paste", "quality", "write")


def darkened(scan: Path, target: Path) -> Path:
    """`scan` with the largest part that the built-in model labels at 950 to 1050, and all else at 0 to 30."""
    nifti: Any = nib.load(scan)
    data = np.asanyarray(nifti.dataobj).astype(np.float32)
    brain = largest_component(segment(scan, BUILT_IN).classes > 0)
    share = data / data.max()
    return scans.save(np.where(brain, 950 + 100 * share, 30 * share), scan, target)


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
    """`bundle` with an int8 graph that was not calibrated: as fast as one that was."""
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    work = Work(bundle, target.parent, files, lambda line: None)
    return open_bundle(write_bundle(target, *work.draft({"int8": to_int8(bundle.graph("fp32"))})))


def prepare(shared: Path, work: Path) -> tuple[Path, Path, Path]:
    """The folder with both model folders, the cascade made of them, and the scan, in `work`."""
    facts = shared / "data" / "dlmuse"
    upright = scans.reoriented(shared / "data" / "t1" / "crop_T1w.nii.gz", work / "upright.nii.gz", "LPS")
    scan = darkened(upright, work / "head_T1w.nii.gz")
    models = work / "models"
    hand_on(random_model(facts / "plans.json", facts / "dataset.json", 2, models / "mask", seed=1))
    random_dlmuse(shared, models / "regions")
    stages = {}
    for role in ("mask", "regions"):
        exported = export_model(models / role, work / f"{role}.bundle", ExportOptions(orientation="LPS"))
        stages[role] = quantised(open_bundle(exported), work / f"{role}-int8.bundle")
    manifest = manifest_of(stages["mask"], stages["regions"])
    return models, write_cascade(work / "cascade.bundle", manifest, stages["mask"], stages["regions"]), scan


def nnunet_steps(models: Path, scan: Path, work: Path) -> dict[str, Any]:
    """nnU-Net's seconds for the mask of `scan` and for the regions inside it; `work` is for the crop."""
    from edgemuse.bench.measure.reference import Reference

    start = time.perf_counter()
    mask = largest_component(Reference(models / "mask", mirroring=False).labels(scan) == 1)
    between = time.perf_counter()
    nifti: Any = nib.load(scan)
    box = padded_box(mask, 10)
    crop = masked_crop(read_image(open_scan(scan)), mask, box)
    nib.save(nib.Nifti1Image(crop, nifti.affine), work / "crop.nii.gz")
    Reference(models / "regions", mirroring=False).labels(work / "crop.nii.gz")
    seconds = {"mask": between - start, "regions": time.perf_counter() - between}
    return {"seconds": seconds, "mask_voxels": int(mask.sum()), "crop": crop.shape, "peak": peak_memory()}


def edgemuse_steps(cascade: Path, scan: Path, work: Path, setting: Setting, repeats: int) -> dict[str, Any]:
    """Whole runs of the command line, one to warm the cache of engines and `repeats` that count."""
    profile, precision, max_ram = setting
    command = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", str(scan), "-m", str(cascade)]
    command += ["-o", str(work), "--overwrite", "--profile", profile, "--precision", precision]
    command += ["--max-ram", max_ram] if max_ram else []
    runs: list[Run] = []
    records: list[dict[str, Any]] = []
    for _ in range(repeats + 1):
        runs.append(measure(command, os.environ | {"EDGEMUSE_CACHE_DIR": str(work / "cache")}))
        records.append(json.loads((work / "head_provenance.json").read_text()))
        click.echo(f"edgemuse {' '.join(setting)} {runs[-1]}", err=True)
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
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option("--repeats", default=3, show_default=True, help="Runs of edgemuse that count, after one that does not.")
@click.option("--nnunet/--no-nnunet", default=True, show_default=True, help="Run nnU-Net as well: minutes.")
def main(shared: Path, output: Path, repeats: int, nnunet: bool) -> None:
    """Measure the cascade in each of `SETTINGS` and in nnU-Net; exit code 1 beyond the goals for `fast`."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models, cascade, scan = prepare(shared, work)
        theirs: dict[str, Any] = {}
        if nnunet:
            arguments = [str(models), str(scan), str(work), str(work / "nnunet.json")]
            subprocess.run([sys.executable, "-c", NNUNET, *arguments], check=True)
            theirs = json.loads((work / "nnunet.json").read_text())
            click.echo(f"nnU-Net {theirs}", err=True)
        ours = {
            setting: edgemuse_steps(cascade, scan, work, setting, 1 if setting[0] == "reference" else repeats)
            for setting in SETTINGS
        }
        shape = open_scan(scan).shape
    output.write_text(report(shape, ours, theirs), encoding="utf-8")
    click.echo(output.read_text(encoding="utf-8"))
    large, small = ours["fast", "int8", ""], ours["fast", "int8", SMALL_RAM]
    raise SystemExit(0 if large["wall"] <= GOAL_SECONDS and small["peak"] <= GOAL_BYTES else 1)


def report(shape: tuple[int, int, int], ours: Mapping[Setting, Mapping[str, Any]], theirs: Mapping[str, Any]) -> str:
    """The Markdown page."""
    settings = list(ours)
    titles = [
        f"edgemuse `{profile}` {precision}" + (f", `--max-ram {max_ram}`" if max_ram else "")
        for profile, precision, max_ram in settings
    ]
    size = " x ".join(map(str, shape))
    first = ours[settings[0]]
    rows = [
        "<!-- Written by: python -m edgemuse.bench.pages.cascade SHARED -o docs/measured/cascade.md -->",
        "# A cascade of DLMUSE's size on a whole head",
        "",
        f"A mask network of two classes and a region network of 152, both with DLMUSE's plans; a head of {size} voxels "
        f"of 1 mm, of which the mask takes {first['mask_voxels'] / 1e6:.2f} million and the crop is "
        f"{' x '.join(map(str, first['crop']))}. {cpu_name()}, {cpu_cores()} cores, "
        f"{', '.join(f'{name} {version(name)}' for name in ('openvino', 'torch', 'nnunetv2'))}. Medians of whole "
        f"processes; the int8 graphs are not calibrated, which their speed does not depend on. Commit {commit()}.",
        "",
        f"| | {' | '.join(titles)} |{' nnU-Net, no mirroring |' if theirs else ''}",
        f"|---|{'---|' * (len(titles) + bool(theirs))}",
    ]

    def row(name: str, values: list[str], other: str) -> str:
        return f"| {name} | {' | '.join(values)} |{f' {other} |' if theirs else ''}"

    total = sum(theirs["seconds"].values()) if theirs else 0.0
    rows.append(row("whole run, engines cached", [f"**{ours[s]['wall']:.1f} s**" for s in settings], f"{total:.1f} s"))
    rows.append(row("ratio to nnU-Net", [f"{total / ours[s]['wall']:.1f}" for s in settings], "1")) if theirs else None
    rows.append(row("first run, engines compiled", [f"{ours[s]['cold']:.1f} s" for s in settings], ""))
    peak = f"{theirs['peak'] / 1e9:.2f} GB" if theirs else ""
    rows.append(row("peak memory", [f"{ours[s]['peak'] / 1e9:.2f} GB" for s in settings], peak))
    for role in ("mask", "regions"):
        spent = [
            sum(value for name, value in ours[s]["seconds"].items() if name.startswith(f"{role} ")) for s in settings
        ]
        mine = [f"{value:.1f} s, {ours[s]['tiles'][role]} tiles" for value, s in zip(spent, settings, strict=True)]
        rows.append(row(role, mine, f"{theirs['seconds'][role]:.1f} s" if theirs else ""))
    names = {name for s in settings for name in ours[s]["seconds"]}
    for name in sorted(names, key=lambda name: (name.rpartition(" ")[0], STAGES.index(name.rpartition(" ")[2]))):
        rows.append(row(name, [f"{ours[s]['seconds'].get(name, 0.0):.2f} s" for s in settings], ""))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
