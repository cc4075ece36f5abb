"""Samples from real scans with DLMUSE's regions: seen as they are, with other contrast, or painted anew.

All scans are from one scanner, which the network must not get used to. So the tissues of a scan are taken apart: what
is typical of a region is replaced by other intensities, mildly or wholly, and what is left, the anatomy that no label
map shows, is kept to some share. The rest is as in `synthesis`: deformation, field, mask, resolution, noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgemuse.runtime.network.preprocess import nonzero_box
from edgemuse.runtime.regions.muse import CORTICAL_CSF
from edgemuse.runtime.scan.types import Shape
from edgemuse.training.labelmaps import LARGEST, OUTSIDE
from edgemuse.training.loop import Numbered, Sample
from edgemuse.training.pairs import TISSUES, Pair
from edgemuse.training.regions import INDICES, class_table, mirror_table, tissues
from edgemuse.training.synthesis import (
    SKULL_STRIPPED,
    Look,
    Texture,
    Warp,
    acquire,
    chance,
    draw_look,
    draw_view,
    draw_warp,
    generator,
    inside_view,
    lit,
    smooth_by,
    textured,
    uniform,
    usual_look,
    warped_points,
)

CLASSES = len(INDICES)
TISSUE = tissues()
BOXES = ((160.0, 192.0, 160.0), (192.0, 224.0, 160.0), (224.0, 256.0, 192.0))
"""mm along d, h, w that a sample shows: a brain, a brain with what is around it, most of a head."""
BOX_SHARES = (0.6, 0.25, 0.15)
STRIDE = 16
"""Sides of a sample are multiples of this, because the network halves four times."""
PAINTED = 0.45
"""Share of the samples whose tissues are painted anew."""
SHIFTED = 0.5
"""Share of the other samples in which tissues differ from the scan's by up to some `SHIFT`."""
SHIFT = 0.06
USUAL = 0.5
"""Share of the samples degraded no more than hospitals' scans are."""
SHARPENED = 0.5
ANYWHERE = 0.15
"""Share of the samples that lie anywhere in the head, as tiles may, and not around the brain."""
VOXELS = 80_000
"""Of a sample that count in the loss."""
REACH = 4
"""Voxels around the brain that count as much as the brain itself."""
FAR = 0.1
"""How densely voxels farther away are drawn, in relation to those near the brain."""
RARE = 400.0
"""Voxels: regions smaller than that are drawn more densely, with what is next to them."""


@dataclass(frozen=True)
class Choices:
    """How samples are made.

    Attributes:
        spacing: mm, of the network.
        painted: share whose tissues are painted anew.
        voxels: how many count in the loss.
        boxes: mm along d, h, w that samples show.
    """

    spacing: float = 2.0
    painted: float = PAINTED
    voxels: int = VOXELS
    boxes: tuple[tuple[float, float, float], ...] = BOXES

    def shape(self, g: torch.Generator) -> Shape:
        """Of the next sample."""
        box = self.boxes[int(torch.multinomial(torch.tensor(BOX_SHARES), 1, generator=g))]
        return grid_shape(box, self.spacing)


def grid_shape(box: Sequence[float], spacing: float) -> Shape:
    """The smallest grid for `box` mm whose sides the network can halve."""
    d, h, w = (math.ceil(round(size / spacing, 3) / STRIDE) * STRIDE for size in box)
    return d, h, w


class Samples(Numbered):
    """Sample number n of the stream that `seed` starts, as `draw_sample` makes it."""

    def __init__(self, pairs: list[Pair], rarity: Tensor, choices: Choices, seed: int, first: int, end: int) -> None:
        super().__init__(first, end)
        self.pairs, self.rarity, self.choices, self.seed = pairs, rarity, choices, seed

    def make(self, number: int) -> Sample:
        """An image, the voxels that count, and their classes."""
        g = generator(self.seed, number)
        pair = self.pairs[int(uniform(g, 0, len(self.pairs)))]
        image, target = draw_sample(pair, self.choices, g)
        where = draw_voxels(target, self.rarity, self.choices.voxels, g)
        return image[None], where, target.reshape(-1)[where].to(torch.int64)


def rarity_of(pairs: list[Pair]) -> Tensor:
    """(C,) how much more densely each class is drawn than 1: by the root of how much smaller than `RARE` it is."""
    table = class_table()
    counts = sum(np.bincount(table[pair.numbers].ravel(), minlength=CLASSES) for pair in pairs) / len(pairs)
    extra = np.sqrt(RARE / np.maximum(counts, 1)) - 1
    return torch.from_numpy(np.asarray(extra)).float().clamp(0, 7)


def draw_voxels(target: Tensor, rarity: Tensor, count: int, g: torch.Generator) -> Tensor:
    """(count,) voxels of the flattened `target`, some more than once, evenly over it at a density smooth in space.

    Smooth, so that both sides of a border count alike: else the network would move it to the side that counts less.
    """
    near = grown((target > 0).float(), REACH)
    rare = smooth_by(grown(rarity[target.to(torch.int64)], 2), (1.0, 1.0, 1.0))
    density = FAR + near * (1 - FAR + rare)
    total = density.reshape(-1).to(torch.float64).cumsum(0)
    steps = (torch.arange(count) + torch.rand(count, generator=g, dtype=torch.float64)) / count
    return torch.searchsorted(total, steps * total[-1]).clamp_max_(len(total) - 1)


def grown(values: Tensor, reach: int) -> Tensor:
    """(d, h, w) the largest of the values up to `reach` voxels away along each axis."""
    spread = values[None, None]
    for axis in range(3):
        window = [2 * reach + 1 if other == axis else 1 for other in range(3)]
        spread = functional.max_pool3d(spread, window, 1, [size // 2 for size in window])
    return spread[0, 0]


def draw_sample(pair: Pair, choices: Choices, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the network gets, (d, h, w) float32 z-scores, and its classes (d, h, w) uint8."""
    if chance(g, 0.5):
        pair = mirrored(pair)
    stripped = chance(g, SKULL_STRIPPED)
    look = usual_look(g, stripped, TISSUE) if chance(g, USUAL) else draw_look(g, TISSUE)
    look, warp, view = _family_texture(textured(look, g)), draw_warp(pair.numbers, g), draw_view(g)
    shape = choices.shape(g)
    centre = _sample_centre(g)
    start = centre - torch.tensor(shape) * choices.spacing / 2 + choices.spacing / 2
    points = warped_points(to_voxels(warp, pair.spacing), start, shape, choices.spacing)
    tissue = draw_tissue(pair, look, choices.painted, g)
    head = lit(tissue, torch.from_numpy(pair.numbers), look, _corner(pair, warp), pair.spacing, TISSUE)
    image = acquire(_sharpened(linear_at(head, points), g), look, choices.spacing, g)
    target = vote_at(torch.from_numpy(class_table()[pair.numbers]), points)
    outside = ~inside_view(start, shape, choices.spacing, view)
    target[outside] = 0
    image[outside] = 0
    target[(image == 0) & (target == INDICES.index(CORTICAL_CSF))] = 0  # the fluid was cut away with the skull
    return scored(image, uniform(g, 0, 0.6) if look.stripped is None else 0.0), target


def mirrored(pair: Pair) -> Pair:
    """The pair of the mirrored head: left and right change places, and numbers."""
    numbers = mirror_table()[np.ascontiguousarray(pair.numbers[:, :, ::-1])]
    return replace(pair, image=np.ascontiguousarray(pair.image[:, :, ::-1]), numbers=numbers)


def to_voxels(warp: Warp, spacing: float) -> Warp:
    """A deformation that was drawn for maps of 1 mm, for one of `spacing` mm with the same centre in voxels."""
    return Warp(warp.linear / spacing, warp.centre, warp.displacement / spacing)


def _corner(pair: Pair, warp: Warp) -> Tensor:
    """(3,) mm from the brain's centre to the first voxel of the pair's own grid."""
    return -warp.centre * pair.spacing


def _sample_centre(g: torch.Generator) -> Tensor:
    """(3,) mm from the brain's centre."""
    if chance(g, ANYWHERE):
        return (torch.rand(3, generator=g) - 0.5) * torch.tensor([120.0, 100.0, 80.0])
    return torch.randn(3, generator=g) * torch.tensor([10.0, 10.0, 8.0])


def _family_texture(look: Look) -> Look:
    """Texture alike in all regions of a family: no border between two gyri can be seen."""
    if look.texture is None:
        return look
    return replace(look, texture=Texture(look.texture.field, look.texture.shares[torch.from_numpy(TISSUE.family)]))


def draw_tissue(pair: Pair, look: Look, painted: float, g: torch.Generator) -> Tensor:
    """(d, h, w) clean intensities on the pair's own grid, white matter about 1: of the scan, or painted anew."""
    index = torch.from_numpy(pair.numbers).to(torch.int64)
    scan = torch.from_numpy(pair.image).float() / pair.white
    typical = family_means(scan, index)
    if not chance(g, painted):
        shift = torch.zeros(LARGEST + 1)
        if chance(g, SHIFTED):
            shift = (torch.randn(LARGEST + 1, generator=g).clamp(-2, 2) * SHIFT)[torch.from_numpy(TISSUE.family)]
        shift[0] = 0
        return remapped((scan + shift[index]).clamp_min_(0), g)
    means, kept = _outside(look.means, g), uniform(g, 0, 0.8) if chance(g, 0.75) else 0.0
    image = means[index] + kept * (scan - typical[index])
    return (image + look.spreads[index] * torch.randn(image.shape, generator=g)).clamp_min_(0)


def family_means(scan: Tensor, index: Tensor) -> Tensor:
    """(1024,) mean of `scan` over all labels of each label's family."""
    family = torch.from_numpy(TISSUE.family)
    flat = index.reshape(-1)
    sums = torch.bincount(flat, scan.reshape(-1), LARGEST + 1)
    counts = torch.bincount(flat, minlength=LARGEST + 1).float()
    sums, counts = (torch.zeros(LARGEST + 1).index_add(0, family, part.float()) for part in (sums, counts))
    return (sums / counts.clamp_min(1))[family]


def _outside(means: Tensor, g: torch.Generator) -> Tensor:
    """`means` with the tissues outside the brain in the order of the scan in half of the cases, else in any."""
    means, kinds = means.clone(), slice(OUTSIDE, OUTSIDE + TISSUES)
    if chance(g, 0.5):
        means[kinds] = means[kinds].sort().values
    return means


def remapped(scan: Tensor, g: torch.Generator) -> Tensor:
    """Intensities through a random rising curve of straight pieces; in one case of four it bends back a little."""
    knots = 6
    steps = torch.exp(torch.randn(knots, generator=g).clamp(-2, 2) * 0.5)
    heights = torch.cat((torch.zeros(1), steps.cumsum(0)))
    heights = heights * (1.5 / heights[-1])
    if chance(g, 0.25):
        heights[1:] += torch.randn(knots, generator=g).clamp(-2, 2) * 0.08
    at = (scan * (knots / 1.5)).clamp(0, knots - 1e-3)
    low = at.to(torch.int64)
    return (heights[low] + (at - low) * (heights[low + 1] - heights[low])).clamp_min_(0)


def linear_at(volume: Tensor, points: list[Tensor]) -> Tensor:
    """(d, h, w) of `volume`, linear between its voxels, 0 outside."""
    sizes = volume.shape
    grid = torch.stack([points[n] * (2 / (sizes[n] - 1)) - 1 for n in (2, 1, 0)], dim=-1)
    found: Tensor = functional.grid_sample(volume[None, None], grid[None], align_corners=True, padding_mode="zeros")
    return found[0, 0]


def vote_at(classes: Tensor, points: list[Tensor]) -> Tensor:
    """(d, h, w) the class that the eight voxels around each point agree on most, nearer ones counting more.

    That is the largest of the linearly interpolated shares of all classes: borders stay smooth on any grid. Outside
    `classes`, (d, h, w) uint8, is background.
    """
    sizes = classes.shape
    inside = torch.ones(points[0].shape, dtype=torch.bool)
    for point, size in zip(points, sizes, strict=True):
        inside &= (point >= 0) & (point <= size - 1)
    low = [point[inside].clamp(max=size - 1.001) for point, size in zip(points, sizes, strict=True)]
    first, shares = [point.to(torch.int64) for point in low], [point.frac() for point in low]
    index = (first[0] * sizes[1] + first[1]) * sizes[2] + first[2]
    voted = classes.reshape(-1)[index]
    mixed = ~_plain(classes).reshape(-1)[index]
    voted[mixed] = _most_votes(classes, index[mixed], [share[mixed] for share in shares])
    found = torch.zeros(inside.shape, dtype=torch.uint8)
    found[inside] = voted
    return found


def _plain(classes: Tensor) -> Tensor:
    """(d, h, w) whether a voxel and the next ones along all axes have one class; the last ones count as mixed."""
    plain = torch.zeros(classes.shape, dtype=torch.bool)
    corner = classes[:-1, :-1, :-1]
    same = torch.ones(corner.shape, dtype=torch.bool)
    for d, h, w in itertools.product(*(((0, size - 1), (1, size)) for size in classes.shape)):
        same &= classes[slice(*d), slice(*h), slice(*w)] == corner
    plain[:-1, :-1, :-1] = same
    return plain


def _most_votes(classes: Tensor, index: Tensor, shares: list[Tensor]) -> Tensor:
    """(n,) the class with the largest sum of weights among the eight voxels from each flat `index` on."""
    steps = (classes.shape[1] * classes.shape[2], classes.shape[2], 1)
    found, weights = [], []
    for ends in itertools.product((0, 1), repeat=3):
        found.append(classes.reshape(-1)[index + sum(step for step, end in zip(steps, ends, strict=True) if end)])
        near = [share if end else 1 - share for share, end in zip(shares, ends, strict=True)]
        weights.append(near[0] * near[1] * near[2])
    best, most = found[0].clone(), torch.zeros(len(index))
    for one in found:
        votes = sum((weight * (other == one) for other, weight in zip(found, weights, strict=True)), torch.zeros(()))
        best = torch.where(votes > most, one, best)
        most = torch.maximum(votes, most)
    return best


def _sharpened(image: Tensor, g: torch.Generator) -> Tensor:
    """Linear interpolation blurs; scans that are thinned out to the network's spacing are sharper."""
    if not chance(g, SHARPENED):
        return image
    sharp = image + uniform(g, 0, 1) * (image - smooth_by(image, (0.8, 0.8, 0.8)))
    return sharp.clamp_min_(0) * (image > 0)


def scored(image: Tensor, air: float) -> Tensor:
    """Z-scores as the runtime takes them: over the box of what is not 0, and 0 outside that box.

    `air`: share of a whole scan that is empty and not seen here.
    """
    scores = torch.zeros_like(image)
    if not image.any():
        return scores
    box = nonzero_box(image.numpy())
    inside = image[box]
    mean, square = float(inside.mean()) * (1 - air), float(inside.square().mean()) * (1 - air)
    deviation = math.sqrt(max(square - mean**2, 0.0))
    scores[box] = (inside - mean) / max(deviation, 1e-3)
    return scores
