"""The result of a scan becomes files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgemuse.runtime.pipeline.result import Segmentation
from edgemuse.runtime.regions.labels import count_voxels, dseg_tsv, structure_voxels, to_indices
from edgemuse.runtime.regions.muse import is_muse
from edgemuse.runtime.regions.volumes import dlmuse_csv, volumes_tsv
from edgemuse.runtime.results import files, picture
from edgemuse.runtime.scan.geometry import voxel_mm3
from edgemuse.runtime.scan.nifti import scan_stem


def write(
    segmentation: Segmentation,
    paths: Mapping[str, Path],
    with_picture: bool = True,
    notes: Mapping[str, Any] | None = None,
    new: Collection[Path] = (),
) -> list[Path]:
    """Write the label map, its legend, the volumes, the provenance and a picture to `paths`.

    Args:
        segmentation: what to write.
        paths: by their name in `files.NAMES`.
        with_picture: whether to make one.
        notes: what the provenance says besides.
        new: those of the paths where nothing was when the scan was taken up: what others put there is not replaced.

    Returns:
        The files written; older ones of a kind that is not written are removed. The provenance, which lists the hashes
        of the others, is placed first: where the process is killed halfway, it tells what is missing.

    Raises:
        OutputError: they cannot be written, or somebody put something else there meanwhile.
    """
    start = time.perf_counter()
    contents = _results(segmentation, with_picture)
    seconds = segmentation.provenance["seconds"] | {"write": round(time.perf_counter() - start, 4)}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    provenance = {**(notes or {}), **segmentation.provenance, "seconds": seconds, "files": hashes}
    record = {files.PROVENANCE: (json.dumps(provenance, indent=2) + "\n").encode()}
    contents = record | contents
    gone = [paths[name] for name in files.NAMES if name not in contents]
    _place({paths[name]: data for name, data in contents.items()}, gone, paths, new)
    return [paths[name] for name in files.NAMES if name in contents]


def _place(
    contents: Mapping[Path, bytes], gone: Iterable[Path], paths: Mapping[str, Path], new: Collection[Path]
) -> None:
    """Write the files. Where another machine wrote the same results meanwhile, whose claim is not seen here, again."""
    try:
        files.write_files(contents, gone, new)
    except files.Appeared:
        if files.not_ours(paths) is not None:
            raise
        files.write_files(contents, gone)


def _results(segmentation: Segmentation, with_picture: bool) -> dict[str, bytes]:
    """All files but the provenance."""
    with ThreadPoolExecutor(1) as pool:  # the label map is compressed while the picture is drawn
        dseg = pool.submit(_label_map, segmentation)
        others = _tables_and_picture(segmentation, with_picture)
        return {"dseg.nii.gz": dseg.result(), **others}


def _label_map(segmentation: Segmentation) -> bytes:
    return files.nifti_bytes(to_indices(segmentation.classes, segmentation.labels), segmentation.scan)


def _tables_and_picture(segmentation: Segmentation, with_picture: bool) -> dict[str, bytes]:
    labels, scan = segmentation.labels, segmentation.scan
    voxels, mm3 = structure_voxels(count_voxels(segmentation.classes, labels), labels), voxel_mm3(scan.affine)
    contents = {
        "dseg.tsv": dseg_tsv(labels).encode(),
        "volumes.tsv": volumes_tsv(voxels, labels, mm3).encode(),
    }
    if is_muse(labels):
        contents[files.DLMUSE_CSV] = dlmuse_csv(scan_stem(scan.path), voxels, mm3).encode()
    if with_picture:
        found, litres = np.count_nonzero(list(voxels.values())), sum(voxels.values()) * mm3 / 1e6
        caption = f"{scan.path.name}   {segmentation.provenance['model']['name']}   {found} structures   {litres:.2f} l"
        names = [flag.name for flag in segmentation.flags]
        shown, classes = segmentation.shown, segmentation.classes
        contents["qc.png"] = picture.picture(shown, classes, scan.affine, labels, caption, names)
    return contents
