"""T1-like images synthesised from label maps, so that a network never sees, and never gets used to, one real scanner.

The idea is that of SynthSeg (Billot et al., Medical Image Analysis 2023): deform a label map, draw an intensity
distribution for every label, and degrade the image the way acquisitions do, all at random and far beyond what occurs.
Here most intensities are drawn around T1 contrast, because T1 scans are what the network is for.

Arrays are (d, h, w) as in `labelmaps`; lengths are mm; intensities are relative to white matter in T1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgemuse.runtime.scan.types import Shape
from edgemuse.training.labelmaps import (
    INNER_PAIRS,
    LARGEST,
    NAMES,
    OUTSIDE,
    PLEXUS,
    RIGHT,
    LabelMap,
    class_table,
    mirror_table,
)

View = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
"""Where a scan begins and ends along d, h, w, mm from the brain's centre."""

T1_MEANS = {
    0: 0.0, 2: 1.0, 3: 0.70, 4: 0.22, 5: 0.28, 7: 0.97, 8: 0.72, 10: 0.89, 11: 0.78, 12: 0.84, 13: 0.96, 14: 0.24,
    15: 0.24, 16: 0.94, 17: 0.72, 18: 0.71, 24: 0.25, 25: 0.80, 26: 0.76, 28: 0.94, 30: 0.45, 72: 0.30, 85: 0.80,
}  # fmt: skip
"""Mean intensity of the left-hand or unpaired labels, white matter = 1: textbooks' T1 contrast, drawn halfway towards
what two whole heads show, where deep grey matter and the brain stem are much like white matter."""
FLUIDS = (4, 5, 14, 15, 24, 72)
FINE = 1.0
"""Images are painted at this spacing in mm, and come to the network's spacing by linear interpolation."""
COARSE = 6.0
"""Spacing in mm of the copy of the whole head from which the scan's mean and deviation are taken."""
RANDOM_CONTRAST = 0.2
SKULL_STRIPPED = 0.5
WINDOWS = 0.6
USUAL = 0.65
"""Shares of samples: with contrast unlike T1, without skull, of patches anywhere in the field of view, and of scans as
hospitals usually make them."""
TEXTURE = 0.12
"""The most by which a label's intensity drifts inside it, as a standard deviation over the labels."""
SPAN = 240.0
"""mm around the centre of a scan over which its smooth random fields are drawn."""


@dataclass(frozen=True)
class Tissues:
    """The labels of a kind of map, as what they are painted.

    Attributes:
        means: usual intensity of labels that stand for their family; any other label may have any intensity.
        family: (1024,) the label whose intensity each label shares.
        fluids: labels that are fluid.
        solid: labels between which and white matter the contrast varies.
        around: number of the fluid around the brain.
        between: labels of tissue in fluid, in any proportion.
    """

    means: Mapping[int, float]
    family: NDArray[np.int64]
    fluids: tuple[int, ...]
    solid: tuple[int, ...]
    around: int
    between: tuple[int, ...] = ()


def _families() -> NDArray[np.int64]:
    family = np.arange(LARGEST + 1)
    for left, right in (RIGHT | INNER_PAIRS).items():
        family[right] = left
    return family


FREESURFER = Tissues(T1_MEANS, _families(), FLUIDS, tuple(set(NAMES) - set(FLUIDS)), 24, tuple(PLEXUS))
"""The maps of `labelmaps`."""


@dataclass(frozen=True)
class Warp:
    """From points of the scan, mm from its centre, to voxels of the label map: `linear` (3, 3), then a displacement.

    Attributes:
        linear: rotation, scaling and shear.
        centre: (3,) voxel of the label map at the scan's centre.
        displacement: (1, 3, n, n, n) voxels, on a grid over `SPAN` mm around the centre.
    """

    linear: Tensor
    centre: Tensor
    displacement: Tensor


@dataclass(frozen=True)
class Texture:
    """How tissue varies inside structures.

    Attributes:
        field: (1, 1, n, n, n) smooth over the head.
        shares: (1024,) how much each label follows it, relative to its intensity; of either sign.
    """

    field: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Look:
    """How one scan looks: the random choices that hold for every point of it.

    Attributes:
        means: (1024,) intensity of each label.
        spreads: (1024,) standard deviation inside each label.
        stripped: mm by which a brain mask is grown, or None for a whole head.
        fluid: whether that mask starts from the brain with the fluid around it.
        bias: (1, 1, n, n, n) logarithm of the bias field over the head.
        gamma: exponent.
        blur: (3,) mm, along d, h, w.
        voxel: (3,) mm, the acquired spacing.
        noise: standard deviation.
        floor: whether the air around the head is noisy; else it is exactly 0.
        texture: of the structures, or None where each is uniform but for its spread.
    """

    means: Tensor
    spreads: Tensor
    stripped: float | None
    fluid: bool
    bias: Tensor
    gamma: float
    blur: tuple[float, float, float]
    voxel: tuple[float, float, float]
    noise: float
    floor: bool
    texture: Texture | None = None


def generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of sample `index`: every sample can be made again alone."""
    mixed = np.random.SeedSequence((seed, index)).generate_state(1)  # PyTorch's generator takes 32 bits
    return torch.Generator().manual_seed(int(mixed[0]))


def uniform(g: torch.Generator, low: float, high: float) -> float:
    """One number between `low` and `high`."""
    return low + (high - low) * float(torch.rand((), generator=g))


def chance(g: torch.Generator, share: float) -> bool:
    """True in `share` of the calls."""
    return uniform(g, 0, 1) < share


def mirror(labels: LabelMap) -> LabelMap:
    """The label map of the mirrored head: left and right change places, and names."""
    turned: LabelMap = mirror_table()[labels[:, :, ::-1]]
    return turned


def draw_warp(labels: LabelMap, g: torch.Generator) -> Warp:
    """Rotation up to 25 degrees, scaling 0.85 to 1.17 along each axis, some shear, and a smooth elastic part."""
    angles = torch.randn(3, generator=g).clamp(-2.5, 2.5) * math.radians(10)
    scales = torch.exp(torch.randn(3, generator=g).clamp(-2, 2) * 0.08)
    shears = torch.randn(3, generator=g).clamp(-2, 2) * 0.04
    linear = torch.diag(scales)
    for axis, angle in enumerate(angles.tolist()):
        turn, shear = torch.eye(3), torch.eye(3)
        first, second = (n for n in range(3) if n != axis)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        shear[first, second] = shears[axis]
        linear = linear @ turn @ shear
    points = 5 if chance(g, 0.5) else 9
    amplitude = uniform(g, 0, 4) if points == 5 else uniform(g, 0, 2.5)
    displacement = torch.randn((1, 3, points, points, points), generator=g) * amplitude
    return Warp(linear, brain_centre(labels), displacement)


def brain_centre(labels: LabelMap) -> Tensor:
    """(3,) centre of the box around the brain, in voxels."""
    brain = (labels > 0) & (labels < OUTSIDE)
    axes = (np.flatnonzero(brain.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1)))
    return torch.tensor([(float(used[0]) + float(used[-1])) / 2 for used in axes])


def sample_labels(labels: LabelMap, warp: Warp, corner: Tensor, shape: Shape, spacing: float) -> Tensor:
    """The deformed label map on a grid: the nearest label at every point, air outside the map.

    Args:
        labels: (d, h, w) at 1 mm.
        warp: the deformation.
        corner: (3,) mm from the scan's centre to the grid's first point.
        shape: of the grid.
        spacing: of the grid, mm.
    """
    points = warped_points(warp, corner, shape, spacing)
    sizes = torch.tensor(labels.shape)
    inside = torch.ones(shape, dtype=torch.bool)
    index = torch.zeros(shape, dtype=torch.int64)
    for n in range(3):
        voxel = points[n].round_().to(torch.int64)
        inside &= (voxel >= 0) & (voxel < sizes[n])
        index.mul_(int(sizes[n])).add_(voxel.clamp_(0, int(sizes[n]) - 1))
    found = torch.from_numpy(labels).reshape(-1)[index.reshape(-1)].reshape(shape)
    found[~inside] = 0
    return found


def warped_points(warp: Warp, corner: Tensor, shape: Shape, spacing: float) -> list[Tensor]:
    """Where each point of a grid lies in the label map: (d, h, w) of voxels along each of its axes."""
    axes = [float(corner[n]) + spacing * torch.arange(shape[n], dtype=torch.float32) for n in range(3)]
    elastic = _field(warp.displacement, axes)
    return [
        sum(warp.linear[n, m] * axes[m].reshape([-1 if k == m else 1 for k in range(3)]) for m in range(3))
        + warp.centre[n]
        + elastic[n]
        for n in range(3)
    ]


def _field(grid: Tensor, axes: list[Tensor]) -> Tensor:
    """(C, d, h, w): a coarse grid (1, C, n, n, n) over `SPAN` mm around 0, linear in between, at the points of `axes`.

    Interpolation along one axis after the other: three small matrix products instead of eight gathers a point.
    """
    for n, axis in enumerate(axes):
        count = grid.shape[2 + n]
        grid = _along(grid, _linear((axis / SPAN + 0.5) * (count - 1), count), 2 + n)
    return grid[0]


def draw_look(g: torch.Generator, tissues: Tissues = FREESURFER) -> Look:
    """The contrast, mask, field, resolution and noise of one scan."""
    means, spreads = _any_intensities(g, tissues) if chance(g, RANDOM_CONTRAST) else t1_intensities(g, tissues)
    voxel = _acquired_spacing(g)
    log_bias = torch.randn((1, 1, 4, 4, 4), generator=g) * uniform(g, 0, 0.45)
    return Look(
        means=means,
        spreads=spreads,
        stripped=uniform(g, 0.0, 1.0) if chance(g, SKULL_STRIPPED) else None,
        fluid=chance(g, 0.5),
        bias=log_bias,
        gamma=math.exp(uniform(g, -0.35, 0.35)),
        blur=tuple(0.42 * size * uniform(g, 0.75, 1.25) for size in voxel),  # type: ignore[arg-type]
        voxel=voxel,
        noise=uniform(g, 0, 0.07) if chance(g, 0.8) else uniform(g, 0.05, 0.15),
        floor=chance(g, 0.6),
    )


def usual_look(g: torch.Generator, stripped: bool, tissues: Tissues = FREESURFER) -> Look:
    """T1 contrast at about 1 mm with moderate noise and field: a scan as hospitals make them."""
    means, spreads = t1_intensities(g, tissues)
    look = draw_look(g, tissues)
    return replace(
        look,
        means=means,
        spreads=spreads * 0.7,
        stripped=uniform(g, 0, 0.7) if stripped else None,
        bias=look.bias.clamp(-0.3, 0.3),
        gamma=1.0,
        blur=(0.45, 0.45, 0.45),
        voxel=(1.0, 1.0, 1.0),
        noise=uniform(g, 0.01, 0.04),
        floor=False,
    )


def textured(look: Look, g: torch.Generator) -> Look:
    """The same scan with structures that are not uniform: intensity drifts over 4 to 30 mm, in each its own way.

    Real grey nuclei are brighter towards white matter, and white matter differs from lobe to lobe.
    """
    points = (9, 17, 33, 65)[int(uniform(g, 0, 4))]
    shares = torch.randn(LARGEST + 1, generator=g).clamp(-2.5, 2.5) * uniform(g, 0, TEXTURE)
    return replace(look, texture=Texture(torch.randn((1, 1, points, points, points), generator=g), shares))


def t1_intensities(g: torch.Generator, tissues: Tissues = FREESURFER) -> tuple[Tensor, Tensor]:
    """(1024,) means and spreads around those of T1; left and right of a structure are nearly alike."""
    count, family = LARGEST + 1, torch.from_numpy(tissues.family)
    drawn = torch.rand(count, generator=g)
    means = drawn * 1.3  # whatever has no usual intensity, above all outside the brain
    for label, mean in tissues.means.items():
        means[label] = mean
    contrast = uniform(g, 0.6, 1.4)  # of grey to white matter
    solid = torch.tensor(tissues.solid)
    means[solid] = 1 - (1 - means[solid]) * contrast
    means[torch.tensor(tissues.fluids)] *= uniform(g, 0.3, 1.5)
    if tissues.between:
        between = torch.tensor(tissues.between)
        means[between] = means[4] + (0.2 + 0.9 * drawn[between[0]]) * (means[3] - means[4])
    means *= torch.exp(torch.randn(count, generator=g).clamp(-2.5, 2.5) * 0.06)
    spreads = (0.02 + torch.rand(count, generator=g) * 0.06)[family]
    return _settled(means[family], spreads, g)


def _any_intensities(g: torch.Generator, tissues: Tissues) -> tuple[Tensor, Tensor]:
    """(1024,) means and spreads of a contrast that no scanner need have."""
    count, family = LARGEST + 1, torch.from_numpy(tissues.family)
    means = torch.rand(count, generator=g)[family] * 1.2
    return _settled(means, torch.rand(count, generator=g)[family] * 0.12, g)


def _settled(means: Tensor, spreads: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A slight difference between left and right, and empty air."""
    means = means * torch.exp(torch.randn(len(means), generator=g) * 0.01)
    means[0] = spreads[0] = 0
    return means.clamp_min(0), spreads


def _acquired_spacing(g: torch.Generator) -> tuple[float, float, float]:
    size = uniform(g, 0.7, 1.2) if chance(g, 0.6) else uniform(g, 1.0, 2.2)
    voxel = [size, size, size]
    if chance(g, 0.25):
        voxel[int(uniform(g, 0, 3))] = uniform(g, 1.5, 4.0)
    return voxel[0], voxel[1], voxel[2]


def paint(
    labels: Tensor, look: Look, corner: Tensor, spacing: float, g: torch.Generator, tissues: Tissues = FREESURFER
) -> Tensor:
    """(d, h, w) intensities of a clean scan before its resolution is lost: tissue, texture, field and mask."""
    index = labels.to(torch.int64).reshape(-1)
    image = look.means[index].reshape(labels.shape)
    image += look.spreads[index].reshape(labels.shape) * torch.randn(labels.shape, generator=g)
    return lit(image, labels, look, corner, spacing, tissues)


def lit(image: Tensor, labels: Tensor, look: Look, corner: Tensor, spacing: float, tissues: Tissues) -> Tensor:
    """The clean scan of tissue as bright as `image`, in place: with texture, field and mask."""
    axes = [float(corner[n]) + spacing * torch.arange(labels.shape[n], dtype=torch.float32) for n in range(3)]
    if look.texture is not None:
        shares = look.texture.shares[labels.to(torch.int64)]
        image *= 1 + shares * _field(look.texture.field, axes)[0]
    image *= torch.exp(_field(look.bias, axes)[0])
    if look.stripped is not None:
        image *= brain_mask(labels, look.stripped, look.fluid, spacing, tissues)
    return image.clamp_min_(0)


def brain_mask(labels: Tensor, grown: float, fluid: bool, spacing: float, tissues: Tissues = FREESURFER) -> Tensor:
    """(d, h, w) 0 or 1: the brain, with or without the fluid around it, grown by about `grown` times 3 mm."""
    brain = ((labels > 0) & (labels < OUTSIDE) & ((labels != tissues.around) | fluid)).float()
    smooth = smooth_by(brain, (2.5 / spacing,) * 3)
    return (smooth > 0.5 - 0.42 * grown).float()


def smooth_by(image: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """Gaussian smoothing of (d, h, w), standard deviations in voxels along d, h, w; what lies outside is left out."""
    for axis, sigma in enumerate(sigmas):
        if sigma >= 0.2:
            at = torch.arange(image.shape[axis], dtype=torch.float32)
            weights = torch.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
            image = _along(image, weights / weights.sum(1, keepdim=True), axis)
    return image


def _linear(position: Tensor, count: int) -> Tensor:
    """(m, count): weights of linear interpolation between `count` points at m positions, constant beyond the ends."""
    return (1 - (position.clamp(0, count - 1)[:, None] - torch.arange(count)).abs()).clamp_min(0)


def _along(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The product of `weights` (m, n) with one axis of length n."""
    return torch.movedim(torch.tensordot(weights, values, dims=([1], [axis])), 0, axis)


def acquire(image: Tensor, look: Look, spacing: float, g: torch.Generator) -> Tensor:
    """The scan at `image`'s grid after a scanner of lower resolution and its noise; exact zeros stay exact."""
    empty = image == 0
    image = smooth_by(image, tuple(width / spacing for width in look.blur))
    coarse = [max(round(n * spacing / max(size, spacing)), 2) for n, size in zip(image.shape, look.voxel, strict=True)]
    if coarse != list(image.shape):
        image = _resize(image, coarse)
    noise = torch.randn((2, *image.shape), generator=g) * look.noise
    image = torch.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)  # the magnitude of a complex signal
    if coarse != list(empty.shape):
        image = _resize(image, list(empty.shape))
    image = image.clamp_min_(1e-4) ** look.gamma
    if look.stripped is not None or not look.floor:
        image.masked_fill_(_shrunk(empty), 0)
    return image


def _resize(image: Tensor, shape: list[int]) -> Tensor:
    return functional.interpolate(image[None, None], shape, mode="trilinear", align_corners=False)[0, 0]


def _shrunk(empty: Tensor) -> Tensor:
    """Air that has no tissue next to it, so that partial volume at the border survives."""
    for axis in range(3):
        ahead, behind = empty.narrow(axis, 1, empty.shape[axis] - 1), empty.narrow(axis, 0, empty.shape[axis] - 1)
        shrunk = empty.clone()
        shrunk.narrow(axis, 0, empty.shape[axis] - 1).logical_and_(ahead)
        shrunk.narrow(axis, 1, empty.shape[axis] - 1).logical_and_(behind)
        empty = shrunk
    return empty


def draw_patch(maps: list[LabelMap], shape: Shape, spacing: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A patch as the network gets it: (1, d, h, w) float32 z-scores at `spacing`, and its classes (d, h, w) uint8."""
    labels = maps[int(uniform(g, 0, len(maps)))]
    if chance(g, 0.5):
        labels = mirror(labels)
    usual = chance(g, USUAL)
    look = usual_look(g, chance(g, SKULL_STRIPPED)) if usual else draw_look(g)
    look, warp, view = textured(look, g), draw_warp(labels, g), draw_view(g)
    extent = torch.tensor([n * spacing for n in shape])
    start = _patch_centre(view, extent, g) - extent / 2
    image, numbers = _scan(labels, warp, look, start, shape, spacing, g)
    mean, deviation = scan_statistics(labels, warp, look, view, g)
    image = torch.where(image > 0, (image - mean) / deviation, 0)
    outside = ~inside_view(start + spacing / 2, shape, spacing, view)
    image[outside], numbers[outside] = 0, 0
    return image[None], torch.from_numpy(class_table())[numbers.to(torch.int64)]


def draw_scan(labels: LabelMap, g: torch.Generator, look: Look) -> tuple[Tensor, Tensor]:
    """A whole scan at 1 mm: (d, h, w) float32 intensities from 0 on, and its labels (d, h, w) int16."""
    warp, view = draw_warp(labels, g), draw_view(g)
    shape = tuple(math.ceil(high - low) for low, high in view)
    start = torch.tensor([low for low, _ in view])
    return _scan(labels, warp, look, start, (shape[0], shape[1], shape[2]), 1.0, g)


def _patch_centre(view: View, extent: Tensor, g: torch.Generator) -> Tensor:
    """(3,) mm from the brain's centre: where a tile of the sliding window may lie, or near the brain's centre."""
    if chance(g, WINDOWS):
        low, high = torch.tensor(view).T
        room = (high - low - extent).clamp_min(0)
        return (low + high) / 2 + (torch.rand(3, generator=g) - 0.5) * room
    return torch.randn(3, generator=g) * torch.tensor([14.0, 16.0, 12.0])


def _scan(
    labels: LabelMap, warp: Warp, look: Look, start: Tensor, shape: Shape, spacing: float, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Intensities and labels on a grid whose first voxel begins at `start`, mm from the scan's centre."""
    fine = [math.ceil(n * spacing / FINE) for n in shape]
    tissue = sample_labels(labels, warp, start + FINE / 2, (fine[0], fine[1], fine[2]), FINE)
    image = acquire(paint(tissue, look, start + FINE / 2, FINE, g), look, FINE, g)
    if spacing == FINE:
        return image, tissue
    for axis, count in enumerate(shape):  # not `_resize`: the fine grid may reach beyond the patch
        image = _along(image, _linear((torch.arange(count) + 0.5) * spacing / FINE - 0.5, fine[axis]), axis)
    return image, sample_labels(labels, warp, start + spacing / 2, shape, spacing)


def draw_view(g: torch.Generator) -> View:
    """A field of view that holds the brain, except that one in eight cuts it at one side."""
    reach = [(uniform(g, 85, 140), uniform(g, 80, 115)), (uniform(g, 95, 125),) * 2, (uniform(g, 78, 105),) * 2]
    if chance(g, 1 / 8):
        axis = int(uniform(g, 0, 3))
        low, high = reach[axis]
        reach[axis] = (uniform(g, 30, 70), high) if chance(g, 0.5) else (low, uniform(g, 30, 70))
    d, h, w = ((-low, high) for low, high in reach)
    return d, h, w


def inside_view(corner: Tensor, shape: Shape, spacing: float, view: View) -> Tensor:
    """(d, h, w) whether each point of a grid lies in the field of view."""
    inside = torch.ones(shape, dtype=torch.bool)
    for n, (low, high) in enumerate(view):
        axis = float(corner[n]) + spacing * torch.arange(shape[n])
        inside &= ((axis >= low) & (axis <= high)).reshape([-1 if k == n else 1 for k in range(3)])
    return inside


def scan_statistics(labels: LabelMap, warp: Warp, look: Look, view: View, g: torch.Generator) -> tuple[float, float]:
    """Mean and deviation of the whole scan, which its z-scores rest on; from a coarse copy, and slightly off."""
    corner = torch.tensor([low for low, _ in view])
    sizes = [max(int((high - low) / COARSE), 2) for low, high in view]
    tissue = sample_labels(labels, warp, corner, (sizes[0], sizes[1], sizes[2]), COARSE)
    image = paint(tissue, look, corner, COARSE, g)
    empty = image == 0
    noise = torch.randn((2, *image.shape), generator=g) * look.noise
    image = torch.sqrt((image + noise[0]) ** 2 + noise[1] ** 2).clamp_min_(1e-4) ** look.gamma
    seen = image if look.stripped is None and look.floor else image[~empty]
    if seen.numel() < 100:
        seen = image
    mean, deviation = float(seen.mean()), float(seen.std())
    return mean + deviation * uniform(g, -0.1, 0.1), max(deviation, 0.02) * math.exp(uniform(g, -0.1, 0.1))
