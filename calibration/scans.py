"""Finds the scans for a calibration and their true label maps, and decides which are calibrated on and which judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemuse.engines.errors import InputError
from edgemuse.engines.protocol import Batch
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.network.preprocess import preprocess
from edgemuse.runtime.network.tiles import cut, plan_tiles
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.geometry import shape_of
from edgemuse.runtime.scan.nifti import SUFFIXES, file_sha256, open_scan, read_scan, scan_stem
from edgemuse.runtime.scan.types import Labels

TRUTH = "_dseg"
MOST_CALIBRATION_SCANS = 8
PATCHES = 24
"""The most patches to calibrate on, over all scans."""
STEP = 0.5
"""Distance between tiles, in patches."""
AFFINE_TOLERANCE = 1e-3
"""Affines that differ by less than this, in mm, are the same."""


@dataclass(frozen=True)
class Source:
    """A scan on disk and its true label map, if there is one."""

    path: Path
    sha256: str
    truth: Path | None

    def record(self) -> dict[str, str]:
        """What the bundle records about the scan."""
        return {"name": self.path.name, "sha256": self.sha256}


def find_scans(folder: Path) -> list[Source]:
    """The NIfTI files in `folder`, by name, each with `STEM_dseg.nii[.gz]` beside it as its truth.

    Every header is checked. Raises InputError if a scan or a truth cannot be used, or if a scan is there twice.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds T1 scans (.nii.gz)")
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIXES))
    truths = {scan_stem(path).removesuffix(TRUTH): path for path in files if _is_truth(path)}
    sources: dict[str, Source] = {}
    for path in files:
        if _is_truth(path) or path.name.startswith("."):
            continue
        source = _source(path, truths.get(scan_stem(path)))
        if source.sha256 in sources:
            raise InputError(f"{path}: the same file as {sources[source.sha256].path.name}; remove one of them")
        sources[source.sha256] = source
    return list(sources.values())


def _is_truth(path: Path) -> bool:
    return scan_stem(path).endswith(TRUTH)


def _source(path: Path, truth: Path | None) -> Source:
    scan = open_scan(path)
    if truth is not None:
        labels = open_scan(truth)
        if labels.shape != scan.shape or not np.allclose(labels.affine, scan.affine, atol=AFFINE_TOLERANCE):
            raise InputError(
                f"{truth}: its grid is not that of {path.name}; resample it to the scan, with nearest neighbours"
            )
    return Source(path, file_sha256(path), truth)


def split(sources: Sequence[Source], folder: Path) -> tuple[list[Source], list[Source]]:
    """A third of the scans, at most, to calibrate on, and the others to evaluate on: if possible those with a truth.

    Raises InputError if there are fewer than two.
    """
    if len(sources) < 2:
        raise InputError(
            f"{folder}: {len(sources) or 'no'} scan{'s' * (len(sources) != 1)} found, at least 2 are needed: one to "
            f"calibrate on and another to evaluate on; ten or more, with true labels as STEM{TRUTH}.nii.gz, are better"
        )
    count = min(max(len(sources) // 3, 1), MOST_CALIBRATION_SCANS)
    order = sorted(sources, key=lambda source: source.truth is not None)  # stable: by name within each
    return order[:count], order[count:]


def calibration_patches(sources: Sequence[Source], network: Network) -> list[Batch]:
    """Patches (1, 1, D, H, W), normalised as in use, spread evenly over each scan; raises InputError."""
    share = max(PATCHES // len(sources), 1)
    return [patch for source in sources for patch in _tiles(source.path, network, share)]


def _tiles(path: Path, network: Network, count: int) -> Iterator[Batch]:
    scan, voxels = read_scan(path)
    image = preprocess(voxels, scan.affine, scan.zooms, network).image
    plan = plan_tiles(shape_of(image), network.patch, STEP)
    padded = np.pad(image, plan.pad)
    chosen = np.unique(np.linspace(0, plan.count - 1, min(count, plan.count)).round().astype(int))
    for place in zip(*np.unravel_index(chosen, [len(axis) for axis in plan.starts]), strict=True):
        corner = [axis[index] for axis, index in zip(plan.starts, place, strict=True)]
        yield cut(padded, corner, network.patch)[None, None]


def read_truth(path: Path, labels: Sequence[Label]) -> Labels:
    """The true label map at `path` as class numbers (i, j, k); indices that the network does not know become 0.

    Raises InputError if it holds something else than whole numbers, or no structure of the network.
    """
    image = read_scan(path)[1]
    indices = np.rint(image)
    if not np.array_equal(indices, image):
        raise InputError(f"{path}: holds values between whole numbers, so it is no label map")
    classes = _numbers(labels)
    values, places = np.unique(indices, return_inverse=True)
    table = np.array([classes.get(int(value), 0) for value in values], np.uint16)
    if not table.any():
        raise InputError(f"{path}: holds none of the model's structures; 'edgemuse info' lists their numbers")
    truth: Labels = table[places].reshape(image.shape)
    return truth


def structures(classes: Labels, labels: Sequence[Label]) -> Labels:
    """`classes` with those that share an index merged, numbered as by `read_truth`; index 0 is background."""
    numbers = _numbers(labels)
    return np.array([numbers[label.index] for label in labels], classes.dtype)[classes]


def _numbers(labels: Sequence[Label]) -> dict[int, int]:
    """Index to class number, the first where several share it."""
    return {label.index: label.number for label in reversed(labels)} | {0: 0}
