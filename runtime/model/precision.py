"""Which engine to run a bundle on: what was asked for, or with `auto` the fastest that passed the accuracy gate.

The fastest is what `edgemuse tune` measured here. Without that it is the first backend that works, in the precision
that was fastest when the gate was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import Way, choose
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.manifest import STORED_PRECISIONS, GateRow
from edgemuse.runtime.model.tuned import outdated, recall

ALWAYS_FP32 = "reference"
"""The profile that promises nnU-Net's own labels."""
NOT_MEASURED = "not measured"


def choose_engine(
    bundle: Bundle, profile: str, options: EngineOptions, refused: Mapping[Way, str] | None = None
) -> EngineOptions:
    """`options` without `auto`; `refused` says why a way to compute is not to be taken.

    Raises BackendError or BundleError if what was asked for cannot be had here.
    """
    tuned = _tuned(bundle, profile, options, refused)
    if tuned is not None:
        return tuned
    if options.precision != "auto":
        chosen = choose(options, refused)[1]
        bundle.graph_name(stored_precision(chosen.precision))
        return chosen
    chosen = choose(replace(options, precision="fp32"), refused)[1]
    if profile == ALWAYS_FP32:
        return chosen
    candidates = (replace(chosen, precision=row.precision) for row in _by_speed(bundle, profile, chosen))
    return next((candidate for candidate in candidates if usable(bundle, candidate, refused)), chosen)


def _tuned(
    bundle: Bundle, profile: str, options: EngineOptions, refused: Mapping[Way, str] | None
) -> EngineOptions | None:
    """The fastest that was measured here, is what was asked for as far as that goes, and may be used."""
    known = recall(options.cache_dir, bundle.sha256) if "auto" in _asked(options) else None
    for timing in known.timings if known else ():
        found = (timing.backend, timing.device, timing.precision)
        fits = all(asked in ("auto", had) for asked, had in zip(_asked(options), found, strict=True))
        if timing.profile != profile or not fits:
            continue
        candidate = replace(options, backend=timing.backend, device=timing.device, precision=timing.precision)
        allowed = options.precision != "auto" or may_choose(bundle, profile, candidate)
        if allowed and usable(bundle, candidate, refused) and not outdated(timing):
            return candidate
    return None


def _asked(options: EngineOptions) -> tuple[str, str, str]:
    device = options.device if options.device == "auto" else options.device.upper()
    return options.backend, device, options.precision


def may_choose(bundle: Bundle, profile: str, options: EngineOptions) -> bool:
    """Whether `auto` may take definite `options`: they passed the gate, or are fp32 and did not fail it."""
    if profile == ALWAYS_FP32 and options.precision != "fp32":
        return False
    found = verdict(bundle, profile, options)
    return found == "passed" or (options.precision == "fp32" and found == NOT_MEASURED)


def stored_precision(precision: str) -> str:
    """The precision of the graph that is run for `precision`."""
    return precision if precision in STORED_PRECISIONS else "fp32"


def gate_row(bundle: Bundle, profile: str, options: EngineOptions) -> GateRow | None:
    """The gate's row for definite `options`, or None if it was not measured."""
    wanted = (options.backend, options.device, options.precision, profile)
    rows = bundle.manifest.gate
    return next((row for row in rows if (row.backend, row.device, row.precision, row.profile) == wanted), None)


def verdict(bundle: Bundle, profile: str, options: EngineOptions) -> str:
    """`passed`, `not measured`, or `failed` and why."""
    row = gate_row(bundle, profile, options)
    if row is None:
        return NOT_MEASURED
    return "passed" if row.passed else f"failed: {'; '.join(row.failures)}"


def _by_speed(bundle: Bundle, profile: str, chosen: EngineOptions) -> list[GateRow]:
    """Rows that passed for the backend chosen, the fastest first; none where fp32 itself was not timed."""
    where = (chosen.backend, chosen.device, profile)
    rows = [row for row in bundle.manifest.gate if row.passed and (row.backend, row.device, row.profile) == where]
    rows.sort(key=lambda row: row.seconds or 0.0)
    return rows if any(row.precision == "fp32" for row in rows) else []


def usable(bundle: Bundle, options: EngineOptions, refused: Mapping[Way, str] | None = None) -> bool:
    """Whether definite `options` can be had here: the bundle stores the graph, and the backend works."""
    if stored_precision(options.precision) not in bundle.manifest.graphs:
        return False
    try:
        choose(options, refused)
    except BackendError:
        return False
    return True
