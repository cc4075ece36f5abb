"""Plain-text descriptions for people: a bundle, and the machine's backends."""

from __future__ import annotations

from edgemuse.engines.hardware import available_memory, machine
from edgemuse.engines.registry import Status, statuses
from edgemuse.runtime.bundle import Bundle, Cascade
from edgemuse.runtime.labels import by_index
from edgemuse.runtime.memory import gib


def describe_model(model: Bundle | Cascade) -> str:
    """A bundle, or a cascade and then both of its bundles."""
    if isinstance(model, Bundle):
        return describe_bundle(model)
    manifest, fill = model.manifest, model.manifest.fill
    filled = "stays background" if fill is None else f"becomes {fill.index} {fill.name} inside the mask"
    lines = [
        f"{model.name}  (licence: {manifest.license or 'not recorded'})",
        f"  stages        mask: {model.mask.name}, then regions: {model.regions.name} inside it",
        f"  orientation   {manifest.orientation}",
        f"  crop          box of the mask, {manifest.padding_percent} % wider on each side",
        f"  mask          {'its largest component' if manifest.keep_largest else 'as found'}",
        f"  no label      {filled}",
        f"  bundle SHA-256 {model.sha256}",
        *(f"stage {role}\n{describe_bundle(getattr(model, role))}" for role in model.STAGES),
    ]
    return "\n".join(lines)


def describe_bundle(bundle: Bundle) -> str:
    """Name, licence, network, graphs, verification and structures."""
    manifest, network = bundle.manifest, bundle.manifest.network
    head = "applied last, on the scan's grid" if network.deferred_head else "inside the graph"
    structures = [label for label in by_index(manifest.labels) if label.index]
    lines = [
        f"{manifest.name}  (licence: {manifest.license or 'not recorded'})",
        f"  orientation   {network.orientation or 'as stored'}",
        f"  spacing       {' x '.join(f'{mm:g}' for mm in network.spacing)} mm",
        f"  patch         {' x '.join(map(str, network.patch))}",
        f"  mirroring     {', '.join('dhw'[axis] for axis in network.mirror_axes) or 'none allowed'}",
        f"  normalisation {network.normalization.scheme}",
        f"  classes       {network.classes}, from {network.channels_out} channels; head {head}",
        *(f"  {precision:<13} {name}, {_mb(bundle, name)}" for precision, name in manifest.graphs.items()),
        f"  bundle SHA-256 {bundle.sha256}",
        *_records("source", manifest.source),
        *_records("verification", manifest.verification),
        f"structures ({len(structures)})",
        *(f"  {label.index:>5} {label.name}" for label in structures),
    ]
    return "\n".join(lines)


def _mb(bundle: Bundle, name: str) -> str:
    return f"{bundle.manifest.files[name].bytes / 1e6:.1f} MB"


def _records(title: str, record: object, indent: str = "") -> list[str]:
    if isinstance(record, list) and any(isinstance(entry, dict) for entry in record):
        return [line for entry in record for line in _records(title, entry, indent)]
    if isinstance(record, list):
        record = ", ".join(map(str, record))
    if not isinstance(record, dict):
        return [f"{indent}{title}: {record}"]
    return [
        f"{indent}{title}",
        *(line for key, value in record.items() for line in _records(key, value, indent + "  ")),
    ]


def describe_devices() -> str:
    """The machine, then a line a backend in the order in which `auto` prefers them."""
    facts = machine()
    lines = [
        f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} cores, {gib(available_memory())} free",
        "backends, most preferred first:",
        *(line for status in statuses() for line in _backend(status)),
        "auto takes the first backend that is usable, in fp32; name a backend or precision to override it",
    ]
    return "\n".join(lines)


def _backend(status: Status) -> list[str]:
    name = f"  {status.backend.name:<12}"
    if status.reason:
        return [f"{name} not usable: {status.reason}"]
    return [
        f"{name} {status.version}: {device} with {', '.join(precisions)}"
        for device, precisions in status.devices.items()
    ]
