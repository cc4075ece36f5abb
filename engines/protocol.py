"""The protocol that every inference backend follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Batch: TypeAlias = NDArray[np.float32]
"""(N, C, D, H, W), C-contiguous."""
Output: TypeAlias = NDArray[np.floating]
"""(N, F, D, H, W), float32 or float16."""
TileShape: TypeAlias = tuple[int, int, int, int, int]
"""(N, C, D, H, W)"""


class Engine(Protocol):
    """A network that is ready to run.

    Contract:
        - `infer` takes (N, C, D, H, W) float32 of exactly the shape the engine was opened for and returns
          (N, F, D, H, W), writable, in whatever memory order costs least; features last suits the runtime. They are
          float32, or float16 where the engine computes in int8.
        - The array returned belongs to the engine: the caller may change it, and it is valid until the next call.
        - The precision is the one asked for. An engine that cannot give it does not open.
        - `infer` raises BackendError where the backend fails; `close` may be called more than once.
    """

    backend: str
    version: str
    device: str
    precision: str

    def infer(self, batch: Batch) -> Output:
        """Run the network once."""
        ...

    def close(self) -> None:
        """Free the backend's memory."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """What the user may choose about an engine.

    `backend` and `precision` may be `auto`. `threads` None lets the backend use every core it is allowed.
    `cache_dir` None: compiled models are not kept.
    """

    backend: str = "auto"
    precision: str = "fp32"
    device: str = "auto"
    threads: int | None = None
    cache_dir: Path | None = None
