"""Files that stand in for others are named, with how to get what they stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemuse.runtime.scan.stand_in import stand_in

KINDS = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1\n", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--ab.nii.gz\n", "git annex get"),
    "annex of Windows": (b"..\\.git\\annex\\objects\\aa\\bb\\SHA256E-s1--ab\n", "git annex get"),
    "page": (b"\n<!DOCTYPE html>\n<html>", "a web page"),
    "old page": (b"<HTML><BODY>", "a web page"),
    "answer of a store": (b"<?xml version='1.0'?><Error>", "a web page"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stand_ins_are_named(kind: str, tmp_path: Path) -> None:
    content, reason = KINDS[kind]
    (tmp_path / "file").write_bytes(content)
    assert reason in stand_in(tmp_path / "file")


def test_link_into_an_annex_that_was_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("../.git/annex/objects/aa/bb/SHA256E-s1--ab.nii.gz")
    assert "git annex get" in stand_in(tmp_path / "file")


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\x1f\x8b", b"{}", b"version 2", b"text about annex/objects/"])
def test_other_files_are_not(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert stand_in(tmp_path / "file") == ""


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert [stand_in(tmp_path / name) for name in ("absent", "link", ".")] == ["", "", ""]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes by name")
def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert stand_in(tmp_path / "pipe") == ""
