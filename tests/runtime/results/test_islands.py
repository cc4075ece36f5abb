"""Removing islands: what is in one piece stays, what lies apart goes, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.results.islands import remove_islands
from edgemuse.runtime.scan.types import Labels

LABELS = [
    Label(0, 0, "background"),
    Label(1, 2, "white matter", single=True),
    Label(2, 17, "hippocampus", single=True),
    Label(3, 24, "CSF"),
]
volumes = arrays.arrays(np.uint8, (5, 6, 7), elements=st.integers(0, 3))


@pytest.fixture
def brain() -> Labels:
    """White matter with a hippocampus inside and some fluid in two places."""
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[2:18, 2:18, 2:18] = 1
    classes[5:9, 5:9, 5:9] = 2
    classes[12:14, 12, 12] = classes[16, 16, 16] = 3
    return classes


def test_a_brain_in_one_piece_stays_as_it_is(brain: Labels) -> None:
    before = brain.copy()
    assert remove_islands(brain, LABELS) == 0
    assert np.array_equal(brain, before)


def test_an_island_inside_takes_the_class_around_it(brain: Labels) -> None:
    wanted = brain.copy()
    brain[13:15, 4:6, 13] = 2
    assert remove_islands(brain, LABELS) == 4
    assert np.array_equal(brain, wanted)


def test_an_island_outside_the_brain_becomes_background(brain: Labels) -> None:
    wanted = brain.copy()
    brain[0, 0, 0:3] = 1
    brain[19, 19, 19] = 3
    assert remove_islands(brain, LABELS) == 4
    assert np.array_equal(brain, wanted)


def test_parts_that_share_a_corner_are_one(brain: Labels) -> None:
    brain[9, 9, 9] = 2
    before = brain.copy()
    assert remove_islands(brain, LABELS) == 0
    assert np.array_equal(brain, before)


def test_a_table_that_says_nothing_changes_nothing(brain: Labels) -> None:
    brain[0, 0, 0] = 2
    before = brain.copy()
    assert remove_islands(brain, [Label(n, n, str(n)) for n in range(4)]) == 0
    assert np.array_equal(brain, before)


@given(volumes)
def test_any_labels(classes: Labels) -> None:
    """Counts are true, no label appears that was not there, and a second time the brain alone can lose parts."""
    before = classes.copy()
    changed = remove_islands(classes, LABELS)
    assert changed >= (classes != before).sum()  # an island in an island changes twice
    assert set(np.unique(classes)) <= {0, *np.unique(before)}
    assert not classes[before == 0].any()
