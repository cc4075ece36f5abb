"""Which scans to segment and where the results of each go."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import InputError
from edgemuse.runtime.batch.walk import scans_below
from edgemuse.runtime.results.files import output_paths
from edgemuse.runtime.scan.nifti import scan_stem

log = logging.getLogger("edgemuse")

MOST_COMPARED = 2 << 30
"""Bytes of two scans of one name that are compared; a small gzip file may hold any number."""


@dataclass(frozen=True)
class Job:
    """A scan to be segmented.

    Attributes:
        scan: its path.
        outputs: the paths of its results by their name in `files.NAMES`.
        notes: what its provenance says besides.
        walked: whether it was found in a folder, so that nobody asked for this file: a label map is then passed over.
        refused: why it cannot be segmented, known from its path alone; empty: it may be.
    """

    scan: Path
    outputs: Mapping[str, Path]
    notes: Mapping[str, Any] = field(default_factory=dict)
    walked: bool = False
    refused: str = ""


def find_jobs(inputs: Iterable[Path], output: Path) -> list[Job]:
    """A job for each file, and for each T1 below each folder, whose sub-folders are made below `output` again.

    Raises InputError where there are none, or a folder holds no scan.
    """
    jobs = list[Job]()
    for path in inputs:
        jobs += _in_folder(path, output) if os.path.isdir(path) else [_job(path, output)]
    if not jobs:
        raise InputError("no scans are named; name T1 scans (.nii.gz) or folders of them")
    return distinct(jobs)


def _job(scan: Path, output: Path) -> Job:
    return Job(scan, output_paths(output, scan_stem(scan)))


def _in_folder(folder: Path, output: Path) -> list[Job]:
    scans = scans_below(folder, output)
    return [replace(_job(scan, output / scan.parent.relative_to(folder)), walked=True) for scan in scans]


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """One job for each place of results. Where several scans have the same place, that job is refused.

    Of one scan that lies in a folder twice, zipped and not, one file is taken. Raises InputError if there is but one
    place, and its job is refused.
    """
    by_place: dict[Path, dict[Path, Job]] = {}
    for job in jobs:
        by_place.setdefault(job.outputs["dseg.nii.gz"], {}).setdefault(job.scan, job)
    found = [_only(list(rivals.values()), place) for place, rivals in by_place.items()]
    if len(found) == 1 and found[0].refused:
        raise InputError(found[0].refused)
    return found


def _only(rivals: Sequence[Job], place: Path) -> Job:
    """The job of all that would give results at `place`."""
    first, *others = sorted(rivals, key=lambda job: job.scan.suffix.lower() != ".gz")  # what BIDS prefers
    different = [job for job in others if not _is_copy(job.scan, first.scan)]
    if different:
        return replace(first, refused=_clash([first, *different], place))
    for job in others:
        log.warning("%s holds the same scan as %s, which is taken", job.scan, first.scan)
    return first


def _clash(jobs: Sequence[Job], place: Path) -> str:
    """That the scans of `jobs` would give the same files, and what helps."""
    first, second = jobs[0].scan, jobs[1].scan
    would = f"and {len(jobs) - 2} more would all" if len(jobs) > 2 else "would both"
    if first.parent == second.parent:
        advice = "they are not the same scan: rename or remove one"
    elif any(job.walked for job in jobs):
        advice = "segment each folder into one of its own"
    else:
        advice = "name the folder that holds them instead of the files, and the results get its sub-folders"
    return f"{first} and {second} {would} give {place.name.removesuffix('dseg.nii.gz')}*; {advice}"


def _is_copy(scan: Path, other: Path) -> bool:
    """Whether two files are one scan; equal scans in folders of their own may be people who were mixed up."""
    return scan.parent == other.parent and same_content(scan, other)


def same_content(first: Path, second: Path) -> bool:
    """Whether two NIfTI files hold the same bytes once they are unzipped; what cannot be read is not the same."""
    try:
        if os.path.samefile(first, second):
            return True
        if not (first.is_file() and second.is_file()):  # reading a pipe could wait for ever
            return False
        with _content(first) as one, _content(second) as two:
            for _ in range(MOST_COMPARED >> 20):
                block = one.read(1 << 20)
                if block != two.read(1 << 20):
                    return False
                if not block:
                    return True
    except Exception:  # why it cannot be read is said when it is to be segmented
        return False
    return False


def _content(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def read_list(lines: Iterable[str]) -> list[Path]:
    """The paths in a text list, one a line; empty lines and those that begin with # are passed over.

    Raises InputError if it is not UTF-8.
    """
    try:
        stripped = [line.strip() for line in lines]
    except UnicodeDecodeError as error:
        raise InputError(f"the list of scans is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return [Path(line) for line in stripped if line and not line.startswith("#")]


def shard(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """Part `number`, from 1, of `count` parts of nearly the same size; together they are `jobs`."""
    return list(jobs[number - 1 :: count])
