"""Reading a scan: NIfTI in, a float32 volume with its grid out, and a reason where that cannot be."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from edgemuse.engines.errors import InputError
from edgemuse.runtime.scan.geometry import orientation
from edgemuse.runtime.scan.types import Affine, Image, Shape, Spacing

SUFFIXES = (".nii.gz", ".nii")
SPACING_RANGE = (0.05, 20.0)
"""mm; outside it the header is wrong rather than the scanner unusual."""
SPACING_TOLERANCE = 0.01
"""Relative difference of voxel sizes between pixdim and sform beyond which the volumes would be wrong."""
FORMS_COSINE = 0.7
"""Cosine of the angle between the same axis in sform and qform below which one of the two must be wrong."""
MAX_TAIL_BYTES = 64 << 20
"""What may follow the voxels in a gzip file: it is read for the checksum at the end, and could go on for ever."""
READ_ERRORS = (OSError, EOFError, ValueError, OverflowError, zlib.error, ImageFileError, HeaderDataError)


@dataclass(frozen=True)
class Scan:
    """A scan whose header was checked and whose voxels are still on disk.

    `zooms` are mm along i, j, k; `affine` maps voxel indices to RAS+ mm.
    """

    path: Path
    shape: Shape
    zooms: Spacing
    affine: Affine
    nifti: Any


def scan_stem(path: Path) -> str:
    """File name without `.nii[.gz]` and without a trailing `_T1w`."""
    name = path.name
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return name.removesuffix("_T1w") or name


def open_scan(path: str | Path) -> Scan:
    """Read and check the header of the NIfTI file at `path`; raises InputError with the reason if it is unusable."""
    path = Path(path)
    _check_file(path)
    with np.errstate(all="ignore"):  # NaN and infinity in the header are refused below
        nifti = _load(path)
        shape = _check_shape(path, nifti)
        _check_dtype(path, nifti)
        zooms = _check_zooms(path, nifti)
        return Scan(path, shape, zooms, _check_affine(path, nifti, zooms), nifti)


def read_image(scan: Scan) -> Image:
    """The scan's voxels, (i, j, k) float32; raises InputError if they cannot be read or hold nothing to segment."""
    try:
        with np.errstate(all="ignore"):
            data = _voxels(scan)
            image: Image = data.reshape(scan.shape).astype(np.float32, copy=False)
    except (*READ_ERRORS, MemoryError) as error:
        raise InputError(f"{scan.path}: the file is cut off or damaged ({_reason(error)}); copy it again") from error
    bad = image.size - int(np.count_nonzero(np.isfinite(image)))
    if bad:
        raise InputError(f"{scan.path}: {bad} voxels are NaN or infinite; replace them, with 0 for background, first")
    if not image.any():
        raise InputError(f"{scan.path}: every voxel is 0, so there is nothing to segment")
    if image.min() == image.max():
        raise InputError(f"{scan.path}: every voxel is {image.flat[0]:g}, so there is nothing to segment")
    return image


def _voxels(scan: Scan) -> NDArray[Any]:
    """The scaled voxels. A gzip file is read to its end, because only there stands the checksum of its content."""
    proxy: Any = scan.nifti.dataobj
    data: NDArray[Any]
    if not scan.path.name.lower().endswith(".gz"):
        data = np.asanyarray(proxy)
        return data
    with gzip.open(scan.path) as file:
        data = np.asanyarray(ArrayProxy(file, (proxy.shape, proxy.dtype, proxy.offset, proxy.slope, proxy.inter)))
        for _ in range(MAX_TAIL_BYTES >> 20):
            if not file.read(1 << 20):
                return data
    raise ValueError(f"more than {MAX_TAIL_BYTES >> 20} MiB follow the voxels")


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder; name the NIfTI files in it")
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(
                f"{path}: edgemuse reads NIfTI (.nii or .nii.gz); convert DICOM with dcm2niix, others likewise"
            )
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty; copy it again")
        with path.open("rb") as file:
            magic = file.read(2)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    zipped = magic == b"\x1f\x8b"
    if path.name.lower().endswith(".gz") != zipped:
        found = "is compressed" if zipped else "is not gzip"
        raise InputError(f"{path}: by its name it should end in {'.nii.gz' if zipped else '.nii'}: the content {found}")


def _load(path: Path) -> Any:
    try:
        nifti: Any = nib.load(path)
    except READ_ERRORS as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_reason(error)})") from error
    if not isinstance(nifti, nib.Nifti1Image):
        raise InputError(f"{path}: a {type(nifti).__name__} and not NIfTI; convert it to .nii.gz first")
    return nifti


def _check_shape(path: Path, nifti: Any) -> Shape:
    shape = tuple(int(n) for n in nifti.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise InputError(
            f"{path}: a series of shape {shape}; extract one 3D volume, for example with fslroi or mrconvert"
        )
    if len(shape) < 3 or min(shape) < 2:
        raise InputError(f"{path}: shape {shape} is not a volume; a 3D scan of at least two slices is needed")
    i, j, k = shape
    return i, j, k


def _check_dtype(path: Path, nifti: Any) -> None:
    dtype = nifti.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        kind = "RGB" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(f"{path}: {kind} voxels; an image with one real number a voxel is needed")


def _check_zooms(path: Path, nifti: Any) -> Spacing:
    """Voxel sizes as the file has them: on loading, nibabel silently turns 0 into 1 and -2 into 2."""
    with ImageOpener(path) as file:
        header = type(nifti.header).from_fileobj(file, nifti.header.endianness, check=False)
    i, j, k = (float(zoom) for zoom in header["pixdim"][1:4])
    low, high = SPACING_RANGE
    if not all(low <= zoom <= high for zoom in (i, j, k)):
        raise InputError(
            f"{path}: voxel size {i:g} x {j:g} x {k:g} mm (pixdim) is outside {low}-{high} mm; mend the header"
        )
    return i, j, k


def _check_affine(path: Path, nifti: Any, zooms: Spacing) -> Affine:
    affine: Affine = np.asarray(nifti.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * math.prod(zooms):
        raise InputError(f"{path}: the affine (sform or qform) is singular; mend the header")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(sizes, zooms, rtol=SPACING_TOLERANCE):
        raise InputError(
            f"{path}: the affine gives voxels of {_mm(sizes)} mm, pixdim {_mm(zooms)} mm; make them agree first, "
            "for example by resampling to the sform or copying the qform over it"
        )
    _check_forms(path, nifti)
    return affine


def _check_forms(path: Path, nifti: Any) -> None:
    """A rotation between sform and qform is common and harmless; another orientation swaps left and right."""
    try:
        sform, qform = nifti.get_sform(coded=True)[0], nifti.get_qform(coded=True)[0]
    except READ_ERRORS as error:
        raise InputError(f"{path}: the qform is not valid ({_reason(error)}); mend the header") from error
    if sform is None and qform is None:
        raise InputError(
            f"{path}: neither sform nor qform is set, so left and right are unknown; set the one that holds, for "
            "example with fslorient, or convert the scan from DICOM again"
        )
    if sform is None or qform is None:
        return
    if not np.isfinite(qform).all():
        raise InputError(f"{path}: the qform is not valid (it holds NaN or infinity); mend the header")
    if _cosines(sform, qform).min() < FORMS_COSINE:
        raise InputError(
            f"{path}: sform says {orientation(sform)} and qform {orientation(qform)}, so left and right are in doubt; "
            "find out which holds and copy it over the other, for example with fslorient"
        )


def _cosines(first: Affine, second: Affine) -> NDArray[np.float64]:
    """(3,): cosines of the angles between the i, j and k axes of two affines."""
    one, two = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (first, second))
    cosines: NDArray[np.float64] = (one * two).sum(axis=0)
    return cosines


def _mm(sizes: Any) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
