"""Limits of memory and processor time that a container, a batch system or systemd set for this process (Linux).

`/proc/self/cgroup` names the groups that the process is in. Limits of all groups above count as well, and the tightest
wins; what is used is used by all that are in the group. Which cores a group may use, the system tells by itself.
Both versions of control groups are read (kernel.org: admin-guide/cgroup-v2, admin-guide/cgroup-v1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MEMORY = (
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of each version: the limits, what is used, and the part of that which is page cache, given back under pressure."""


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that the process may still take, or None where nothing limits it; `root` is the root of the file system."""
    found = [free for folder in _groups(root, "memory") for free in _free(folder)]
    return max(min(found), 0) if found else None


def _free(folder: Path) -> Iterator[int]:
    for limits, used, cache in MEMORY:
        for limit in (_number(folder / name) for name in limits):
            if limit is not None:
                yield limit - (_number(folder / used) or 0) + _statistic(folder / "memory.stat", cache)


def cores(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the process may take, such as 1.5, or None where nothing limits it."""
    found = [share for folder in _groups(root, "cpu") for share in _shares(folder)]
    return min(found) if found else None


def _shares(folder: Path) -> Iterator[float]:
    words = _text(folder / "cpu.max").split()
    pairs = [(words[0], words[1])] if len(words) == 2 else []
    pairs += [(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))]
    for quota, period in pairs:
        with contextlib.suppress(ValueError, ZeroDivisionError):  # "max", or no such file
            if int(quota) > 0:
                yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that limit what `controller` controls, each before those above it.

    In a container, the path may be the one outside, of which only the mounted root is there.
    """
    mount = root / "sys" / "fs" / "cgroup"
    lines = _text(root / "proc" / "self" / "cgroup").splitlines() or ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in PurePosixPath(place).parts if part not in ("/", "..")]
        for name in (controllers, controller) if controllers else ("", "unified"):
            yield from (mount.joinpath(name, *parts[:count]) for count in range(len(parts), -1, -1))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    """What stands in the file, or None: no such file, or no limit."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
