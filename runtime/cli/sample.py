"""The sample scan, whose true labels are known: it is segmented, and the result compared with the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgemuse.engines.errors import OutputError
from edgemuse.runtime.model.builtin import BUILT_IN, SAMPLE_SCAN, SAMPLE_TRUTH
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.result import Segmentation
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.pipeline.write import write
from edgemuse.runtime.regions.agreement import dice
from edgemuse.runtime.regions.labels import to_indices
from edgemuse.runtime.results.files import free, not_ours, output_paths, prepare_folder
from edgemuse.runtime.scan.geometry import voxel_mm3
from edgemuse.runtime.scan.nifti import read_scan, scan_stem
from edgemuse.runtime.scan.types import Labels

SHOWN = {
    "cerebral white matter": (2, 41),
    "cerebral cortex": (3, 42),
    "lateral ventricle": (4, 43),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "cerebellum cortex": (8, 47),
    "brain stem": (16,),
}
"""Structures of the report, with FreeSurfer's numbers."""


def run(
    output: Path, threads: int | None, progress: Callable[[int, int], None], overwrite: bool = False
) -> tuple[str, list[Path]]:
    """Segment the sample into `output`; returns the report and the paths written.

    Raises OutputError where there is a file that edgemuse did not write, unless `overwrite` says to replace it.
    """
    bundle = open_bundle(BUILT_IN)
    prepare_folder(output)
    places = output_paths(output, scan_stem(SAMPLE_SCAN))
    if not overwrite:
        _check_ours(places)
    new = frozenset() if overwrite else free(places)
    with Segmenter(bundle, Options(threads=threads)) as segmenter:
        segmentation = segmenter.segment(SAMPLE_SCAN, progress)
    paths = write(segmentation, places, new=new)
    found = to_indices(segmentation.classes, bundle.manifest.labels)
    truth = read_scan(SAMPLE_TRUTH)[1].astype(found.dtype)
    return report(segmentation, found, truth), paths


def _check_ours(places: Mapping[str, Path]) -> None:
    """Raise OutputError where something is that no demo wrote, or that was changed since."""
    other = not_ours(places)
    if other is not None:
        raise OutputError(
            f"{other} exists and is not as an earlier demo wrote it; choose another folder with --output, or replace "
            "it with --overwrite"
        )


def report(segmentation: Segmentation, found: Labels, truth: Labels) -> str:
    """Dice and volume of the main structures, the mean Dice over all, and the seconds of each stage."""
    scores = dice(found, truth)
    voxel_ml = voxel_mm3(segmentation.scan.affine) / 1000
    lines = [f"{'structure (both sides)':<24}{'Dice':>6}{'ml':>9}"]
    for name, indices in SHOWN.items():
        score = np.mean([scores.get(index, 0.0) for index in indices])
        lines.append(f"{name:<24}{score:>6.2f}{np.isin(found, indices).sum() * voxel_ml:>9.1f}")
    lines.append(f"{f'mean of {len(scores)} structures':<24}{np.mean(list(scores.values())):>6.2f}")
    lines.append("")
    lines += [f"{stage:<24}{seconds:>6.2f} s" for stage, seconds in segmentation.seconds.items()]
    lines.append(f"{'all':<24}{sum(segmentation.seconds.values()):>6.2f} s")
    return "\n".join(lines)
