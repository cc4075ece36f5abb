"""The networks that the performance page is about, each as a bundle with every precision, and their scans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.models import Progress, development_bundle, dlmuse_scan, exported, made, random_dlmuse
from edgemuse.calibration.calibrate import Work
from edgemuse.calibration.half import half_precision
from edgemuse.calibration.quantise import quantise
from edgemuse.calibration.scans import Source, calibration_patches
from edgemuse.export.writer import write_bundle
from edgemuse.runtime.model.builtin import BUILT_IN, SAMPLE_SCAN
from edgemuse.runtime.model.bundle import open_bundle

SMALL_RAM = "2.1"
"""What `--max-ram` gets, in GiB, to show `fast` in int8 on a small machine: less than one pass is planned to take."""
CORNER = 64
"""Voxels along each side of what random weights are calibrated on; a whole patch takes NNCF too much memory."""


@dataclass(frozen=True)
class Case:
    """A network and the scans that it is measured on.

    Attributes:
        name: what people call the network.
        bundle: the network with every precision that can be made.
        folder: the same in nnU-Net's own format; None if that is not at hand.
        timed: the scan on which time is measured, LPS.
        others: scans on which only labels are compared, LPS.
        truth: label map of `timed`, if one is known.
        unmirrored: the bundle as if the checkpoint allowed no mirroring; None if that is not measured.
    """

    name: str
    bundle: Path
    folder: Path | None
    timed: Path
    others: tuple[Path, ...] = ()
    truth: Path | None = None
    unmirrored: Path | None = None


def dlmuse(shared: Path, work: Path, progress: Progress) -> Case:
    """Make DLMUSE's network with random weights, mirrored as DLMUSE allows it, and crop a real T1 for it."""
    folder = made(work / "model", partial(random_dlmuse, shared, mirror_axes=(0, 1, 2)))
    scan = dlmuse_scan(shared, work)
    plain = exported(folder, work / "fp32.bundle", progress=progress)
    bundle = _all_precisions(plain, work / "all.bundle", scan, progress, CORNER)
    unmirrored = without_mirroring(bundle, work / "unmirrored.bundle")
    return Case("DLMUSE's network, random weights", bundle, folder, scan, unmirrored=unmirrored)


def trained(name: str, plain: Path, folder: Path | None, shared: Path, work: Path, progress: Progress) -> Case:
    """Make a case of the trained network in the bundle `plain`, with a scan that has a truth and two that have none.

    The network is calibrated on the sample scan, which is synthetic, so none of these.
    """
    bundle = _all_precisions(plain, work / "all.bundle", SAMPLE_SCAN, progress)
    timed, truth, *others = (
        scans.reoriented(_t1(shared, scan), work / f"{scan}.nii.gz", "LPS")  # nnU-Net takes voxels as they are stored
        for scan in ("vxm_T1w", "vxm_dseg", "chris_T1w", "crop_T1w")
    )
    return Case(name, bundle, folder, timed, tuple(others), truth)


def development(shared: Path, work: Path, progress: Progress) -> Case:
    """Make a case of the development model."""
    plain = development_bundle(shared, work, progress)
    return trained("development model", plain, shared / "data" / "devmodel", shared, work, progress)


def built_in(shared: Path, work: Path, progress: Progress) -> Case:
    """Make a case of the built-in model."""
    return trained("built-in model", BUILT_IN, None, shared, work, progress)


def _all_precisions(plain: Path, output: Path, scan: Path, progress: Progress, side: int | None = None) -> Path:
    """Return the bundle `plain` if it stores int8, else a copy with int8 and fp16, calibrated on `scan`.

    With a `side` it is calibrated on a corner of one patch, of that many voxels along each side.
    """
    source = open_bundle(plain)
    if "int8" in source.manifest.graphs:
        return plain
    if not output.exists():
        progress(f"quantising {plain}")
        graph = source.graph("fp32")
        patches = calibration_patches([Source(scan, "", None)], source.manifest.network)
        if side is not None:
            patches = [np.ascontiguousarray(patches[len(patches) // 2][..., :side, :side, :side])]
        graphs = {"int8": quantise(graph, patches).graph(), "fp16": half_precision(graph)}
        files = {name: source.read(name) for name in source.manifest.files}
        write_bundle(output, *Work(source, output.parent, files, progress).draft(graphs))
    return output


def without_mirroring(bundle: Path, output: Path) -> Path:
    """Copy `bundle` as if the checkpoint allowed no mirroring."""
    if not output.exists():
        source = open_bundle(bundle)
        network = replace(source.manifest.network, mirror_axes=())
        files = {name: source.read(name) for name in source.manifest.files}
        write_bundle(output, replace(source.manifest, network=network), files)
    return output


def _t1(shared: Path, name: str) -> Path:
    return shared / "data" / "t1" / f"{name}.nii.gz"
