"""`edgemuse cascade`: two bundles become one, and what it says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import CommandLine, snapshot, tiny_bundle, write_scan

from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.regions.muse import muse_labels


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "mask.bundle", classes=2, deferred=False, threshold=True)


def test_joins_two_bundles(mask: Path, cli: CommandLine, tmp_path: Path) -> None:
    regions, scan = tiny_bundle(tmp_path / "regions.bundle"), write_scan(tmp_path / "t1.nii.gz")
    ran = cli("cascade", mask, regions, "-o", tmp_path / "both.bundle", "--name", "both", "--keep-largest")
    assert (ran.code, ran.out, ran.err) == (0, f"{tmp_path / 'both.bundle'}\n", "")
    manifest = Cascade(tmp_path / "both.bundle").manifest
    assert (manifest.name, manifest.fill, manifest.keep_largest, manifest.padding_percent) == ("both", None, True, 10)
    assert cli("segment", scan, "--model", tmp_path / "both.bundle", "-o", tmp_path / "out").code == 0


def test_fills_in_cortical_csf_for_dlmuse(mask: Path, cli: CommandLine, tmp_path: Path) -> None:
    regions = tiny_bundle(tmp_path / "regions.bundle", classes=152, labels=muse_labels())
    assert cli("cascade", mask, regions, "-o", tmp_path / "both.zip").code == 0
    fill = Cascade(tmp_path / "both.zip").manifest.fill
    assert fill is not None
    assert (fill.number, fill.index, fill.name) == (152, 1, "Cortical CSF")


def test_fills_in_what_is_asked_for(mask: Path, cli: CommandLine, tmp_path: Path) -> None:
    regions = tiny_bundle(tmp_path / "regions.bundle")
    assert cli("cascade", mask, regions, "-o", tmp_path / "both.bundle", "--fill", 700).code == 0
    assert Cascade(tmp_path / "both.bundle").manifest.fill == Label(6, 700, "inside the mask")


@pytest.mark.parametrize(("orientation", "expected"), [("RAS", "RAS"), (None, "LIA")])
def test_orientation_is_that_of_the_bundles(
    orientation: str | None, expected: str, cli: CommandLine, tmp_path: Path
) -> None:
    both = [tiny_bundle(tmp_path / name, orientation=orientation) for name in ("a", "b")]
    assert cli("cascade", *both, "-o", tmp_path / "both.bundle", "--orientation", "lia").code == 0
    assert Cascade(tmp_path / "both.bundle").manifest.orientation == expected


def test_refuses(mask: Path, cli: CommandLine, tmp_path: Path) -> None:
    regions = tiny_bundle(tmp_path / "regions.bundle")
    no_orientation = [tiny_bundle(tmp_path / name, orientation=None) for name in ("a", "b")]
    before = snapshot(tmp_path)
    for arguments in (
        (mask, tmp_path / "absent", "-o", tmp_path / "both.bundle"),
        (mask, regions, "-o", mask),
        (mask, regions, "-o", tmp_path / "no" / "folder"),
        (*no_orientation, "-o", tmp_path / "both.bundle", "--orientation", "XYZ"),
    ):
        ran = cli("cascade", *arguments)
        assert ran.code == 2
        assert len(ran.err.splitlines()) == 1
        assert snapshot(tmp_path) == before


def test_labels_of_dlmuse_in_another_order_are_not_dlmuse(mask: Path, cli: CommandLine, tmp_path: Path) -> None:
    labels = [replace(label, index=label.index + 1000 * (label.number > 0)) for label in muse_labels()]
    regions = tiny_bundle(tmp_path / "regions.bundle", classes=152, labels=tuple(labels))
    assert cli("cascade", mask, regions, "-o", tmp_path / "both.bundle").code == 0
    assert Cascade(tmp_path / "both.bundle").manifest.fill is None
