"""How often the quality flags are right: silent on good scans, raised on copies that are spoilt in known ways.

The good scans are real T1s of SHARED: one in three of IXI's, and the four of other scanners beside them. With
`--anatomy` the ranges of volumes in `runtime/data/anatomy.tsv` are set anew from the same measurements.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np

from edgemuse.bench.measure.rows import Row, state
from edgemuse.bench.measure.spoilt import WAYS, Spoil
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.regions.anatomy import TABLE, WHOLE, Structure, read_table
from edgemuse.runtime.regions.labels import count_voxels, structure_voxels
from edgemuse.runtime.regions.labels import table as text_table
from edgemuse.runtime.scan.geometry import voxel_mm3

OPTIONS = Options("fast", precision="int8")
TAKEN = 3
"""One in so many scans of IXI is taken."""
EVERY_IXI, EVERY_OTHER = 27, 2
"""One in so many of the scans of IXI that are taken, and of the others, is spoilt."""
SMALL = 1000.0
"""mm3; structures whose median is smaller differ too much from head to head for a range."""
MARGINS = (0.5, 2.0)
"""The range of a structure is wider by these factors than what was measured in healthy adults."""
VENTRICLES = (0.25, 4.0)
"""The same for ventricles, which grow with age and disease."""
WHOLE_MARGINS = (0.85, 1.2)
"""The same for the whole brain."""
INTRODUCTION = """
*Good scans*: real T1s, one in three of IXI's and four of other scanners, of which at most 2 % should be flagged.
*Spoilt copies* of four of them, each made by one function of `bench/measure/spoilt.py`, which should all be flagged,
and by a flag that names what is wrong. The ranges of volumes were set on the same good scans, with wide margins; all
other limits are round numbers beyond what these scans show. A head that is mirrored from left to right looks like a
head, so nothing flags it. Segmented with the built-in model, profile `fast`, int8.
"""


def good_scans(shared: Path) -> tuple[list[Path], list[Path]]:
    """The T1s of IXI that are taken, and those of other scanners, in SHARED."""
    ixi, *others = (sorted((shared / "data" / name).glob("*_T1w.nii.gz")) for name in ("ixi/t1", "t1", "fs"))
    return ixi[::TAKEN], [scan for folder in others for scan in folder]


def assessed(segmenter: Segmenter, scan: Path) -> Row:
    """Flags of a scan, and mm3 of every structure by its index."""
    result = segmenter.segment(scan)
    voxels = structure_voxels(count_voxels(result.classes, result.labels), result.labels)
    mm3 = {str(index): count * voxel_mm3(result.scan.affine) for index, count in voxels.items()}
    return {"flags": [flag.name for flag in result.flags], "mm3": mm3}


def spoilt(segmenter: Segmenter, scan: Path, way: Spoil, folder: Path) -> Row:
    """The same of a copy that is spoilt in one way."""
    image: Any = nib.as_closest_canonical(nib.load(scan))
    data, affine = way(np.asanyarray(image.dataobj).astype(np.float32), image.affine)
    copy = folder / "spoilt_T1w.nii.gz"
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), copy)
    return assessed(segmenter, copy)


def good_table(rows: Sequence[Row]) -> str:
    """How many of the good scans each flag is raised for."""
    counts = Counter(flag for row in rows for flag in row["flags"])
    flagged = sum(bool(row["flags"]) for row in rows)
    lines = [("any", str(flagged), f"{flagged / len(rows):.1%}")]
    lines += [(flag, str(count), f"{count / len(rows):.1%}") for flag, count in counts.most_common()]
    return table((f"flag, of {len(rows)} good scans", "scans", "share"), lines)


def spoilt_table(rows: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """For each way of spoiling, how many copies were flagged, by which flags, and how many by one that names it."""
    lines = []
    for name, copies in rows:
        wanted = WAYS[name][1]
        right = sum(any(flag in wanted for flag in flags) for flags in copies)
        counts = Counter(flag for flags in copies for flag in flags)
        raised = ", ".join(f"{flag} {count}" for flag, count in counts.most_common())
        flagged = sum(bool(flags) for flags in copies)
        lines.append((name, " or ".join(wanted), f"{right} of {len(copies)}", f"{flagged} of {len(copies)}", raised))
    return table(("spoilt by", "named by", "so named", "flagged", "flags"), lines)


def muse_volumes(shared: Path) -> list[dict[str, float]]:
    """mm3 of each region in DLMUSE's label maps of IXI."""
    volumes = []
    for path in sorted((shared / "data" / "ixi" / "dlmuse").glob("*.nii.gz")):
        image: Any = nib.load(path)
        counts = np.bincount(np.asanyarray(image.dataobj).astype(np.int64).ravel())
        volumes.append({str(index): float(count) * voxel_mm3(image.affine) for index, count in enumerate(counts)})
    return volumes


def with_range(row: Structure, volumes: Sequence[dict[str, float]], parts: Sequence[int]) -> tuple[object, ...]:
    """A line of the anatomy table for `row`, whose volume is that of its `parts` in each of `volumes`."""
    mm3 = np.array([sum(each.get(str(part), 0.0) for part in parts) for each in volumes])
    cells: tuple[object, ...] = (row.protocol, row.index, row.name, row.tissue)
    if row.tissue == "fluid" or np.median(mm3) < SMALL or (row.mm3 is None and row.index != WHOLE and not mm3.min()):
        return (*cells, "", "")
    low, high = WHOLE_MARGINS if row.index == WHOLE else VENTRICLES if "entricle" in row.name else MARGINS
    return (*cells, f"{low * mm3.min():.0f}", f"{high * mm3.max():.0f}")


def anatomy(volumes: dict[str, Sequence[dict[str, float]]]) -> str:
    """The table of `regions.anatomy` with ranges set anew; `volumes`: of each scan, by protocol."""
    rows = read_table()
    brain = {
        protocol: [x.index for x in rows if x.protocol == protocol and x.index != WHOLE and x.tissue != "fluid"]
        for protocol in volumes
    }
    lines = [
        with_range(row, volumes[row.protocol], brain[row.protocol] if row.index == WHOLE else [row.index])
        for row in rows
    ]
    return text_table("\t", ["protocol", "index", "name", "tissue", "least_mm3", "most_mm3"], lines)


def measure(place: Workplace, bundle: Bundle, shared: Path) -> tuple[list[Row], list[tuple[str, list[list[str]]]]]:
    """What was found in every good scan, and the flags of every spoilt copy by the way it was spoilt."""
    ixi, others = good_scans(shared)
    good, copies = [], []
    with Segmenter(bundle, OPTIONS) as segmenter:
        for number, scan in enumerate((*others, *ixi), 1):
            say(f"good scan {number} of {len(ixi) + len(others)}")
            good.append(place.once(f"good {scan.name}", partial(assessed, segmenter, scan)))
        chosen = (*others[::EVERY_OTHER], *ixi[::EVERY_IXI])
        for number, (name, (way, _)) in enumerate(WAYS.items(), 1):
            say(f"spoilt in {number} of {len(WAYS)} ways: {name}")
            found = [
                place.once(f"{name}, {scan.name}", partial(spoilt, segmenter, scan, way, place.folder))["flags"]
                for scan in chosen
            ]
            copies.append((name, found))
    return good, copies


@click.command()
@page_options("flags")
@click.option("--anatomy", "write_anatomy", is_flag=True, help="Set the ranges in runtime/data/anatomy.tsv anew, too.")
def main(shared: Path, output: Path, work: Path, write_anatomy: bool) -> None:
    """Segment good scans and spoilt copies of some, and count the flags."""
    logging.getLogger("edgemuse").setLevel(logging.ERROR)
    place, bundle = Workplace(work, state()), open_bundle(BUILT_IN)
    good, copies = measure(place, bundle, shared)
    if write_anatomy:
        text = anatomy({"FreeSurfer": [row["mm3"] for row in good], "MUSE": muse_volumes(shared)})
        TABLE.write_text(text, encoding="utf-8", newline="\n")
        say(f"{TABLE}: ranges set anew; measure again to see the flags that they give")
    what = [named("built-in model", bundle.sha256)]
    tables = ("## Good scans", good_table(good), "## Spoilt copies", spoilt_table(copies), place.machine)
    place.publish(output, joined(place.age(what, "flags"), "# Quality flags", INTRODUCTION, *tables))


if __name__ == "__main__":
    main()
