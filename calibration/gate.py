"""The accuracy gate: what an engine, precision and profile must reach to be offered by `auto`.

Compared are whole label maps, on the scan's grid, with those of the `reference` profile in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgemuse.runtime.regions.agreement import dice
from edgemuse.runtime.scan.types import Labels

TRUTH_SHARE = {"int8": 0.99}
"""Share of the reference's mean Dice against the truth that must be kept."""
TRUTH_SHARE_DEFAULT = 0.999
"""The same for fp32, bf16 and fp16."""
LARGEST_DROP = 0.02
"""By which no structure's Dice against the truth may fall."""
SMALLEST_AGREEMENT = 0.98
"""Dice with the reference."""
ROUNDING = 1e-9
"""Differences of means this small are of float64, not of the labels."""


@dataclass(frozen=True)
class Case:
    """One scan's label maps, (i, j, k) class numbers with background 0. `truth` None: not known."""

    reference: Labels
    candidate: Labels
    truth: Labels | None = None


@dataclass(frozen=True)
class Measurement:
    """What the gate judges; every figure is a mean over scans.

    Attributes:
        agreement: Dice with the reference, over the structures in either map.
        dice: Dice against the truth, over the structures in it; None where no scan has a truth.
        reference_dice: the same of the reference.
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
    """1 where both hold nothing but background: then they agree, and `one_label` says what is wrong."""
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
