"""What a cheap first look saves a mask network: `python -m edgemuse.bench.first_look SHARED -o docs/first-look.md`.

A mask network runs over a whole head, most of which is air, face and neck. A first look finds roughly where the brain
is: the mask network itself at twice its spacing, or the built-in model in one pass. Then the mask network runs at its
own spacing on what the look leaves: the patches that touch the border of the rough mask, or its box and a margin.

DLICV's weights may not be passed on. Two trained networks pose as it, their structures taken together as one mask;
what a network with DLMUSE's plans would compute is counted.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.bench import scans
from edgemuse.bench.models import development_bundle
from edgemuse.bench.performance_report import table
from edgemuse.bench.rows import commit
from edgemuse.calibration.evaluate import quiet
from edgemuse.calibration.gate import Case, failures, measure
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.builtin import BUILT_IN
from edgemuse.runtime.bundle import Bundle, Network, open_bundle
from edgemuse.runtime.cascade import Mask
from edgemuse.runtime.geometry import reorientation, shape_of
from edgemuse.runtime.head import label_blocks
from edgemuse.runtime.pipeline import Options, Segmenter, Stopwatch
from edgemuse.runtime.postprocess import largest_component
from edgemuse.runtime.preprocess import Box, Prepared, preprocess
from edgemuse.runtime.resample import output_matrices, resample_image, resampled_shape
from edgemuse.runtime.scan import Scan, open_scan, read_image
from edgemuse.runtime.tiles import largest_tiles, merge_tiles, plan_tiles
from edgemuse.runtime.types import Features, Labels, Shape, Spacing

TRUE_SCAN = "vxm"
PATCHES = "patches over the whole scan"
MARGIN_MM = 20.0
"""Around the box of what the look found."""
STEP = 0.5
NOISE = 0.02
"""Of the head's bright voxels."""
PAGE = """<!-- Written by: python -m edgemuse.bench.first_look SHARED -o docs/first-look.md -->
# A cheap first look before the mask network

DLICV's weights are not here. The built-in model and the development model pose as the mask network: all their
structures are one mask. *2x look*: the mask network at twice its spacing, in one pass. *Built-in look*: the
built-in model in one pass. *Border*: then the mask network's patches that touch the border of the rough mask. *Box*:
then the mask network inside the rough mask's box and a margin of {margin:.0f} mm.

Scans: {scans}. Chris and crop are whole heads in a void of 0, which is cropped in any case; vxm is a brain without its
skull; *noisy air* is crop with noise of {noise:.0%} in the void, for the built-in model alone, because the other takes
noise for brain. *Agreement*: Dice with the mask of patches over the whole scan. *Truth*: Dice with the labelled brain
of vxm, which lacks the CSF around it. *Computed*: voxels that the mask network computes, the 2x look included, as a
share of those of patches over the whole scan. *Seconds*: of looking and of computing, median of {repeats}, without
compiling. *Gate*: that of `edgemuse calibrate` for fp32, on each scan.

fp32, OpenVINO, {cpu}, {cores} cores; commit {commit}.

{variants}
Passes on every scan with both networks: {passing}. Of these, computes fewer voxels on every whole head with both:
**{saving}**.

## What a network with DLMUSE's plans would compute

Patches of 112 x 128 x 96 voxels at 1 mm with step {step}, and the voxels of one pass where memory allows one. *Border*:
the patches that touch the border of the built-in model's mask. *Ideal*: the box of that mask without a margin, less
than any look can leave.

{plans}"""


@dataclass(frozen=True)
class Found:
    """A mask (i, j, k) on the scan's grid, the voxels that the mask network computed for it, and the seconds."""

    mask: Mask
    voxels: int
    seconds: float

    def after(self, look: Found) -> Found:
        """With what `look` took besides."""
        return Found(self.mask, self.voxels + look.voxels, self.seconds + look.seconds)


@dataclass(frozen=True)
class Row:
    """A variant with one network: whether it passes on every scan, whether it saves voxels on whole heads."""

    name: str
    passes: bool
    saves: bool
    cells: Sequence[str]


@dataclass(frozen=True)
class Head:
    """A scan, and its voxels in a network's axes and intensities but at the scan's own spacing."""

    scan: Scan
    whole: Prepared

    def part(self, network: Network, box: Box | None = None) -> Prepared:
        """The network's input: all of the scan, or what lies at `box` of `whole.image`."""
        d, h, w = box or (slice(0, size) for size in self.whole.image.shape)
        image = np.ascontiguousarray(self.whole.image[d, h, w])
        shape = resampled_shape(shape_of(image), self.whole.spacing, network.spacing)
        image = resample_image(image, shape, self.whole.spacing, network.spacing, network.image_resampling)
        d, h, w = (
            slice(outer.start + inner.start, outer.start + inner.stop)
            for outer, inner in zip(self.whole.box, (d, h, w), strict=True)
        )
        return replace(self.whole, image=image, box=(d, h, w))

    def inside(self, mask: Mask) -> Mask:
        """`mask`, given on the scan's grid, on that of `whole.image`."""
        turned: Mask = self.whole.reorientation.apply(mask)[self.whole.box]
        return turned


def head(path: Path, network: Network) -> Head:
    """The scan at `path`, for `network`."""
    scan = open_scan(path)
    spacing = reorientation(scan.affine, network.orientation, network.transpose).spacing(scan.zooms)
    return Head(scan, preprocess(read_image(scan), scan.affine, scan.zooms, replace(network, spacing=spacing)))


class MaskNetwork:
    """A bundle whose structures together are the mask, in patches and in one pass."""

    def __init__(self, bundle: Bundle) -> None:
        options = Options("balanced", EngineOptions(backend="openvino", precision="fp32"), postprocess=False)
        self.network = bundle.manifest.network
        self.patches, self.one_pass = Segmenter(bundle, options), Segmenter(bundle, replace(options, profile="fast"))

    def run(self, segmenter: Segmenter, head: Head, box: Box | None = None, scale: int = 1) -> Found:
        """The mask by one of the two segmenters, of the whole head or inside `box`, at `scale` times the spacing."""
        d, h, w = self.network.spacing
        segmenter.network = replace(self.network, spacing=(d * scale, h * scale, w * scale))
        watch, prepared = Stopwatch(), head.part(segmenter.network, box)
        run = segmenter.run(head.scan, prepared, watch, lambda done, total: None, lambda total, last: None)
        return Found(run.classes > 0, run.plan.count * math.prod(run.plan.patch), watch.seconds["infer"])

    def border(self, head: Head, rough: Mask) -> Found:
        """By the patches of the whole head that touch the border of `rough`; what none reaches is as in `rough`."""
        network, prepared, watch = self.network, head.part(self.network), Stopwatch()
        shape = shape_of(prepared.image)
        plan = plan_tiles(shape, network.patch, STEP)
        touched = touching(np.pad(nearest(head.inside(rough), shape), plan.pad), plan.starts, network.patch)
        engine, order = self.patches.engine(network.patch), iter(touched)

        def infer(tile: NDArray[np.float32]) -> Features:
            """A channel of ones after the features; all 0 where the border is not touched."""
            if not next(order):
                return np.zeros((*tile.shape, network.channels_out + 1), np.float32)
            features = np.moveaxis(engine.infer(tile[None, None])[0], 0, -1)
            return np.concatenate([features, np.ones((*tile.shape, 1), np.float32)], axis=-1)

        with watch.stage("infer"):
            merged = np.concatenate([slab.copy() for _, slab in merge_tiles(prepared.image, plan, infer)])
            features, reached = merged[..., :-1], merged[..., -1:]
            np.divide(features, reached, out=features, where=reached > 0)
            matrices = output_matrices(
                shape, network.spacing, prepared.box_shape, prepared.spacing, network.output_resampling
            )
            slabs = [((0, 0, 0), np.ascontiguousarray(features))]
            classes = label_blocks(slabs, self.patches.head, network.classes, matrices, prepared.box_shape)
        mask = np.zeros(prepared.grid_shape, bool)
        kept = nearest(reached[..., 0] > 0, prepared.box_shape)
        mask[prepared.box] = np.where(kept, classes > 0, head.inside(rough))
        voxels = sum(touched) * math.prod(network.patch)
        return Found(prepared.reorientation.undo(mask), voxels, watch.seconds["infer"])


def box_of(mask: Mask, spacing: Spacing, margin: float) -> Box:
    """Of the largest component of `mask`, `margin` mm wider on every side."""
    found = ndimage.find_objects(largest_component(mask).view(np.uint8))[0]
    d, h, w = (
        slice(max(side.start - math.ceil(margin / mm), 0), min(side.stop + math.ceil(margin / mm), size))
        for side, mm, size in zip(found, spacing, mask.shape, strict=True)
    )
    return d, h, w


def touching(mask: Mask, starts: Sequence[Sequence[int]], patch: Shape) -> list[bool]:
    """Of every patch, in order of `starts`, whether the border of `mask` runs through it."""
    border = mask & ~ndimage.binary_erosion(mask)
    return [
        bool(border[tuple(slice(first, first + size) for first, size in zip(corner, patch, strict=True))].any())
        for corner in itertools.product(*starts)
    ]


def nearest(mask: Mask, shape: Shape) -> Mask:
    """`mask` at `shape`, nearest neighbours."""
    places = [((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(mask.shape, shape, strict=True)]
    resampled: Mask = mask[np.ix_(*places)]
    return resampled


def variants(network: MaskNetwork, built_in: MaskNetwork, path: Path, repeats: int) -> Iterator[tuple[str, Found]]:
    """The mask of the scan at `path` in every way, first by patches over the whole scan."""
    subject, seen = head(path, network.network), head(path, built_in.network)

    def timed(run: Callable[[], Found]) -> Found:
        found = [run() for _ in range(repeats)]
        return replace(found[0], seconds=median(each.seconds for each in found))

    click.echo(f"{path.name} {network.network.spacing[0]} mm", err=True)
    yield PATCHES, timed(lambda: network.run(network.patches, subject))
    yield "one pass", timed(lambda: network.run(network.one_pass, subject))
    twice = timed(lambda: network.run(network.one_pass, subject, scale=2))
    yield "2x look alone", twice
    yield "2x look, border", timed(lambda: network.border(subject, twice.mask)).after(twice)
    quick = replace(timed(lambda: built_in.run(built_in.one_pass, seen)), voxels=0)
    for name, look in (("2x", twice), ("built-in", quick)):
        box = box_of(subject.inside(look.mask), subject.whole.spacing, MARGIN_MM)
        for how, segmenter in (("patches", network.patches), ("one pass", network.one_pass)):
            run = partial(network.run, segmenter, subject, box)
            yield f"{name} look, box, {how}", timed(run).after(look)


def rows_of(network: str, found: Mapping[str, Mapping[str, Found]], truth: Labels) -> Iterator[Row]:
    """A row a variant, of masks by scan and variant, each held against patches over the whole scan."""
    for name in found[TRUE_SCAN]:
        judged, shares = {}, {}
        for scan, ways in found.items():
            whole, each = ways[PATCHES], ways[name]
            case = Case(whole.mask.view(np.uint8), each.mask.view(np.uint8), truth if scan == TRUE_SCAN else None)
            judged[scan], shares[scan] = measure([case]), each.voxels / whole.voxels
        failed = [scan for scan, each in judged.items() if failures(each, "fp32")]
        cells = (
            network,
            name,
            ", ".join(f"{each.agreement:.4f}" for each in judged.values()),
            f"{judged[TRUE_SCAN].dice:.4f}",
            ", ".join(f"{share:.0%}" for share in shares.values()),
            ", ".join(f"{ways[name].seconds:.1f}" for ways in found.values()),
            f"fails: {', '.join(failed)}" if failed else "passes",
        )
        yield Row(name, not failed, all(share < 1 for scan, share in shares.items() if scan != TRUE_SCAN), cells)


def plans_cells(mask: Mask, spacing: Spacing, plans: Mapping[str, Any]) -> list[str]:
    """What a network of `plans` computes of a scan of `spacing` with `mask`, both in the network's axes."""
    target, patch = tuple(plans["spacing"]), tuple(plans["patch_size"])
    stride = tuple(2**count for count in plans["num_pool_per_axis"])
    mask = nearest(mask, resampled_shape(shape_of(mask), spacing, target))

    def counted(part: Mask) -> str:
        one = next(largest_tiles(shape_of(part), patch, stride))
        return f"{plan_tiles(shape_of(part), patch, STEP).count} / {math.prod(one.patch) / 1e6:.1f} M"

    plan = plan_tiles(shape_of(mask), patch, STEP)
    border = sum(touching(np.pad(mask, plan.pad), plan.starts, patch))
    twice = next(largest_tiles(shape_of(mask[::2, ::2, ::2]), patch, stride))
    cells = [counted(mask[box_of(mask, target, margin)]) for margin in (0.0, MARGIN_MM)]
    return [counted(mask), str(border), *cells, f"{math.prod(twice.patch) / 1e6:.1f} M"]


def noisy(path: Path, target: Path) -> Path:
    """The scan at `path` with Rician noise where it is 0, so that nothing around the head is cropped."""
    image = read_image(open_scan(path))
    sigma = NOISE * np.percentile(image[image > 0], 99)
    noise = np.hypot(*np.random.default_rng(0).normal(0, sigma, (2, *image.shape)))
    return scans.save(np.where(image == 0, noise, image), path, target)


def report(shared: Path, work: Path, repeats: int) -> str:
    """The Markdown page."""
    t1, facts = shared / "data" / "t1", json.loads((shared / "data" / "dlmuse" / "plans.json").read_text())
    paths = {scan: t1 / f"{scan}_T1w.nii.gz" for scan in ("chris", "crop", TRUE_SCAN)}
    paths["noisy air"] = noisy(paths["crop"], work / "noisy_T1w.nii.gz")
    truth = (scans.labels_of(t1 / f"{TRUE_SCAN}_dseg.nii.gz") > 0).view(np.uint8)
    built_in, development = (
        MaskNetwork(open_bundle(bundle)) for bundle in (BUILT_IN, development_bundle(shared, work))
    )
    found = {
        network: {
            scan: dict(variants(network, built_in, path, repeats))
            for scan, path in paths.items()
            if network is built_in or scan != "noisy air"
        }
        for network in (built_in, development)
    }
    rows = [*rows_of("built-in", found[built_in], truth), *rows_of("development", found[development], truth)]
    plans = []
    for scan, path in paths.items():
        subject, mask = head(path, built_in.network), found[built_in][scan][PATCHES].mask
        cells = plans_cells(subject.inside(mask), subject.whole.spacing, facts["configurations"]["3d_fullres"])
        plans.append([scan, *cells])
    return page(rows, plans, list(paths), repeats)


def page(rows: Sequence[Row], plans: Sequence[Sequence[str]], names: Sequence[str], repeats: int) -> str:
    """The page of both tables, and which variants pass with every network."""
    variants = dict.fromkeys(row.name for row in rows if row.name != PATCHES)
    passing = [name for name in variants if all(row.passes for row in rows if row.name == name)]
    saving = [name for name in passing if all(row.saves for row in rows if row.name == name)]
    header = ("network", "variant", "agreement", "truth", "computed", "seconds", "gate")
    second = ("scan", "whole: patches / one pass", "border: patches", "ideal", f"margin {MARGIN_MM:.0f} mm", "2x look")
    return PAGE.format(
        margin=MARGIN_MM, noise=NOISE, step=STEP, scans=", ".join(names), repeats=repeats, cpu=cpu_name(),
        cores=cpu_cores(), commit=commit(), variants=table(header, [row.cells for row in rows]),
        passing=", ".join(passing) or "none", saving=", ".join(saving) or "none", plans=table(second, plans),
    )  # fmt: skip


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option("--repeats", default=3, show_default=True, help="Runs of which the median counts.")
def main(shared: Path, output: Path, repeats: int) -> None:
    """Measure what a first look saves a mask network, and what it costs in Dice."""
    with tempfile.TemporaryDirectory() as work, quiet():
        output.write_text(report(shared, Path(work), repeats), encoding="utf-8")
    click.echo(output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
