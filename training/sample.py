"""Scans with known truth: `python -m edgemuse.training.sample LABELMAPS -o FOLDER` makes the sample of `edgemuse demo`.

A held-out label map is deformed at random, so that neither the map nor the head can be had back from it.
"""

from __future__ import annotations

from pathlib import Path

import click
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from edgemuse.training.labelmaps import INDICES, LabelMap, class_table, find_label_maps, read_label_map
from edgemuse.training.synthesis import draw_scan, generator, usual_look

SEED = 44


def make_scan(labels: LabelMap, seed: int, stripped: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Intensities from 0 to about 120 and FreeSurfer's numbers of the 32 structures, (d, h, w) at 1 mm."""
    g = generator(seed, 0)
    image, tissue = draw_scan(labels, g, usual_look(g, stripped))
    scaled = (image * (100 / float(torch.quantile(image[image > 0][::50], 0.99)))).clamp(0, 255)
    indices = np.array(INDICES, np.uint8)[class_table()[tissue.numpy()]]
    return scaled.to(torch.uint8).numpy(), indices


def save_scan(path: Path, volume: NDArray[np.uint8]) -> Path:
    """Write (d, h, w) as NIfTI, stored in RAS."""
    image = nib.Nifti1Image(volume.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    nib.save(nib.as_closest_canonical(image), path)
    return path


@click.command(context_settings={"show_default": True})
@click.argument("labelmaps", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--seed", default=SEED)
@click.option("--held-out", is_flag=True, help="Two scans, one skull-stripped, of every held-out map, for measuring.")
def main(labelmaps: Path, output: Path, seed: int, held_out: bool) -> None:
    """Write sample_T1w.nii.gz and sample_dseg.nii.gz, made from the first held-out map of LABELMAPS."""
    maps = find_label_maps(labelmaps, held_out=True)
    if not held_out:
        _write(maps[0], output, "sample", seed, stripped=False)
        return
    for number, path in enumerate(maps):
        for stripped in (False, True):
            name = f"heldout-{number + 1}-{'brain' if stripped else 'head'}"
            _write(path, output, name, seed + 1 + number, stripped)


def _write(path: Path, output: Path, stem: str, seed: int, stripped: bool) -> None:
    image, truth = make_scan(read_label_map(path), seed, stripped)
    for name, volume in (("T1w", image), ("dseg", truth)):
        click.echo(save_scan(output / f"{stem}_{name}.nii.gz", volume))


if __name__ == "__main__":
    main()
