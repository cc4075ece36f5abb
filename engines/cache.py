"""The cache of compiled models on this machine. Its key is made of everything that a compiled model depends on.

Every model is one file: 32 bytes of SHA-256 over the rest, then what the backend exported. If a file is damaged, or the
backend no longer takes it, the model is compiled again. When the folder grows beyond `MAX_BYTES`, the files that were
not used for longest are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

log = logging.getLogger("edgemuse")

SUFFIX = ".engine"
MAX_BYTES = 2 << 30
DAY = 24 * 60 * 60


def cache_key(facts: Mapping[str, object]) -> str:
    """A name made of `facts`: the model's hash, backend and version, device, driver, precision, shape and threads."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def load(folder: Path, key: str) -> memoryview | None:
    """The compiled model stored under `key`, mapped into memory, or None if there is none that is whole."""
    path = folder / (key + SUFFIX)
    try:
        with path.open("rb") as file:  # a copy on write, because OpenVINO asks for memory that may be written to
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError:
        return None
    except ValueError:  # an empty file cannot be mapped
        data = memoryview(b"")
    digest, blob = data[:32], data[32:]
    if hashlib.sha256(blob).digest() != digest:
        log.warning("cached engine %s is damaged; compiling again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return blob


def give_back(blob: memoryview) -> None:
    """Let the operating system take the memory of a mapped `blob` back; what is read again comes from its file."""
    advise = getattr(blob.obj, "madvise", None)
    if advise and hasattr(mmap, "MADV_DONTNEED"):
        advise(mmap.MADV_DONTNEED)


def store(folder: Path, key: str, blob: bytes) -> None:
    """Keep `blob` under `key`. A cache that cannot be written is no reason to stop: it is only logged."""
    try:
        save(folder, key, blob)
        _prune(folder)
    except OSError as error:
        log.warning("compiled engine not kept: %s", error)


def save(folder: Path, key: str, blob: bytes) -> Path:
    """Write `blob` under `key` and return its path; raises OSError, and then leaves nothing."""
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.sha256(blob).digest())
            file.write(blob)
        return temporary.replace(folder / (key + SUFFIX))
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _prune(folder: Path) -> None:
    """Delete what is too much. Other processes may use the folder too, so files that are gone or open are skipped."""
    total = 0
    for used, size, path in sorted(_entries(folder), reverse=True):
        total += size * (path.suffix == SUFFIX)
        abandoned = path.suffix == ".tmp" and time.time() - used > DAY  # by a process that was killed
        if abandoned or (path.suffix == SUFFIX and total > MAX_BYTES):
            with contextlib.suppress(OSError):
                path.unlink()


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts = path.stat()
            yield facts.st_mtime, facts.st_size, path
