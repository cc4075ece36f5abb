"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("edgemuse", deadline=None, print_blob=True)  # a clock is no test
settings.load_profile("edgemuse")


def _load(name: str) -> ModuleType:
    """Import `tests/NAME.py` under its bare name: with importlib mode, tests/ itself is not on sys.path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def nnunet_models() -> ModuleType:
    """The helper module `tests/nnunet_models.py`; skips where PyTorch is not installed."""
    pytest.importorskip("torch", reason="making model folders needs PyTorch: pip install '.[dev]'")
    return _load("nnunet_models")


@pytest.fixture
def model_folder(nnunet_models: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny nnU-Net model folder, a fresh one at each call."""
    made: list[Path] = []

    def make(**options: Any) -> Path:
        made.append(nnunet_models.make_model_folder(tmp_path / f"model{len(made)}", **options))
        return made[-1]

    return make
