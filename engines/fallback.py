"""A GPU that fails costs time and no results: the CPU takes over, once, and it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import Batch, Engine, EngineOptions
from edgemuse.engines.registry import choose

log = logging.getLogger("edgemuse")

Open = Callable[[EngineOptions], Engine]
"""Opens an engine for definite options."""


def open_with_fallback(open_engine: Open, options: EngineOptions) -> Engine:
    """Open what `options` name, or choose; what was chosen, not named, and is no CPU, is replaced by one if it fails.

    Raises BackendError where the engine was named, or where the CPU fails as well.
    """
    chosen = choose(options)[1]
    if chosen.device == "CPU" or (options.backend, options.device) != ("auto", "auto"):
        return open_engine(chosen)
    return FallbackEngine(open_engine, chosen, replace(options, device="CPU"))


class FallbackEngine:
    """An engine that is replaced by one on the CPU the first time it fails. `fallback` says why, or is empty."""

    def __init__(self, open_engine: Open, first: EngineOptions, spare: EngineOptions) -> None:
        self._open, self._spare = open_engine, spare
        self.fallback = ""
        try:
            self._use(open_engine(first))
        except BackendError as error:
            self._replace(f"{first.backend}: {error}", error)

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self.backend, self.version = engine.backend, engine.version
        self.device, self.precision = engine.device, engine.precision

    def infer(self, batch: Batch) -> Batch:
        """Run the network once; a tile on which the GPU fails is run again on the CPU."""
        try:
            return self._engine.infer(batch)
        except BackendError as error:
            if self.fallback:
                raise
            reason = f"{self._engine.backend}: {error}"
            self._engine.close()
            self._replace(reason, error)
        return self._engine.infer(batch)

    def _replace(self, reason: str, error: BackendError) -> None:
        self.fallback = reason
        log.warning("%s; going on with the CPU", reason)
        try:
            self._use(self._open(choose(self._spare)[1]))
        except BackendError as second:
            raise BackendError(f"{reason}; and the CPU cannot take over: {second}") from error

    def close(self) -> None:
        """Free the backend's memory."""
        self._engine.close()
