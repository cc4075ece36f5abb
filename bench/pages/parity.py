"""Label parity with nnU-Net's own predictor.

Every case segments one scan four ways: nnU-Net as it is, which adds up its tiles in half precision; edgemuse's
`reference` profile, which does the same; its `balanced` profile, which adds up features in float32; and nnU-Net's steps
with every sum in float64, which judges the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from edgemuse.bench.measure import models, scans
from edgemuse.bench.measure.reference import Reference
from edgemuse.bench.measure.rows import state
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.regions.agreement import agreement, mean_dice


@dataclass(frozen=True)
class Case:
    """A model and a scan: in the model's orientation for nnU-Net, and as it is given to edgemuse.

    `required` is the share of voxels that must agree.
    """

    model: str
    name: str
    upright: Path
    given: Path
    required: float
    mirroring: bool = False


@dataclass(frozen=True)
class Result:
    """Agreement of label maps and what the disagreements are worth.

    `agreement` and `dice` are of `reference` with nnU-Net as it is; the `exact` ones are with the judge. `explained` is
    the share of the voxels that nnU-Net labels otherwise where the error bound of its sums allows it. `balanced_exact`
    is None where nnU-Net mirrors, which `balanced` does not. `sha256` is the bundle's.
    """

    model: str
    sha256: str
    name: str
    required: float
    agreement: float
    dice: float
    reference_exact: float
    nnunet_exact: float
    balanced_exact: float | None
    explained: float

    @property
    def passed(self) -> bool:
        """Whether nnU-Net, and for `balanced` the judge, agree as is asked, and half precision explains the rest."""
        same = self.agreement >= self.required and self.dice >= DICE_REQUIRED and self.explained == 1.0
        return same and (self.balanced_exact is None or self.balanced_exact >= max(self.nnunet_exact, self.required))


DICE_REQUIRED = 0.999
SAME_GRID, RESAMPLED, NEARLY_TIED = 0.9999, 0.999, 0.999
"""Agreement asked without resampling, with it, and for random weights, whose logits are nearly tied."""


def cases(shared: Path, work: Path) -> Iterator[Case]:
    """Make all cases and their scans in `work` from the T1 scans of `shared`."""
    for name in ("chris", "crop", "vxm"):
        whole = shared / "data" / "t1" / f"{name}_T1w.nii.gz"
        upright = scans.reoriented(whole, work / f"{name}_lps.nii.gz", "LPS")
        coarse = scans.resampled(upright, work / f"{name}_2mm.nii.gz", (2, 2, 2))
        yield Case("dev", f"{name}, 2 mm", coarse, coarse, SAME_GRID)
        yield Case("dev", f"{name}, as scanned", upright, whole, RESAMPLED)
        if name == "vxm":
            yield Case("dev, mirrored", f"{name}, 2 mm", coarse, coarse, SAME_GRID, mirroring=True)
            yield Case("dev, mirrored", f"{name}, as scanned", upright, whole, RESAMPLED, mirroring=True)
            yield Case("dev, two folds", f"{name}, 2 mm", coarse, coarse, SAME_GRID)
            yield Case("dev, two folds", f"{name}, as scanned", upright, whole, RESAMPLED)
            yield Case("residual encoder", f"{name}, 2 mm", coarse, coarse, NEARLY_TIED)
            yield from _difficult(upright, work)
            cropped = scans.centre_crop(upright, work / "cropped.nii.gz", (130, 160, 120))
            yield Case("DLMUSE, random weights", f"{name}, 1 mm, cropped", cropped, cropped, NEARLY_TIED)


def _difficult(upright: Path, work: Path) -> Iterator[Case]:
    thick = scans.resampled(upright, work / "thick.nii.gz", (1, 1, 3))
    thicker = scans.resampled(upright, work / "thicker.nii.gz", (1, 1, 5))
    yield Case("dev", "vxm, 1 x 1 x 3 mm", thick, thick, RESAMPLED)
    yield Case("dev", "vxm, 1 x 1 x 5 mm", thicker, thicker, RESAMPLED)
    for codes in ("RAS", "PIR", "SLA"):
        turned = scans.reoriented(upright, work / f"{codes}.nii.gz", codes)
        yield Case("dev", f"vxm, stored {codes}", upright, turned, RESAMPLED)
    yield Case(
        "dev", "vxm, oblique by 20 degrees", upright, scans.oblique(upright, work / "oblique.nii.gz", 20), RESAMPLED
    )


def compare(case: Case, reference: Reference, bundle: Bundle, work: Path) -> Result:
    """Segment the case's scan in every way and compare the labels on the upright grid."""
    ours = _ours(case, bundle, "reference", work)
    theirs = reference.labels(case.upright)
    balanced = None if case.mirroring else _ours(case, bundle, "balanced", work)
    exact = reference.exact(case.upright)
    judge = exact.labels()
    return Result(
        case.model,
        bundle.sha256,
        case.name,
        case.required,
        agreement(ours, theirs),
        mean_dice(ours, theirs),
        agreement(ours, judge),
        agreement(theirs, judge),
        None if balanced is None else agreement(balanced, judge),
        exact.explained(ours, theirs),
    )


def _ours(case: Case, bundle: Bundle, profile: str, work: Path) -> NDArray[np.int64]:
    with Segmenter(bundle, Options(profile, "openvino", "fp32", cache_dir=None)) as segmenter:
        classes = segmenter.segment(case.given).classes
    stored = scans.save(classes, case.given, work / "ours.nii.gz")
    return scans.labels_of(scans.reoriented(stored, work / "ours_upright.nii.gz", "LPS"))


def measured(case: Case, folder: Path, work: Path) -> dict[str, Any]:
    """Measure a case and return its result as fields; the model in `folder` is exported once into `work`."""
    bundle = open_bundle(models.exported(folder, work / f"{case.model}.bundle"))
    result = asdict(compare(case, Reference(folder, case.mirroring), bundle, work))
    say(json.dumps(result))
    return result


HEADER = ("model", "scan", "asked", "`reference` = nnU-Net", "mean Dice", "reached", "explained",
          "`reference` = float64", "nnU-Net = float64", "`balanced` = float64")  # fmt: skip


def cells(result: Result) -> list[str]:
    """Write the row of the table for a result."""
    return [
        result.model,
        result.name,
        f"{result.required:.2%}",
        f"{result.agreement:.5%}",
        f"{result.dice:.5f}",
        "yes" if result.passed else "no",
        f"{result.explained:.2%}",
        f"{result.reference_exact:.4%}",
        f"{result.nnunet_exact:.4%}",
        "" if result.balanced_exact is None else f"{result.balanced_exact:.5%}",
    ]


INTRODUCTION = """
Each scan is segmented four ways with the same checkpoint, step 0.5 and Gaussian weights: by nnU-Net's own
`nnUNetPredictor`, which adds its tiles up in half precision; by edgemuse's `reference` profile, which repeats that; by
its `balanced` profile, which adds up features in float32 (both OpenVINO, fp32); and by nnU-Net's steps with every sum
in float64, which judges the others.

- *`reference` = nnU-Net*: share of voxels with the same label. *Mean Dice*: over the structures in either map.
- *reached*: as many voxels agree as is asked, mean Dice is at least 0.999, half precision explains every difference
  that is left, and `balanced` agrees with the judge in as many voxels as is asked and as nnU-Net does.
- *explained*: share of the voxels in which `reference` and nnU-Net differ where the exact logits of the two labels are
  closer together than half-precision sums may be off (`half_precision_error` in `bench/measure/reference.py`).
- *= float64*: share of voxels with the judge's label. `balanced` does not mirror, so it is left out where nnU-Net does.

What is left between `reference` and nnU-Net is the order in which convolutions add up float32 numbers, which tips a
half-precision rounding now and then.
"""


@click.command()
@page_options("parity")
def main(shared: Path, output: Path, work: Path) -> None:
    """Compare edgemuse with nnU-Net on the scans and the model of SHARED; exit code 1 if a case falls short."""
    place = Workplace(work, state())
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        folders = models.parity_models(shared, made)
        results = [
            Result(**place.once(f"{case.model}: {case.name}", partial(measured, case, folders[case.model], made)))
            for case in cases(shared, made)
        ]
    first = place.age(dict.fromkeys(named(result.model, result.sha256) for result in results), "parity")
    page = table(HEADER, map(cells, results))
    place.publish(output, joined(first, "# Parity with nnU-Net's predictor", INTRODUCTION, page, place.machine))
    raise SystemExit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
