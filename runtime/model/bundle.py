"""The bundle: one directory (or `.zip`) that holds a network and everything needed to run it. Data, never code.

`bundle.json` describes the network and lists every other file with its size and SHA-256. A file is read once,
checked against that list, and what was checked is what is used. Nothing outside the bundle can be named by it.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BundleError, one_line
from edgemuse.runtime.model.archive import MAX_MANIFEST_BYTES, Source, check_members
from edgemuse.runtime.model.checks import MAX_TEXT
from edgemuse.runtime.model.graph import inspect_graph
from edgemuse.runtime.model.manifest import MANIFEST, FileEntry, parse_manifest
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.stand_in import stand_in

MAX_HEAD_BYTES = 16 << 20
"""Of `head.npz`. DLMUSE's has 20 KB."""
BLOCK = 1 << 20
"""Bytes that are read at once where a file is only checked."""


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
        """Number of folds, K."""
        return 1 if self.fold_bias is None else len(self.fold_bias)


class Bundle:
    """An opened bundle: the checked manifest, and files that are checked as they are read."""

    def __init__(self, path: Path, folder: str = "") -> None:
        self.path = path / folder
        self._source = Source(path, folder)
        self.manifest_bytes = self._source.read(MANIFEST, MAX_MANIFEST_BYTES)
        self.manifest = parse_manifest(self.manifest_bytes, self.path)
        self.sha256 = hashlib.sha256(self.manifest_bytes).hexdigest()
        self._inspected: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[Label, ...]:
        """Labels of the classes that the network gives."""
        return self.manifest.labels

    def read(self, name: str) -> bytes:
        """Bytes of the file `name`; raises BundleError if it is missing or not what the manifest lists."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not listed in {MANIFEST}; export the bundle again")
        data = self._source.read(name, entry.bytes)
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def _check(self, name: str, sha256: str) -> None:
        """Raise BundleError unless the file `name` has the checksum `sha256` by the manifest."""
        if self.manifest.files[name].sha256 == sha256:
            return
        instead = stand_in(self.path / name)
        what = f"is {instead}" if instead else "has a wrong checksum, so the bundle is damaged or was changed"
        raise BundleError(f"{self.path}: {name} {what}; copy or export it again")

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
        """The ONNX backbone stored for `precision`, checked to be what the manifest says; raises BundleError."""
        name = self.graph_name(precision)
        graph = self.read(name)
        if name not in self._inspected:
            self._inspect(name, graph)
            self._inspected.add(name)
        return graph

    def _inspect(self, name: str, graph: bytes) -> None:
        """Raise BundleError unless edgemuse runs `graph` and it is what the manifest says of it."""
        where, network = f"{self.path}: {name}", self.manifest.network
        try:
            facts = inspect_graph(graph)
        except ValueError as error:
            reason = one_line(error)[:MAX_TEXT]
            raise BundleError(f"{where} is not a graph that edgemuse runs: {reason}; export it again") from error
        found = {"channels_out": facts.channels, "stride": facts.stride, "activation_bytes": facts.activation_bytes}
        fits = {
            "channels_out": facts.channels == network.channels_out,
            "stride": not any(says % is_ for says, is_ in zip(network.stride, facts.stride, strict=True)),
            "activation_bytes": facts.activation_bytes <= network.activation_bytes,
        }
        for what, fit in fits.items():
            if not fit:
                raise BundleError(
                    f"{where} has {what} {found[what]}, its manifest says {getattr(network, what)}; export it again"
                )

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays in the `.npz` file `name`; raises BundleError."""
        if name in self.manifest.files and self.manifest.files[name].bytes > MAX_HEAD_BYTES:
            raise BundleError(f"{self.path}: {name} is larger than the {MAX_HEAD_BYTES} bytes expected")
        data = self.read(name)
        try:
            return _arrays(data)
        except Exception as error:  # numpy's for what is no .npz, and zipfile's, share no base class but Exception
            raise BundleError(f"{self.path}: {name} cannot be read ({one_line(error)})") from error

    def head(self) -> Head | None:
        """The deferred head, or None where the graph returns logits itself; raises BundleError."""
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
        for name, entry in self.manifest.files.items():
            digest = hashlib.sha256()
            with self._source.opened(name, entry.bytes) as (stream, _):
                while block := stream.read(BLOCK):
                    digest.update(block)
            self._check(name, digest.hexdigest())

    def close(self) -> None:
        """Let go of the zip file, which Windows does not replace while it is open. Nothing can be read afterwards."""
        self._source.close()


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file, none larger than the file says of itself; raises in any way.

    numpy makes room for what the head of an array claims before it reads it, and warns of heads it has to repair.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive, warnings.catch_warnings():
        warnings.simplefilter("error")
        check_members(archive.infolist(), len(data))
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("its arrays are compressed, so their size is not known")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in archive.infolist()}


def _array(data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("its arrays are of another version than 1.0")
    shape, turned, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError("its arrays are not as large as they say, or hold objects")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if turned else "C")


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
