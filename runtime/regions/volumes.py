"""Tables of volumes: one that is tidy, for any model, and the one that NiChart_DLMUSE writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemuse.runtime.regions.labels import Label, by_index, table
from edgemuse.runtime.regions.muse import is_muse, region_voxels, regions


def volumes_tsv(voxels: Mapping[int, int], labels: Sequence[Label], voxel_mm3: float) -> str:
    """Index, name, voxels and mm3 of every structure but background; for DLMUSE then of its sums, ICV first."""
    rows = [(label.index, label.name, voxels[label.index]) for label in by_index(labels) if label.index]
    if is_muse(labels):
        sums = region_voxels(voxels)
        rows += [(x.index, x.name, sums[x.index]) for x in regions() if x.parts and x.index not in voxels]
    mm3 = ((*row, f"{row[2] * voxel_mm3:.3f}") for row in rows)
    return table("\t", ["index", "name", "voxels", "volume_mm3"], mm3)


def dlmuse_csv(name: str, voxels: Mapping[int, int], voxel_mm3: float) -> str:
    """NiChart_DLMUSE's table: MRID, then mm3 of every region in its order, with MUSE indices for column names.

    Upstream multiplies the voxel sizes in float32, so that its volumes differ in the eighth digit unless the sizes are
    round numbers. It cuts the name so that those of one batch differ; here it is the scan's, whatever the batch.
    """
    found = region_voxels(voxels)
    return table(",", ["MRID", *found], [[name, *(count * voxel_mm3 for count in found.values())]])
