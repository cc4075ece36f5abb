"""Which precision to run a bundle in: what was asked for, or with `auto` the fastest that passed the accuracy gate."""

from __future__ import annotations

from dataclasses import replace

from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import choose
from edgemuse.runtime.bundle import STORED_PRECISIONS, Bundle, GateRow

ALWAYS_FP32 = "reference"
"""The profile that promises nnU-Net's own labels."""
NOT_MEASURED = "not measured"


def choose_engine(bundle: Bundle, profile: str, options: EngineOptions) -> EngineOptions:
    """`options` without `auto`; raises BackendError or BundleError if what was asked for cannot be had here."""
    if options.precision != "auto":
        chosen = choose(options)[1]
        bundle.graph_name(stored_precision(chosen.precision))
        return chosen
    chosen = choose(replace(options, precision="fp32"))[1]
    if profile == ALWAYS_FP32:
        return chosen
    usable = [row.precision for row in _by_speed(bundle, profile, chosen) if _usable(bundle, row, chosen)]
    return replace(chosen, precision=next(iter(usable), "fp32"))


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


def _usable(bundle: Bundle, row: GateRow, chosen: EngineOptions) -> bool:
    if stored_precision(row.precision) not in bundle.manifest.graphs:
        return False
    try:
        choose(replace(chosen, precision=row.precision))
    except BackendError:
        return False
    return True
