"""A head of a few labels, small enough to deform in no time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="training needs PyTorch: pip install 'edgemuse[dev]'")


@pytest.fixture(scope="session")
def head() -> NDArray[np.int16]:
    """(80, 90, 70): scalp, fluid, cortex and white matter as nested ellipsoids, a thalamus on either side.

    The last axis runs from right to left.
    """
    shape = (80, 90, 70)
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    d, h, w = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt((d / 36) ** 2 + (h / 40) ** 2 + (w / 32) ** 2)
    left = w > 0
    labels = np.zeros(shape, np.int16)
    for limit, right_label, left_label in ((1.0, 507, 507), (0.85, 24, 24), (0.75, 42, 3), (0.6, 41, 2)):
        labels[radius < limit] = np.where(left, left_label, right_label)[radius < limit]
    for side, label in ((10, 10), (-10, 49)):
        labels[(d / 8) ** 2 + (h / 8) ** 2 + ((w - side) / 6) ** 2 < 1] = label
    return labels


MUSE = {24: 1, 42: 100, 3: 101, 41: 81, 2: 82, 10: 60, 49: 59, 507: 0}
"""MUSE's numbers of what is in the head."""
GREY = {24: 20, 42: 70, 3: 70, 41: 100, 2: 100, 10: 90, 49: 90, 507: 130, 0: 0}


@pytest.fixture(scope="session")
def pair(head: NDArray[np.int16]) -> Any:
    """The head thinned out to 2 mm, with a scan: (40, 45, 35)."""
    from edgemuse.training.pairs import Pair, with_tissues

    thin = head[::2, ::2, ::2]
    numbers, image = np.zeros(thin.shape, np.int16), np.zeros(thin.shape, np.uint8)
    for label, grey in GREY.items():
        numbers[thin == label], image[thin == label] = MUSE.get(label, 0), grey
    return Pair("sub", image, 100.0, with_tissues(image, numbers), 2.0)
