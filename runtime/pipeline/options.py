"""What a user may choose about segmenting, and who is told how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.model.folders import default_cache_dir
from edgemuse.runtime.network.profiles import PROFILES

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many tiles of how many are done."""
Planned: TypeAlias = Callable[[int, bool], None]
"""Told, before a network runs, the bytes that the process will take at most, and whether it is the scan's last."""


@dataclass(frozen=True)
class Options:
    """How to segment. The defaults are those of `edgemuse segment`.

    Attributes:
        profile: `reference`, `balanced` or `fast`.
        backend: `openvino`, `onnxruntime`, `tensorrt`, or `auto`: what `edgemuse tune` found to be fastest here, else
            the first that works.
        precision: `fp32`, `bf16`, `fp16`, `int8`, or `auto`: the fastest that passed the model's accuracy gate, fp32
            with the profile `reference`.
        device: of the backend, such as `CPU`, or `auto`: its first.
        threads: processor cores to use; None: the backend's choice.
        max_ram: GiB that the process may take; None: nine tenths of what is free.
        postprocess: remove islands of the structures that the model says are in one piece.
        cache_dir: folder of compiled engines; None: they are not kept.
    """

    profile: str = "reference"
    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_ram: float | None = None
    postprocess: bool = True
    cache_dir: Path | None = field(default_factory=default_cache_dir)

    @property
    def engine(self) -> EngineOptions:
        """The part that concerns the engine."""
        return EngineOptions(self.backend, self.precision, self.device, self.threads, self.cache_dir)

    @property
    def asked(self) -> dict[str, Any]:
        """What may change labels, for the provenance. The memory allowed does where it decides how large tiles are."""
        large_tiles = PROFILES[self.profile].large_tiles
        return {
            "profile": self.profile,
            "backend": self.backend,
            "device": self.device,
            "precision": self.precision,
            "postprocess": self.postprocess,
            "max_ram": self.max_ram if large_tiles else None,
        }
