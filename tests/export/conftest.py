"""Bundles exported once for all tests of this folder: an export takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemuse.runtime.model.bundle import Bundle, open_bundle

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"spacing": (1.5, 1.0, 1.0), "transpose": (2, 0, 1), "mirror_axes": (0, 1)},
    "ensemble": {
        "folds": ("0", "1"),
        "classes": 12,
        "layout": "old",
        "inherits": True,
        "prefix": "_orig_mod.",
    },
    "residual": {
        "network": "ResidualEncoderUNet",
        "folds": ("0", "1"),
        "classes": 5,
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "patch": (8, 16, 24),
        "normalization": "CTNormalization",
        "mirror_axes": "absent",
        "reader": "NibabelIOWithReorient",
    },
}


@dataclass(frozen=True)
class Exported:
    """A model folder, the options it was made with, and the bundle made of it."""

    options: Any
    folder: Path
    bundle: Bundle


@pytest.fixture(scope="session", params=list(MODELS))
def exported(request: pytest.FixtureRequest, nnunet_models: ModuleType, tmp_path_factory: Any) -> Exported:
    from edgemuse.export.exporter import export_model

    base = tmp_path_factory.mktemp(request.param)
    options = nnunet_models.ModelOptions(**MODELS[request.param])
    folder = nnunet_models.make_model_folder(base / "model", **MODELS[request.param])
    name = "bundle.zip" if request.param == "residual" else "bundle"
    return Exported(options, folder, open_bundle(export_model(folder, base / name)))
