"""Operations counted from a graph are those that PyTorch counts; the peak is one that was reached."""

from __future__ import annotations

import pytest
from bundles import Tiny, tiny_graph

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install '.[bench]'")
torch = pytest.importorskip("torch", reason="PyTorch counts to compare with: pip install '.[bench]'")

from torch.utils.flop_counter import FlopCounterMode
from unets import WIDTHS, unet

from edgemuse.bench.measure import roofline
from edgemuse.bench.measure.roofline import operations, peaks
from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.calibration.half import half_precision


@pytest.mark.parametrize("tile", [(8, 10, 12), (16, 8, 8)])
def test_a_convolution_is_counted_as_torch_counts_it(tile):
    tiny = Tiny(features=5)
    with FlopCounterMode(display=False) as counter:
        torch.nn.Conv3d(1, 5, 3, padding=1)(torch.zeros(1, 1, *tile))
    assert operations(tiny_graph(tiny), tile) == counter.get_total_flops()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_network_with_strides_and_upsampling_is_counted_as_torch_counts_it(parts):
    tile = (12, 8, 16)
    skip, low, up = (WIDTHS[name] for name in ("skip", "low", "up"))
    with FlopCounterMode(display=False) as counter:
        image = torch.zeros(1, 1, *tile)
        first = torch.nn.Conv3d(1, skip, 3, padding=1)(image)
        second = torch.nn.Conv3d(skip, low, 3, stride=2, padding=1)(first)
        raised = torch.nn.ConvTranspose3d(low, up, 2, stride=2)(second)
        joined = torch.cat([raised, first] if parts == 2 else [raised], 1)
        torch.nn.Conv3d(joined.shape[1], 4, 3, padding=1)(joined)
    graph = unet(parts=parts).SerializeToString()
    assert operations(graph, tile) == counter.get_total_flops()


def test_precision_does_not_change_the_count():
    graph = unet().SerializeToString()
    counts = {operations(made, (8, 8, 8)) for made in (graph, half_precision(graph), to_int8(graph))}
    assert len(counts) == 1


def test_peaks_of_what_is_offered(monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", 32)
    monkeypatch.setattr(roofline, "probe", lambda: {"CPU": ["fp32", "int8"]})
    found = peaks(0.0)
    assert set(found) == {"fp32", "int8"}
    assert min(found.values()) > 0
