"""Replacing a bundle: the old one or the new one is there, whole; nothing else is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import snapshot, tiny_bundle, zip_bundle

from edgemuse.engines.errors import OutputError
from edgemuse.export import writer
from edgemuse.export.writer import replace_bundle
from edgemuse.runtime.model.bundle import Bundle, open_bundle


@pytest.fixture(params=["folder", "zip"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    folder = tiny_bundle(tmp_path / "tiny.bundle")
    return open_bundle(folder if request.param == "folder" else zip_bundle(folder, tmp_path / "tiny.zip"))


def renamed(bundle: Bundle) -> tuple[Any, dict[str, bytes]]:
    """The same bundle under another name."""
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    return replace(bundle.manifest, name="renamed"), files


def test_the_new_one_takes_the_place(bundle: Bundle, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    path = replace_bundle(bundle, *renamed(bundle))
    assert path == bundle.path
    assert open_bundle(path).manifest.name == "renamed"
    open_bundle(path).verify()
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_old_one_stays_where_the_last_step_fails(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(tmp_path)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == bundle.path and ".tmp-" in str(path):
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OutputError, match="cannot be written"):
        replace_bundle(bundle, *renamed(bundle))
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


def test_a_damaged_new_one_does_not_replace(bundle: Bundle, tmp_path: Path) -> None:
    manifest, files = renamed(bundle)
    before = snapshot(tmp_path)
    with pytest.raises(Exception, match="wrong checksum"):
        replace_bundle(bundle, manifest, files | {"head.npz": files["head.npz"][:-1] + b"x"})
    assert snapshot(tmp_path) == before


def test_files_of_others_are_not_deleted(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "tiny.bundle")
    (folder / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    bundle = open_bundle(folder)
    with pytest.raises(OutputError, match=r"would delete notes\.txt"):
        replace_bundle(bundle, *renamed(bundle))
    assert snapshot(tmp_path) == before


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link.bundle"
    link.symlink_to(tiny_bundle(tmp_path / "tiny.bundle"), target_is_directory=True)
    bundle = open_bundle(link)
    with pytest.raises(OutputError, match="a link"):
        replace_bundle(bundle, *renamed(bundle))
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["new.zip", "new.bundle"])
def test_what_appears_meanwhile_is_not_replaced(
    name: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look, just before the bundle takes its place."""
    output, looks = tmp_path / name, []

    def look(path: Path) -> None:
        looks.append(path)
        if len(looks) == 2:
            path.write_bytes(b"mine")

    monkeypatch.setattr(writer, "check_output", look)
    with pytest.raises(OutputError, match="cannot be written"):
        writer.write_bundle(output, *renamed(bundle))
    assert output.read_bytes() == b"mine"
    assert not list(tmp_path.glob(".*"))
