"""Writes a bundle whole or not at all, checked before it appears; nothing is overwritten unless it was asked for."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgemuse.engines.errors import OutputError
from edgemuse.engines.files import place_new, sync
from edgemuse.runtime.model.archive import write_zip
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, Head
from edgemuse.runtime.model.cascade import CASCADE, Cascade, CascadeManifest, open_model
from edgemuse.runtime.model.manifest import MANIFEST, Manifest

HEAD = "head.npz"


def check_output(output: Path) -> None:
    """Raise OutputError unless a bundle can be written to `output`."""
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output}: already exists; remove it or choose another name")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; make it first")
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"{output.parent}: this folder cannot be written to; choose another")


def head_bytes(head: Head) -> bytes:
    """The content of `head.npz`."""
    stream = io.BytesIO()
    arrays = {name: array for name, array in vars(head).items() if array is not None}
    np.savez(stream, **arrays)
    return stream.getvalue()


def check_replaceable(model: Bundle | Cascade) -> None:
    """Raise OutputError unless `model` can be replaced where it lies without losing anything else."""
    path = model.path
    if path.resolve() == BUILT_IN.resolve():
        raise OutputError(f"{model.name}: comes with edgemuse and is not replaced; choose another output with --output")
    if path.is_symlink():
        raise OutputError(f"{path}: a link, which is not replaced; name the bundle itself, or another output")
    if not os.access(path.resolve().parent, os.W_OK):
        raise OutputError(f"{path}: its folder cannot be written to; choose another output")
    if others := sorted(_names(path) - _listed(model)):
        raise OutputError(f"{path}: replacing it would delete {', '.join(others)}; move that, or choose another output")


def _names(path: Path) -> set[str]:
    """Every file and folder inside a directory or a zip file."""
    if path.is_dir():
        return {inside.relative_to(path).as_posix() for inside in path.rglob("*")}
    with zipfile.ZipFile(path) as archive:
        return {name.rstrip("/") for name in archive.namelist()}


def _listed(model: Bundle | Cascade) -> set[str]:
    """What `_names` finds where there is nothing but `model`."""
    if isinstance(model, Bundle):
        return {MANIFEST, *model.manifest.files}
    return {CASCADE, *model.bundles} | {
        f"{role}/{name}" for role, bundle in model.bundles.items() for name in _listed(bundle)
    }


def write_bundle(output: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle, a zip file if `output` ends with `.zip`, else a directory; raises OutputError or BundleError."""
    return _write_whole(output, _contents(manifest, files))


def write_cascade(output: Path, manifest: CascadeManifest, mask: Bundle, regions: Bundle) -> Path:
    """Write a cascade of two bundles, a zip file or a directory as above; `manifest` names their SHA-256."""
    return _write_whole(output, _cascade_contents(manifest, mask, regions))


def _cascade_contents(manifest: CascadeManifest, mask: Bundle, regions: Bundle) -> dict[str, bytes]:
    files = {CASCADE: manifest.to_json().encode()}
    for role, bundle in (("mask", mask), ("regions", regions)):
        files |= {f"{role}/{name}": data for name, data in bundle.contents()}
    return files


def _contents(manifest: Manifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {MANIFEST: manifest.to_json().encode(), **files}


def _write_whole(output: Path, whole: Mapping[str, bytes]) -> Path:
    check_output(output)
    with _staged(output, whole, zipped=output.suffix.lower() == ".zip") as staged:
        check_output(output)
        if staged.is_file():
            sync(staged)
            place_new(staged, output)
        else:
            staged.rename(output)  # which replaces no folder but an empty one
        sync(output.parent)
    return output


def replace_bundle(bundle: Bundle, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle in place of `bundle`, which stays as it is unless all succeeds; raises OutputError."""
    return _replace_whole(bundle, _contents(manifest, files))


def replace_cascade(cascade: Cascade, manifest: CascadeManifest, mask: Bundle, regions: Bundle) -> Path:
    """Write a cascade in place of `cascade`, as `replace_bundle` does; `mask` and `regions` lie elsewhere."""
    return _replace_whole(cascade, _cascade_contents(manifest, mask, regions))


def _replace_whole(model: Bundle | Cascade, whole: Mapping[str, bytes]) -> Path:
    check_replaceable(model)
    path = model.path
    zipped = path.is_file()
    model.close()
    with _staged(path, whole, zipped) as staged:
        if zipped:
            os.replace(staged, path)
            return path
        old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
        path.rename(old)
        try:
            staged.rename(path)
        except OSError:
            old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)
    return path


@contextlib.contextmanager
def _staged(output: Path, whole: Mapping[str, bytes], zipped: bool) -> Iterator[Path]:
    """Write and check a bundle in a folder beside `output`; the folder is deleted afterwards."""
    stage = output.parent / f".{output.name}.tmp-{secrets.token_hex(4)}"
    try:
        stage.mkdir()
        bundle = (_write_zip if zipped else _write_folder)(stage / output.name, whole)
        written = open_model(bundle)
        written.verify()
        written.close()
        yield bundle
    except OSError as error:
        raise OutputError(f"{output}: the bundle cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    return path


def _write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    return write_zip(path, files.items())
