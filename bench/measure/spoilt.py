"""Copies of a good scan, each spoilt in one way that a quality flag is there to find.

Every function takes the voxels (i, j, k) of a scan whose axes run to the right, anterior and superior, and its affine,
and returns both for the spoilt copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from nibabel.affines import from_matvec, voxel_sizes
from nibabel.eulerangles import euler2mat
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.scan.types import Affine

Voxels: TypeAlias = NDArray[Any]
Spoil: TypeAlias = Callable[[Voxels, Affine], tuple[Voxels, Affine]]


def relabelled(data: Voxels, affine: Affine, change: tuple[tuple[int, int], ...]) -> tuple[Voxels, Affine]:
    """The same voxels under a header whose axes are `change`d: for each axis the one it claims to be, and the sign."""
    turn = np.zeros((3, 3))
    for axis, (claimed, sign) in enumerate(change):
        turn[claimed, axis] = sign
    return data, from_matvec(turn, [0, 0, 0]) @ affine


def resized(data: Voxels, affine: Affine, factor: float) -> tuple[Voxels, Affine]:
    """The same voxels under a header that claims voxels `factor` times as large."""
    return data, affine @ np.diag([factor, factor, factor, 1.0])


def tilted(data: Voxels, affine: Affine, degrees: tuple[float, float, float]) -> tuple[Voxels, Affine]:
    """The head turned by `degrees` about its three axes inside the volume, resampled linearly; the header tells so."""
    zooms = voxel_sizes(affine)
    turn = np.diag(1 / zooms) @ euler2mat(*np.deg2rad(degrees[::-1])) @ np.diag(zooms)
    centre = (np.array(data.shape) - 1) / 2
    shift = centre - turn @ centre
    moved = ndimage.affine_transform(data.astype(np.float32), turn, shift, order=1)
    return moved, affine @ from_matvec(turn, shift)


def inverted(data: Voxels, affine: Affine) -> tuple[Voxels, Affine]:
    """Dark tissue bright and bright tissue dark, as between T1 and T2; air stays dark."""
    top = _bright(data)
    return np.where(data > 0.08 * top, np.clip(1.05 * top - data, 0, None), data), affine


def cut(data: Voxels, affine: Affine, share: float) -> tuple[Voxels, Affine]:
    """Without the upper `share` of the head."""
    used = np.flatnonzero((data > 0.1 * _bright(data)).any(axis=(0, 1)))
    return data[:, :, : used[-1] - int(share * (used[-1] - used[0]))], affine


def noisy(data: Voxels, affine: Affine, share: float) -> tuple[Voxels, Affine]:
    """With noise of `share` of the brightest tissue."""
    noise = np.random.default_rng(0).normal(0, share * _bright(data), data.shape)
    return np.abs(data + noise).astype(np.float32), affine


def halved(data: Voxels, affine: Affine) -> tuple[Voxels, Affine]:
    """With nothing in the left half of the head."""
    middle = int(ndimage.center_of_mass(data > 0.1 * _bright(data))[0])
    half = data.copy()
    half[:middle] = 0
    return half, affine


def _bright(data: Voxels) -> float:
    return float(np.percentile(data[data > 0], 99))


R, A, S = 0, 1, 2
WAYS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "header turned: L P S": (partial(relabelled, change=((R, -1), (A, -1), (S, 1))), ("orientation", "structures")),
    "header turned: L A I": (partial(relabelled, change=((R, -1), (A, 1), (S, -1))), ("orientation", "structures")),
    "header turned: R P I": (partial(relabelled, change=((R, 1), (A, -1), (S, -1))), ("orientation", "structures")),
    "header mirrored: R P S": (partial(relabelled, change=((R, 1), (A, -1), (S, 1))), ("orientation", "structures")),
    "header mirrored: R A I": (partial(relabelled, change=((R, 1), (A, 1), (S, -1))), ("orientation", "structures")),
    "header mirrored: L P I": (partial(relabelled, change=((R, -1), (A, -1), (S, -1))), ("orientation", "structures")),
    "axes exchanged: A S R": (partial(relabelled, change=((A, 1), (S, 1), (R, 1))), ("orientation", "structures")),
    "axes exchanged: S R A": (partial(relabelled, change=((S, 1), (R, 1), (A, 1))), ("orientation", "structures")),
    "axes exchanged: A R S": (partial(relabelled, change=((A, 1), (R, 1), (S, 1))), ("orientation", "structures")),
    "axes exchanged: R S A": (partial(relabelled, change=((R, 1), (S, 1), (A, 1))), ("orientation", "structures")),
    "axes exchanged: S A R": (partial(relabelled, change=((S, 1), (A, 1), (R, 1))), ("orientation", "structures")),
    "voxel size x 0.65": (partial(resized, factor=0.65), ("volume",)),
    "voxel size x 0.8": (partial(resized, factor=0.8), ("volume", "structures")),
    "voxel size x 1.3": (partial(resized, factor=1.3), ("volume",)),
    "head tilted sideways by 40 degrees": (partial(tilted, degrees=(0, 40, 0)), ("orientation",)),
    "head turned by 40 degrees": (partial(tilted, degrees=(0, 0, 40)), ("orientation",)),
    "contrast inverted": (inverted, ("contrast",)),
    "upper quarter cut off": (partial(cut, share=0.25), ("field of view",)),
    "noise of 10 %": (partial(noisy, share=0.1), ("noise",)),
    "noise of 20 %": (partial(noisy, share=0.2), ("noise",)),
    "half a brain": (halved, ("missing", "asymmetry", "volume")),
}
"""Each way with the flags that name what is wrong, of which one is enough. A header that exchanges left and right alone
is not among them: a mirrored head looks like a head."""
