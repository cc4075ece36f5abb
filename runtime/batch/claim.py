"""Claims: which process works on a scan, or gets a model, where several share a folder of results or a store.

A claim is a lock that the system takes back when its process ends, however it ends, so none is ever left over. It only
saves work: what is made appears by rename and is checked before, so two processes on one thing do no harm. Where a file
system has no locks (some network mounts), every claim is granted, and processes are kept apart by `--shard`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from pathlib import Path

from edgemuse.engines.errors import OutputError

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Claim:
    """A claim on what will be at `place`; of the results of a scan one of their paths."""

    def __init__(self, place: Path) -> None:
        mark = hashlib.sha256(os.fsencode(place.name)).hexdigest()[:16]  # the name itself could be too long
        self.path = place.with_name(f".{mark}.lock")
        self.exclusive = False
        """Whether it is held, and there are locks: then no other process of this machine works on the scan."""
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether no other process has it.

        Raises:
            OSError: the file cannot be made.
            OutputError: something else is in its place.
        """
        while True:
            descriptor = self._open()
            try:
                _lock(descriptor)
                self.exclusive = True
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                return False
            except OSError:
                pass  # no locks here
            self._descriptor = descriptor
            if sys.platform == "win32" or os.fstat(descriptor).st_nlink:
                return True
            self.release()  # its last holder removed the file after it was opened here

    def _open(self) -> int:
        """A descriptor of the file, made if it is not there. What lies behind a link is neither made nor opened."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = -1 if self.path.is_symlink() else os.open(self.path, flags, 0o666)
        except OSError:
            if not self.path.is_symlink():
                raise
            descriptor = -1
        if descriptor >= 0 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        if descriptor >= 0:
            os.close(descriptor)
        raise OutputError(f"{self.path} is a link or another thing that is no lock of edgemuse; remove it")

    def release(self) -> None:
        """Let others have it; a second time does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor, self.exclusive = self._descriptor, None, False
        with contextlib.suppress(OSError):
            if sys.platform == "win32":  # what is open cannot be removed there
                os.close(descriptor)
                self.path.unlink()
                return
            if os.fstat(descriptor).st_nlink:
                self.path.unlink()
        os.close(descriptor)
