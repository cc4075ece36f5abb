"""Where edgemuse keeps things on this machine: compiled engines, and models that go by a name."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_cache_dir() -> Path:
    """In whose sub-folder compiled engines are kept: `EDGEMUSE_CACHE_DIR`, or the user's cache directory."""
    return Path(os.environ.get("EDGEMUSE_CACHE_DIR") or platformdirs.user_cache_dir())


def store_folder(chosen: Path | None = None) -> Path:
    """Where the store is: `chosen`, else `models` in the folder `EDGEMUSE_HOME` or in the user's data directory."""
    home = os.environ.get("EDGEMUSE_HOME") or platformdirs.user_data_dir("edgemuse", appauthor=False)
    return chosen or Path(home) / "models"
