"""The bundle: one directory (or `.zip`) that holds a network and everything needed to run it. Data, never code.

`bundle.json` describes the network and lists every other file with its size and SHA-256. A file is read once,
checked against that list, and what was checked is what is used. Nothing outside the bundle can be named by it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BundleError
from edgemuse.runtime.model.archive import MAX_MANIFEST_BYTES, READ_ERRORS, Source
from edgemuse.runtime.model.manifest import MANIFEST, FileEntry, parse_manifest
from edgemuse.runtime.regions.labels import Label

EXTERNAL_DATA = b"location"
"""ONNX names a file outside the graph under this key. Eight such bytes do not turn up in weights by chance."""


@dataclass(frozen=True)
class Head:
    """The last 1x1x1 convolution: `weight` (C, F) and `bias` (C,), float32.

    Of an ensemble the weights are side by side, divided by the number of folds K, and `bias` is the mean of `fold_bias`
    (K, C); of one fold that is None.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    fold_bias: NDArray[np.float32] | None = None

    @property
    def folds(self) -> int:
        """K."""
        return 1 if self.fold_bias is None else len(self.fold_bias)


class Bundle:
    """An opened bundle: the checked manifest, and files that are checked as they are read."""

    def __init__(self, path: Path, folder: str = "") -> None:
        self.path = path / folder
        self._source = Source(path, folder)
        self.manifest_bytes = self._source.read(MANIFEST, MAX_MANIFEST_BYTES)
        self.manifest = parse_manifest(self.manifest_bytes, self.path)
        self.sha256 = hashlib.sha256(self.manifest_bytes).hexdigest()

    @property
    def name(self) -> str:
        """Of the model."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[Label, ...]:
        """Of the classes it gives."""
        return self.manifest.labels

    def read(self, name: str) -> bytes:
        """Bytes of the file `name`; raises BundleError if it is missing or not what the manifest lists."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not listed in {MANIFEST}; export the bundle again")
        data = self._source.read(name, entry.bytes)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.path}: {name} has a wrong checksum, so the bundle is damaged or was changed; "
                "copy or export it again"
            )
        return data

    def graph_name(self, precision: str) -> str:
        """The file that holds the backbone for `precision`; raises BundleError if there is none."""
        name = self.manifest.graphs.get(precision)
        if name is None:
            stored = ", ".join(self.manifest.graphs)
            raise BundleError(
                f"{self.path}: no {precision} graph is stored, only {stored}; 'edgemuse calibrate' adds others"
            )
        return name

    def graph(self, precision: str) -> bytes:
        """The ONNX backbone stored for `precision`."""
        name = self.graph_name(precision)
        graph = self.read(name)
        if EXTERNAL_DATA in graph:
            raise BundleError(f"{self.path}: {name} keeps weights in a file outside the bundle; export it again")
        return graph

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays in the `.npz` file `name`; raises BundleError."""
        try:
            return _arrays(self.read(name))
        except (*READ_ERRORS, TypeError, AttributeError, MemoryError) as error:  # numpy's for what is no .npz
            raise BundleError(f"{self.path}: {name} cannot be read ({error})") from error

    def head(self) -> Head | None:
        """The deferred head, or None where the graph returns logits itself."""
        network = self.manifest.network
        if not network.deferred_head:
            return None
        arrays = self.arrays("head.npz")
        try:
            head = Head(arrays["weight"], arrays["bias"], arrays.get("fold_bias"))
        except KeyError as error:
            raise BundleError(f"{self.path}: head.npz cannot be read ({error})") from error
        parts = [head.weight, head.bias, *([] if head.fold_bias is None else [head.fold_bias])]
        wanted = [(network.classes, network.channels_out), (network.classes,), (*parts[-1].shape[:1], network.classes)]
        found = [part.shape for part in parts]
        if found != wanted[: len(parts)] or any(part.dtype != np.float32 for part in parts):
            raise BundleError(f"{self.path}: head.npz holds float32 {wanted[:2]} by its manifest, found {found}")
        if not head.folds or network.channels_out % head.folds:
            raise BundleError(f"{self.path}: head.npz has {head.folds} folds of {network.channels_out} features")
        if not all(np.isfinite(part).all() for part in parts):
            raise BundleError(f"{self.path}: head.npz holds NaN or infinity; export the bundle again")
        return head

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file, `bundle.json` first, each checked; raises BundleError at one that differs."""
        yield MANIFEST, self.manifest_bytes
        for name in self.manifest.files:
            yield name, self.read(name)

    def verify(self) -> None:
        """Read every file once and check it; raises BundleError at the first that differs."""
        for _ in self.contents():
            pass

    def close(self) -> None:
        """Let go of the zip file, which Windows does not replace while it is open. Nothing can be read afterwards."""
        self._source.close()


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file; raises one of numpy's many errors."""
    stream = io.BytesIO(data)
    if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(stream).infolist()):
        raise ValueError("its arrays are compressed, so their size is not known")
    with np.load(stream, allow_pickle=False) as arrays:
        return dict(arrays)


def open_bundle(path: str | Path) -> Bundle:
    """Open the bundle at `path`, a directory or a zip file; raises BundleError."""
    path = Path(path)
    if not path.exists():
        raise BundleError(f"{path}: no such bundle; make one with 'edgemuse export MODEL_FOLDER -o {path}'")
    if path.is_dir() and not (path / MANIFEST).is_file():
        hint = (
            " It looks like an nnU-Net model folder: run 'edgemuse export' on it first."
            * (path / "plans.json").exists()
        )
        raise BundleError(f"{path}: there is no {MANIFEST} in this folder, so it is not a bundle.{hint}")
    return Bundle(path)


def file_entry(data: bytes) -> FileEntry:
    """The manifest's entry for a file with this content."""
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())
