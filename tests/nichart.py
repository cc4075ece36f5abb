"""NiChart_DLMUSE's own functions, where it is installed: `pip install --no-deps NiChart_DLMUSE==1.0.10`.

Its package cannot be imported without DLMUSE, DLICV and what they pin, so its modules are loaded one by one.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest


def module(name: str) -> ModuleType:
    """NiChart_DLMUSE's module `name`; skips where it, or pandas, is absent."""
    pytest.importorskip("pandas", reason="NiChart_DLMUSE needs pandas: pip install pandas")
    spec = importlib.util.spec_from_file_location(f"nichart_{name}", folder() / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(), mock.patch("logging.basicConfig"):  # it would log into the working directory
        warnings.simplefilter("ignore", DeprecationWarning)  # scipy.ndimage.measurements
        spec.loader.exec_module(loaded)
    return loaded


def folder() -> Path:
    """Where it is installed."""
    spec = importlib.util.find_spec("NiChart_DLMUSE")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("NiChart_DLMUSE is not installed: pip install --no-deps NiChart_DLMUSE==1.0.10")
    return Path(spec.submodule_search_locations[0])


def table(name: str) -> Path:
    """One of its tables."""
    return folder() / "shared" / "dicts" / name
