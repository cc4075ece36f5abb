"""An engine made of a function: for tests, and for pipelines that bring their own network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgemuse.engines.protocol import Batch


class FunctionEngine:
    """Runs `function`, (N, C, D, H, W) -> (N, F, D, H, W), as the engine."""

    backend, version, device, precision = "function", "0", "CPU", "fp32"

    def __init__(self, function: Callable[[Batch], Batch]) -> None:
        self.function = function

    def infer(self, batch: Batch) -> Batch:
        """Run the function on a copy and return a copy, so that neither side can keep the other's array."""
        return np.array(self.function(batch.copy()), dtype=np.float32, order="C")

    def close(self) -> None:
        """Nothing to free."""
