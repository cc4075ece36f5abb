"""`edgemuse cascade`: joins two bundles into one that runs them one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from edgemuse.export.writer import write_cascade
from edgemuse.runtime.cli.terminal import say_paths
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.cascade import CascadeManifest
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.regions.muse import cortical_csf, is_muse

PADDING_PERCENT = 10
ADULT_ICV_MM3 = (900_000.0, 2_200_000.0)
"""The range of intracranial volumes that are not flagged. It is wide: outside it a wrong mask is likelier than an
unusual head."""


@click.command(short_help="Join a brain mask bundle and a region bundle into one.")
@click.argument("mask", type=click.Path(path_type=Path))
@click.argument("regions", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="BUNDLE",
    help="Where to write: a new directory, or a new file if it ends with .zip. Nothing that exists is overwritten.",
)  # fmt: skip
@click.option("--name", help="Name of the cascade, which its results record.  [default: the name of REGIONS]")
@click.option("--orientation", default="LPS", show_default=True, metavar="CODES", help="Orientation that scans are "
              "turned to before the mask is found, where neither bundle names one.")  # fmt: skip
@click.option("--fill", metavar="INDEX", type=click.IntRange(1, 2**32 - 1), help="Label number for voxels inside the "
              "mask that REGIONS calls background.  [default: 1 for DLMUSE, else they stay background]")  # fmt: skip
@click.option("--keep-largest", is_flag=True, help="Keep only the largest component of the mask; NiChart_DLMUSE "
              "does so for refaced scans only.")  # fmt: skip
def cascade(
    mask: Path, regions: Path, output: Path, name: str | None, orientation: str, fill: int | None, keep_largest: bool
) -> None:
    """Join a brain mask bundle and a region bundle into one.

    'edgemuse segment' then finds the mask with the bundle MASK on the whole scan, crops to it, and labels with the
    bundle REGIONS what is inside, as NiChart_DLMUSE does with DLICV and DLMUSE.

    \b
    Example:
      edgemuse cascade dlicv.bundle dlmuse-regions.bundle -o dlmuse.bundle
      edgemuse segment T1.nii.gz -o out --model dlmuse.bundle
    """  # noqa: D301  # \b keeps click from wrapping the example
    first, second = open_bundle(mask), open_bundle(regions)
    manifest = manifest_of(first, second, orientation)
    manifest = replace(manifest, name=name or manifest.name, keep_largest=keep_largest)
    if fill is not None:
        manifest = replace(manifest, fill=filled_label(second, fill))
    say_paths([write_cascade(output, manifest, first, second)])


def manifest_of(mask: Bundle, regions: Bundle, orientation: str = "LPS") -> CascadeManifest:
    """A manifest that runs two networks as NiChart_DLMUSE does; for DLMUSE's own network it fills in cortical CSF."""
    fill = cortical_csf(len(regions.labels))
    return CascadeManifest(
        name=regions.name,
        license=regions.manifest.license,
        orientation=regions.manifest.network.orientation or mask.manifest.network.orientation or orientation.upper(),
        stages={"mask": mask.sha256, "regions": regions.sha256},
        padding_percent=PADDING_PERCENT,
        keep_largest=False,
        plausible_mm3=ADULT_ICV_MM3,
        fill=fill if is_muse((*regions.labels, fill)) else None,
    )


def filled_label(regions: Bundle, index: int) -> Label:
    """The label numbered `index`, for voxels to which `regions` gives no label."""
    muse = cortical_csf(len(regions.labels))
    return (
        muse
        if is_muse((*regions.labels, muse)) and index == muse.index
        else Label(muse.number, index, "inside the mask")
    )
