"""Phantoms of a head: what a network is tried on where there is no scan, or where no scan may be given away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.protocol import Batch
from edgemuse.runtime.scan.types import Shape


def synthetic_patches(shape: Shape, count: int, seed: int) -> Iterator[Batch]:
    """`count` phantoms of a head (1, 1, D, H, W): smooth nested ellipsoids and noise, z-scored."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    for _ in range(count):
        phantom = _phantom(grids, rng)
        noisy = phantom + rng.normal(scale=0.1, size=shape)
        yield ((noisy - noisy.mean()) / noisy.std()).astype(np.float32)[None, None]


def _phantom(grids: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    total = np.zeros_like(grids[0])
    for radius in (0.95, 0.8, 0.6, 0.35, 0.2):
        radii, center = radius * rng.uniform(0.8, 1, 3), rng.uniform(-0.15, 0.15, 3)
        distance = sum(((grid - c) / r) ** 2 for grid, c, r in zip(grids, center, radii, strict=True))
        total += rng.uniform(-0.5, 0.5) * (1 - np.tanh(6 * (distance - 1)))
    return total
