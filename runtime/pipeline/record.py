"""What one network gave for a scan, and the provenance: how it was made, for people and for making it again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from edgemuse.engines.hardware import machine, peak_memory
from edgemuse.engines.protocol import Engine
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.network.memory import MemoryPlan
from edgemuse.runtime.network.tiles import TilePlan
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Labels


@dataclass(frozen=True)
class Run:
    """What one network gave.

    `classes`: (i, j, k) on the grid that was prepared; `removed`: voxels changed by removing islands.
    """

    classes: Labels
    plan: TilePlan
    engine: Engine
    memory: MemoryPlan
    removed: int


@dataclass(frozen=True)
class Setup:
    """How a network was set up.

    Attributes:
        bundle: that holds it.
        options: as the user gave them.
        mirrored_axes: of (d, h, w), over which results were averaged.
        gate: what the bundle's accuracy gate says of the engine.
        instead_of: why another engine, which was to run, failed; empty if none did.
    """

    bundle: Bundle
    options: Options
    mirrored_axes: Sequence[int]
    gate: str
    instead_of: str


def provenance(scan: Scan, sha256: str, run: Run, setup: Setup, seconds: dict[str, float]) -> dict[str, Any]:
    """How `run` was made of `scan`, a file of that hash."""
    options = setup.options
    return {
        "edgemuse": version("edgemuse"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "input": {"name": scan.path.name, "sha256": sha256, "shape": scan.shape, "mm": scan.zooms},
        "model": {"name": setup.bundle.name, "sha256": setup.bundle.sha256},
        "asked": options.asked,
        "backend": _backend(run.engine, setup),
        "profile": {
            "name": options.profile,
            "tiles": run.plan.count,
            "tile": run.plan.patch,
            "mirrored_axes": list(setup.mirrored_axes),
        },
        "postprocess": {"done": options.postprocess, "voxels_changed": run.removed},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "nibabel")},
        "machine": machine(),
        "seconds": {stage: round(value, 4) for stage, value in seconds.items()},
        "memory": {"planned_bytes": run.memory.total, "peak_bytes": peak_memory()},
    }


def _backend(engine: Engine, setup: Setup) -> dict[str, Any]:
    return {
        "name": engine.backend,
        "version": engine.version,
        "device": engine.device,
        "precision": engine.precision,
        "gate": setup.gate,
        "threads": setup.options.threads,
        "instead_of": setup.instead_of,
    }
