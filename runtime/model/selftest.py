"""Does a backend compute rightly on this machine? A tile is stored in the bundle, and what the network makes of it.

A processor may have an instruction, a backend a kernel for it, and both together a fault that no other machine shows.
So the first time that a bundle's graph is run by a backend, in its version, in a precision, on a processor, the tile is
run first. The verdict is kept in the cache.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines import cache
from edgemuse.engines.errors import BackendError, BundleError
from edgemuse.engines.protocol import Batch, EngineOptions, Output
from edgemuse.engines.registry import Way, basis, open_engine, statuses, way
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.model.precision import choose_engine, stored_precision

log = logging.getLogger("edgemuse")

SELFTEST = "selftest.npz"
STEPS = 32
"""Of the tile's numbers, which are stored as int8, to a standard deviation of the network's input."""
LIMITS = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05, "int8": 0.2}
"""Largest error allowed. Seen of right implementations, with trained networks and a random one of DLMUSE's size, on a
processor with AMX ('edgemuse devices --check' measures it): fp32 4e-6, fp16 0.0015, bf16 0.016, int8 0.07, and 0.12
where weights have seven bits, as processors without VNNI need. In int8 that much comes from roundings alone: one that
falls to the other side moves all that follows. Faults of int8 arithmetic that tests/calibration/test_selftest.py plants
give 1 and more; where fp32 is asked for and bf16 computed, the error is five times the limit.
"""
REFERENCES = {"fp32", "int8"}
"""Precisions of graphs whose features are stored; bf16 and fp16 are held against fp32."""
LEAST_SPREAD = 0.1
"""Of a channel, relative to all: errors of one that hardly varies do not count for more."""


@dataclass(frozen=True)
class SelfTest:
    """A tile, and the features that each graph makes of it.

    Attributes:
        tile: (1, 1, D, H, W) float32, the network's input.
        places: (P,) voxels of the tile, counted in the order in which it lies in memory.
        features: (F, P) float32 at these voxels, by the precision of the graph; those of int8 are what its nodes
            say, computed in fp32.
    """

    tile: Batch
    places: NDArray[np.int32]
    features: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Verdict:
    """The error that was measured beside what is allowed; see `deviation`."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether what was computed may be believed."""
        return self.error <= self.limit


def read_selftest(bundle: Bundle) -> SelfTest | None:
    """What is stored in `bundle`; None if nothing is. Raises BundleError where it is damaged."""
    if SELFTEST not in bundle.manifest.files:
        return None
    arrays = bundle.arrays(SELFTEST)
    if not _fits(arrays, bundle.manifest.network):
        raise BundleError(f"{bundle.path}: {SELFTEST} does not fit the network; export the bundle again")
    tile, features = arrays["tile"], {name: arrays[name] for name in sorted(arrays.keys() & REFERENCES)}
    return SelfTest((tile / np.float32(STEPS)).astype(np.float32)[None, None], arrays["places"], features)


def _fits(arrays: Mapping[str, NDArray[Any]], network: Network) -> bool:
    """Whether there are a tile that the network takes, places in it, and features of them."""
    kinds = {name: (str(array.dtype), array.ndim) for name, array in arrays.items()}
    if kinds.get("tile") != ("int8", 3) or kinds.get("places") != ("int32", 1):
        return False
    tile, places = arrays["tile"], arrays["places"]
    sides = zip(tile.shape, network.stride, network.patch, strict=True)
    return (
        all(0 < side <= patch and side % stride == 0 for side, stride, patch in sides)
        and len(places) > 0
        and 0 <= places.min() <= places.max() < tile.size
        and all(
            kinds[name] == ("float32", 2)
            and arrays[name].shape == (network.channels_out, len(places))
            and np.isfinite(arrays[name]).all()
            for name in arrays.keys() & REFERENCES
        )
    )


def sampled(output: Output, places: NDArray[np.int32]) -> NDArray[np.float32]:
    """Of (1, F, D, H, W) what is at `places`, as (F, P)."""
    features: NDArray[np.float32] = output[0].reshape(output.shape[1], -1)[:, places].astype(np.float32)
    return features


def deviation(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """How far features are off, both (F, P): of the worst channel the RMS error, in its standard deviations.

    Infinite where they hold NaN or infinity.
    """
    spread = expected.std(axis=1, dtype=np.float64)
    least = max(LEAST_SPREAD * float(expected.std(dtype=np.float64)), float(np.finfo(np.float32).tiny))
    errors = np.sqrt(np.square(found.astype(np.float64) - expected).mean(axis=1)) / np.maximum(spread, least)
    return float(errors.max()) if np.isfinite(errors).all() else math.inf


def measure(bundle: Bundle, options: EngineOptions) -> Verdict | None:
    """Run the tile on the engine that definite `options` name; None where the bundle has nothing to compare with.

    Raises BackendError where the engine does not run, BundleError where the bundle is damaged.
    """
    selftest, precision = read_selftest(bundle), stored_precision(options.precision)
    reference = precision if precision in REFERENCES else "fp32"
    if selftest is None or reference not in selftest.features:
        return None
    expected = selftest.features[reference]
    n, c, d, h, w = selftest.tile.shape
    engine = open_engine(bundle.graph(precision), (n, c, d, h, w), replace(options, cache_dir=None))
    try:
        output = engine.infer(selftest.tile)
        if output.shape != (n, len(expected), d, h, w):
            raise BackendError(f"{options.backend} returns {output.shape} for a tile of {selftest.tile.shape}")
        return Verdict(deviation(sampled(output, selftest.places), expected), LIMITS[options.precision])
    finally:
        engine.close()


def check(bundle: Bundle, options: EngineOptions) -> Verdict | None:
    """The verdict on definite `options`, measured the first time and kept in their cache; None: it is not known.

    Raises BackendError where the engine does not run, BundleError where the bundle is damaged.
    """
    if options.cache_dir is None or SELFTEST not in bundle.manifest.files:
        return None
    key = _key(bundle, options)
    blob = cache.load(options.cache_dir, key)
    found = None if blob is None else _read(bytes(blob), LIMITS[options.precision])
    return found or remeasure(bundle, options)


def remeasure(bundle: Bundle, options: EngineOptions) -> Verdict | None:
    """As `measure`, and keep the verdict."""
    found = measure(bundle, options)
    if found is not None and options.cache_dir is not None:
        log.info(
            "self-test of %s %s: error %.2g, limit %g", options.backend, options.precision, found.error, found.limit
        )
        cache.store(options.cache_dir, _key(bundle, options), json.dumps({"error": found.error}).encode())
    return found


def _key(bundle: Bundle, options: EngineOptions) -> str:
    """What a verdict holds for: as an engine's key, with the driver, and the same for tiles of every shape."""
    files, graph = bundle.manifest.files, bundle.graph_name(stored_precision(options.precision))
    stored = {"tile": files[SELFTEST].sha256, "graph": files[graph].sha256, "edgemuse": version("edgemuse")}
    return cache.cache_key({"what": "verdict", **stored, **basis(options)})


def _read(data: bytes, limit: float) -> Verdict | None:
    try:
        return Verdict(float(json.loads(data)["error"]), limit)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def trusted(bundle: Bundle, profile: str, asked: EngineOptions) -> tuple[EngineOptions, str]:
    """As `choose_engine`, but nothing that fails the self-test; and why something else was left, or an empty text.

    Raises BackendError where what fails was asked for by name, or nothing is left.
    """
    refused: dict[Way, str] = {}
    while True:
        chosen = choose_engine(bundle, profile, asked, refused)
        found = _if_it_runs(bundle, chosen)
        if found is None or found.passed:
            break
        refused[way(chosen)] = _reason(chosen, found)
        if "auto" not in (asked.backend, asked.precision):
            raise BackendError(
                f"{_reason(chosen, found)}; choose another --precision or --backend, or install another version of "
                f"{chosen.backend}; 'edgemuse devices --check' shows what is right here"
            )
    reason = "; ".join(refused.values())
    if reason:
        log.warning("%s; going on with %s %s", reason, chosen.backend, chosen.precision)
    return chosen, reason


def _if_it_runs(bundle: Bundle, options: EngineOptions) -> Verdict | None:
    """What does not run at all is reported, or replaced, where it is opened for the scan."""
    try:
        return check(bundle, options)
    except BackendError as error:
        log.info("self-test of %s %s: %s", options.backend, options.precision, error)
        return None


def _reason(options: EngineOptions, found: Verdict) -> str:
    name = f"{options.backend} {basis(options)['version'].partition('-')[0]}"
    return (
        f"{name} computes wrongly in {options.precision} on this {options.device}: on the tile that the bundle stores "
        f"it is off by {found.error:.2g}, and {found.limit:g} is allowed"
    )


def ways(bundle: Bundle, options: EngineOptions) -> Iterator[EngineOptions]:
    """Every way in which `bundle` can be run here, as definite options; the rest of them is that of `options`."""
    for status in statuses():
        for device, precisions in status.devices.items():
            for precision in precisions:
                if stored_precision(precision) in bundle.manifest.graphs:
                    yield replace(options, backend=status.backend.name, device=device, precision=precision)
