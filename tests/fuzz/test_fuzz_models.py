"""Whatever a model folder holds, export makes a bundle or refuses it in one line, runs nothing and leaves nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs PyTorch: pip install 'edgemuse[dev]'")

from fuzz import hostile_models
from fuzz.harness import RETURNED, outcome, run_cases

SHORT, LONG = 12, 100
MAX_BYTES = 2 * 2**30
"""PyTorch and its exporter take a third of that."""


def check(outcomes: Counter[str], wrong: list[str], count: int) -> None:
    assert not wrong, "\n".join(wrong[:20])
    assert outcomes.total() == count
    assert outcomes["ModelFolderError"] > count / 2


def test_some_mutated_model_folders(tmp_path: Path) -> None:
    attempt = hostile_models.prepare(tmp_path)
    found = [outcome(attempt, number) for number in range(SHORT)]
    check(Counter(kind for kind, _ in found), [trouble for _, trouble in found if trouble], SHORT)


@pytest.mark.fuzz
def test_a_hundred_mutated_model_folders() -> None:
    outcomes, wrong = run_cases("fuzz.hostile_models", LONG, MAX_BYTES)
    check(outcomes, wrong, LONG)
    assert outcomes[RETURNED] > LONG / 50
