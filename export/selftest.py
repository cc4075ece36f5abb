"""The tile that a bundle stores for self-tests, and the features that its graphs make of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgemuse.engines.protocol import Batch, EngineOptions
from edgemuse.engines.registry import open_engine
from edgemuse.export.phantoms import synthetic_patches
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.model.selftest import STEPS, SelfTest, sampled
from edgemuse.runtime.scan.types import Shape

SEED = 20240301
STRIDES = 2
"""At least, along each axis: the deepest normalisation then averages over eight voxels."""
SMALLEST = 32
"""Voxels along an axis, unless the patch is smaller."""
VALUES = 1 << 15
"""Features that are stored of each graph: 128 KiB."""
FEWEST_PLACES, MOST_PLACES = 256, 2048
BACKEND = "openvino"
"""Which edgemuse always has."""


def tile_shape(network: Network) -> Shape:
    """Of a tile as small as means something."""
    sides = (
        min(patch, max(STRIDES, -(-SMALLEST // stride)) * stride)
        for patch, stride in zip(network.patch, network.stride, strict=True)
    )
    d, h, w = sides
    return d, h, w


def new_selftest(network: Network) -> SelfTest:
    """A phantom and the places at which its features are compared, and no features yet."""
    shape = tile_shape(network)
    phantom = next(synthetic_patches(shape, 1, SEED))
    steps = np.rint(phantom * STEPS).clip(-127, 127)
    count = min(max(VALUES // network.channels_out, FEWEST_PLACES), MOST_PLACES, phantom.size)
    places = np.random.default_rng(SEED).choice(phantom.size, count, replace=False)
    return SelfTest((steps / STEPS).astype(np.float32), np.sort(places).astype(np.int32), {})


def with_features(selftest: SelfTest, outputs: Mapping[str, Batch]) -> SelfTest:
    """`selftest` with what (1, F, D, H, W) the graphs, by their precision, must make of its tile."""
    found = {precision: sampled(output, selftest.places) for precision, output in outputs.items()}
    return replace(selftest, features={**selftest.features, **found})


def run_fp32(graph: bytes, tile: Batch) -> Batch:
    """What the fp32 `graph` makes of `tile` here."""
    n, c, d, h, w = tile.shape
    engine = open_engine(graph, (n, c, d, h, w), EngineOptions(BACKEND, "fp32", "CPU"))
    try:
        return np.array(engine.infer(tile), np.float32)
    finally:
        engine.close()


def selftest_bytes(selftest: SelfTest) -> bytes:
    """The content of the file."""
    stream = io.BytesIO()
    tile = np.rint(selftest.tile[0, 0] * STEPS).astype(np.int8)
    arrays: dict[str, Any] = {"tile": tile, "places": selftest.places, **selftest.features}
    np.savez(stream, **arrays)
    return stream.getvalue()
