"""What kind of image a file holds, as far as its name says: of a folder only what may be a T1 scan is taken."""

from __future__ import annotations

import re

from edgemuse.runtime.scan.nifti import SUFFIXES

OTHER_KINDS = {
    "T2-weighted": "t2w?|t2star|t2starw|inplanet2",
    "FLAIR": "(t2|t1)?flair|t2f",
    "proton density": "pdw?|pdt2",
    "T1 with contrast agent": "t1(ce|c|gd|post)",
    "map of a property of tissue": "[tr][12](star)?map|pdmap|m0map|s0map|mt(r|v)map|mtsat|mwfmap|b1map|b0map",
    "part of a quantitative protocol": "mp2rage|inv[12]|vfa|irt1|mpm|mtr|mts|mese|megre",
    "functional": "bold|sbref|cbv|fmri|rsfmri|inplanet1",
    "diffusion": "dwi|dti|adc|fa|md|rd|b0|tracew?|colfa",
    "perfusion": "asl|asllabeling|m0scan|cbf|mtt|ttp|tmax|pwi|dsc|dce",
    "field map": "epi|phase(diff|[12])?|magnitude[12]?|fieldmap|tb1(map|epi|tfl|afi|srge)|rb1(map|cor)",
    "angiography": "mra|mrv|tof|angio|cta",
    "susceptibility": "swi|qsm|swan|minip|mip",
    "CT or PET": "ct|pet",
    "mask": ".*mask|dlicv|icv",
    "map of probabilities": "prob(seg|map)?|pve|posteriors?|gm|wm|csf",
    "label map": ".*seg|labels?|labelmap|aparc|wmparc|ribbon|filled|parc|parcellation|segmentation|atlas|dlmuse|muse",
    "transformation": "warp|warpcoef|field|jacobian|jac|deformation|displacement|xfm",
}
"""Patterns of the last word of a file's name, in small letters, by kind: BIDS's suffixes and what IXI, BraTS,
FreeSurfer, FSL, SPM and NiChart call their files. The words of a name are what stands between its marks."""
SERIES = "dwi|dti|bold|fmri|asl|epi|pve"
"""Of these a number may follow, as in IXI's `-DTI-00`. Other words with a number are often people: `PD_07`."""
PART = re.compile(r"(^|_)part-(phase|real|imag)(_|$)")
"""BIDS's entity of images that hold no magnitudes, whatever their suffix."""


def other_kind(name: str) -> str:
    """The kind of image that a NIfTI file called `name` is by its name; empty if it may be a T1 scan."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name.lower())
    if PART.search(stem):
        return "phase, real or imaginary part"
    *words, last = [word for word in re.split(r"[\W_]+", stem) if word] or [""]
    before = words[-1] if words else ""
    if before in ("sub", "ses"):
        return ""
    if last.isdecimal() and re.fullmatch(SERIES, before):
        last = before
    return next((kind for kind, pattern in OTHER_KINDS.items() if re.fullmatch(pattern, last)), "")


def is_nifti(name: str) -> bool:
    """Whether a file called `name` is a NIfTI file by its name, and not hidden."""
    return name[0] != "." and name.lower().endswith(SUFFIXES)


def may_be_t1(name: str) -> bool:
    """Whether a file called `name` may be a T1 scan: a NIfTI file that is not named after another kind of image."""
    return is_nifti(name) and not other_kind(name)
