"""Which scans to segment and where the results of each go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import InputError
from edgemuse.runtime.results.files import output_paths
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.nifti import SUFFIXES, scan_stem

OTHER_IMAGES = frozenset(
    "dseg probseg mask t2 t2w t2star t2starw flair t2flair pd pdw pdt2 b0 adc inplanet1 inplanet2 t1map t2map bold "
    "sbref dwi epi asl m0scan phasediff phase1 phase2 magnitude magnitude1 magnitude2 fieldmap angio swi ct pet seg "
    "labels brainmask".split()
)
"""What a file in a folder is not called after its last underscore or hyphen if it is a T1; BIDS's suffixes, mostly."""


@dataclass(frozen=True)
class Job:
    """A scan, the paths of its results by their name in `outputs.NAMES`, and what its provenance says besides."""

    scan: Path
    outputs: Mapping[str, Path]
    notes: Mapping[str, Any] = field(default_factory=dict)


def find_jobs(inputs: Iterable[Path], output: Path) -> list[Job]:
    """A job for each file, and for each T1 below each folder, whose sub-folders are made below `output` again.

    Raises InputError where a folder holds no scan or two scans would give results of the same name.
    """
    jobs = list[Job]()
    for path in inputs:
        jobs += _in_folder(path, output) if os.path.isdir(path) else [_job(path, output)]
    return distinct(jobs)


def _job(scan: Path, output: Path) -> Job:
    return Job(scan, output_paths(output, scan_stem(scan)))


def _in_folder(folder: Path, output: Path) -> list[Job]:
    scans = sorted(_walk(folder, output.absolute()))
    if not scans:
        other = foreign.of_folder(folder)
        raise InputError(
            f"{folder}: {other or 'a folder without T1 scans (.nii or .nii.gz); name the files themselves'}"
        )
    return [_job(scan, output / scan.parent.relative_to(folder)) for scan in scans]


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    """Possible T1 scans below `folder`, outside hidden folders and outside the folder of results."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and Path(parent, name).absolute() != output]
        yield from (Path(parent, name) for name in names if may_be_t1(name))


def may_be_t1(name: str) -> bool:
    """Whether a file called `name` may be a T1 scan: a NIfTI file that is not named after another kind of image."""
    if name[0] == "." or not name.lower().endswith(SUFFIXES):
        return False
    return re.split("[_-]", scan_stem(Path(name)).lower())[-1] not in OTHER_IMAGES


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once; raises InputError if two scans would give the same files."""
    by_place = dict[Path, Job]()
    for job in jobs:
        place = job.outputs["dseg.nii.gz"]
        other = by_place.setdefault(place, job)
        if other.scan != job.scan:
            stem = place.name.removesuffix("dseg.nii.gz")
            raise InputError(f"{other.scan} and {job.scan} would both give {stem}*; segment them into two folders")
    return list(by_place.values())


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
