"""Files whose names matter: put in place without replacing any, safe on the disk, and tidied after a killed process."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

OLD = 3600.0
"""Seconds after which a file that is being written was left by a process that is gone."""
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}
"""What file systems without hard links say to one."""


def place_new(source: Path, target: Path) -> None:
    """Give the file `source` the name `target`, which must be free; raises FileExistsError where it is not.

    Other ways to rename replace what is there. Where there are no hard links, the name is taken by an empty file first.
    """
    if sys.platform == "win32":
        os.rename(source, target)  # which replaces nothing there
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(source, target)
    else:
        os.unlink(source)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk, where it can; Windows cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard_old(folder: Path, names: re.Pattern[str]) -> None:
    """Remove files and folders in `folder` that are called like `names` and were not changed for `OLD` seconds.

    Those are what a killed process left; what cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not names.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if time.time() - facts.st_mtime <= OLD:
                    continue
                if stat.S_ISDIR(facts.st_mode):
                    shutil.rmtree(path)
                elif stat.S_ISREG(facts.st_mode):
                    path.unlink()
