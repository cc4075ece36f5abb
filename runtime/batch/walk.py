"""The T1 scans below a folder, links to folders followed; what is left out is named."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from edgemuse.engines.errors import InputError
from edgemuse.runtime.batch.kinds import is_nifti, other_kind
from edgemuse.runtime.scan import foreign

log = logging.getLogger("edgemuse")


def scans_below(top: Path, output: Path) -> list[Path]:
    """Files below the folder `top` that may be T1 scans by their names, sorted, and none from the folder `output`.

    Raises InputError if there are none.
    """
    images = [Path(folder, name) for folder, names in folders_below(top, output) for name in names if is_nifti(name)]
    scans = sorted(path for path in images if not other_kind(path.name))
    kinds = Counter(other_kind(path.name) for path in images)
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common() if kind)
    if not scans:
        why = f", only others by their names ({others})" if others else ""
        plain = f"a folder without T1 scans (.nii or .nii.gz){why}; name the files themselves"
        raise InputError(f"{top}: {(not others and foreign.of_folder(top)) or plain}")
    if others:
        log.info("%s: passed over by their names: %s", top, others)
    return scans


def folders_below(top: Path, output: Path) -> Iterator[tuple[str, list[str]]]:
    """`top` and every folder below it, each with the names of its files. Hidden ones and `output` are not entered.

    Links to folders are followed. Whatever leads to a folder, it is entered once, first as what it really is, so links
    that lead in circles end. A link that is not followed is named, and so is a folder that cannot be read.
    """
    entered, links, skipped = set[str](), list[Path](), os.path.realpath(output)
    start: Path | None = top
    while start is not None:
        for parent, folders, names in os.walk(start, onerror=_not_read):
            real = os.path.realpath(parent)
            if real in entered:  # by a mount, or by a junction of Windows, which is no link to Python
                folders.clear()
                continue
            entered.add(real)
            folders[:] = [n for n in folders if n[0] != "." and os.path.realpath(os.path.join(parent, n)) != skipped]
            links += [path for path in (Path(parent, name) for name in folders) if path.is_symlink()]
            yield parent, names
        start = _next(links, entered, top)


def _next(links: list[Path], entered: set[str], top: Path) -> Path | None:
    """Take from `links` those that lead nowhere new, and then the first of the others."""
    links.sort(reverse=True)
    while links:
        link = links.pop()
        real = os.path.realpath(link)
        if real in entered:
            log.warning("%s leads to %s, whose scans are taken once", link, real)
        elif Path(os.path.realpath(top)).is_relative_to(real):
            log.warning("%s leads to %s, which %s is part of, so it is not followed", link, real, top)
        else:
            return link
    return None


def _not_read(error: OSError) -> None:
    log.warning("%s: cannot be read (%s), so its scans are left out", error.filename, error.strerror)
