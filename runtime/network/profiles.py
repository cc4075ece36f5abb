"""Profiles: what of nnU-Net's inference is kept for accuracy and what is given up for speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`mirror`: average over the mirrorings the checkpoint allows; `large_tiles`: as large as memory allows.

    `step`: distance between tiles in patches, where they are patches. `half_sums`: logits are added up in half
    precision, as nnU-Net adds them up, and not features in single precision.
    """

    mirror: bool
    half_sums: bool = False
    large_tiles: bool = False
    step: float = 0.5


PROFILES = {
    "reference": Profile(mirror=True, half_sums=True),  # label for label what nnU-Net's own predictor gives
    "balanced": Profile(mirror=False),  # up to eight times faster, sums in single precision
    "fast": Profile(mirror=False, large_tiles=True),  # if memory allows, the whole brain at once
}
