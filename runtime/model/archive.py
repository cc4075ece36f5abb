"""The files of a bundle by name, in a folder or a zip file. Both are read without trust."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from edgemuse.engines.errors import BundleError

ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that are accepted. Others are not decompressed piece by piece, so a small file could fill the
memory."""
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""Time of every member, the earliest that the format knows, so that equal bundles are equal byte by byte."""
READ_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading from a folder, a damaged zip or a damaged array can raise; NotImplementedError is a RuntimeError."""


class Source:
    """Files of a bundle by name, in a directory or a zip file; those of a stage in the folder of that name."""

    def __init__(self, path: Path, folder: str = "") -> None:
        self.path, self.folder = path, folder
        self._zip = _open_zip(path) if path.is_file() else None

    def close(self) -> None:
        """Let go of the zip file."""
        if self._zip is not None:
            self._zip.close()

    def read(self, name: str, limit: int) -> bytes:
        """Bytes of the file `name`; raises BundleError if it cannot be read or is larger than `limit`."""
        where = self.path / self.folder
        try:
            if self._zip is not None:
                with self._zip.open(f"{self.folder}/{name}".lstrip("/")) as stream:
                    data = stream.read(limit + 1)
            else:
                with (where / name).open("rb") as file:
                    data = file.read(limit + 1)
        except READ_ERRORS as error:
            raise BundleError(f"{where}: {name} cannot be read, so this is no whole bundle ({error})") from error
        if len(data) > limit:
            raise BundleError(f"{where}: {name} is larger than the {limit} bytes expected")
        return data

    def holds(self, name: str) -> bool:
        """Whether there is a file called `name`."""
        return (self.path / name).is_file() if self._zip is None else name in self._zip.namelist()


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except READ_ERRORS as error:
        raise BundleError(f"{path}: neither a bundle directory nor a zip file ({error})") from error
    if any(member.compress_type not in ZIP_METHODS for member in archive.infolist()):
        raise BundleError(
            f"{path}: zipped by a method other than deflate; zip the bundle again, for example with zip -r"
        )
    return archive


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


MAX_MANIFEST_BYTES = 16 << 20
