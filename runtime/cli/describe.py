"""Plain-text descriptions for people: a bundle, and the machine's backends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edgemuse.engines.hardware import available_memory, machine
from edgemuse.engines.registry import Status, statuses
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.model.folders import default_cache_dir
from edgemuse.runtime.model.manifest import GateRow
from edgemuse.runtime.model.selftest import read_selftest
from edgemuse.runtime.model.tuned import Tuned, outdated, recall, recall_all
from edgemuse.runtime.network.memory import gib
from edgemuse.runtime.regions.labels import by_index


def describe_model(model: Bundle | Cascade) -> list[str]:
    """The lines about a bundle, or about a cascade and then both of its bundles."""
    if isinstance(model, Bundle):
        return describe_bundle(model)
    manifest, fill = model.manifest, model.manifest.fill
    filled = "stays background" if fill is None else f"becomes {fill.index} {fill.name} inside the mask"
    return [
        f"{model.name}  (licence: {manifest.license or 'not recorded'})",
        f"  stages        mask: {model.mask.name}, then regions: {model.regions.name} inside it",
        f"  orientation   {manifest.orientation}",
        f"  crop          box of the mask, {manifest.padding_percent} % wider on each side",
        f"  mask          {'its largest component' if manifest.keep_largest else 'as found'}",
        f"  no label      {filled}",
        f"  bundle SHA-256 {model.sha256}",
        *(line for role, bundle in model.bundles.items() for line in (f"stage {role}", *describe_bundle(bundle))),
    ]


def describe_bundle(bundle: Bundle) -> list[str]:
    """Name, licence, network, graphs, verification and structures."""
    manifest, network = bundle.manifest, bundle.manifest.network
    head = "applied last, on the scan's grid" if network.deferred_head else "inside the graph"
    structures = [label for label in by_index(manifest.labels) if label.index]
    return [
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
        *(_records("calibration", manifest.calibration) if manifest.calibration else []),
        *_gate_table(manifest.gate),
        _selftest(bundle),
        *tuned_lines(recall(default_cache_dir(), bundle.sha256)),
        f"structures ({len(structures)})",
        *(f"  {label.index:>5} {label.name}" for label in structures),
    ]


def _selftest(bundle: Bundle) -> str:
    selftest = read_selftest(bundle)
    if selftest is None:
        return "self-test: none is stored; 'edgemuse calibrate' or another export adds one"
    size = " x ".join(map(str, selftest.tile.shape[2:]))
    return f"self-test: a tile of {size} with features in {' and '.join(selftest.features)}; see 'devices --check'"


DEEPEST = 8
"""Steps of a record within a record that are shown."""
GATE_HEADER = ("profile", "backend", "precision", "seconds", "agreement", "Dice", "of fp32", "largest drop", "gate")


def _gate_table(rows: Sequence[GateRow]) -> list[str]:
    """The accuracy gate, a line a measurement; agreement is Dice with fp32 `reference`, Dice is against the truth."""
    if not rows:
        return ["accuracy gate: not measured, so auto is fp32; 'edgemuse calibrate' adds int8 and fp16"]
    cells = [GATE_HEADER, *(gate_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(GATE_HEADER))]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return ["accuracy gate", *(line.rstrip() for line in lines)]


def tuned_lines(tuned: Tuned | None) -> list[str]:
    """What `edgemuse tune` measured here, the fastest of each profile marked, and what no longer counts."""
    if tuned is None:
        return ["not tuned on this machine; 'edgemuse tune' finds the fastest engine"]
    changes = [outdated(timing) for timing in tuned.timings]
    current = [timing for timing, change in zip(tuned.timings, changes, strict=True) if not change]
    fastest = {timing.profile: timing for timing in reversed(current)}
    lines = [f"tuned on this machine, with {tuned.scan}"]
    for timing, change in zip(tuned.timings, changes, strict=True):
        line = f"  {timing.profile:<10} {timing.backend} {timing.device} {timing.precision:<5} {timing.seconds:7.2f} s"
        note = f"  not used: {change}; run 'edgemuse tune' again" if change else ""
        lines.append(line + (note or "  fastest" * (fastest[timing.profile] is timing)))
    return lines


def gate_cells(row: GateRow) -> tuple[str, ...]:
    """A row of the accuracy gate's table, under `GATE_HEADER`."""
    drop = "-" if row.drop is None else f"{row.drop:.3f} {row.worst}"
    figures = (_figure(value, 4) for value in (row.agreement, row.dice, row.reference_dice))
    outcome = "passed" if row.passed else f"failed: {'; '.join(row.failures)}"
    backend = f"{row.backend} {row.device}"
    return (row.profile, backend, row.precision, _figure(row.seconds, 2), *figures, drop, outcome)


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mb(bundle: Bundle, name: str) -> str:
    return f"{bundle.manifest.files[name].bytes / 1e6:.1f} MB"


def _records(title: str, record: object, depth: int = 0) -> list[str]:
    """What a record for people says, in lines; whoever made the bundle may have put anything into it."""
    indent = "  " * depth
    if depth > DEEPEST:
        return [f"{indent}{title}: ..."]
    if isinstance(record, list) and any(isinstance(entry, dict) for entry in record):
        return [line for entry in record for line in _records(title, entry, depth + isinstance(entry, list))]
    if isinstance(record, list):
        record = ", ".join("..." if isinstance(entry, list) else str(entry) for entry in record)
    if not isinstance(record, dict):
        return [f"{indent}{title}: {record}"]
    return [f"{indent}{title}", *(line for key, value in record.items() for line in _records(key, value, depth + 1))]


RANKING = (
    "auto takes what 'edgemuse tune' found to be fastest for a bundle on this machine. For one that was not tuned it "
    "takes the first backend that is usable, in the fastest precision that passed the bundle's accuracy gate (fp32 if "
    "none did). OpenVINO comes first: it is the fastest that was measured (docs/measured/performance.md); TensorRT has "
    "not been measured on a GPU yet, so it comes last. Name a backend or precision to override this."
)


def describe_devices() -> list[str]:
    """Lines: the machine, then a line a backend in the order in which `auto` prefers them."""
    facts = machine()
    return [
        f"{facts['cpu']} ({facts['architecture']}), {facts['cores']} cores, {gib(available_memory())} free",
        "backends, most preferred first:",
        *(line for status in statuses() for line in _backend(status)),
        *textwrap.wrap(RANKING, 118),
        *(f"{tuned.name}: {line}" for tuned in recall_all(default_cache_dir()) for line in tuned_lines(tuned)),
    ]


def _backend(status: Status) -> list[str]:
    name = f"  {status.backend.name:<12}"
    if status.reason:
        return [f"{name} not usable: {status.reason.removeprefix(f'{status.backend.name}: ')}"]
    return [
        f"{name} {status.version}: {device} with {', '.join(precisions)}"
        for device, precisions in status.devices.items()
    ]
