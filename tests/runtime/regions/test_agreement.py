"""Dice and agreement against their definitions, voxel by voxel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.runtime.regions.agreement import agreement, dice, mean_dice


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_dice_is_its_definition(seed, labels):
    rng = np.random.default_rng(seed)
    first, second = (rng.integers(0, labels + 1, (3, 4, 5)) for _ in range(2))
    expected = {}
    for label in range(1, labels + 1):
        a, b = (set(map(tuple, np.argwhere(volume == label))) for volume in (first, second))
        if a or b:
            expected[label] = 2 * len(a & b) / (len(a) + len(b))
    assert dice(first, second) == pytest.approx(expected)
    if expected:
        assert mean_dice(first, second) == pytest.approx(np.mean(list(expected.values())))


def test_a_structure_absent_in_both_does_not_count():
    first, second = np.array([0, 1, 3, 3]), np.array([0, 1, 1, 3])
    assert dice(first, second) == pytest.approx({1: 2 / 3, 3: 2 / 3})


def test_nothing_but_background_has_no_dice():
    assert np.isnan(mean_dice(np.zeros(4, int), np.zeros(4, int)))


def test_agreement_counts_voxels():
    assert agreement(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])) == 0.75
