"""What a file is that is not a NIfTI scan, and the command that makes one of it: for messages that help."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgemuse.runtime.scan.stand_in import stand_in, what_stands_in

READS = "edgemuse reads NIfTI (.nii or .nii.gz)"
LOOKED_AT = 200
"""Files of a folder that are looked at to find out what they are."""
START = 512
"""Bytes at a file's start that tell what it is."""


@dataclass(frozen=True)
class Format:
    """A format of images.

    Attributes:
        what: its name.
        command: what makes a NIfTI file of it; `{path}`, `{stem}` (without suffix) and `{folder}` stand for the file's.
        suffix: a pattern of the end of file names, in small letters.
        start: a pattern of the first bytes; None: they do not tell.
    """

    what: str
    command: str
    suffix: str
    start: bytes | None = None


FORMATS = (
    Format("DICOM", "dcm2niix -z y {folder}", r"\.(dcm|ima|dicom)", rb".{128}DICM"),
    Format("FreeSurfer's format", "nib-convert {path} {stem}.nii.gz", r"\.(mgz|mgh|mgh\.gz)"),
    Format("MINC", "mnc2nii {path} {stem}.nii", r"\.mnc(\.gz)?", rb"\x89HDF\r\n|CDF[\1\2]"),
    Format("NRRD", "c3d {path} -o {stem}.nii.gz", r"\.(nrrd|nhdr)", rb"NRRD000"),
    Format("MetaImage", "c3d {path} -o {stem}.nii.gz", r"\.(mha|mhd)", rb"ObjectType *= *Image"),
    Format("MRtrix's format", "mrconvert {path} {stem}.nii.gz", r"\.mif(\.gz)?", rb"mrtrix image"),
    Format("AFNI's format", "3dAFNItoNIFTI -prefix {stem}.nii.gz {path}", r"\.(head|brik|brik\.gz)"),
    Format("PAR/REC", "dcm2niix -z y {path}", r"\.(par|rec)"),
)
NIFTI_PAIR = re.compile(rb".{344}ni1\0|.{4}ni2\0", re.DOTALL)
"""How the header file of a pair begins."""


def of_name(path: Path) -> str:
    """Why a file of this name is not read, and what to do. Where the name does not tell, the content is looked at."""
    name = path.name.lower()
    if re.search(r"\.(img|hdr)(\.gz)?$", name):
        return _of_pair(path)
    found = next((kind for kind in FORMATS if re.search(kind.suffix + "$", name)), None)
    if found:
        return _filled(_conversion(found), path)
    return of_content(path, _start(path)) or f"{READS}; convert DICOM with dcm2niix, others likewise"


def of_content(path: Path, start: bytes) -> str:
    """What a file is that starts with these bytes, and what to do; empty if that is not known."""
    instead = what_stands_in(start)
    if instead:
        return instead
    found = next((kind for kind in FORMATS if kind.start and re.match(kind.start, start, re.DOTALL)), None)
    return _filled(_conversion(found), path) if found else ""


def of_missing(path: Path) -> str:
    """Why there is no file at `path`, and what to do: a link may be there all the same."""
    if not path.is_symlink():
        return "no such file"
    return stand_in(path) or f"a link to {os.readlink(path)}, which is not there"


def of_folder(folder: Path) -> str:
    """What a folder without NIfTI files holds, and what to do; empty if that is not known."""
    for path in islice(_files(folder), LOOKED_AT):
        start = _start(path)
        for kind in FORMATS:
            by_content = kind.start and re.match(kind.start, start, re.DOTALL)
            if by_content or re.search(kind.suffix + "$", path.name.lower()):
                return _filled(f"a folder of {_conversion(kind)}", path, folder)
    return ""


def _of_pair(path: Path) -> str:
    """Only NIfTI's pairs say where left is; of Analyze's, nib-convert would make it up."""
    header = path.with_name(re.sub(r"(?i)\.img(?=(\.gz)?$)", ".hdr", path.name))
    if NIFTI_PAIR.match(_start(header)):
        return _filled(f"half of a NIfTI pair, and {READS}; convert it: nib-convert {{path}} {{stem}}.nii.gz", header)
    return (
        f"half of a pair (.hdr, .img), and {READS}; a NIfTI pair converts with nib-convert, but Analyze does not say "
        "where left is: convert such a scan from DICOM again, with dcm2niix"
    )


def _conversion(kind: Format) -> str:
    return f"{kind.what}, and {READS}; convert it: {kind.command}"


def _filled(text: str, path: Path, folder: Path | None = None) -> str:
    """`text` about the file at `path`; words that hold a path with a space are put in quotation marks."""
    stem = path.with_name(re.sub(r"(?i)(\.(hdr|img|mgh|mif|mnc|brik))?\.?[^.]*$", "", path.name) or path.name)
    words = [(word, word.format(path=path, stem=stem, folder=folder or path.parent)) for word in text.split()]
    return " ".join(f'"{filled}"' if filled != word and " " in filled else filled for word, filled in words)


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _start(path: Path) -> bytes:
    """The first bytes of a file; none of what is not one or cannot be read."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(START)
    except OSError:
        return b""
