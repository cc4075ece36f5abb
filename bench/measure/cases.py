"""What is measured: DLMUSE's network and the trained ones, as bundles with int8 and fp16 graphs, and their scans."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgemuse.bench.measure import scans
from edgemuse.bench.measure.models import development_bundle, dlmuse_scan, random_dlmuse
from edgemuse.calibration.calibrate import Work
from edgemuse.calibration.half import half_precision
from edgemuse.calibration.quantise import quantise
from edgemuse.calibration.scans import Source, calibration_patches
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.export.writer import write_bundle
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle

SAMPLE = BUILT_IN.with_name("sample_T1w.nii.gz")
"""Synthetic, so it is none of the scans that are measured: trained networks are calibrated on it."""
CORNER = 64
"""Voxels along each side of what random weights are calibrated on: NNCF keeps every activation."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A network and scans.

    Attributes:
        name: for people.
        bundle: with every precision that can be made.
        folder: the same in nnU-Net's own format; None where that is not at hand.
        timed: the scan that is measured, LPS.
        others: scans that only the labels are compared of, LPS.
        truth: label map of `timed`, if one is known.
        unmirrored: the bundle as if the checkpoint allowed no mirroring, if that is measured too.
    """

    name: str
    bundle: Path
    folder: Path | None
    timed: Path
    others: tuple[Path, ...] = ()
    truth: Path | None = None
    unmirrored: Path | None = None


def dlmuse(shared: Path, work: Path, progress: Progress) -> Case:
    """DLMUSE's plans and classes, random weights, mirroring allowed as DLMUSE allows it; a real T1, cropped."""
    folder = work / "model"
    if not folder.exists():
        shutil.rmtree(work / "part", ignore_errors=True)  # of a run that was interrupted
        random_dlmuse(shared, work / "part", mirror_axes=(0, 1, 2)).rename(folder)
    (work / "scan").mkdir(exist_ok=True)
    scan = dlmuse_scan(shared, work / "scan" / "brain_T1w.nii.gz")
    plain = work / "fp32.bundle"
    if not plain.exists():
        export_model(folder, plain, ExportOptions(orientation="LPS", progress=progress))
    bundle = _all_precisions(plain, work / "all.bundle", scan, progress, CORNER)
    unmirrored = without_mirroring(bundle, work / "unmirrored.bundle")
    return Case("DLMUSE's network, random weights", bundle, folder, scan, unmirrored=unmirrored)


def trained(name: str, plain: Path, folder: Path | None, shared: Path, work: Path, progress: Progress) -> Case:
    """The trained network of the bundle `plain`, on a scan with truth and two without."""
    bundle = _all_precisions(plain, work / "all.bundle", SAMPLE, progress)
    timed, truth, *others = (
        scans.reoriented(_t1(shared, scan), work / f"{scan}.nii.gz", "LPS")  # nnU-Net takes voxels as they are stored
        for scan in ("vxm_T1w", "vxm_dseg", "chris_T1w", "crop_T1w")
    )
    return Case(name, bundle, folder, timed, tuple(others), truth)


def development(shared: Path, work: Path, progress: Progress) -> Case:
    """The development model."""
    plain = development_bundle(shared, work, progress)
    return trained("development model", plain, shared / "data" / "devmodel", shared, work, progress)


def built_in(shared: Path, work: Path, progress: Progress, folder: Path | None = None) -> Case:
    """The built-in model; `folder` is what it was exported from."""
    return trained("built-in model", BUILT_IN, folder, shared, work, progress)


def _all_precisions(plain: Path, output: Path, scan: Path, progress: Progress, side: int | None = None) -> Path:
    """The bundle `plain` if it stores int8, else a copy with int8 and fp16, calibrated on `scan`.

    `side` None: on whole patches, else on one corner of one patch.
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
    """A copy of `bundle` as if the checkpoint allowed no mirroring."""
    if not output.exists():
        source = open_bundle(bundle)
        network = replace(source.manifest.network, mirror_axes=())
        files = {name: source.read(name) for name in source.manifest.files}
        write_bundle(output, replace(source.manifest, network=network), files)
    return output


def _t1(shared: Path, name: str) -> Path:
    return shared / "data" / "t1" / f"{name}.nii.gz"
