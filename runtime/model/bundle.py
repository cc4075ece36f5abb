"""The bundle: one directory (or `.zip`) that holds a network and everything needed to run it. Data, never code.

`bundle.json` describes the network and lists every other file with its size and SHA-256. A file is read once,
checked against that list, and what was checked is what is used. Nothing outside the bundle can be named by it.
A cascade is a directory (or `.zip`) of two bundles, `mask` and `regions`, and `cascade.json`: how they follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BundleError
from edgemuse.runtime.regions.labels import COLOR, Label
from edgemuse.runtime.scan.types import Shape, Spacing

MANIFEST = "bundle.json"
CASCADE = "cascade.json"
FORMAT = "edgemuse-bundle"
FORMAT_VERSION = 1
CASCADE_FORMAT = "edgemuse-cascade"
CASCADE_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILE_BYTES = 8 << 30
EXTERNAL_DATA = b"location"
"""ONNX names a file outside the graph under this key. Eight such bytes do not turn up in weights by chance."""
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Others cannot be decompressed piece by piece, so a small file could fill the memory."""
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest that the format knows: equal bundles shall be equal byte by byte."""
READ_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What reading from a folder, a damaged zip or a damaged array can raise; NotImplementedError is a RuntimeError."""
SPACING_RANGE = (1e-3, 1e3)
"""mm"""
T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
STORED_PRECISIONS = ("fp32", "fp16", "int8")
"""Those with a graph of their own. For bf16 a backend is told to run the fp32 graph so."""

NormalizationScheme = Literal["zscore", "ct", "rescale01", "rgb01", "none"]


@dataclass(frozen=True)
class Normalization:
    """One of nnU-Net's intensity normalisations.

    `use_mask` limits z-scores to non-zero voxels; the other numbers are the training intensities that `ct` needs.
    """

    scheme: NormalizationScheme
    use_mask: bool = False
    mean: float = 0.0
    std: float = 1.0
    lower: float = 0.0
    upper: float = 0.0


@dataclass(frozen=True)
class Resampling:
    """Spline orders and the treatment of anisotropic spacing, as nnU-Net's plans name them.

    `order_z` applies along the coarse axis when it is resampled apart; `force_separate_z` None lets the spacing decide.
    """

    order: int
    order_z: int = 0
    force_separate_z: bool | None = None


@dataclass(frozen=True)
class Network:
    """How to feed one network and how to read what it returns.

    Attributes:
        orientation: axis codes of the (i, j, k) grid that the network expects, such as `LPS`; None: as stored.
        transpose: the plan's permutation from (k, j, i) to the network's (d, h, w).
        spacing: mm along d, h, w.
        patch: tile size along d, h, w.
        stride: d, h, w must be multiples of this.
        mirror_axes: axes of (d, h, w) that may be mirrored at inference.
        normalization: of the intensities inside the non-zero box.
        image_resampling: from the scan's spacing to the network's.
        output_resampling: from the network's spacing back to the scan's.
        channels_out: channels that the graph returns: features if the head is deferred, else logits.
        classes: number of classes.
        deferred_head: True if `head.npz` turns features into logits.
        activation_bytes: peak bytes of live float32 activations per voxel of a tile.
    """

    orientation: str | None
    transpose: Shape
    spacing: Spacing
    patch: Shape
    stride: Shape
    mirror_axes: tuple[int, ...]
    normalization: Normalization
    image_resampling: Resampling
    output_resampling: Resampling
    channels_out: int
    classes: int
    deferred_head: bool
    activation_bytes: int


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class GateRow:
    """How one backend, precision and profile compared with the fp32 `reference`, and why it failed, if it did.

    Attributes:
        backend: name in the registry.
        version: of the backend.
        device: of the backend.
        precision: of the computation.
        profile: name of the profile.
        processor: on which it was measured.
        scans: how many.
        seconds: that the network took a scan, median.
        agreement: mean Dice with the reference; None if nothing could be measured.
        dice: mean Dice against the truth; None where no truth is known.
        reference_dice: the same of the reference.
        drop: by how much the worst structure's Dice against the truth is below the reference's.
        worst: that structure's name.
        failures: a phrase each; empty if it passed.
    """

    backend: str
    version: str
    device: str
    precision: str
    profile: str
    processor: str
    scans: int
    seconds: float | None = None
    agreement: float | None = None
    dice: float | None = None
    reference_dice: float | None = None
    drop: float | None = None
    worst: str | None = None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether `auto` may choose it."""
        return not self.failures


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says. `source`, `verification` and `calibration` are records for people, not interpreted."""

    name: str
    license: str | None
    network: Network
    labels: tuple[Label, ...]
    graphs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    source: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Any] = field(default_factory=dict)
    gate: tuple[GateRow, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps(head | asdict(self), indent=2, allow_nan=False) + "\n"


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

    def head(self) -> Head | None:
        """The deferred head, or None where the graph returns logits itself."""
        network = self.manifest.network
        if not network.deferred_head:
            return None
        try:
            data = io.BytesIO(self.read("head.npz"))
            if any(member.compress_type != zipfile.ZIP_STORED for member in zipfile.ZipFile(data).infolist()):
                raise ValueError("its arrays are compressed, so their size is not known")
            with np.load(data, allow_pickle=False) as arrays:
                head = Head(arrays["weight"], arrays["bias"], arrays.get("fold_bias"))
        except (*READ_ERRORS, TypeError, AttributeError, MemoryError) as error:  # numpy's for what is no .npz
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


@dataclass(frozen=True)
class CascadeManifest:
    """What `cascade.json` says: how two bundles, in the folders `mask` and `regions`, are run one after the other.

    Attributes:
        name: of the whole.
        license: of the weights.
        orientation: axis codes of the grid on which mask and crop are made.
        stages: SHA-256 of the manifest of each bundle.
        padding_percent: of the mask's extent, added on each side of the crop.
        keep_largest: forget parts of the mask apart from its largest component.
        plausible_mm3: least and largest volume of the mask; outside it the result is flagged. None: any.
        fill: number in the protocol, name and colour of what is inside the mask and gets no label; None: it stays
            background.
    """

    name: str
    license: str | None
    orientation: str
    stages: Mapping[str, str]
    padding_percent: int
    keep_largest: bool
    plausible_mm3: tuple[float, float] | None
    fill: Label | None

    def to_json(self) -> str:
        """The text of `cascade.json`."""
        head = {"format": CASCADE_FORMAT, "format_version": CASCADE_VERSION}
        return json.dumps(head | asdict(self), indent=2, allow_nan=False) + "\n"


class Cascade:
    """Two bundles that are run one after the other: the first finds the mask, the second labels what is inside."""

    STAGES = ("mask", "regions")

    def __init__(self, path: Path) -> None:
        self.path = path
        with contextlib.closing(Source(path)) as source:
            self.manifest_bytes = source.read(CASCADE, MAX_MANIFEST_BYTES)
        self.sha256 = hashlib.sha256(self.manifest_bytes).hexdigest()
        self.manifest = parse_cascade(self.manifest_bytes, path)
        self.mask, self.regions = (Bundle(path, role) for role in self.STAGES)
        for role, bundle in self.bundles.items():
            if bundle.sha256 != self.manifest.stages[role]:
                raise BundleError(f"{bundle.path}: another bundle than {CASCADE} lists; make the cascade again")
        fill = self.manifest.fill
        if fill is not None and fill.number != len(self.regions.labels):
            raise BundleError(f"{path}: the class filled in must have the number {len(self.regions.labels)}")

    @property
    def bundles(self) -> dict[str, Bundle]:
        """Both, by their role, in the order in which they run."""
        return dict(zip(self.STAGES, (self.mask, self.regions), strict=True))

    @property
    def name(self) -> str:
        """Of the model."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[Label, ...]:
        """Of the classes it gives."""
        fill = self.manifest.fill
        return (*self.regions.labels, *([] if fill is None else [fill]))

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """As of a bundle: `cascade.json` first, then the files of each stage, the stage's folder in the name."""
        yield CASCADE, self.manifest_bytes
        for role, bundle in self.bundles.items():
            yield from ((f"{role}/{name}", data) for name, data in bundle.contents())

    def verify(self) -> None:
        """Read every file once and check it; raises BundleError at the first that differs."""
        for _ in self.contents():
            pass

    def close(self) -> None:
        """Let go of the zip file. Nothing can be read afterwards."""
        self.mask.close()
        self.regions.close()


def open_model(path: str | Path) -> Bundle | Cascade:
    """Open the bundle or the cascade of bundles at `path`, a directory or a zip file; raises BundleError."""
    path = Path(path)
    if not path.exists():
        return open_bundle(path)
    with contextlib.closing(Source(path)) as source:
        joined = source.holds(CASCADE)
    return Cascade(path) if joined else open_bundle(path)


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


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Check the text of `bundle.json` field by field; raises BundleError, naming `path`, at the first that is off."""
    data = _document(raw, path, MANIFEST, FORMAT, FORMAT_VERSION)
    with _named(path, MANIFEST):
        return _manifest(data)


def parse_cascade(raw: bytes, path: Path) -> CascadeManifest:
    """Check the text of `cascade.json` field by field; raises BundleError, naming `path`, at the first that is off."""
    data = _document(raw, path, CASCADE, CASCADE_FORMAT, CASCADE_VERSION)
    with _named(path, CASCADE):
        return _cascade(data)


def _document(raw: bytes, path: Path, name: str, format: str, known: int) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: {name} is not valid JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != format:
        raise BundleError(f"{path}: {name} does not describe an edgemuse bundle")
    version = data.get("format_version")
    if version != known:
        raise BundleError(
            f"{path}: bundle format {version!r}, this edgemuse reads {known}; upgrade edgemuse or export again"
        )
    return data


@contextlib.contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """What a malformed document raises, as BundleError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: {name} is not valid: {reason}") from error


def _cascade(data: dict[str, Any]) -> CascadeManifest:
    if not is_orientation(data["orientation"]):
        raise ValueError(f"orientation {data['orientation']!r} is not three axis codes such as LPS")
    plausible, fill = data["plausible_mm3"], data["fill"]
    if plausible is not None:
        low, high = (_float(value) for value in plausible)
        plausible = (low, high)
    return CascadeManifest(
        _text(data["name"]),
        None if data["license"] is None else _text(data["license"]),
        data["orientation"],
        {role: _sha256(data["stages"][role]) for role in Cascade.STAGES},
        _int(data["padding_percent"], 0, 100),
        _bool(data["keep_largest"]),
        plausible,
        None if fill is None else _label(fill),
    )


def _manifest(data: dict[str, Any]) -> Manifest:
    network = _network(data["network"])
    files = {_file_name(name): _file_entry(entry) for name, entry in data["files"].items()}
    graphs = {
        _one_of(precision, STORED_PRECISIONS, "precision"): _file_name(name)
        for precision, name in data["graphs"].items()
    }
    labels = tuple(_label(row) for row in data["labels"])
    if [label.number for label in labels] != list(range(network.classes)):
        raise ValueError(f"labels must name classes 0 to {network.classes - 1} in order")
    needed = set(graphs.values()) | ({"head.npz"} if network.deferred_head else set())
    if missing := sorted(needed - files.keys()):
        raise ValueError(f"{', '.join(missing)} not listed under files")
    if "fp32" not in graphs:
        raise ValueError("no fp32 graph is named")
    return Manifest(
        _text(data["name"]),
        None if data["license"] is None else _text(data["license"]),
        network,
        labels,
        graphs,
        files,
        dict(data.get("source", {})),
        dict(data.get("verification", {})),
        tuple(_gate_row(row) for row in _list(data.get("gate", []))),
        dict(data.get("calibration", {})),
    )


def _label(row: dict[str, Any]) -> Label:
    return Label(
        _int(row["number"], 0, 1 << 16),
        _int(row["index"], 0, (1 << 32) - 1),
        _text(row["name"]),
        _color(row.get("color")),
        _bool(row.get("single", False)),
    )


def _gate_row(data: dict[str, Any]) -> GateRow:
    row = GateRow(
        backend=_text(data["backend"]),
        version=_text(data["version"]),
        device=_text(data["device"]),
        precision=_one_of(data["precision"], PRECISIONS, "precision"),
        profile=_text(data["profile"]),
        processor=_text(data["processor"]),
        scans=_int(data["scans"], 1, 1 << 20),
        seconds=_optional(_number, data["seconds"], 0, 1e9),
        agreement=_optional(_number, data["agreement"], 0, 1),
        dice=_optional(_number, data["dice"], 0, 1),
        reference_dice=_optional(_number, data["reference_dice"], 0, 1),
        drop=_optional(_number, data["drop"], -1, 1),
        worst=_optional(_text, data["worst"]),
        failures=tuple(_text(reason) for reason in _list(data["failures"])),
    )
    if row.passed and None in (row.seconds, row.agreement):
        raise ValueError("a row of the gate passed without a measurement")
    return row


def _network(data: dict[str, Any]) -> Network:
    norm = data["normalization"]
    if norm["scheme"] not in get_args(NormalizationScheme):
        raise ValueError(f"unknown normalization scheme {norm['scheme']!r}")
    orientation = data["orientation"]
    if orientation is not None and not is_orientation(orientation):
        raise ValueError(f"orientation {orientation!r} is not three axis codes such as LPS")
    transpose = _ints(data["transpose"], 0, 2)
    if sorted(transpose) != [0, 1, 2]:
        raise ValueError(f"transpose {transpose} is not a permutation of 0, 1, 2")
    network = Network(
        orientation=orientation,
        transpose=transpose,
        spacing=_spacing(data["spacing"]),
        patch=_ints(data["patch"], 1, 4096),
        stride=_ints(data["stride"], 1, 4096),
        mirror_axes=tuple(_int(axis, 0, 2) for axis in data["mirror_axes"]),
        normalization=Normalization(
            norm["scheme"],
            _bool(norm["use_mask"]),
            *(_float(norm[key]) for key in ("mean", "std", "lower", "upper")),
        ),
        image_resampling=_resampling(data["image_resampling"], max_order=5),
        output_resampling=_resampling(data["output_resampling"], max_order=1),
        channels_out=_int(data["channels_out"], 1, 1 << 16),
        classes=_int(data["classes"], 2, 1 << 16),
        deferred_head=_bool(data["deferred_head"]),
        activation_bytes=_int(data["activation_bytes"], 0, 1 << 30),
    )
    if len(set(network.mirror_axes)) != len(network.mirror_axes):
        raise ValueError(f"mirror_axes {network.mirror_axes} names an axis twice")
    if any(p % s for p, s in zip(network.patch, network.stride, strict=True)):
        raise ValueError(f"patch {network.patch} is not a multiple of stride {network.stride}")
    if not network.deferred_head and network.channels_out != network.classes:
        raise ValueError("without a deferred head the graph must return one channel a class")
    return network


def is_orientation(codes: object) -> bool:
    """True for three axis codes, one each of L/R, P/A and I/S, in any order."""
    axes = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
    return isinstance(codes, str) and len(codes) == 3 and {axes.get(code) for code in codes} == {0, 1, 2}


def _resampling(data: dict[str, Any], max_order: int) -> Resampling:
    force = data["force_separate_z"]
    return Resampling(
        _int(data["order"], 0, max_order),
        _int(data["order_z"], 0, max_order),
        None if force is None else _bool(force),
    )


def _file_name(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a plain file name inside the bundle")
    return name


def _file_entry(data: dict[str, Any]) -> FileEntry:
    return FileEntry(_int(data["bytes"], 0, MAX_FILE_BYTES), _sha256(data["sha256"]))


def _sha256(digest: object) -> str:
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{digest!r} is not a SHA-256")
    return digest


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a line of printable text")
    return value


def _color(value: object) -> str | None:
    if value is not None and not COLOR.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not a color such as #1e90ff")
    return None if value is None else _text(value)


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _int(value: object, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
    return value


def _number(value: object, low: float, high: float) -> float:
    number = _float(value)
    if not low <= number <= high:
        raise ValueError(f"{value!r} is not from {low:g} to {high:g}")
    return number


def _optional(check: Callable[..., T], value: object, *limits: float) -> T | None:
    return None if value is None else check(value, *limits)


def _one_of(value: object, choices: tuple[str, ...], what: str) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is no {what} of {', '.join(choices)}")
    return str(value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _float(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _ints(values: Any, low: int, high: int) -> Shape:
    i, j, k = (_int(value, low, high) for value in values)
    return i, j, k


def _spacing(values: Any) -> Spacing:
    i, j, k = (_float(value) for value in values)
    low, high = SPACING_RANGE
    if not low <= min(i, j, k) <= max(i, j, k) <= high:
        raise ValueError(f"spacing {[i, j, k]} is outside {low:g} to {high:g} mm")
    return i, j, k
