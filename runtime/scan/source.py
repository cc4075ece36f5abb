"""The bytes of one file: opened once, and each byte read once, in order, unzipped where it is gzip and hashed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edgemuse.engines.errors import InputError, one_line

GZIP = b"\x1f\x8b"
"""The first two bytes of every gzip member."""
BLOCK = 256 << 10
"""Bytes that are read, and at most unzipped, at once."""
MAX_TAIL_BYTES = 64 << 20
"""What may follow the part of a file that is wanted: it is read for the checksums, and could go on for ever."""


DAMAGE = (OSError, EOFError, zlib.error)
"""What reading from a file that is damaged raises."""


class Source:
    """A file that is read once, from its start to its end. Use it as a context manager.

    Whatever happens to the file meanwhile, what was read and its hash belong together: a file that replaces it is
    another one, and of one that is rewritten in place `finish` tells.

    Attributes:
        path: of the file.
        head: its first bytes as they are stored, up to `BLOCK`; empty if the file is.
        zipped: whether it is gzip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._digest = hashlib.sha256()
        stored = self._stored()
        try:
            self._opened = _state(self._file)
            self.head = next(stored, b"")
        except OSError:
            self._file.close()
            raise
        self.zipped = self.head.startswith(GZIP)
        blocks = _with(self.head, stored)
        self._blocks = unzipped(blocks) if self.zipped else blocks
        self._rest = memoryview(b"")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer where the content ends."""
        return b"".join(self._parts(count))

    def skip(self, count: int) -> int:
        """Pass over `count` bytes, fewer where the content ends; returns how many."""
        return sum(len(part) for part in self._parts(count))

    def finish(self) -> str:
        """Read the file to its end, where the checksum of gzip stands; returns the SHA-256 of all its bytes as stored.

        Raises:
            EOFError: more than `MAX_TAIL_BYTES` of content follow what was read.
            InputError: the file was changed since it was opened.
        """
        left = MAX_TAIL_BYTES - len(self._rest)
        for block in self._blocks:
            left -= len(block)
            if left < 0:
                raise EOFError(f"more than {MAX_TAIL_BYTES >> 20} MiB follow the voxels")
        if _state(self._file) != self._opened:
            raise InputError(f"{self.path}: the file was changed while it was read; segment it again once it is whole")
        return self._digest.hexdigest()

    def _parts(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes, part by part."""
        while count:
            if not self._rest:
                self._rest = memoryview(next(self._blocks, b""))
            part, self._rest = self._rest[:count], self._rest[count:]
            if not part:
                return
            count -= len(part)
            yield part

    def _stored(self) -> Iterator[bytes]:
        while block := self._file.read(BLOCK):
            self._digest.update(block)
            yield block


def unzipped(stored: Iterator[bytes]) -> Iterator[bytes]:
    """What gzip members one after the other hold, in blocks of at most `BLOCK` bytes, checked against their checksums.

    As `gzip` does, zeros between and after members are passed over, and so is anything behind them that is not a
    member; `stored` is read to its end all the same. Raises zlib.error or EOFError where a member is damaged or cut.
    """
    member: Any = None
    rest = b""
    for block in stored:
        rest += block
        while rest:
            if member is None:
                rest = rest.lstrip(b"\0")
                if len(rest) < len(GZIP):
                    break  # the next block tells
                if not rest.startswith(GZIP):
                    for _ in stored:  # it is hashed there
                        pass
                    return
                member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            content = member.decompress(rest, BLOCK)
            rest = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
            if content:
                yield content
    if member is not None:
        yield from _held_back(member)


def _held_back(member: Any) -> Iterator[bytes]:
    """What a member whose bytes are all there has not given yet."""
    while content := member.decompress(b"", BLOCK):
        yield content
    if not member.eof:
        raise EOFError("the compressed content ends too early")


def damaged(path: Path, error: BaseException) -> InputError:
    """What to raise where reading the file at `path` raised `error`."""
    return InputError(f"{path}: the file is cut off or damaged ({one_line(error)}); copy it again")


def _with(first: bytes, others: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from others


def _state(file: IO[bytes]) -> tuple[int, int]:
    """What changes when somebody writes to the file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
