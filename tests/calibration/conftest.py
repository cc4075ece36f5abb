"""Fixtures of the calibration's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def only_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all settings the gate measures fp32 alone: enough where a test is about files. int8 and fp16 are made."""
    from edgemuse.calibration import calibrate
    from edgemuse.calibration.evaluate import settings

    monkeypatch.setattr(
        calibrate, "settings", lambda bundle: [each for each in settings(bundle) if each.precision == "fp32"][:1]
    )
