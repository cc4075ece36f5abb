"""DLMUSE's own network, time and memory of whole processes: `python -m edgemuse.bench.dlmuse SHARED -o docs/dlmuse.md`.

The network has DLMUSE's plans and 152 classes but random weights. A T1 cropped to 163 x 214 x 155 voxels of 1 mm goes
through edgemuse (`reference`, fp32) and through nnU-Net's predictor, each run a process of its own, in turn, mirroring
off on both sides.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np

from edgemuse.bench import scans
from edgemuse.bench.process import Run, measure
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.runtime.agreement import agreement, mean_dice

SHAPE = (163, 214, 155)
NNUNET = """
import sys, numpy as np
from pathlib import Path
from edgemuse.bench.reference import Reference
np.save(sys.argv[3], Reference(Path(sys.argv[1]), mirroring=False).labels(Path(sys.argv[2])).astype(np.uint8))
"""


def prepare(shared: Path, work: Path) -> tuple[Path, Path, Path]:
    """Model folder, bundle and scan for the measurement, made in `work`."""
    from edgemuse.bench.models import random_dlmuse
    from edgemuse.export.exporter import ExportOptions, export_model

    folder = random_dlmuse(shared, work / "model")
    bundle = export_model(folder, work / "dlmuse.bundle", ExportOptions(orientation="LPS"))
    upright = scans.reoriented(shared / "data" / "t1" / "crop_T1w.nii.gz", work / "upright.nii.gz", "LPS")
    (work / "scan").mkdir()
    return folder, bundle, scans.centre_crop(upright, work / "scan" / "brain_T1w.nii.gz", SHAPE)


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each side, in turn.")
@click.option("--precision", default="fp32", show_default=True)
def main(shared: Path, output: Path, repeats: int, precision: str) -> None:
    """Measure edgemuse and nnU-Net on DLMUSE's network; exit code 1 beyond 2.0 GB or below 2.5 times the speed."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder, bundle, scan = prepare(shared, work)
        edgemuse = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", str(scan), "-m", str(bundle)]
        edgemuse += ["-o", str(work), "--profile", "reference", "--precision", precision, "--overwrite"]
        nnunet = [sys.executable, "-c", NNUNET, str(folder), str(scan), str(work / "nnunet.npy")]
        environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(work / "cache")}
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(measure(edgemuse, environment))
            click.echo(f"edgemuse {ours[-1]}", err=True)
            theirs.append(measure(nnunet, environment))
            click.echo(f"nnU-Net {theirs[-1]}", err=True)
        labels, reference = scans.labels_of(work / "brain_dseg.nii.gz"), np.load(work / "nnunet.npy")
    speedup = statistics.median(t.seconds / o.seconds for o, t in zip(ours, theirs, strict=True))
    output.write_text(
        _report(ours, theirs, precision, speedup, agreement(labels, reference), mean_dice(labels, reference))
    )
    click.echo(output.read_text())
    raise SystemExit(0 if speedup >= 2.5 and max(run.peak for run in ours) <= 2.0e9 else 1)


def _report(ours: list[Run], theirs: list[Run], precision: str, speedup: float, same: float, dice: float) -> str:
    def row(name: str, runs: list[Run]) -> str:
        seconds = statistics.median(run.seconds for run in runs)
        return f"| {name} | {seconds:.1f} s | {max(run.peak for run in runs) / 1e9:.2f} GB |"

    return "\n".join(
        [
            "<!-- Written by: python -m edgemuse.bench.dlmuse -->",
            "| DLMUSE's network, 163 x 214 x 155 at 1 mm, no mirroring | median wall time | peak memory |",
            "|---|---|---|",
            row(f"edgemuse, `reference`, OpenVINO {precision}", ours),
            row("nnU-Net's predictor, PyTorch CPU", theirs),
            "",
            f"Ratio of times, median of {len(ours)} pairs: {speedup:.2f}. Same label in {same:.3%} of voxels, "
            f"mean Dice {dice:.4f} (random weights: the logits are nearly tied). {cpu_name()}, {cpu_cores()} cores, "
            f"{', '.join(f'{name} {version(name)}' for name in ('torch', 'nnunetv2', 'openvino'))}. The first run of "
            "edgemuse compiles the network, later ones load it from the cache.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
