"""Whatever a NIfTI file holds, edgemuse gives a result or refuses it in one line, within the memory allowed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fuzz import nifti
from fuzz.harness import RETURNED, outcome, run_cases

SHORT, LONG = 60, 1000


def check(outcomes: Counter[str], wrong: list[str], count: int) -> None:
    assert not wrong, "\n".join(wrong[:20])
    assert outcomes.total() == count
    assert outcomes[RETURNED] > count / 20
    assert outcomes["InputError"] > count / 20


def test_some_mutated_scans(tmp_path: Path) -> None:
    attempt = nifti.prepare(tmp_path)
    found = [outcome(attempt, number) for number in range(SHORT)]
    check(Counter(kind for kind, _ in found), [trouble for _, trouble in found if trouble], SHORT)


@pytest.mark.fuzz
def test_a_thousand_mutated_scans() -> None:
    check(*run_cases("fuzz.nifti", LONG, nifti.MAX_RAM * 2**30), LONG)
