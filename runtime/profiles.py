"""Profiles: what of nnU-Net's inference is kept for accuracy and what is given up for speed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`step`: distance between tiles in patches; `mirror`: average over the mirrorings the checkpoint allows."""

    step: float
    mirror: bool


PROFILES = {
    "reference": Profile(0.5, mirror=True),  # label for label what nnU-Net's own predictor gives
    "balanced": Profile(0.5, mirror=False),  # up to eight times faster
}
