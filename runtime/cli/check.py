"""`edgemuse devices --check`: every way to run a model here, held against what its bundles store."""

from __future__ import annotations

from collections.abc import Sequence

from edgemuse.engines.errors import BackendError, one_line
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import basis
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.model.folders import default_cache_dir
from edgemuse.runtime.model.selftest import SELFTEST, remeasure, ways

HEADER = ("backend", "version", "device", "precision", "error", "limit", "verdict")
MEANING = "error: root mean square over the worst channel of the features, in that channel's standard deviations"


def check_model(model: Bundle | Cascade) -> tuple[list[str], bool]:
    """Lines that say what was found of each network, and whether anything failed. The verdicts are kept."""
    lines, failed = [], False
    for role, bundle in (model.bundles if isinstance(model, Cascade) else {"": model}).items():
        lines.append(f"{role}: {bundle.name}".removeprefix(": "))
        if SELFTEST not in bundle.manifest.files:
            lines.append("  not checked: no self-test is stored; 'edgemuse calibrate' or another export adds one")
            continue
        rows = [_row(bundle, way) for way in ways(bundle, EngineOptions(cache_dir=default_cache_dir()))]
        failed |= any(row[-1].startswith("failed") for row in rows)
        lines += _table([HEADER, *rows])
    return [*lines, MEANING], failed


def _row(bundle: Bundle, options: EngineOptions) -> tuple[str, ...]:
    version = basis(options)["version"].partition("-")[0]
    start = (options.backend, version, options.device, options.precision)
    try:
        found = remeasure(bundle, options)
    except BackendError as error:
        return (*start, "-", "-", f"failed: it does not run ({one_line(error)})")
    if found is None:
        return (*start, "-", "-", "not checked: no features are stored for it; 'edgemuse calibrate' adds them")
    return (*start, f"{found.error:.1e}", f"{found.limit:.1e}", "passed" if found.passed else "failed")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
