"""How much two label maps agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def agreement(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Share of voxels with the same label."""
    return float(np.mean(first == second))


def dice(first: NDArray[np.integer], second: NDArray[np.integer]) -> dict[int, float]:
    """Dice of every label but 0 that is in either map: 2 |A and B| / (|A| + |B|)."""
    count = int(max(first.max(), second.max())) + 1
    sizes = np.bincount(first.ravel(), minlength=count) + np.bincount(second.ravel(), minlength=count)
    common = np.bincount(first[first == second].ravel(), minlength=count)
    return {label: float(2 * common[label] / sizes[label]) for label in range(1, count) if sizes[label]}


def mean_dice(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Mean of `dice` over the labels in either map; NaN if there is none."""
    scores = list(dice(first, second).values())
    return float(np.mean(scores)) if scores else float("nan")
