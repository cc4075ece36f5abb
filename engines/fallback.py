"""If a GPU fails, the CPU takes over once and a warning says so: the failure costs time, but no results."""

from __future__ import annotations

import logging
from collections.abc import Callable

from edgemuse.engines.errors import BackendError, EdgemuseError
from edgemuse.engines.protocol import Batch, Engine, EngineOptions, Output

log = logging.getLogger("edgemuse")

Open = Callable[[EngineOptions], Engine]
"""Opens an engine for options without `auto`."""
Spare = Callable[[str], EngineOptions]
"""Is told why the GPU failed and returns the options of the engine on the CPU that takes over."""


def open_with_fallback(open_engine: Open, first: EngineOptions, spare: Spare | None) -> Engine:
    """Open `first`. If it fails, now or while it runs, the engine that `spare` names takes over.

    Raises BackendError where the engine fails and there is no `spare`, or where the CPU fails as well.
    """
    return open_engine(first) if spare is None else FallbackEngine(open_engine, first, spare)


class FallbackEngine:
    """An engine that is replaced by one on the CPU the first time it fails."""

    def __init__(self, open_engine: Open, first: EngineOptions, spare: Spare) -> None:
        self._open = open_engine
        self._spare: Spare | None = spare
        try:
            self._use(open_engine(first))
        except BackendError as error:
            self._replace(spare, f"{first.backend}: {error}", error)

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self.backend, self.version = engine.backend, engine.version
        self.device, self.precision = engine.device, engine.precision

    def infer(self, batch: Batch) -> Output:
        """Run the network once; a tile on which the GPU fails is run again on the CPU."""
        try:
            return self._engine.infer(batch)
        except BackendError as error:
            if self._spare is None:
                raise
            self._engine.close()
            self._replace(self._spare, f"{self.backend}: {error}", error)
        return self._engine.infer(batch)

    def _replace(self, spare: Spare, reason: str, error: BackendError) -> None:
        self._spare = None
        log.warning("%s; going on with the CPU", reason)
        try:
            self._use(self._open(spare(reason)))
        except EdgemuseError as second:
            raise BackendError(f"{reason}; and the CPU cannot take over: {second}") from error

    def close(self) -> None:
        """Free the backend's memory."""
        self._engine.close()
