"""What changes to the runtime brought: each step as it is now, in turn with the simple form that it replaced.

`python -m edgemuse.bench.changes SHARED` prints the table; `edgemuse.bench.performance` puts it into its page. The
results of both forms are compared on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import openvino as ov
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.bench import scans
from edgemuse.bench.performance_report import table
from edgemuse.calibration.scans import Source, calibration_patches
from edgemuse.engines.hardware import cpu_cores
from edgemuse.engines.openvino import OpenVINOEngine
from edgemuse.engines.openvino_rewrites import put_channels_last
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime import picture
from edgemuse.runtime.builtin import BUILT_IN
from edgemuse.runtime.bundle import Head, Resampling, open_bundle
from edgemuse.runtime.geometry import voxel_mm3
from edgemuse.runtime.half_sums import HalfSums
from edgemuse.runtime.head import BLOCK, label_blocks
from edgemuse.runtime.labels import Label
from edgemuse.runtime.muse import muse_labels
from edgemuse.runtime.postprocess import TOUCHING
from edgemuse.runtime.preprocess import nonzero_box
from edgemuse.runtime.quality import APART_MM3, NOISE, apart, contrast_to_noise, noise
from edgemuse.runtime.resample import resample_image, resampled_shape
from edgemuse.runtime.scan import open_scan, read_image
from edgemuse.runtime.tiles import plan_tiles
from edgemuse.runtime.types import Half, Labels, Shape

ROUNDS = 5
SPACING = (1.5, 1.5, 1.5)
"""Of the built-in model."""
SCATTERED = (96, 96, 96)
HEAD_SHAPE, CLASSES = (16, 214, 155, 32), 152
"""Rows of DLMUSE's features on a brain."""


def equal(before: Any, after: Any) -> None:
    """Raise AssertionError unless all arrays are the same but for the order of float32 sums."""
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-7, atol=1e-10)


def no_larger(before: Any, after: Any) -> None:
    """Raise AssertionError if a share has grown: parts that lie close together are now one."""
    assert before.keys() == after.keys()
    assert all(after[index] <= before[index] for index in before)


def near(before: Any, after: Any) -> None:
    """Raise AssertionError beyond 2 % in the root mean square: int8 falls otherwise where sums differ in a digit."""
    assert np.sqrt(np.square(before - after).mean()) <= 2e-2 * np.sqrt(np.square(before).mean())


@dataclass(frozen=True)
class Change:
    """A step `before` and `after`, what was expected of the change, and what holds both results together."""

    name: str
    predicted: str
    before: Callable[[], Any]
    after: Callable[[], Any]
    check: Callable[[Any, Any], None] = equal


def changes(shared: Path) -> Iterator[Change]:
    """All of them, on real scans."""
    t1 = shared / "data" / "t1"
    head = open_scan(t1 / "chris_T1w.nii.gz")
    image = read_image(head)
    shape = resampled_shape(head.shape, head.zooms, SPACING)
    yield Change(
        "preprocess: splines as a product of matrices along each axis, not 64 neighbours a voxel",
        "5 times faster",
        lambda: _zoomed(image, shape),
        lambda: resample_image(image, shape, head.zooms, SPACING, Resampling(3, 0)),
    )
    labels = open_bundle(BUILT_IN).manifest.labels
    scan = open_scan(t1 / "vxm_dseg.nii.gz")
    classes = _classes(scans.labels_of(scan.path), labels)
    mm3 = voxel_mm3(scan.affine)
    yield Change(
        "load: grey values plane by plane as voxels lie in memory, not along i",
        "3 times faster",
        lambda: _to_bytes(image),
        lambda: picture.to_bytes(image),
    )
    yield Change(
        "quality: components of each structure among blocks of 2 x 2 x 2 voxels, several structures at once",
        "8 times faster for each core",
        lambda: _apart(classes, labels, mm3),
        lambda: apart(classes, labels, mm3, cpu_cores()),
        no_larger,
    )
    scattered = np.random.default_rng(0).integers(0, len(muse_labels()), SCATTERED).astype(np.uint8)
    yield Change(
        f"the same, 152 classes scattered over {' x '.join(map(str, SCATTERED))} voxels",
        "8 times faster for each core",
        lambda: _apart(scattered, muse_labels(), 1.0),
        lambda: apart(scattered, muse_labels(), 1.0, cpu_cores()),
        no_larger,
    )
    shown, inside = picture.to_bytes(image), image > image.mean()
    yield Change(
        "quality: contrast and noise from counts of whole numbers, not from sorted ones",
        "4 times faster",
        lambda: [_contrast_to_noise(shown, inside)],
        lambda: [contrast_to_noise(shown, inside)],
    )
    yield from _head()
    yield from _half_sums()
    yield from _int8(head.path)
    yield Change(
        "picture: slices as views, not np.take, which walks through the volume",
        "9 walks saved",
        lambda: [np.take(classes, position, axis=plane.cut).T[::-1, ::-1] for plane, position in _cuts(classes)],
        lambda: [picture._slice(classes, plane, position) for plane, position in _cuts(classes)],
    )


def _whole_numbers() -> tuple[NDArray[np.float32], Head]:
    """Features of `HEAD_SHAPE` and a head, of which sums are exact in any order."""
    rng = np.random.default_rng(1)
    features, weight, bias = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in (HEAD_SHAPE, (CLASSES, HEAD_SHAPE[-1]), CLASSES)
    )
    return features, Head(weight, bias)


def _half_sums() -> Iterator[Change]:
    features, head = _whole_numbers()
    plan = plan_tiles(HEAD_SHAPE[:3], HEAD_SHAPE[:3], 1.0)
    window = np.full(HEAD_SHAPE[:3], 3, np.float32)

    def by_numpy() -> list[Half]:
        total = np.zeros((window.size, CLASSES), np.float16)
        logits = features.reshape(window.size, -1) @ head.weight.T + head.bias
        total += logits * window.reshape(-1, 1)
        return [total.reshape(*window.shape, CLASSES)]

    def by_openvino() -> list[Half]:
        with ThreadPoolExecutor(cpu_cores()) as pool:
            sums = HalfSums(plan, window, pool, True, head, cpu_cores())
            sums.add(features, (0, 0, 0))
            return [total for total, _ in sums.blocks.values()]

    yield Change(
        "infer, `reference`: sums in half precision by OpenVINO, piece by piece, not by NumPy",
        "5 times faster",
        by_numpy,
        by_openvino,
    )


def _head() -> Iterator[Change]:
    features, head = _whole_numbers()
    depth, height, width, _ = HEAD_SHAPE
    yield Change(
        "head: one BLAS thread for each row at work, and the bias as one more feature",
        "2 times faster",
        lambda: _labels(features, head),
        lambda: label_blocks([((0, 0, 0), features)], head, CLASSES, (None,) * 3, (depth, height, width), cpu_cores()),
    )


def _labels(features: NDArray[np.float32], head: Head) -> Labels:
    weight = np.ascontiguousarray(head.weight.T)

    def row(plane: NDArray[np.float32]) -> Labels:
        flat = plane.reshape(-1, plane.shape[-1])
        blocks = [flat[start : start + BLOCK] @ weight + head.bias for start in range(0, len(flat), BLOCK)]
        labels: Labels = np.concatenate([block.argmax(axis=1) for block in blocks]).astype(np.uint8)
        return labels.reshape(plane.shape[:-1])

    with ThreadPoolExecutor(cpu_cores()) as pool:
        return np.stack(list(pool.map(row, features)))


def _int8(scan: Path) -> Iterator[Change]:
    bundle = open_bundle(BUILT_IN)
    tile = (1, 1, *bundle.manifest.network.patch)
    batch = calibration_patches([Source(scan, "", None)], bundle.manifest.network)[0]
    model = ov.Core().read_model(bundle.graph("int8"))
    model.reshape(list(tile))
    put_channels_last(model)
    request = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    engine = OpenVINOEngine(EngineOptions("openvino", "int8", "CPU"), tile)
    engine.build(bundle.graph("int8"), keep=False)
    yield Change(
        "infer, OpenVINO int8: features in half precision and not copied, convolutions added up in place",
        "1.3 times faster",
        lambda: np.moveaxis(request.infer({0: batch})[0], -1, 1).copy(),
        lambda: engine.infer(batch).astype(np.float32),
        near,
    )


def _classes(indices: NDArray[np.int64], labels: Sequence[Label]) -> Labels:
    numbers = np.zeros(int(indices.max()) + 1, np.uint8)
    for label in labels:
        if label.index < len(numbers):
            numbers[label.index] = label.number
    classes: Labels = numbers[indices]
    return classes


def _zoomed(image: NDArray[np.float32], shape: Shape) -> NDArray[np.float32]:
    factors = [new / old for new, old in zip(shape, image.shape, strict=True)]
    zoomed = ndimage.zoom(image.astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)
    clipped: NDArray[np.float32] = np.clip(zoomed, image.min(), image.max()).astype(np.float32)
    return clipped


def _apart(classes: Labels, labels: Sequence[Label], mm3: float) -> dict[int, float]:
    shares = {}
    boxes = ndimage.find_objects(classes, max_label=len(labels) - 1)
    for label, box in zip(labels[1:], boxes, strict=True):
        if box is not None and label.index:
            sizes = np.bincount(ndimage.label(classes[box] == label.number, TOUCHING)[0].ravel())[1:]
            if sizes.sum() * mm3 >= APART_MM3:
                shares[label.index] = 1 - float(sizes.max() / sizes.sum()) if len(sizes) > 1 else 0.0
    return shares


def _to_bytes(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    sample = image[tuple(slice(None, None, max(size // 64, 1)) for size in image.shape)]
    low, high = np.percentile(sample[sample > sample.min()], picture.WINDOW)
    shown = np.empty(image.shape, np.uint8)
    for index, plane in enumerate(image):
        shown[index] = np.clip((plane - np.float32(low)) * np.float32(255 / (high - low)), 0, 255)
    return shown


def _contrast_to_noise(shown: NDArray[np.uint8], inside: NDArray[np.bool_]) -> float:
    box = nonzero_box(inside)
    core = inside[box][1:-1, 1:-1, 1:-1]
    low, high = np.percentile(shown[box][1:-1, 1:-1, 1:-1][core], (10, 90))
    residuals = np.abs(NOISE * noise(shown[box].astype(np.float32))[core])
    return float(high - low) / max(1.4826 * float(np.median(residuals)), 0.5)


def _cuts(classes: Labels) -> list[tuple[picture.Plane, int]]:
    return [(plane, classes.shape[plane.cut] * part // 4) for plane in picture.PLANES for part in (1, 2, 3)]


def measured(shared: Path, rounds: int = ROUNDS) -> str:
    """The table: medians of `rounds` in turn. Raises AssertionError if a form does not give what it should."""
    rows = []
    for change in changes(shared):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        results = []
        for _ in range(rounds):
            for now, step in ((False, change.before), (True, change.after)):
                start = time.perf_counter()
                results.append(step())
                seconds[now].append(time.perf_counter() - start)
        change.check(results[-2], results[-1])
        before, after = median(seconds[False]), median(seconds[True])
        effect = f"{1000 * before:.1f} to {1000 * after:.1f} ms, {before / after:.1f} times faster"
        rows.append((change.name, change.predicted, effect))
    return table(("change", "predicted", "measured"), rows)


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(shared: Path) -> None:
    """Print the table."""
    click.echo(measured(shared))


if __name__ == "__main__":
    main()
