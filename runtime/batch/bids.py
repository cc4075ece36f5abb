"""A BIDS dataset in, a BIDS derivative dataset out (brain-imaging data structure 1.11, bids.neuroimaging.io).

`sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz` gives `sub-01/ses-1/anat/sub-01_ses-1_seg-MODEL_dseg.nii.gz` with sidecar,
legend and volumes, and `sub-01/figures/sub-01_ses-1_seg-MODEL_qc.png`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgemuse.engines.errors import InputError, OutputError, one_line
from edgemuse.runtime.batch.jobs import Job, distinct
from edgemuse.runtime.batch.kinds import may_be_t1
from edgemuse.runtime.regions.labels import table
from edgemuse.runtime.results import files as outputs
from edgemuse.runtime.scan import foreign
from edgemuse.runtime.scan.nifti import SUFFIXES, file_sha256, scan_stem
from edgemuse.runtime.scan.stand_in import stand_in

log = logging.getLogger("edgemuse")

VERSION = "1.11.1"
DESCRIPTION = "dataset_description.json"
T1 = "_T1w"
MOST_NAMED = 10
"""Labels in one line."""
NONE = "n/a"
"""How BIDS writes that there is no value."""
GROUP_RECORD = ".edgemuse.json"
"""In it stand the SHA-256 of the merged tables, by their names."""
IGNORED = ("figures", "*_volumes.tsv", f"*_{outputs.DLMUSE_CSV}")
"""What BIDS has no names for yet; for `.bidsignore`."""


def find_jobs(
    dataset: Path, output: Path, model: str, participants: Sequence[str], sessions: Sequence[str]
) -> list[Job]:
    """A job for every T1w image of the dataset, or of these participants and sessions.

    Args:
        dataset: its root.
        output: root of the derivatives.
        model: its name, for the file names.
        participants: labels, with or without `sub-`; none: all.
        sessions: labels, with or without `ses-`; none: all, and images without a session.

    Raises:
        InputError: there is no image, or none of those asked for. Where only some labels give one, the others are named
            in a warning.
    """
    wanted = _prefixed("ses", sessions)
    scans = [
        path
        for subject in _subjects(dataset, participants)
        for anat in _anat_folders(subject)
        if not wanted or anat.parent.name in wanted
        for path in _files(anat)
        if _is_t1(path.name)
    ]
    empty = _without(scans, dataset, participants, sessions)
    if not scans:
        of = f" of {empty}" if empty else ""
        raise InputError(f"{dataset}: no T1w image (sub-*/[ses-*/]anat/*{T1}.nii[.gz]){of}")
    if empty:
        log.warning("%s: no T1w image of %s; what else was asked for is segmented", dataset, empty)
    return distinct(_job(scan, dataset, output, segmentation_label(model)) for scan in scans)


def _prefixed(key: str, labels: Sequence[str]) -> list[str]:
    """`sub-01` for `01` and for `sub-01`, each once."""
    return list(dict.fromkeys(f"{key}-{label.removeprefix(f'{key}-')}" for label in labels))


def _subjects(root: Path, labels: Sequence[str]) -> list[Path]:
    """The folders of these participants that exist, or of all."""
    found = {path.name: path for path in sorted(root.glob("sub-*")) if path.is_dir()}
    if not found:
        raise InputError(f"{root}: no sub-* folder there, so it is not the root of a BIDS dataset")
    return [found[name] for name in _prefixed("sub", labels) or found if name in found]


def _anat_folders(subject: Path) -> list[Path]:
    """Without a session and with one, and links to folders like folders."""
    return [path for path in sorted([*subject.glob("anat"), *subject.glob("ses-*/anat")]) if path.is_dir()]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        log.warning("%s: cannot be read (%s), so its scans are left out", folder, error.strerror)
        return []


def _without(found: Sequence[Path], root: Path, participants: Sequence[str], sessions: Sequence[str]) -> str:
    """The names of participants and sessions asked for of which nothing is in `found`, paths below `root`."""
    there = {part for path in found for part in path.relative_to(root).parts}
    empty = [name for name in (*_prefixed("sub", participants), *_prefixed("ses", sessions)) if name not in there]
    more = f" and {len(empty) - MOST_NAMED} more" if len(empty) > MOST_NAMED else ""
    return ", ".join(empty[:MOST_NAMED]) + more


def _is_t1(name: str) -> bool:
    return name.startswith("sub-") and name.endswith(tuple(T1 + suffix for suffix in SUFFIXES)) and may_be_t1(name)


def _job(scan: Path, dataset: Path, output: Path, label: str) -> Job:
    place = scan.parent.relative_to(dataset)
    stem = f"{scan_stem(scan)}_seg-{label}"
    paths = outputs.output_paths(output / place, stem)
    paths[outputs.PROVENANCE] = output / place / f"{stem}_dseg.json"
    paths["qc.png"] = output / place.parts[0] / "figures" / f"{stem}_qc.png"
    notes = {
        "Description": "Segmentation of the whole brain, on the grid of the T1w image",
        "Manual": False,
        "SpatialReference": "orig",
        "Sources": [f"bids:raw:{scan.relative_to(dataset).as_posix()}"],
    }
    return Job(scan, paths, notes)


def segmentation_label(model: str) -> str:
    """The model's name as a BIDS label: letters and digits."""
    return re.sub("[^0-9A-Za-z]", "", model) or "edgemuse"


def start_dataset(dataset: Path, output: Path) -> None:
    """Make `output` a derivative dataset of `dataset`, unless it is one; raises OutputError if it is something else."""
    outputs.prepare_folder(output)
    path = output / DESCRIPTION
    if not _written(path, json.dumps(_description(dataset), indent=2) + "\n"):
        _check_ours(path)
    _written(output / ".bidsignore", "".join(f"{pattern}\n" for pattern in IGNORED))


def _written(path: Path, text: str) -> bool:
    """Write a file where none is; whether there was none, neither before nor by another process meanwhile."""
    if os.path.lexists(path):
        return False
    try:
        outputs.write_files({path: text.encode()}, new=[path])
    except outputs.Appeared:
        return False
    return True


def _check_ours(path: Path) -> None:
    makers = outputs.read_record(path).get("GeneratedBy")
    names = [maker.get("Name") for maker in makers if isinstance(maker, dict)] if isinstance(makers, list) else []
    if "edgemuse" not in names:
        raise OutputError(f"{path} is of a dataset that edgemuse did not make; choose another folder")


def _description(dataset: Path) -> dict[str, Any]:
    raw = outputs.read_record(dataset / DESCRIPTION)
    doi, name = raw.get("DatasetDOI"), raw.get("Name")
    root = dataset.resolve().as_uri()
    return {
        "Name": f"edgemuse: brain segmentation of {name if isinstance(name, str) and name else dataset.resolve().name}",
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "edgemuse", "Version": version("edgemuse")}],
        "SourceDatasets": [{"DOI": doi} if isinstance(doi, str) and doi else {"URL": root}],
        "DatasetLinks": {"raw": root},
    }


def merge_tables(
    output: Path, participants: Sequence[str], sessions: Sequence[str] = (), overwrite: bool = False
) -> list[Path]:
    """Put the volume tables of all scans in `output`, or of these participants and sessions, into one a model.

    Returns their paths.

    Raises:
        InputError: there is no table, or one is not like the others.
        OutputError: a merged table cannot be written, or is there, is not as it was written here and `overwrite` does
            not say to replace it.
    """
    if not (output / DESCRIPTION).exists():
        raise _nothing(output)
    _check_ours(output / DESCRIPTION)
    wanted = _prefixed("ses", sessions)
    folders = [anat for subject in _subjects(output, participants) for anat in _anat_folders(subject)]
    folders = [anat for anat in folders if not wanted or anat.parent.name in wanted]
    merged, found = {}, list[Path]()
    for name, delimiter in (("volumes.tsv", "\t"), (outputs.DLMUSE_CSV, ",")):
        by_model: dict[str, list[Path]] = {}
        for path in (path for folder in folders for path in sorted(folder.glob(f"*_seg-*_{name}"))):
            by_model.setdefault(_entity(path.name, "seg"), []).append(path)
            found.append(path)
        for label, paths in by_model.items():
            header = ["participant_id", "session_id", "scan"] if delimiter == "\t" else []
            rows = _rows(paths, delimiter, keyed=bool(header))
            merged[output / f"group_seg-{label}_{name}"] = table(delimiter, header + next(rows), rows).encode()
    empty = _without(found, output, participants, sessions)
    if not merged:
        raise _nothing(output, empty)
    if empty:
        log.warning("%s: no volumes of %s; those of the others are merged", output, empty)
    _write_merged(output, merged, overwrite)
    return list(merged)


def _write_merged(output: Path, merged: Mapping[Path, bytes], overwrite: bool) -> None:
    """Write the tables. Their hashes are noted before: by these they are known when they are to be replaced."""
    record = outputs.read_record(output / GROUP_RECORD).get("files")
    known: dict[str, Any] = dict(record) if isinstance(record, dict) else {}
    there = {path: _hash(path) for path in merged if os.path.lexists(path)}
    for path, found in there.items() if not overwrite else ():
        if found is None or found not in known.get(path.name, ()):
            raise OutputError(
                f"{path} exists and is not as 'edgemuse bids' wrote it; move it away, or replace it with --overwrite"
            )
    for path, text in merged.items():  # that of the table that is there too: this process may be killed in between
        before = [there[path]] if path in there and not overwrite else []
        known[path.name] = [*before, hashlib.sha256(text).hexdigest()]
    note = (json.dumps({"files": known}, indent=2) + "\n").encode()
    new = () if overwrite else [path for path in merged if path not in there]
    outputs.write_files({output / GROUP_RECORD: note, **merged}, new=new)


def _hash(path: Path) -> str | None:
    """SHA-256 of a plain file; None: it is something else."""
    return file_sha256(path) if path.is_file() and not path.is_symlink() else None


def _nothing(output: Path, labels: str = "") -> InputError:
    what = f"no volumes of {labels}" if labels else "no volumes"
    return InputError(f"{output}: {what} there; run 'edgemuse bids BIDS_DIR {output} participant' first")


def _rows(paths: Sequence[Path], delimiter: str, keyed: bool) -> Iterator[list[str]]:
    """The common header, then the rows of all tables; `keyed`: those begin with participant, session and scan."""
    common: list[str] | None = None
    for path in paths:
        header, *rows = _table(path, delimiter) or [[]]
        if common is None:
            common = header
            yield header
        if header != common or any(len(row) != len(header) for row in rows):
            raise InputError(f"{path}: not a table like {paths[0]}; segment that scan again with --overwrite")
        stem = path.name.partition("_seg-")[0]
        key = [f"sub-{_entity(stem, 'sub')}", _session(stem), stem] if keyed else []
        yield from (key + row for row in rows)


def _table(path: Path, delimiter: str) -> list[list[str]]:
    instead = stand_in(path)
    if instead:
        raise InputError(f"{path}: {instead}")
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return [*csv.reader(file, delimiter=delimiter)]
    except FileNotFoundError as error:
        raise InputError(f"{path}: {foreign.of_missing(path)}") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from error


def _session(stem: str) -> str:
    label = _entity(stem, "ses")
    return f"ses-{label}" if label else NONE


def _entity(name: str, key: str) -> str:
    found = re.search(rf"(?:^|_){key}-([0-9A-Za-z+]+)", name)
    return found[1] if found else ""
