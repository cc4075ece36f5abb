"""How much memory a scan will take, worked out before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgemuse.engines.errors import MemoryLimitError
from edgemuse.engines.hardware import available_memory, resident_memory
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.network.resample import resampled_shape, separate_axis
from edgemuse.runtime.network.tiles import TilePlan
from edgemuse.runtime.scan.geometry import reorientation
from edgemuse.runtime.scan.nifti import Scan
from edgemuse.runtime.scan.types import Shape, Spacing

BASE = 260 << 20
"""Python, the libraries and a backend without a network, measured with OpenVINO."""
WEIGHT_COPIES = {"int8": 3.0}
WEIGHT_COPIES_DEFAULT = 4.0
"""Copies of the fp32 graph that exist while it is compiled: as read, as parsed, in the backend's own layout, on its
way into the cache. An int8 graph is a third as large, and its weights pass through fp32."""
ACTIVATIONS = {("openvino", "int8"): 0.45, ("onnxruntime", "fp16"): 1.7}
ACTIVATIONS_DEFAULT = 1.0
"""Bytes of activations relative to fp32. ONNX Runtime computes fp16 in fp32 and keeps both, measured at 1.53. In int8
it saves nothing, because convolutions give fp32. OpenVINO then normalises in place and adds up in place, measured at
0.38."""
HALF = ("openvino", "int8")
"""The backend and precision that return features in half precision."""
SPLINE_BYTES = 16
"""Bytes per voxel while resampling with splines: float64, before and after an axis."""
SHARE = 0.9
"""Share of the free memory that is used unless `--max-ram` says otherwise; the rest is for other programs."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. Preprocessing comes before features exist; the engine stays from one scan to the next."""

    engine: int
    scan: int
    preprocessing: int
    features: int

    @property
    def total(self) -> int:
        """Peak bytes of the process."""
        return BASE + self.scan + self.engine + max(self.preprocessing, self.features)

    @property
    def ahead(self) -> int:
        """Bytes that reading and preprocessing take beside the network of another scan."""
        return self.scan + self.preprocessing

    @property
    def behind(self) -> int:
        """Bytes that the results take while they are written: classes, grey values, and the label map twice."""
        return self.scan

    def __str__(self) -> str:
        parts = [
            ("scan", self.scan),
            ("preprocessing", self.preprocessing),
            ("engine", self.engine),
            ("features", self.features),
        ]
        detail = ", ".join(f"{name} {gib(size)}" for name, size in parts)
        return f"{gib(self.total)} at most ({detail})"


def plan_memory(
    scan: Scan,
    network: Network,
    graph_bytes: int,
    mirrored: bool = False,
    tiles: TilePlan | None = None,
    engine: tuple[str, str] = ("openvino", "fp32"),
    half_sums: int = 0,
) -> MemoryPlan:
    """Upper bound for one scan, from its header alone: a scan that is not 0 anywhere is not cropped.

    `graph_bytes`: of the fp32 graph, or of the one that is run if that is larger. `tiles` None: patches, with features
    added up over their overlaps. `engine`: backend and precision. `half_sums`: of how many folds logits are added up in
    half precision instead.
    """
    patch, single = (network.patch, False) if tiles is None else (tiles.patch, tiles.count == 1)
    turn = reorientation(scan.affine, network.orientation, network.transpose)
    shape = turn.shape(scan.shape)
    inner = resampled_shape(shape, turn.spacing(scan.zooms), network.spacing)
    padded = [max(size, tile) for size, tile in zip(inner, patch, strict=True)]
    voxels, inner_voxels = math.prod(scan.shape), math.prod(inner)
    tile = math.prod(patch)
    rows = 0 if single else patch[0] * math.prod(padded[1:])
    copies = 1 if inner[0] == shape[0] else 3  # what is carried to the next slab, and both together
    channels, voxel = network.channels_out, 4 * network.channels_out
    if half_sums:
        channels, voxel = network.classes, 2 * network.classes
        copies += half_sums if half_sums > 1 else 0  # each fold's own, and their mean
    returned = 2 if engine == HALF else 8  # the engine's own, and a fresh array
    if mirrored and network.mirror_axes:
        returned += 8  # their mean, and what is added to it
    weights = WEIGHT_COPIES.get(engine[1], WEIGHT_COPIES_DEFAULT) * graph_bytes
    activations = ACTIVATIONS.get(engine, ACTIVATIONS_DEFAULT) * network.activation_bytes
    return MemoryPlan(
        engine=math.ceil(weights + tile * (activations + returned * network.channels_out)),
        scan=voxels * 11,
        preprocessing=(voxels + inner_voxels) * 4 + _resampling_bytes(shape, inner, turn.spacing(scan.zooms), network),
        features=voxel * rows * copies + 16 * channels * math.prod(shape[1:]) + inner_voxels * 8 + voxels * 4,
    )


def _resampling_bytes(shape: Shape, target: Shape, spacing: Spacing, network: Network) -> int:
    if shape == target:
        return 0
    total = math.prod(shape) * SPLINE_BYTES + math.prod(target) * 16
    axis = separate_axis(spacing, network.spacing, network.image_resampling.force_separate_z)
    if axis is not None:  # every slice at the new in-plane spacing
        total += shape[axis] * math.prod(target) // target[axis] * 16
    return total


def memory_limit(max_ram: float | None) -> float:
    """Bytes that a scan may take: `max_ram` GiB, or what is free here if that is None."""
    return SHARE * (available_memory() + resident_memory()) if max_ram is None else max_ram * 2**30


def check_memory(scan: Scan, plan: MemoryPlan, max_ram: float | None) -> None:
    """Raise MemoryLimitError if `plan` exceeds `max_ram` GiB, or what is free here if that is None."""
    limit = memory_limit(max_ram)
    if plan.total <= limit:
        return
    source = "are free here" if max_ram is None else "are allowed by --max-ram"
    raise MemoryLimitError(
        f"{scan.path}: {' x '.join(map(str, scan.shape))} voxels need {gib(plan.total)} and {gib(limit)} {source}; "
        "crop or resample the scan, or use a machine with more memory"
    )


def gib(size: float) -> str:
    """A number of bytes as text such as `1.23 GiB`."""
    return f"{size / 2**30:.2f} GiB"
