"""The header of a NIfTI file: read as it stands, and refused with a reason where it cannot be right."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from edgemuse.engines.errors import InputError, one_line
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.geometry import orientation
from edgemuse.runtime.scan.source import DAMAGE, Source, damaged
from edgemuse.runtime.scan.types import Affine, Shape, Spacing

SPACING_RANGE = (0.05, 20.0)
"""mm; outside it the header is wrong rather than the scanner unusual."""
SPACING_TOLERANCE = 0.01
"""Relative difference of voxel sizes between pixdim and sform beyond which the volumes would be wrong."""
FORMS_COSINE = 0.7
"""Cosine of the angle between the same axis in sform and qform below which one of the two must be wrong."""
MAX_VOXEL_OFFSET = 64 << 20
"""Bytes of header and extensions before the voxels; beyond, vox_offset is wrong. They are passed over, not kept."""
CIFTI = range(3000, 3100)
"""Intents of files that hold values on surfaces."""
HEADERS: tuple[Any, ...] = (Nifti1Header, Nifti2Header)
HEADER_ERRORS = (ValueError, OverflowError, HeaderDataError, WrapStructError)
"""What nibabel may raise of a header."""
_silent = logging.Logger("nifti", logging.CRITICAL + 1)
"""For nibabel's words on a header: what is wrong with it, edgemuse says."""


def read_header(source: Source) -> tuple[Any, Spacing]:
    """The header at the start of `source` as nibabel mends it, without extensions, and the voxel sizes before that.

    nibabel silently turns a size of 0 mm into 1 and -2 into 2. Raises InputError where there is no header, or one that
    cannot be understood.
    """
    try:
        block = source.read(Nifti1Header.sizeof_hdr)
        if not Nifti1Header.may_contain_header(block):
            block += source.read(Nifti2Header.sizeof_hdr - len(block))
        kind = next((kind for kind in HEADERS if kind.may_contain_header(block[: kind.sizeof_hdr])), None)
        if kind is None:
            raise ValueError(foreign.of_content(source.path, block) or "it does not begin with a whole NIfTI header")
        header = kind(block, check=False)
        i, j, k = (float(size) for size in header["pixdim"][1:4])
        header.check_fix(_silent)
        for look in (header.get_data_shape, header.get_data_dtype, header.get_data_offset, header.get_slope_inter):
            look()  # each raises where it finds nonsense
        return header, (i, j, k)
    except DAMAGE as error:
        raise damaged(source.path, error) from error
    except HEADER_ERRORS as error:
        raise InputError(f"{source.path}: not a readable NIfTI file ({one_line(error)})") from error


def voxel_offset(header: Any) -> int:
    """Where the voxels begin, in bytes from the file's start; 0 in a header means directly behind it."""
    return header.get_data_offset() or int(header.single_vox_offset)


def check_header(path: Path, header: Any, zooms: Spacing) -> tuple[Shape, Affine]:
    """The shape and the affine of the volume in the file at `path`; raises InputError if it cannot be segmented."""
    _check_kind(path, header)
    shape = _check_shape(path, header)
    _check_dtype(path, header)
    low, high = SPACING_RANGE
    if not all(low <= zoom <= high for zoom in zooms):
        i, j, k = zooms
        raise InputError(
            f"{path}: voxel size {i:g} x {j:g} x {k:g} mm (pixdim) is outside {low}-{high} mm; mend the header"
        )
    return shape, _check_affine(path, header, zooms)


def _check_kind(path: Path, header: Any) -> None:
    if header["magic"].item() == header.pair_magic:
        raise InputError(
            f"{path}: half of a NIfTI pair (.hdr, .img) under another name; give it its name back and convert the pair "
            "with nib-convert"
        )
    if int(header["intent_code"]) in CIFTI:
        raise InputError(f"{path}: CIFTI, values on surfaces; a 3D scan is needed")
    if voxel_offset(header) > MAX_VOXEL_OFFSET:
        raise InputError(
            f"{path}: the voxels should begin after {voxel_offset(header)} bytes (vox_offset), more than any header "
            "takes; mend the header"
        )


def _check_shape(path: Path, header: Any) -> Shape:
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3 and shape[2] == 1:
        raise InputError(
            f"{path}: shape {shape}, one slice at {shape[-1]} times, or slices that lost their places; convert the "
            "scan from DICOM again, with a current dcm2niix"
        )
    if len(shape) > 3:
        raise InputError(
            f"{path}: a series of shape {shape}; extract one 3D volume, for example with fslroi or mrconvert"
        )
    if len(shape) < 3 or min(shape) < 2:
        raise InputError(f"{path}: shape {shape} is not a volume; a 3D scan of at least two slices is needed")
    i, j, k = shape
    return i, j, k


def _check_dtype(path: Path, header: Any) -> None:
    dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        kind = "RGB" if dtype.fields else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(f"{path}: {kind} voxels; an image with one real number a voxel is needed")


def _check_affine(path: Path, header: Any, zooms: Spacing) -> Affine:
    try:
        affine: Affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except HEADER_ERRORS as error:
        raise InputError(f"{path}: the qform is not valid ({one_line(error)}); mend the header") from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * math.prod(zooms):
        raise InputError(f"{path}: the affine (sform or qform) is singular; mend the header")
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(sizes, zooms, rtol=SPACING_TOLERANCE):
        raise InputError(
            f"{path}: the affine gives voxels of {_mm(sizes)} mm, pixdim {_mm(zooms)} mm; make them agree first, "
            "for example by resampling to the sform or copying the qform over it"
        )
    _check_forms(path, header)
    return affine


def _check_forms(path: Path, header: Any) -> None:
    """A rotation between sform and qform is common and harmless; another orientation swaps left and right."""
    try:
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except HEADER_ERRORS as error:
        raise InputError(f"{path}: the qform is not valid ({one_line(error)}); mend the header") from error
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
