"""Writes the scans of a calibration as NIfTI files in the form in which each network of a cascade gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from edgemuse.calibration.scans import Source, read_truth
from edgemuse.engines.errors import InputError
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.model.precision import ALWAYS_FP32
from edgemuse.runtime.network.preprocess import Box
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter, Crop, Turned
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.regions.labels import to_indices
from edgemuse.runtime.scan.nifti import scan_stem


def stage_inputs(
    cascade: Cascade, sources: Sequence[Source], folder: Path, progress: Callable[[str], None]
) -> dict[str, list[Source]]:
    """What the network of each stage is calibrated on, in the order of `sources`.

    For `regions` these are crops: the mask network is run on every scan in fp32 with the profile `reference`, and what
    it finds is cut out as it is in segmenting; the truth is cut to the same box. For `mask` they are the scans
    themselves, without a truth: the truth names the structures of the whole model, which are not the classes of the
    mask network, even where their numbers are the same. Files are written into `folder`; each source keeps the name and
    the SHA-256 of its scan.

    Raises:
        InputError: no brain is found in a scan, or its truth holds no structure where the brain was found.
        MemoryLimitError: a scan does not fit in memory.
    """
    whole, cropped = folder / "mask", folder / "regions"
    whole.mkdir()
    cropped.mkdir()
    inputs: dict[str, list[Source]] = {"mask": [], "regions": []}
    with CascadeSegmenter(cascade, Options(ALWAYS_FP32, precision="fp32", cache_dir=None)) as segmenter:
        for number, source in enumerate(sources, start=1):
            progress(f"cropping scan {number} of {len(sources)} to the mask")
            crop = segmenter.crop(source.path)
            inputs["mask"].append(_whole(cascade, source, crop.turned, whole))
            inputs["regions"].append(_cropped(cascade, source, crop, cropped))
    return inputs


def _whole(cascade: Cascade, source: Source, turned: Turned, folder: Path) -> Source:
    """The scan as it is; if the network does not turn scans itself, a copy turned to the cascade's orientation."""
    if cascade.mask.manifest.network.orientation is not None:
        return replace(source, truth=None)
    path = _write(folder / source.path.name, turned.image, turned)
    return replace(source, path=path, truth=None)


def _cropped(cascade: Cascade, source: Source, crop: Crop, folder: Path) -> Source:
    path = _write(folder / source.path.name, crop.image, crop.turned, crop.box)
    return replace(source, path=path, truth=source.truth and _truth(cascade, source.truth, crop, folder))


def _truth(cascade: Cascade, truth: Path, crop: Crop, folder: Path) -> Path:
    """The true labels at the box of `crop`, without those that the region network does not give."""
    labels = cascade.regions.labels
    inside = crop.turn.apply(to_indices(read_truth(truth, labels), labels))[crop.box]
    if not inside.any():
        raise InputError(
            f"{truth}: no structure lies where {cascade.mask.name} found the brain; look at the truth and at the scan"
        )
    return _write(folder / f"{scan_stem(truth)}.nii.gz", inside, crop.turned, crop.box)


def _write(path: Path, data: NDArray[Any], turned: Turned, box: Box | None = None) -> Path:
    """Write `data`, which lies at `box` of `turned`. The voxel sizes are the scan's own; the affine may differ."""
    affine = turned.affine.copy()
    if box is not None:
        affine[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    image = nib.Nifti1Image(np.ascontiguousarray(data), affine, dtype=data.dtype)
    image.header.set_zooms(turned.zooms)
    nib.save(image, path)
    return path
