"""Writing results: a scan's files appear by rename once all of them are written, or all stay as they were."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import platform
import secrets
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image

from edgemuse.engines.errors import OutputError
from edgemuse.engines.files import OLD, place_new, sync
from edgemuse.runtime.scan.nifti import Scan, file_sha256
from edgemuse.runtime.scan.types import Labels

DLMUSE_CSV = "DLMUSE_Volumes.csv"
"""Written for DLMUSE's labels alone."""
PROVENANCE = "provenance.json"
NAMES = ("dseg.nii.gz", "dseg.tsv", "volumes.tsv", DLMUSE_CSV, PROVENANCE, "qc.png")
MAX_RECORD_BYTES = 1 << 20
"""A provenance has some kilobytes."""
COMPRESSION = 4
"""gzip level: label maps shrink hardly more at higher ones."""
IMAGES: dict[type, Any] = {Nifti1Header: Nifti1Image, Nifti2Header: Nifti2Image}
FORMS = {
    "qform_code": ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    "sform_code": ("srow_x", "srow_y", "srow_z"),
}
"""Fields of a NIfTI header that say where the grid lies, by the field that says whether they hold."""
SPACE_BITS, UNITS_OF_SPACE = 7, (1, 2, 3)
"""Of NIfTI's `xyzt_units`: metre, millimetre, micrometre."""


def output_paths(folder: Path, stem: str) -> dict[str, Path]:
    """Where the results of the scan called `stem` go, by their name in `NAMES`."""
    return {name: folder / f"{stem}_{name}" for name in NAMES}


def prepare_folder(folder: Path) -> None:
    """Make `folder`; raises OutputError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there ({error.strerror})") from error


def present(paths: Mapping[str, Path]) -> list[str]:
    """The names of `paths` that exist; raises OutputError where a folder stands in the way."""
    found = []
    for name, path in paths.items():
        try:
            kind = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        if stat.S_ISDIR(kind):
            raise OutputError(f"{path} is a folder; choose another folder for the results")
        found.append(name)
    return found


def free(paths: Mapping[str, Path]) -> frozenset[Path]:
    """Those of `paths` where nothing is; raises OutputError where a folder stands in the way."""
    found = present(paths)
    return frozenset(path for name, path in paths.items() if name not in found)


def not_ours(paths: Mapping[str, Path]) -> Path | None:
    """The first of `paths` that is there and is not as the provenance among them says; None: edgemuse wrote them all.

    Raises OutputError where a folder stands in the way.
    """
    listed = read_record(paths[PROVENANCE]).get("files")
    hashes = listed if isinstance(listed, dict) else None
    return next((paths[name] for name in present(paths) if not _is_ours(name, paths[name], hashes)), None)


def _is_ours(name: str, path: Path, hashes: Mapping[str, object] | None) -> bool:
    if hashes is None or path.is_symlink():
        return False
    try:
        return name == PROVENANCE or file_sha256(path) == hashes.get(name)
    except OSError:
        return False


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`, such as a provenance; empty if there is none."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def nifti_bytes(indices: Labels, scan: Scan) -> bytes:
    """`indices` (i, j, k) as a gzipped NIfTI on the scan's grid, the same bytes for the same labels.

    Of the scan's header only the grid is taken over: names, remarks and times are nobody's business.
    """
    header = type(scan.header)(endianness="<")
    _copy_grid(scan.header, header)
    header.set_data_dtype(indices.dtype)
    header["descrip"] = b"edgemuse"
    header.set_intent("label")
    image = IMAGES[type(header)](indices, None, header)
    return gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)


def _copy_grid(scan: Any, header: Any) -> None:
    """Voxel sizes, their unit, and the forms that are set."""
    header["pixdim"][:4] = scan["pixdim"][:4]
    unit = int(scan["xyzt_units"]) & SPACE_BITS
    header["xyzt_units"] = unit if unit in UNITS_OF_SPACE else 0
    for code, fields in FORMS.items():
        for field in (code, *fields) if scan[code] > 0 else ():
            header[field] = scan[field]


class Appeared(OutputError):
    """Somebody put a file where nothing was when the work began."""


def write_files(contents: Mapping[Path, bytes], gone: Iterable[Path] = (), new: Collection[Path] = ()) -> None:
    """Write every file beside its final name, then rename them all; remove those that are `gone`.

    Where nothing was, at `new` ones of these paths, nothing is replaced or removed.

    If one fails, what was there before is put back and OutputError is raised.

    Raises:
        Appeared: there is something at a path of `new`.
        OutputError: a file cannot be written.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            temporaries[path] = _beside(path)
            with _reported(path):
                _write(temporaries[path], data)
        _replace(temporaries, gone, new)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write one file so that it appears whole, whoever else does the same; raises OutputError."""
    temporary = _beside(path)
    try:
        with _reported(path):
            _write(temporary, data)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _replace(temporaries: Mapping[Path, Path], gone: Iterable[Path], new: Collection[Path]) -> None:
    kept: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for path in (*(path for path in gone if path not in new), *temporaries):
            with _reported(path):
                if path in new:
                    place_new(temporaries[path], path)
                    placed.append(path)
                    continue
                if os.path.lexists(path):
                    kept[path] = _beside(path)
                    with contextlib.suppress(FileNotFoundError):  # another process was quicker
                        os.replace(path, kept[path])
                if path in temporaries:
                    os.replace(temporaries[path], path)
                    placed.append(path)
    except OutputError:
        for path in placed:
            path.unlink()
        for path, old in kept.items():
            if os.path.lexists(old):
                os.replace(old, path)
        raise
    for folder in {path.parent for path in (*placed, *kept)}:
        sync(folder)
    for old in kept.values():
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise Appeared(
            f"{path} was put there meanwhile; nothing was changed; move it away, or use --overwrite"
        ) from error
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error


def discard_parts(paths: Collection[Path]) -> None:
    """Remove what a killed process left of files that it was writing to `paths`; no other here may be writing them.

    What another machine left goes when it is old, because locks do not reach every machine.
    """
    marks = {_mark(path) for path in paths}
    for folder in {path.parent for path in paths}:
        for part in folder.glob(".*.part"):
            mark, machine, _ = [*part.name[1:].split("-"), "", ""][:3]
            with contextlib.suppress(OSError):
                if mark in marks and (machine == _machine() or time.time() - part.stat().st_mtime > OLD):
                    part.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{_mark(path)}-{_machine()}-{secrets.token_hex(4)}.part")


@cache
def _machine() -> str:
    return hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]


def _mark(path: Path) -> str:
    """Stands for the file's name where the whole name could be too long."""
    return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
