"""The memory plan: a bound that holds, and one that is near enough to be of use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    CommandLine,
    edit_manifest,
    head_image,
    replace_file,
    replace_graph,
    run_process,
    tiny_bundle,
    write_scan,
)
from unets import unet

from edgemuse.engines.errors import MemoryLimitError
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.network import memory
from edgemuse.runtime.network.memory import MemoryPlan, check_memory, gib, plan_memory
from edgemuse.runtime.scan.nifti import Scan, open_scan


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return open_bundle(tiny_bundle(tmp_path / "tiny.bundle")).manifest.network


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    return open_scan(write_scan(tmp_path / "t1.nii.gz"))


def test_total_is_the_larger_phase_beside_the_engine() -> None:
    assert MemoryPlan(engine=5, scan=10, preprocessing=100, features=6).total == memory.BASE + 115
    assert MemoryPlan(engine=50, scan=10, preprocessing=10, features=60).total == memory.BASE + 120


def test_plan_is_within_a_limit_or_refused(scan: Scan, network: Network) -> None:
    plan = plan_memory(scan, network, 1000)
    check_memory(scan, plan, plan.total / 2**30)
    check_memory(scan, plan, None)
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(scan, plan, (plan.total - 1) / 2**30)
    message = str(caught.value)
    assert message.startswith(f"{scan.path}: 24 x 28 x 20 voxels need {gib(plan.total)} and ")
    assert "are allowed by --max-ram" in message


def test_free_memory_is_the_limit_otherwise(scan: Scan, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_memory(scan, network, 1000)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)
    monkeypatch.setattr(memory, "available_memory", lambda: plan.total)
    with pytest.raises(MemoryLimitError, match="are free here"):
        check_memory(scan, plan, None)
    monkeypatch.setattr(memory, "resident_memory", lambda: plan.total)  # what the process holds counts for it
    check_memory(scan, plan, None)


def test_plan_grows_with_scan_and_network(tmp_path: Path, network: Network) -> None:
    small, large = (open_scan(write_scan(tmp_path / f"{n}.nii", np.ones((n, n, n), np.uint8))) for n in (16, 64))
    assert plan_memory(small, network, 1000).total < plan_memory(large, network, 1000).total
    assert plan_memory(small, network, 1000).total < plan_memory(small, network, 10**8).total


def test_limit_is_kept_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, scan = tiny_bundle(tmp_path / "b"), write_scan(tmp_path / "t1.nii.gz")
    cli = CommandLine(capfd, tmp_path / "cache")
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "--max-ram", "0.1")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"edgemuse: {scan}: 24 x 28 x 20 voxels need 0.2")
    assert "0.10 GiB are allowed by --max-ram" in ran.err
    assert cli("segment", scan, "-m", model, "-o", tmp_path / "out", "--max-ram", "1").code == 0


CASES = {
    "finer than the network in the plane": ((160, 160, 64), "i2", (0.7, 0.7, 2.0), {"features": 32}),
    "finer than the network": ((160, 160, 160), "i2", (1.0, 1.0, 1.0), {"features": 1}),
    "coarser than the network": ((64, 64, 64), "i2", (2.0, 2.0, 2.0), {"spacing": (1.0, 1.0, 1.0), "features": 32}),
    "same spacing, masked": ((160, 160, 160), "i2", (2.0, 2.0, 2.0), {"use_mask": True}),
    "same spacing, float64": ((192, 192, 176), "f8", (2.0, 2.0, 2.0), {"features": 1}),
    "anisotropic": ((112, 112, 80), "f4", (0.8, 0.8, 4.0), {}),
    "without a deferred head": ((112, 112, 112), "i2", (1.5, 1.5, 1.5), {"deferred": False, "classes": 24}),
}


def planned_and_peak(folder: Path, scan: Path, profile: str = "balanced", **changes: Any) -> tuple[int, int]:
    """Bytes planned for a scan and the peak of a process of its own, from start to end."""
    return run_model(tiny_bundle(folder / "b", **changes), folder, scan, "--profile", profile)


def run_model(model: Path, folder: Path, scan: Path, *options: str) -> tuple[int, int]:
    """The same of the bundle `model`."""
    arguments = ("segment", scan, "-m", model, "-o", folder, *options)
    ran = run_process(*arguments, cache_dir=folder / "cache")
    assert ran.code == 0, ran.err
    found = json.loads((folder / "t1_provenance.json").read_text())["memory"]
    return found["planned_bytes"], found["peak_bytes"]


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak with next to no scan and no network."""
    folder = tmp_path_factory.mktemp("idle")
    return planned_and_peak(folder, write_scan(folder / "t1.nii"), features=1)[1]


def test_base_covers_a_process_that_does_little(idle: int) -> None:
    assert idle <= memory.BASE


@pytest.mark.parametrize(
    ("case", "profile"),
    [(case, "balanced") for case in CASES]
    + [(case, "reference") for case in ("finer than the network in the plane", "same spacing, masked", "anisotropic")],
)
def test_peak_stays_below_the_plan(case: str, profile: str, idle: int, tmp_path: Path) -> None:
    """Without `BASE` too, whose slack would hide a term that is missing; and not more than four times what is used."""
    shape, dtype, spacing, changes = CASES[case]
    changes = {"patch": (64, 64, 64), "features": 16, "classes": 24} | changes
    scan = write_scan(tmp_path / "t1.nii", np.maximum(head_image(shape), 1).astype(dtype), spacing)
    planned, peak = planned_and_peak(tmp_path, scan, profile, **changes)
    assert peak - idle <= planned - memory.BASE, f"{gib(peak - idle)} used, {gib(planned - memory.BASE)} planned"
    assert planned <= 4 * peak, f"{gib(peak)} used, {gib(planned)} planned"


@pytest.mark.parametrize(
    ("backend", "precision"), [("openvino", "int8"), ("onnxruntime", "int8"), ("onnxruntime", "fp16")]
)
def test_peak_stays_below_the_plan_in_lower_precision(backend: str, precision: str, idle: int, tmp_path: Path) -> None:
    """Of a U-Net: its decoder holds the most at once."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    from edgemuse.bench.measure.uncalibrated import to_int8
    from edgemuse.calibration.half import half_precision

    tiny = {"patch": (96, 96, 96), "features": 24, "stride": (2, 2, 2)}
    model = tiny_bundle(tmp_path / "b", **tiny)
    graph = unet(out=24).SerializeToString()
    convert = {"int8": to_int8, "fp16": half_precision}[precision]
    replace_file(replace_graph(model, graph), "low.onnx", convert(graph))
    edit_manifest(model, graphs={"fp32": "fp32.onnx", precision: "low.onnx"})
    scan = write_scan(tmp_path / "t1.nii", np.maximum(head_image((96, 96, 96)), 1), (2.0, 2.0, 2.0))
    planned, peak = run_model(
        model, tmp_path, scan, "--profile", "balanced", "--backend", backend, "--precision", precision
    )
    assert peak - idle <= planned - memory.BASE, f"{gib(peak - idle)} used, {gib(planned - memory.BASE)} planned"
    assert planned <= 4 * peak, f"{gib(peak)} used, {gib(planned)} planned"
