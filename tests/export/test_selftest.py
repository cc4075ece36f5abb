"""The tile that is stored: small, and large enough to mean something."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from bundles import tiny_bundle

from edgemuse.export.selftest import new_selftest, selftest_bytes, tile_shape, with_features
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.manifest import Network


@pytest.fixture
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return open_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")).manifest.network


@pytest.mark.parametrize(
    ("stride", "patch", "shape"),
    [
        ((16, 16, 16), (128, 176, 128), (32, 32, 32)),
        ((32, 32, 16), (112 + 16, 128, 96), (64, 64, 32)),
        ((12, 8, 1), (96, 96, 20), (36, 32, 20)),
        ((32, 32, 32), (32, 64, 96), (32, 64, 64)),
    ],
    ids=str,
)
def test_the_tile_is_what_the_network_takes(
    stride: tuple[int, int, int], patch: tuple[int, int, int], shape: tuple[int, int, int], network: Network
) -> None:
    assert tile_shape(replace(network, stride=stride, patch=patch)) == shape


@pytest.mark.parametrize("channels", [1, 16, 160])
def test_the_file_is_small_and_the_same_every_time(channels: int, network: Network) -> None:
    network = replace(network, stride=(32, 32, 32), patch=(128, 128, 128), channels_out=channels)
    selftest = new_selftest(network)
    output = np.zeros((1, channels, *selftest.tile.shape[2:]), np.float32)
    data = selftest_bytes(with_features(selftest, {"fp32": output, "int8": output}))
    assert len(data) < 700_000
    assert data == selftest_bytes(with_features(new_selftest(network), {"fp32": output, "int8": output}))
    with np.load(io.BytesIO(data)) as arrays:
        assert len(np.unique(arrays["places"])) == len(arrays["places"]) >= 200


def test_the_tile_is_smooth(network: Network) -> None:
    """As a head is, and not noise: neighbours are alike."""
    tile = new_selftest(replace(network, patch=(64, 64, 64))).tile[0, 0]
    assert np.corrcoef(tile[1:].ravel(), tile[:-1].ravel())[0, 1] > 0.7
