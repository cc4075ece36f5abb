"""The accuracy gate: what an engine, precision and profile must reach to be offered by `auto`.

Whole label maps, on the grid of the scan, are compared with those of the profile `reference` in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgemuse.runtime.regions.agreement import dice
from edgemuse.runtime.scan.types import Labels

TRUTH_SHARE = {"int8": 0.99}
"""The share of the reference's mean Dice against the truth that must be kept, by precision."""
TRUTH_SHARE_DEFAULT = 0.999
"""The same for fp32, bf16 and fp16."""
LARGEST_DROP = 0.02
"""No structure's Dice against the truth may fall by more than this."""
SMALLEST_AGREEMENT = 0.98
"""The mean Dice with the reference's labels must be at least this."""
ROUNDING = 1e-9
"""Differences of means up to this size come from float64 arithmetic and not from the labels."""


@dataclass(frozen=True)
class Case:
    """The label maps of one scan, (i, j, k) class numbers with background 0. `truth` is None where it is not known."""

    reference: Labels
    candidate: Labels
    truth: Labels | None = None


@dataclass(frozen=True)
class Measurement:
    """The figures that the gate judges; each is a mean over scans.

    Attributes:
        agreement: Dice with the reference, over the structures in either map.
        dice: Dice against the truth, over the structures in it; None where no scan has a truth.
        reference_dice: Dice of the reference against the truth.
        drop: by how much the worst structure falls behind the reference, against the truth.
        worst: that structure's class number.
        one_label: whether some scan was given a single label.
    """

    agreement: float
    dice: float | None = None
    reference_dice: float | None = None
    drop: float | None = None
    worst: int | None = None
    one_label: bool = False


def measure(cases: Sequence[Case]) -> Measurement:
    """Compare the label maps of at least one scan."""
    agreement = float(np.mean([_agreement(case) for case in cases]))
    one_label = any(case.candidate.min() == case.candidate.max() for case in cases)
    scores = _truth_scores(cases)
    if not scores:
        return Measurement(agreement, one_label=one_label)
    means = {structure: np.mean(pairs, axis=0) for structure, pairs in scores.items()}
    candidate, reference = np.mean(list(means.values()), axis=0)
    drops = {structure: float(pair[1] - pair[0]) for structure, pair in means.items()}
    worst = max(drops, key=lambda structure: drops[structure])
    return Measurement(agreement, float(candidate), float(reference), drops[worst], worst, one_label)


def _agreement(case: Case) -> float:
    """The mean Dice over structures. It is 1 where both maps hold only background; `one_label` tells that case."""
    scores = list(dice(case.reference, case.candidate).values())
    return float(np.mean(scores)) if scores else 1.0


def _truth_scores(cases: Sequence[Case]) -> dict[int, list[tuple[float, float]]]:
    """For every structure of the truth, Dice of candidate and reference, scan by scan."""
    scores: dict[int, list[tuple[float, float]]] = {}
    for case in cases:
        if case.truth is None:
            continue
        candidate, reference = dice(case.truth, case.candidate), dice(case.truth, case.reference)
        for structure in np.unique(case.truth[case.truth > 0]):
            pair = candidate[int(structure)], reference[int(structure)]
            scores.setdefault(int(structure), []).append(pair)
    return scores


def failures(found: Measurement, precision: str) -> tuple[str, ...]:
    """Why `found` does not pass for `precision`, a phrase each; empty if it passes. NaN does not pass."""
    reasons = []
    if found.one_label:
        reasons.append("a scan was given one label only")
    if not found.agreement >= SMALLEST_AGREEMENT - ROUNDING:
        reasons.append(f"agreement {found.agreement:.4f} is below {SMALLEST_AGREEMENT}")
    if found.dice is not None and found.reference_dice is not None:
        wanted = TRUTH_SHARE.get(precision, TRUTH_SHARE_DEFAULT) * found.reference_dice
        if not found.dice >= wanted - ROUNDING:
            reasons.append(f"Dice {found.dice:.4f} is below {wanted:.4f}")
    if found.drop is not None and not found.drop <= LARGEST_DROP + ROUNDING:
        reasons.append(f"a structure loses {found.drop:.3f}, more than {LARGEST_DROP}")
    return tuple(reasons)
