"""The files of a bundle by name, in a folder or a zip file. Both are read without trust."""

from __future__ import annotations

import contextlib
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from edgemuse.engines.errors import BundleError, EdgemuseError, one_line
from edgemuse.runtime.scan.stand_in import stand_in

ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that are accepted. Others are not decompressed piece by piece, so a small file could fill the
memory."""
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every member, the earliest that the format knows, so that equal bundles are equal byte by byte."""
MAX_MANIFEST_BYTES = 16 << 20
MAX_MEMBERS = 1000
"""Most files in the zip file of a bundle; there are a dozen."""
MAX_RATIO = 100
"""Of unpacked to packed bytes beyond `MAX_MANIFEST_BYTES`. Weights are noise: packing them saves less than half."""
LISTING_BYTES = 1 << 10
"""Most bytes for each member in the list of a zip file's members: a name and what is known of it."""
END, END_64, LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
"""What the last parts of a zip file begin with."""
TAIL_BYTES = (1 << 16) + 100
"""The last parts lie in so many bytes at the end: a comment of 64 KiB may follow."""
HEADER_BYTES = 30
"""Bytes before the name and the content of a member."""


class Source:
    """Files of a bundle by name, in a directory or a zip file; those of a stage in the folder of that name."""

    def __init__(self, path: Path, folder: str = "") -> None:
        self.path, self.folder = path, folder
        self._zip = _open_zip(path) if path.is_file() else None

    def close(self) -> None:
        """Let go of the zip file."""
        if self._zip is not None:
            self._zip.close()

    @contextlib.contextmanager
    def opened(self, name: str, limit: int) -> Iterator[tuple[IO[bytes], int]]:
        """The file `name` and its size, which is that of a zip file's own list.

        Raises BundleError if it is larger than `limit`, or cannot be read inside the block.
        """
        where = self.path / self.folder
        try:
            with self._open(name) as stream:
                size = self._size(name)
                if size > limit:
                    raise BundleError(f"{where}: {name} is larger than the {limit} bytes expected")
                yield stream, size
        except EdgemuseError:
            raise
        except Exception as error:  # a damaged zip file makes Python's library fail in any way it likes
            instead = stand_in(where / name) if self._zip is None else ""
            reason = f"it is {instead}" if instead else one_line(error)
            raise BundleError(f"{where}: {name} cannot be read, so this is no whole bundle ({reason})") from error

    def _open(self, name: str) -> IO[bytes]:
        if self._zip is not None:
            return self._zip.open(self._member(name))
        path = self.path / self.folder / name
        if path.exists() and not path.is_file():  # of a pipe, opening it would wait for somebody to write
            raise ValueError("it is not a file")
        return path.open("rb")

    def _size(self, name: str) -> int:
        if self._zip is not None:
            return self._zip.getinfo(self._member(name)).file_size
        return (self.path / self.folder / name).stat().st_size

    def _member(self, name: str) -> str:
        return f"{self.folder}/{name}".lstrip("/")

    def read(self, name: str, limit: int) -> bytes:
        """Bytes of the file `name`; raises BundleError if it cannot be read or is larger than `limit`."""
        with self.opened(name, limit) as (stream, size):
            return stream.read(size)

    def holds(self, name: str) -> bool:
        """Whether there is a file called `name`."""
        return (self.path / name).is_file() if self._zip is None else name in self._zip.namelist()


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            check_listing(file, MAX_MEMBERS)
        archive = zipfile.ZipFile(path)
    except Exception as error:  # as above
        reason = stand_in(path) or one_line(error)
        raise BundleError(f"{path}: neither a bundle directory nor a zip file ({reason})") from error
    members, size = archive.infolist(), path.stat().st_size
    try:
        if any(member.compress_type not in ZIP_METHODS for member in members):
            raise ValueError("zipped by a method other than deflate")
        check_members(members, size)
        if sum(member.file_size for member in members) > MAX_RATIO * size + MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {MAX_RATIO} times as large when it is unpacked")
    except ValueError as error:
        archive.close()
        raise BundleError(f"{path}: {error}; zip the bundle again, for example with zip -r") from error
    return archive


def check_listing(file: IO[bytes], most: int) -> None:
    """Raise ValueError if the list of the members of a zip file claims to be larger than that of `most` members.

    Python's library reads as much of it as is claimed.
    """
    size = file.seek(0, 2)
    file.seek(max(size - TAIL_BYTES, 0))
    tail = file.read(TAIL_BYTES) + bytes(20)
    for found in re.finditer(re.escape(END), tail):
        end = found.start()
        (claimed,) = struct.unpack_from("<L", tail, end + 12)
        if end >= 76 and tail[end - 20 :].startswith(LOCATOR_64) and tail[end - 76 :].startswith(END_64):
            (claimed,) = struct.unpack_from("<Q", tail, end - 36)
        if claimed > most * LISTING_BYTES:
            raise ValueError(f"its list of members has {claimed} bytes")


def check_members(members: Sequence[zipfile.ZipInfo], size: int, most: int = MAX_MEMBERS) -> None:
    """Raise ValueError unless the members of a zip file of `size` bytes are at most `most`, each apart from the others.

    Members that share bytes would make a small file large, and of two with one name it is not clear which counts.
    """
    if len(members) > most:
        raise ValueError(f"{len(members)} files where {most} are expected at most")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two files of one name")
    ordered = sorted(members, key=lambda member: member.header_offset)
    ends = [member.header_offset + HEADER_BYTES + member.compress_size for member in ordered]
    starts = [member.header_offset for member in ordered[1:]]
    if any(end > start for end, start in zip(ends, [*starts, size], strict=True)):
        raise ValueError("files that overlap, or are cut off")


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Write the zip file `path` of a bundle. Raises OSError.

    Stored, not deflated: weights are noise, and compressing them costs seconds and saves little.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.create_system = 3  # Unix, wherever it is written
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return path
