"""What the measurement of a first look rests on: a part of a scan gives what the whole gives there, and counts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from bundles import head_image, tiny_bundle, write_scan
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'edgemuse[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install 'edgemuse[dev]'")

from edgemuse.bench import first_look
from edgemuse.bench.first_look import (
    PATCHES,
    TRUE_SCAN,
    Found,
    Head,
    MaskNetwork,
    Row,
    box_of,
    head,
    nearest,
    page,
    rows_of,
    touching,
)
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.bundle import open_bundle
from edgemuse.runtime.pipeline import Options
from edgemuse.runtime.stages import segment

SIDE = 8
"""Of the patches."""


def made(folder: Path, spacing: float) -> tuple[MaskNetwork, Head]:
    """A random network of `spacing`, and a scan of 1 mm for it; both are left in `folder`."""
    changes = {"spacing": (spacing, spacing, spacing), "patch": (SIDE, SIDE, SIDE)}
    network = MaskNetwork(open_bundle(tiny_bundle(folder / "tiny.bundle", **changes)))
    return network, head(write_scan(folder / "scan_T1w.nii.gz", head_image((30, 26, 28))), network.network)


@pytest.mark.parametrize("spacing", [1.0, 2.0])
@pytest.mark.parametrize("profile", ["balanced", "fast"])
def test_the_whole_scan_is_what_the_product_gives(profile: str, spacing: float, tmp_path: Path) -> None:
    network, subject = made(tmp_path, spacing)
    options = Options(profile, EngineOptions("openvino", "fp32"), postprocess=False)
    found = network.run(network.patches if profile == "balanced" else network.one_pass, subject)
    expected = segment(tmp_path / "scan_T1w.nii.gz", tmp_path / "tiny.bundle", options)
    np.testing.assert_array_equal(found.mask, expected.classes > 0)
    tile = expected.provenance["profile"]
    assert found.voxels == tile["tiles"] * np.prod(tile["tile"])


def test_a_box_changes_nothing_but_its_edge(tmp_path: Path) -> None:
    """The network sees one voxel around each, and intensities are those of the whole scan."""
    network, subject = made(tmp_path, 1.0)
    whole = network.run(network.one_pass, subject)
    part = network.run(network.one_pass, subject, (slice(5, 19), slice(3, 20), slice(4, 16)))
    inside = tuple(slice(side.start + 1, side.stop - 1) for side in (slice(5, 19), slice(3, 20), slice(4, 16)))
    expected = subject.inside(whole.mask)[inside]
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(subject.inside(part.mask)[inside], expected)
    assert part.voxels == 14 * 17 * 12
    assert not subject.inside(part.mask)[:5].any()


@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_a_border_everywhere_gives_the_whole(spacing: float, tmp_path: Path) -> None:
    network, subject = made(tmp_path, spacing)
    whole = network.run(network.patches, subject)
    scattered = np.random.default_rng(1).random(whole.mask.shape) < 0.5
    found = network.border(subject, scattered)
    np.testing.assert_array_equal(found.mask, whole.mask)
    assert found.voxels == whole.voxels


def test_what_no_patch_reaches_stays_as_it_was(tmp_path: Path) -> None:
    network, subject = made(tmp_path, 1.0)
    rough = np.zeros(subject.scan.shape, bool)
    rough[2:6, 2:6, 2:6] = True
    found = network.border(subject, rough)
    assert 0 < found.voxels < network.run(network.patches, subject).voxels
    assert not found.mask[20:, 20:, 20:].any()
    assert (found.mask != rough).any()


def test_patches_inside_or_outside_do_not_touch_the_border() -> None:
    mask = np.zeros((24, 24, 24), bool)
    mask[2:, 2:, 2:] = True
    starts = ((0, 5, 16), (5,), (5,))
    assert touching(mask, starts, (8, 8, 8)) == [True, False, True]
    assert touching(~mask & False, starts, (8, 8, 8)) == [False] * 3


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_whole_multiples_repeat_and_come_back(d: int, h: int, times: int, random: Random) -> None:
    mask = np.array([random.random() < 0.5 for _ in range(d * h * 3)]).reshape(d, h, 3)
    larger = nearest(mask, (d * times, h, 3 * times))
    np.testing.assert_array_equal(larger, mask.repeat(times, 0).repeat(times, 2))
    np.testing.assert_array_equal(nearest(larger, mask.shape), mask)


def test_the_box_of_the_largest_part() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[8:12, 9:14, 3:5] = True
    mask[0, 0, 0] = True
    assert box_of(mask, (1.0, 2.0, 1.0), 0) == (slice(8, 12), slice(9, 14), slice(3, 5))
    assert box_of(mask, (1.0, 2.0, 1.0), 4) == (slice(4, 16), slice(7, 16), slice(0, 9))


def test_masks_are_judged_scan_by_scan() -> None:
    truth = np.zeros((10, 10, 10), np.uint8)
    truth[:5] = 1
    exact, worse = Found(truth > 0, 100, 2.0), Found(np.roll(truth > 0, 1, axis=0), 40, 1.0)
    found = {
        "a head": {PATCHES: exact, "same": Found(exact.mask, 100, 1.0), "less": Found(exact.mask, 40, 1.0)},
        TRUE_SCAN: {PATCHES: exact, "same": exact, "less": worse},
    }
    rows = {row.name: row for row in rows_of("a network", found, truth)}
    assert [(row.passes, row.saves) for row in rows.values()] == [(True, False), (True, False), (False, True)]
    assert rows["less"].cells == ("a network", "less", "1.0000, 0.8000", "0.8000", "40%, 40%", "1.0, 1.0", "fails: vxm")


def test_the_page_names_what_passes_and_saves_with_every_network() -> None:
    cells = ("",) * 7
    rows = [Row(name, *of, cells) for of in ((True, True), (True, True)) for name in ("good",)]
    rows += [Row("one network", True, True, cells), Row("one network", False, True, cells)]
    rows += [Row("saves nothing", True, False, cells), Row(PATCHES, True, False, cells)]
    text = " ".join(page(rows, [], ["a"], 1).split())
    assert "with both networks: good, saves nothing. " in text
    assert "**good**" in text
    assert "both: **none**" in " ".join(page(rows[2:], [], ["a"], 1).split())


def test_the_command_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"classes": 2, "deferred": False, "threshold": True, "patch": (16, 16, 16)}
    model = tiny_bundle(tmp_path / "tiny.bundle", **changes)
    monkeypatch.setattr(first_look, "BUILT_IN", model)
    monkeypatch.setattr(first_look, "development_bundle", lambda shared, work: model)
    for name in ("chris", "crop", TRUE_SCAN):
        scan = write_scan(tmp_path / "data" / "t1" / f"{name}_T1w.nii.gz", head_image((34, 30, 32)))
    write_scan(scan.with_name(f"{TRUE_SCAN}_dseg.nii.gz"), (head_image((34, 30, 32)) > 550).astype(np.int16))
    facts = {"patch_size": [16, 16, 16], "spacing": [1.0, 1.0, 1.0], "num_pool_per_axis": [2, 2, 2]}
    (tmp_path / "data" / "dlmuse").mkdir()
    (tmp_path / "data" / "dlmuse" / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": facts}}))
    output = tmp_path / "page.md"
    ran = CliRunner().invoke(first_look.main, [str(tmp_path), "-o", str(output), "--repeats", "1"])
    assert ran.exit_code == 0, ran.output
    rows = [line for line in output.read_text().splitlines() if line.startswith(("| built-in |", "| development |"))]
    assert len(rows) == 16
    assert rows[0].startswith(f"| built-in | {PATCHES} | 1.0000, 1.0000, 1.0000, 1.0000 |")
    assert "| 100%, 100%, 100%, 100% |" in rows[0]
    assert "| noisy air | 36 / " in output.read_text()
