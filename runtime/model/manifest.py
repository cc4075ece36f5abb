"""What `bundle.json` says of a network: its fields, and how each is checked when it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from edgemuse.runtime.model import checks
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.types import Shape, Spacing

MANIFEST = "bundle.json"
FORMAT = "edgemuse-bundle"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 2 << 30
"""An ONNX file is one protobuf message, which cannot be larger."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
STORED_PRECISIONS = ("fp32", "fp16", "int8")
"""Precisions that have a graph of their own. For bf16 the backend is told to run the fp32 graph in bf16."""
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


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Check the text of `bundle.json` field by field; raises BundleError, naming `path`, at the first that is off."""
    data = checks.document(raw, path, MANIFEST, FORMAT, FORMAT_VERSION)
    with checks.reported(path, MANIFEST):
        return _manifest(data)


def _manifest(data: dict[str, Any]) -> Manifest:
    network = _network(data["network"])
    files = {_file_name(name): _file_entry(entry) for name, entry in data["files"].items()}
    graphs = {
        checks.one_of(precision, STORED_PRECISIONS, "precision"): _file_name(name)
        for precision, name in data["graphs"].items()
    }
    labels = tuple(parse_label(row) for row in data["labels"])
    if [label.number for label in labels] != list(range(network.classes)):
        raise ValueError(f"labels must name classes 0 to {network.classes - 1} in order")
    needed = set(graphs.values()) | ({"head.npz"} if network.deferred_head else set())
    if missing := sorted(needed - files.keys()):
        raise ValueError(f"{', '.join(missing)} not listed under files")
    if "fp32" not in graphs:
        raise ValueError("no fp32 graph is named")
    return Manifest(
        checks.text(data["name"]),
        None if data["license"] is None else checks.text(data["license"]),
        network,
        labels,
        graphs,
        files,
        dict(data.get("source", {})),
        dict(data.get("verification", {})),
        tuple(_gate_row(row) for row in checks.listed(data.get("gate", []))),
        dict(data.get("calibration", {})),
    )


def parse_label(row: dict[str, Any]) -> Label:
    """A row of the label table, checked; raises KeyError or ValueError."""
    return Label(
        checks.integer(row["number"], 0, 1 << 16),
        checks.integer(row["index"], 0, (1 << 32) - 1),
        checks.text(row["name"]),
        checks.color(row.get("color")),
        checks.boolean(row.get("single", False)),
    )


def _gate_row(data: dict[str, Any]) -> GateRow:
    row = GateRow(
        backend=checks.text(data["backend"]),
        version=checks.text(data["version"]),
        device=checks.text(data["device"]),
        precision=checks.one_of(data["precision"], PRECISIONS, "precision"),
        profile=checks.text(data["profile"]),
        processor=checks.text(data["processor"]),
        scans=checks.integer(data["scans"], 1, 1 << 20),
        seconds=checks.optional(checks.number, data["seconds"], 0, 1e9),
        agreement=checks.optional(checks.number, data["agreement"], 0, 1),
        dice=checks.optional(checks.number, data["dice"], 0, 1),
        reference_dice=checks.optional(checks.number, data["reference_dice"], 0, 1),
        drop=checks.optional(checks.number, data["drop"], -1, 1),
        worst=checks.optional(checks.text, data["worst"]),
        failures=tuple(checks.text(reason) for reason in checks.listed(data["failures"])),
    )
    if row.passed and None in (row.seconds, row.agreement):
        raise ValueError("a row of the gate passed without a measurement")
    return row


def _network(data: dict[str, Any]) -> Network:
    norm = data["normalization"]
    if norm["scheme"] not in get_args(NormalizationScheme):
        raise ValueError(f"unknown normalization scheme {checks.short(norm['scheme'])}")
    orientation = data["orientation"]
    if orientation is not None and not checks.is_orientation(orientation):
        raise ValueError(f"orientation {checks.short(orientation)} is not three axis codes such as LPS")
    transpose = checks.three_integers(data["transpose"], 0, 2)
    if sorted(transpose) != [0, 1, 2]:
        raise ValueError(f"transpose {transpose} is not a permutation of 0, 1, 2")
    network = Network(
        orientation=orientation,
        transpose=transpose,
        spacing=checks.spacing(data["spacing"]),
        patch=checks.three_integers(data["patch"], 1, 4096),
        stride=checks.three_integers(data["stride"], 1, 4096),
        mirror_axes=tuple(checks.integer(axis, 0, 2) for axis in data["mirror_axes"]),
        normalization=Normalization(
            norm["scheme"],
            checks.boolean(norm["use_mask"]),
            *(checks.finite(norm[key]) for key in ("mean", "std", "lower", "upper")),
        ),
        image_resampling=_resampling(data["image_resampling"], max_order=5),
        output_resampling=_resampling(data["output_resampling"], max_order=1),
        channels_out=checks.integer(data["channels_out"], 1, 1 << 16),
        classes=checks.integer(data["classes"], 2, 1 << 16),
        deferred_head=checks.boolean(data["deferred_head"]),
        activation_bytes=checks.integer(data["activation_bytes"], 0, 1 << 30),
    )
    if len(set(network.mirror_axes)) != len(network.mirror_axes):
        raise ValueError(f"mirror_axes {network.mirror_axes} names an axis twice")
    if any(p % s for p, s in zip(network.patch, network.stride, strict=True)):
        raise ValueError(f"patch {network.patch} is not a multiple of stride {network.stride}")
    if not network.deferred_head and network.channels_out != network.classes:
        raise ValueError("without a deferred head the graph must return one channel a class")
    return network


def _resampling(data: dict[str, Any], max_order: int) -> Resampling:
    force = data["force_separate_z"]
    return Resampling(
        checks.integer(data["order"], 0, max_order),
        checks.integer(data["order_z"], 0, max_order),
        None if force is None else checks.boolean(force),
    )


def _file_name(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == MANIFEST:
        raise ValueError(f"{checks.short(name)} is not a plain file name inside the bundle")
    return name


def _file_entry(data: dict[str, Any]) -> FileEntry:
    return FileEntry(checks.integer(data["bytes"], 0, MAX_FILE_BYTES), checks.sha256(data["sha256"]))
