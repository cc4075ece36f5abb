"""What the measurement of a first look rests on: a part of a scan gives what the whole gives there, and counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bundles import head_image, tiny_bundle, write_scan
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'edgemuse[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install 'edgemuse[dev]'")

from edgemuse.bench.first_look import (
    PATCHES,
    TRUE_SCAN,
    Found,
    Head,
    MaskNetwork,
    Row,
    box_of,
    head,
    nearest,
    page,
    rows_of,
    touching,
)
from edgemuse.runtime.bundle import open_bundle
from edgemuse.runtime.pipeline import Options, segment
from edgemuse.runtime.types import Shape

SHAPE = (30, 26, 28)


def made(folder: Path, spacing: float) -> tuple[MaskNetwork, Head, Path]:
    """A random network of `spacing`, a scan of 1 mm for it, and the scan's path."""
    side = (spacing, spacing, spacing)
    network = MaskNetwork(open_bundle(tiny_bundle(folder / "tiny.bundle", spacing=side, patch=(8, 8, 8))))
    path = write_scan(folder / "scan_T1w.nii.gz", head_image(SHAPE))
    return network, head(path, network.network), path
