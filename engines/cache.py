"""The cache on this machine: compiled models, and what was measured. Its key is made of everything that they depend on.

They lie in a private sub-folder of the folder that is named (`private.py`), each under a name of 40 hexadecimal digits.
Every model is one file: 32 bytes of SHA-256 over the rest, then what the backend exported. If a file is damaged, or the
backend no longer takes it, the model is compiled again. When the models grow beyond `MAX_BYTES`, those that were not
used for longest are deleted. No other file is ever removed, and none that others could have written is used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from edgemuse.engines.private import NAME, Distrusted, PrivateFolder, private_folder

log = logging.getLogger("edgemuse")

SUFFIX = ".engine"
MODEL = re.compile(r"[0-9a-f]{40}(\.kernels)?\.engine")
PART = re.compile(r"([0-9a-f]{40}(\.[a-z]+){1,2}|CACHEDIR\.TAG)\.[0-9a-f]{8}\.tmp")
"""The names that are given here, and no others are removed."""
MAX_BYTES = 2 << 30
DAY = 24 * 60 * 60


def cache_key(facts: Mapping[str, object]) -> str:
    """A name made of `facts`: the model's hash, backend and version, device, driver, precision, shape and threads."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def place_of(folder: Path, name: str) -> Path:
    """Where the file `name` lies."""
    return folder / NAME / name


def load(folder: Path, key: str) -> memoryview | None:
    """The compiled model stored under `key`, mapped into memory, or None if there is none that is whole."""
    try:
        with private_folder(folder) as place, os.fdopen(place.open(key + SUFFIX), "rb") as file:
            data = _mapped(file.fileno())
            blob = data[32:]
            if hashlib.sha256(blob).digest() != data[:32]:
                log.warning("cached engine %s is damaged; compiling again", place.path / (key + SUFFIX))
                return None
            with contextlib.suppress(OSError, TypeError):
                os.utime(file.fileno() if os.utime in os.supports_fd else place.path / (key + SUFFIX))
            return blob
    except Distrusted as error:
        _say_once(str(error))
    except OSError:
        pass
    return None


def _mapped(descriptor: int) -> memoryview:
    try:  # a copy on write, because OpenVINO asks for memory that may be written to
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    except ValueError:  # an empty file cannot be mapped
        return memoryview(b"")


@functools.lru_cache(maxsize=100)
def _say_once(line: str) -> None:
    log.warning("%s", line)


def give_back(blob: memoryview) -> None:
    """Let the operating system take the memory of a mapped `blob` back; what is read again comes from its file."""
    advise = getattr(blob.obj, "madvise", None)
    if advise and hasattr(mmap, "MADV_DONTNEED"):
        advise(mmap.MADV_DONTNEED)


def store(folder: Path, key: str, blob: bytes) -> None:
    """Keep `blob` under `key`. A cache that cannot be written is no reason to stop: it is only logged."""
    try:
        save(folder, key, blob)
        with private_folder(folder) as place:
            _prune(place)
    except Distrusted as error:
        _say_once(str(error))
    except OSError as error:
        log.warning("compiled engine not kept: %s", error)


def save(folder: Path, key: str, blob: bytes) -> Path:
    """Write `blob` under `key` and return its path; raises OSError, and then leaves nothing."""
    return write(folder, key + SUFFIX, hashlib.sha256(blob).digest(), blob)


def write(folder: Path, name: str, *parts: bytes) -> Path:
    """Write the file `name`, whole or not at all, and return its path; raises OSError."""
    with private_folder(folder, make=True) as place:
        place.write(name, *parts)
        return place.path / name


def read(folder: Path, name: str, limit: int) -> bytes | None:
    """The first `limit` bytes of the file `name`, or None where there is none that only this user can have written."""
    try:
        with private_folder(folder) as place, os.fdopen(place.open(name), "rb") as file:
            return file.read(limit)
    except Distrusted as error:
        _say_once(str(error))
    except OSError:
        pass
    return None


def names(folder: Path, suffix: str) -> list[str]:
    """The names that end with `suffix`, sorted."""
    try:
        with private_folder(folder) as place:
            return sorted(name for name, _ in place.files() if name.endswith(suffix))
    except Distrusted as error:
        _say_once(str(error))
    except OSError:
        pass
    return []


def _prune(place: PrivateFolder) -> None:
    """Delete what is too much. Other processes may use the folder too, so files that are gone or open are skipped."""
    total = 0
    for name, facts in sorted(place.files(), key=lambda entry: entry[1].st_mtime, reverse=True):
        total += facts.st_size * bool(MODEL.fullmatch(name))
        abandoned = PART.fullmatch(name) and time.time() - facts.st_mtime > DAY  # by a process that was killed
        if abandoned or (MODEL.fullmatch(name) and total > MAX_BYTES):
            with contextlib.suppress(OSError):
                place.remove(name)
