"""How long each stage of a scan takes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

log = logging.getLogger("edgemuse")


class Stopwatch:
    """Seconds of each stage, logged as they end; `prefix` stands before every name."""

    def __init__(self, prefix: str = "", seconds: dict[str, float] | None = None) -> None:
        self.prefix, self.seconds = prefix, {} if seconds is None else seconds

    def within(self, prefix: str) -> Stopwatch:
        """The same watch for stages whose names begin with `prefix`."""
        return Stopwatch(prefix, self.seconds)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`; blocks of one name add up."""
        name, start = self.prefix + name, time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        log.info("%s: %.2f s", name, seconds)
