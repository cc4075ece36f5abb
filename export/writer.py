"""Writing a bundle: whole or not at all, checked before it appears, never over something that is there."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from edgemuse.engines.errors import OutputError
from edgemuse.runtime.bundle import CASCADE, MANIFEST, Bundle, CascadeManifest, Head, Manifest, open_model, write_zip

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
    np.savez(stream, weight=head.weight, bias=head.bias)
    return stream.getvalue()


def check_replaceable(bundle: Bundle) -> None:
    """Raise OutputError unless `bundle` can be replaced where it lies without losing anything else."""
    path = bundle.path
    if path.is_symlink():
        raise OutputError(f"{path}: a link, which is not replaced; name the bundle itself, or another output")
    if not os.access(path.resolve().parent, os.W_OK):
        raise OutputError(f"{path}: its folder cannot be written to; choose another output")
    listed = {MANIFEST, *bundle.manifest.files}
    others = sorted(file.name for file in path.iterdir() if file.name not in listed) if path.is_dir() else []
    if others:
        raise OutputError(f"{path}: replacing it would delete {', '.join(others)}; move that, or choose another output")


def write_bundle(output: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle, a zip file if `output` ends with `.zip`, else a directory; raises OutputError or BundleError."""
    return _write_whole(output, _contents(manifest, files))


def write_cascade(output: Path, manifest: CascadeManifest, mask: Bundle, regions: Bundle) -> Path:
    """Write a cascade of two bundles, a zip file or a directory as above; `manifest` names their SHA-256."""
    files = {CASCADE: manifest.to_json().encode()}
    for role, bundle in (("mask", mask), ("regions", regions)):
        files |= {f"{role}/{name}": data for name, data in bundle.contents()}
    return _write_whole(output, files)


def _contents(manifest: Manifest, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {MANIFEST: manifest.to_json().encode(), **files}


def _write_whole(output: Path, whole: Mapping[str, bytes]) -> Path:
    check_output(output)
    with _staged(output, whole, zipped=output.suffix.lower() == ".zip") as staged:
        check_output(output)
        staged.rename(output)
    return output


def replace_bundle(bundle: Bundle, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle in place of `bundle`, which stays as it is unless all succeeds; raises OutputError."""
    check_replaceable(bundle)
    path = bundle.path
    zipped = path.is_file()
    bundle.close()
    with _staged(path, _contents(manifest, files), zipped) as staged:
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
    """A bundle that was written and checked, in a folder beside `output` that goes away afterwards."""
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
