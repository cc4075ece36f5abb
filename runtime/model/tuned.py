"""What `edgemuse tune` measured on this machine: a small file for each bundle, kept beside the compiled engines."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgemuse.engines import cache
from edgemuse.engines.errors import BackendError, OutputError
from edgemuse.engines.hardware import cpu_cores, cpu_identity
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import basis

log = logging.getLogger("edgemuse")

SUFFIX = ".tuned.json"
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds that one way to run a bundle took for a scan, engine from the cache, median.

    They hold for the `version` of the backend, and for the `processor`: of a GPU, with its driver.
    """

    backend: str
    device: str
    precision: str
    profile: str
    seconds: float
    version: str
    processor: str


@dataclass(frozen=True)
class Tuned:
    """The timings of the bundle called `name` with the scan called `scan`, fastest first."""

    name: str
    scan: str
    timings: tuple[Timing, ...]

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self) | {"machine": _machine()}, indent=2) + "\n"


def _machine() -> dict[str, str | int]:
    """What timings depend on besides the bundle."""
    return {"processor": cpu_identity(), "cores": cpu_cores(), "edgemuse": version("edgemuse")}


def timed(options: EngineOptions, profile: str, seconds: float) -> Timing:
    """That definite `options` took so long here, now."""
    here = basis(options)
    return Timing(
        options.backend, options.device, options.precision, profile, seconds, here["version"], here["processor"]
    )


def outdated(timing: Timing) -> str:
    """What has changed here since it was measured, or nothing."""
    try:
        now = basis(EngineOptions(timing.backend, timing.precision, timing.device))
    except BackendError as error:
        return str(error)
    if timing.version != now["version"]:
        return f"it was {timing.backend} {timing.version}, now it is {now['version']}"
    return "" if timing.processor == now["processor"] else f"it was on {timing.processor}"


def tuned_path(folder: Path, sha256: str) -> Path:
    """Where the timings of the bundle with this hash are kept for this machine, if the cache is in `folder`."""
    return cache.place_of(folder, cache.cache_key({"bundle": sha256, **_machine()}) + SUFFIX)


def keep(folder: Path, sha256: str, tuned: Tuned) -> Path:
    """Write what was measured of the bundle with this hash; returns the file. Raises OutputError."""
    try:
        return cache.write(folder, tuned_path(folder, sha256).name, tuned.to_json().encode())
    except OSError as error:
        raise OutputError(f"what was measured cannot be kept: {error}") from error


def recall(folder: Path | None, sha256: str) -> Tuned | None:
    """What was measured of a bundle here, or None; a file that is damaged is passed over with a warning."""
    if folder is None:
        return None
    return _read(folder, tuned_path(folder, sha256).name)


def recall_all(folder: Path) -> Iterator[Tuned]:
    """All that was measured on this machine."""
    for name in cache.names(folder, SUFFIX):
        found = _read(folder, name, _machine())
        if found is not None:
            yield found


def _read(folder: Path, name: str, machine: dict[str, str | int] | None = None) -> Tuned | None:
    stored = cache.read(folder, name, MAX_BYTES)
    if stored is None:
        return None
    try:
        content = json.loads(stored)
        if machine not in (None, content["machine"]):
            return None
        timings = tuple(_timing(row) for row in content["timings"])
        return Tuned(_text(content["name"]), _text(content["scan"]), timings)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        path = cache.place_of(folder, name)
        log.warning("%s is not used (%s); run 'edgemuse tune' again", path, type(error).__name__)
        return None


def _timing(row: Any) -> Timing:
    timing = Timing(**{field.name: row[field.name] for field in fields(Timing)})
    if not isinstance(timing.seconds, float) or not (math.isfinite(timing.seconds) and timing.seconds > 0):
        raise ValueError("seconds")
    for field in fields(Timing):
        if field.name != "seconds":
            _text(row[field.name])
    return timing


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("text")
    return value
