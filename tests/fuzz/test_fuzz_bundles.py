"""Whatever a bundle holds, edgemuse gives a result or refuses it in one line, within the memory allowed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fuzz import hostile_bundles
from fuzz.harness import RETURNED, outcome, run_cases

SHORT, LONG = 40, 300


def check(outcomes: Counter[str], wrong: list[str], count: int) -> None:
    assert not wrong, "\n".join(wrong[:20])
    assert outcomes.total() == count
    assert outcomes[RETURNED] > count / 50
    assert outcomes["BundleError"] > count / 2


def test_some_mutated_bundles(tmp_path: Path) -> None:
    attempt = hostile_bundles.prepare(tmp_path)
    found = [outcome(attempt, number) for number in range(SHORT)]
    check(Counter(kind for kind, _ in found), [trouble for _, trouble in found if trouble], SHORT)


@pytest.mark.fuzz
def test_three_hundred_mutated_bundles() -> None:
    check(*run_cases("fuzz.hostile_bundles", LONG, 1.5 * 2**30), LONG)
