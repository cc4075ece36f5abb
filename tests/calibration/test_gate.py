"""The gate: what is the same passes, what has lost a structure, its accuracy or its variety does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.calibration.gate import LARGEST_DROP, SMALLEST_AGREEMENT, Case, Measurement, failures, measure
from edgemuse.runtime.regions.agreement import dice
from edgemuse.runtime.scan.types import Labels

PRECISIONS = ("fp32", "bf16", "fp16", "int8")


def blocks(seed: int, structures: int = 4) -> Labels:
    """A label map of slabs, each a structure, with a margin of background."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((8 * structures, 12, 12), np.uint8)
    for structure in range(structures):
        labels[8 * structure : 8 * structure + rng.integers(4, 8), 1:11, 1:11] = structure + 1
    return labels


@given(st.integers(0, 1000), st.integers(1, 3), st.booleans(), st.sampled_from(PRECISIONS))
def test_the_reference_itself_passes(seed: int, scans: int, with_truth: bool, precision: str) -> None:
    references = [blocks(seed + scan) for scan in range(scans)]
    cases = [Case(one, one.copy(), np.roll(one, 1, axis=0) if with_truth else None) for one in references]
    found = measure(cases)
    assert found.agreement == 1
    assert found.drop == (0 if with_truth else None)
    assert failures(found, precision) == ()


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(PRECISIONS))
def test_a_structure_that_moved_fails(seed: int, structure: int, by: int, with_truth: bool, precision: str) -> None:
    reference = blocks(seed)
    candidate = reference.copy()
    candidate[candidate == structure] = 0
    candidate[np.roll(reference == structure, by, axis=1)] = structure
    found = measure([Case(reference, candidate, reference if with_truth else None)])
    assert failures(found, precision)
    if with_truth:
        assert found.worst == structure


@given(st.integers(0, 1000), st.integers(1, 4))
def test_one_structure_lost_fails_even_if_all_others_gain(seed: int, lost: int) -> None:
    """The mean may rise all the same."""
    truth = blocks(seed)
    reference, candidate = truth.copy(), truth.copy()
    reference[:, 1, :] = 0
    candidate[truth == lost] = 0
    candidate[(truth == lost) & (np.arange(12) < 8)] = lost
    found = measure([Case(reference, candidate, truth)])
    assert found.worst == lost
    assert any("a structure loses" in reason for reason in failures(found, "int8"))


@given(st.integers(0, 1000), st.sampled_from(PRECISIONS))
def test_one_label_fails_at_once(label: int, precision: str) -> None:
    flat = np.full((4, 4, 4), label % 5, np.uint8)
    assert "a scan was given one label only" in failures(measure([Case(flat, flat)]), precision)
    good = blocks(label)
    assert "a scan was given one label only" in failures(measure([Case(good, good), Case(good, good * 0)]), precision)


@given(st.integers(0, 300))
def test_figures_are_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = [[rng.integers(0, 4, (4, 4, 4)).astype(np.uint8) for _ in range(3)] for _ in range(2)]
    found = measure([Case(*three) for three in maps])
    assert found.agreement == pytest.approx(np.mean([np.mean(list(dice(r, c).values())) for r, c, _ in maps]))
    of = {s: (np.mean([dice(t, c)[s] for _, c, t in maps]), np.mean([dice(t, r)[s] for r, _, t in maps]))
          for s in (1, 2, 3)}  # fmt: skip
    assert found.dice == pytest.approx(np.mean([candidate for candidate, _ in of.values()]))
    assert found.reference_dice == pytest.approx(np.mean([reference for _, reference in of.values()]))
    assert found.drop == pytest.approx(max(reference - candidate for candidate, reference in of.values()))


def test_structures_that_no_truth_holds_do_not_count() -> None:
    reference, truth = blocks(0), blocks(0)
    truth[truth == 2] = 0
    assert measure([Case(reference, reference, truth)]).dice == 1


GOOD = Measurement(agreement=0.99, dice=0.8, reference_dice=0.8, drop=0.0, worst=1)


@pytest.mark.parametrize(
    ("measurement", "precision", "reason"),
    [
        (replace(GOOD, agreement=SMALLEST_AGREEMENT), "int8", None),
        (replace(GOOD, agreement=0.9799), "int8", "agreement 0.9799 is below 0.98"),
        (replace(GOOD, agreement=float("nan")), "int8", "agreement nan is below 0.98"),
        (replace(GOOD, dice=0.8 * 0.99), "int8", None),
        (replace(GOOD, dice=0.7919), "int8", "Dice 0.7919 is below 0.7920"),
        (replace(GOOD, dice=0.8 * 0.999), "fp16", None),
        (replace(GOOD, dice=0.7919), "fp16", "Dice 0.7919 is below 0.7992"),
        (replace(GOOD, dice=0.7919), "bf16", "Dice 0.7919 is below 0.7992"),
        (replace(GOOD, dice=0.7919), "fp32", "Dice 0.7919 is below 0.7992"),
        (replace(GOOD, dice=float("nan")), "int8", "Dice nan is below 0.7920"),
        (replace(GOOD, drop=LARGEST_DROP), "int8", None),
        (replace(GOOD, drop=0.021), "int8", "a structure loses 0.021, more than 0.02"),
        (replace(GOOD, drop=float("nan")), "int8", "a structure loses nan, more than 0.02"),
    ],
)
def test_limits(measurement: Measurement, precision: str, reason: str | None) -> None:
    assert failures(measurement, precision) == (() if reason is None else (reason,))
