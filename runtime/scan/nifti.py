"""Reading a scan: NIfTI in, a float32 volume with its grid out, and a reason where that cannot be."""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import DTypeLike, NDArray

from edgemuse.engines.errors import InputError
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.header import check_header, read_header, voxel_offset
from edgemuse.runtime.scan.source import BLOCK, DAMAGE, Source, damaged
from edgemuse.runtime.scan.types import Affine, Image, Shape, Spacing

SUFFIXES = (".nii.gz", ".nii")
MAX_INTENSITY = 1e14
"""Beyond, the sum of the squares of a scan's voxels would not fit into float32, in which nnU-Net normalises."""
MIN_CONTRAST = 1e-8
"""Below, nnU-Net's normalisation leaves nothing of the differences."""


@dataclass(frozen=True)
class Scan:
    """A scan whose header was checked.

    `zooms` are mm along i, j, k; `affine` maps voxel indices to RAS+ mm; `header` is nibabel's, without extensions.
    """

    path: Path
    shape: Shape
    zooms: Spacing
    affine: Affine
    header: Any


def scan_stem(path: Path) -> str:
    """File name without `.nii[.gz]` and without a trailing `_T1w`."""
    name = path.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return name.removesuffix("_T1w") or name


@contextmanager
def reading(path: str | Path) -> Iterator[tuple[Scan, Source]]:
    """Open the NIfTI file at `path`, once, and check its header.

    Raises InputError with the reason if it is unusable. No more than the header is read, so that the memory that the
    voxels take can be looked at before `read_image` reads them, with their hash, from the source that is given here.
    """
    path = Path(path)
    with _open(path) as source:
        _check_kind(source)
        with np.errstate(all="ignore"):  # NaN and infinity in the header are refused
            header, zooms = read_header(source)
            shape, affine = check_header(path, header, zooms)
        yield Scan(path, shape, zooms, affine, header), source


def open_scan(path: str | Path) -> Scan:
    """Read and check the header of the NIfTI file at `path`; raises InputError with the reason if it is unusable."""
    with reading(path) as (scan, _):
        return scan


def read_scan(path: str | Path) -> tuple[Scan, Image]:
    """The scan at `path` and its voxels, (i, j, k); for those who need not know its hash. Raises InputError."""
    with reading(path) as (scan, source):
        return scan, read_image(scan, source)[0]


def read_image(scan: Scan, source: Source) -> tuple[Image, str]:
    """The scan's voxels, (i, j, k) float32, and the SHA-256 of its file, from what `reading` gave.

    Raises InputError if they cannot be read or hold nothing to segment.
    """
    image, sha256 = read_voxels(scan, source, np.float32)
    with np.errstate(all="ignore"):
        low, high = float(image.min()), float(image.max())
    if not math.isfinite(low) or not math.isfinite(high):
        bad = image.size - int(np.count_nonzero(np.isfinite(image)))
        raise InputError(f"{scan.path}: {bad} voxels are NaN or infinite; replace them, with 0 for background, first")
    if low == high:
        raise InputError(f"{scan.path}: every voxel is {low:g}, so there is nothing to segment")
    if max(-low, high) > MAX_INTENSITY or high - low < MIN_CONTRAST:
        raise InputError(
            f"{scan.path}: intensities from {low:g} to {high:g}, which cannot be normalised; mend their scaling "
            "(scl_slope and scl_inter in the header), or bring them to about 0 to 1000"
        )
    return image, sha256


def read_voxels(scan: Scan, source: Source, dtype: DTypeLike) -> tuple[NDArray[Any], str]:
    """The same of any image, whatever it holds: scaled as the header says, (i, j, k) of type `dtype`."""
    try:
        with np.errstate(all="ignore"):
            image = np.empty(scan.shape, dtype, order="F")
            _fill(image.reshape(-1, order="F"), scan.header, source)
            return image, source.finish()
    except (*DAMAGE, ValueError, MemoryError) as error:  # ValueError: more voxels than can be counted
        raise damaged(scan.path, error) from error


def _fill(image: NDArray[Any], header: Any, source: Source) -> None:
    """Put the voxels that follow in the file into the flat array `image`, scaled, a block at a time."""
    dtype, (slope, inter) = header.get_data_dtype(), header.get_slope_inter()
    source.skip(voxel_offset(header) - header.sizeof_hdr)
    count = BLOCK // dtype.itemsize
    for start in range(0, image.size, count):
        part = image[start : start + count]
        data = source.read(part.size * dtype.itemsize)
        if len(data) < part.size * dtype.itemsize:
            raise EOFError("it ends before the last voxel")
        part[:] = apply_read_scaling(np.frombuffer(data, dtype), slope, inter)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> Source:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: {foreign.of_folder(path) or 'a folder; name the NIfTI files in it'}")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: a pipe or a device; write the scan to a file first")
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"{path}: {foreign.of_name(path)}")
        return Source(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"{path}: {foreign.of_missing(path)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _check_kind(source: Source) -> None:
    path, zipped = source.path, source.zipped
    if not source.head:
        raise InputError(f"{path}: the file is empty; copy it again")
    if path.name.lower().endswith(".gz") != zipped:
        found, suffix = ("is compressed", ".nii.gz") if zipped else ("is not gzip", ".nii")
        other = foreign.of_content(path, source.head)
        raise InputError(f"{path}: {other or f'by its name it should end in {suffix}: the content {found}'}")
