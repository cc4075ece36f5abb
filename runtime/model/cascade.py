"""A cascade: a directory (or `.zip`) of two bundles, `mask` and `regions`, and `cascade.json`: how they follow."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import BundleError
from edgemuse.runtime.model import checks
from edgemuse.runtime.model.archive import MAX_MANIFEST_BYTES, Source
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.manifest import parse_label
from edgemuse.runtime.regions.labels import Label

CASCADE = "cascade.json"
CASCADE_FORMAT = "edgemuse-cascade"
CASCADE_VERSION = 1


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


def parse_cascade(raw: bytes, path: Path) -> CascadeManifest:
    """Check the text of `cascade.json` field by field; raises BundleError, naming `path`, at the first that is off."""
    data = checks.document(raw, path, CASCADE, CASCADE_FORMAT, CASCADE_VERSION)
    with checks.reported(path, CASCADE):
        return _cascade(data)


def _cascade(data: dict[str, Any]) -> CascadeManifest:
    if not checks.is_orientation(data["orientation"]):
        raise ValueError(f"orientation {checks.short(data['orientation'])} is not three axis codes such as LPS")
    plausible, fill = data["plausible_mm3"], data["fill"]
    if plausible is not None:
        low, high = (checks.finite(value) for value in plausible)
        plausible = (low, high)
    return CascadeManifest(
        checks.text(data["name"]),
        None if data["license"] is None else checks.text(data["license"]),
        data["orientation"],
        {role: checks.sha256(data["stages"][role]) for role in Cascade.STAGES},
        checks.integer(data["padding_percent"], 0, 100),
        checks.boolean(data["keep_largest"]),
        plausible,
        None if fill is None else parse_label(fill),
    )


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
        """Name of the model."""
        return self.manifest.name

    @property
    def labels(self) -> tuple[Label, ...]:
        """Labels of the classes that the cascade gives."""
        fill = self.manifest.fill
        return (*self.regions.labels, *([] if fill is None else [fill]))

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every file: `cascade.json`, then those of each stage, the stage's folder in their names."""
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
