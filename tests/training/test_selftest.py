"""A self-test is added to the zip file of a bundle and nothing else is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import tiny_bundle, zip_bundle

pytest.importorskip("onnx", reason="int8 graphs are read with onnx: pip install 'edgemuse[calibrate]'")

from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.selftest import SELFTEST, read_selftest
from edgemuse.training.selftest import add_selftest


def test_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    path = zip_bundle(tiny_bundle(tmp_path / "tiny.bundle"), tmp_path / "tiny.zip")
    before = open_bundle(path)
    files = {name: before.read(name) for name in before.manifest.files}
    add_selftest(path)
    after = open_bundle(path)
    after.verify()
    assert after.manifest.files.keys() == {*files, SELFTEST}
    assert all(after.read(name) == data for name, data in files.items())
    assert replace(after.manifest, files=before.manifest.files) == before.manifest
    assert read_selftest(after) is not None
    first = path.read_bytes()
    add_selftest(path)
    assert path.read_bytes() == first
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.bundle", "tiny.zip"}
