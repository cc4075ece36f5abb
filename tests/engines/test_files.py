"""Names in folders: nothing is replaced that must not be, and what killed processes left goes."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

import pytest
from bundles import snapshot

from edgemuse.engines.files import OLD, discard_old, place_new, sync

posix = pytest.mark.skipif(os.name != "posix", reason="links of other systems need rights")


@pytest.fixture(params=["links", "no links"])
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file to be placed, on a file system with and without hard links."""

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "made").write_text("new")
    return tmp_path


def test_a_free_name_is_taken(files: Path) -> None:
    place_new(files / "made", files / "name")
    assert {path.name: path.read_text() for path in files.iterdir()} == {"name": "new"}


@pytest.mark.parametrize("kind", ["file", "folder", pytest.param("link", marks=posix), pytest.param("to", marks=posix)])
def test_what_has_the_name_stays(kind: str, files: Path) -> None:
    target = files / "name"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(files / ("made" if kind == "to" else "nowhere"))
    before = snapshot(files)
    with pytest.raises(FileExistsError):
        place_new(files / "made", target)
    assert snapshot(files) == before


def test_other_failures_are_told(tmp_path: Path) -> None:
    (tmp_path / "made").touch()
    with pytest.raises(FileNotFoundError):
        place_new(tmp_path / "made", tmp_path / "gone" / "name")
    with pytest.raises(FileNotFoundError):
        place_new(tmp_path / "absent", tmp_path / "name")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_old_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    """Neither new ones nor those of other names, nor what a link of such a name leads to."""
    old, kept = (time.time() - 2 * OLD,) * 2, ["x1.part", ".x1.part~", ".new.part"]
    (tmp_path / ".old.part").touch()
    (tmp_path / ".folder.part").mkdir()
    (tmp_path / ".folder.part" / "inside").touch()
    for name in kept:
        (tmp_path / name).touch()
    if os.name == "posix":
        (tmp_path / "x1.part").replace(tmp_path / "precious")
        (tmp_path / ".link.part").symlink_to(tmp_path / "precious")
        os.utime(tmp_path / ".link.part", old, follow_symlinks=False)
        kept[0:1] = ["precious", ".link.part"]
    for path in tmp_path.iterdir():
        if path.name not in (".new.part", ".link.part"):
            os.utime(path, old)
    discard_old(tmp_path, re.compile(r"\..*\.part"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    discard_old(tmp_path / "absent", re.compile(".*"))


def test_syncing_what_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    sync(tmp_path / "absent")
    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
