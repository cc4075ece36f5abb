"""Files that stand in for others: what tools leave or download where the real content was not fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

HEAD_BYTES = 1024
LFS = b"version https://git-lfs.github.com/"
ANNEX = re.compile(rb"(?:\S*/)?(?:\.git/)?annex/objects/")
PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|\?xml|head|!--)", re.IGNORECASE)


def stand_in(path: Path) -> str:
    """What lies at `path` in place of the file that belongs there, and how to get that; empty if it is none of these.

    Told apart are files without content, pointers of Git LFS and git-annex, and web pages.
    """
    try:
        if path.is_symlink() and not path.exists():
            return what_stands_in(os.fsencode(os.readlink(path)))
        if not path.is_file():  # of a pipe, opening it would wait for somebody to write
            return ""
        with path.open("rb") as file:
            return what_stands_in(file.read(HEAD_BYTES))
    except OSError:
        return ""


def what_stands_in(head: bytes) -> str:
    """As `stand_in`, of the first bytes of a file, or of where a link leads that leads nowhere."""
    if not head:
        return "an empty file; copy or download it again"
    if head.startswith(LFS):
        return "a pointer of Git LFS, not the file itself; get that with 'git lfs pull'"
    if ANNEX.match(head.replace(b"\\", b"/")):
        return "a pointer of git-annex, not the file itself; get that with 'git annex get' or 'datalad get'"
    if PAGE.match(head):
        return "a web page, not the file itself; download that, perhaps after a login"
    return ""
