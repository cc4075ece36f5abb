"""A sub-folder that nobody else may write to. What is read there was put there by this user; links are not followed.

A compiled engine is as good as a program, so one that somebody else could have put there is not taken. Owner and rights
of the folder and of each file are looked at after they were opened, so neither can be exchanged in between. Windows
has other rights; there only links are refused.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "edgemuse-cache"
TAG = "CACHEDIR.TAG"
TAG_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag created by edgemuse. What is here can be made again.
# For information about cache directory tags, see:
#\thttps://bford.info/cachedir/
"""
"""By it, programs for backups know what they may leave out."""
FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | FLAGS
"""A pipe that was put in a file's place does not block."""
WRITABLE = "may be written to by others"
RELATIVE = os.open in os.supports_dir_fd
"""Whether files can be reached by the folder that is open instead of by its path."""


class Distrusted(OSError):
    """Others may write to a folder or file, or have written it; the message says how to mend that."""


class PrivateFolder:
    """The folder at `path`, open and found to be private; the files in it by their names."""

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path = path
        self._at: dict[str, Any] = {} if descriptor is None else {"dir_fd": descriptor}
        self._listed: Any = path if descriptor is None else descriptor

    def open(self, name: str) -> int:
        """A descriptor to read the file `name` from; raises Distrusted, or OSError if there is none."""
        path = self.path / name
        try:
            descriptor = os.open(self._reach(name), READ, **self._at)
        except OSError as error:
            if path.is_symlink():
                raise Distrusted(f"{path} is a link, so it is not used; remove it") from error
            raise
        why = _why_not(os.fstat(descriptor), stat.S_ISREG)
        if why or (not FLAGS & getattr(os, "O_NOFOLLOW", 0) and path.is_symlink()):
            os.close(descriptor)
            raise Distrusted(f"{path} {why or 'is a link'}, so it is not used; remove it")
        return descriptor

    def write(self, name: str, *parts: bytes) -> None:
        """Make the file `name` of `parts`, whole or not at all; raises OSError."""
        temporary = f"{name}.{secrets.token_hex(4)}.tmp"
        descriptor = os.open(self._reach(temporary), os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS, 0o600, **self._at)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
            both = {f"{end}_{key}": value for end in ("src", "dst") for key, value in self._at.items()}
            os.replace(self._reach(temporary), self._reach(name), **both)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise

    def remove(self, name: str) -> None:
        """Remove the file `name`; raises OSError."""
        os.unlink(self._reach(name), **self._at)

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Name and facts of everything in it. What goes away meanwhile is passed over."""
        with os.scandir(self._listed) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    yield entry.name, entry.stat(follow_symlinks=False)

    def _reach(self, name: str) -> str:
        return name if self._at else str(self.path / name)


@contextmanager
def private_folder(parent: Path, make: bool = False) -> Iterator[PrivateFolder]:
    """Open the private sub-folder of `parent`, made where it is missing if `make` says so.

    Raises:
        Distrusted: it is not private.
        OSError: there is none, or it cannot be made.
    """
    path = parent / NAME
    if make:
        parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    descriptor = _open(path)
    try:
        folder = PrivateFolder(path, descriptor)
        if make and not (path / TAG).exists():
            folder.write(TAG, TAG_TEXT)
        yield folder
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(path: Path) -> int | None:
    """A descriptor of the folder at `path`, or None where files cannot be reached by one; raises OSError."""
    if path.is_symlink():  # told apart here for the message; below, links are refused
        raise Distrusted(_refusal(path, "is a link"))
    if not RELATIVE:
        os.listdir(path)
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | FLAGS)
    why = _why_not(os.fstat(descriptor), stat.S_ISDIR)
    if why:
        os.close(descriptor)
        raise Distrusted(_refusal(path, why))
    return descriptor


def _refusal(path: Path, why: str) -> str:
    elsewhere = "set EDGEMUSE_CACHE_DIR to another folder"
    mend = f"run: chmod go-w {shlex.quote(str(path))}" if why == WRITABLE else elsewhere
    return f"{path} {why}, so nothing in it is used and nothing is kept there; {mend}"


def _why_not(facts: os.stat_result, is_kind: Any) -> str:
    """Why what has these facts may come from somebody else, or nothing; root may do everything anyway."""
    if not is_kind(facts.st_mode):
        return "is something else than a plain file or folder"
    if sys.platform == "win32":
        return ""
    if facts.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {facts.st_uid})"
    return WRITABLE if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""
