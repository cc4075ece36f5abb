"""Checks that an exported graph gives what the PyTorch network gives: the same features, and labels but for ties.

The reference is the network as nnU-Net runs it, head included, one fold after the other. So the graph, the split of
the head and the merging of folds are all compared with something that knows nothing of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgemuse.engines.errors import VerificationError
from edgemuse.engines.protocol import Batch, Engine, EngineOptions
from edgemuse.engines.registry import open_engine
from edgemuse.export.architecture import head_layer
from edgemuse.export.phantoms import synthetic_patches
from edgemuse.runtime.model.bundle import Head
from edgemuse.runtime.model.manifest import Network
from edgemuse.runtime.network.preprocess import preprocess
from edgemuse.runtime.scan.nifti import read_scan
from edgemuse.runtime.scan.types import Image, Shape

TOLERANCE = 5e-3
"""Largest error allowed, in standard deviations of the reference, of features and of logits.

Backends sum in another order than PyTorch, most visibly in normalisation layers, which average over a million voxels of
a patch. A wrong weight, axis or padding moves features by more than their spread; tests plant such faults.
"""
SYNTHETIC_PATCHES = 2
PATCHES_PER_SCAN = 2
SEED = 20240229


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives for one patch (1, 1, D, H, W): `features` (1, K * F, D, H, W), `logits` (1, C, D, H, W)."""

    patch: Batch
    features: Batch
    logits: Batch


@dataclass(frozen=True)
class Comparison:
    """One patch on one backend: each error beside the error allowed, and how many of `voxels` have another label.

    `unexplained` counts labels that differ although PyTorch's own decision was no tie within the tolerance.
    """

    backend: str
    version: str
    error: float
    tolerance: float
    logit_error: float
    logit_tolerance: float
    different: int
    unexplained: int
    voxels: int


def verify(
    networks: Sequence[nn.Module],
    graph: bytes,
    head: Head | None,
    patches: Iterable[Batch],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compare `graph` and `head` with `networks` on every backend here; raises VerificationError where they differ.

    Args:
        networks: the folds, whole.
        graph: the ONNX graph made of them.
        head: the merged head if it is deferred.
        patches: normalised, (1, 1, D, H, W) float32, of any shapes that the network takes.
        progress: called with a line of text now and then.

    Returns:
        The record for the bundle's manifest.
    """
    names = backends()
    comparisons: list[Comparison] = []
    for shape, group in itertools.groupby(patches, key=lambda patch: patch.shape):
        progress(f"comparing {' and '.join(names)} with PyTorch at {'x'.join(map(str, shape[2:]))}")
        with _engines(names, graph, shape) as engines:
            for patch in group:
                expected = reference(networks, patch)
                comparisons += [_checked(engine, head, expected) for engine in engines]
    records = [_summary([found for found in comparisons if found.backend == name]) for name in names]
    return {"reference": f"torch {torch.__version__}", "engines": records}


@contextlib.contextmanager
def _engines(names: Iterable[str], graph: bytes, shape: tuple[int, ...]) -> Iterator[list[Engine]]:
    n, c, d, h, w = shape
    with contextlib.ExitStack() as stack:
        engines = []
        for name in names:
            engine = open_engine(graph, (n, c, d, h, w), EngineOptions(backend=name, precision="fp32"))
            stack.callback(engine.close)
            engines.append(engine)
        yield engines


def _summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How one backend compares with PyTorch over all patches. The errors are those of the graph's output."""
    voxels = sum(found.voxels for found in comparisons)
    worst = max(comparisons, key=lambda found: found.error)
    return {
        "backend": comparisons[0].backend,
        "version": comparisons[0].version,
        "patches": len(comparisons),
        "max_abs_error": worst.error,
        "tolerance": worst.tolerance,
        "max_abs_logit_error": max(found.logit_error for found in comparisons),
        "label_agreement": 1 - sum(found.different for found in comparisons) / voxels,
    }


def backends() -> list[str]:
    """OpenVINO, which edgemuse always has, and ONNX Runtime if it is installed."""
    extra = ["onnxruntime"] if importlib.util.find_spec("onnxruntime") else []
    return ["openvino", *extra]


def reference(networks: Sequence[nn.Module], patch: Batch) -> Reference:
    """Features and mean logits of the whole networks."""
    features, logits = _run(networks[0], patch)
    for network in networks[1:]:
        more_features, more_logits = _run(network, patch)
        features = np.concatenate([features, more_features], axis=1)
        logits += more_logits
    logits /= len(networks)
    return Reference(patch, features, logits)


def _run(network: nn.Module, patch: Batch) -> tuple[Batch, Batch]:
    caught: list[torch.Tensor] = []
    hook = head_layer(network).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.inference_mode():
            logits = network(torch.from_numpy(patch))
    finally:
        hook.remove()
    return caught[0].numpy(), logits.numpy()


def _checked(engine: Engine, head: Head | None, ref: Reference) -> Comparison:
    found = compare(engine, head, ref)
    where = f"{engine.backend} {engine.version}"
    # Written so that NaN fails.
    if not found.error <= found.tolerance:
        raise VerificationError(
            f"{where} differs from PyTorch by {found.error:.3g} in the graph's output, allowed are "
            f"{found.tolerance:.3g}; no bundle was written"
        )
    if not found.logit_error <= found.logit_tolerance or found.unexplained:
        raise VerificationError(
            f"{where} differs from PyTorch by {found.logit_error:.3g} in the logits, allowed are "
            f"{found.logit_tolerance:.3g}, and in {found.unexplained} labels beyond ties; no bundle was written"
        )
    return found


def compare(engine: Engine, head: Head | None, ref: Reference) -> Comparison:
    """Run `engine` on the reference's patch, and compare its output and the logits made from it with the reference."""
    output, expected = engine.infer(ref.patch), ref.logits if head is None else ref.features
    if output.shape != expected.shape:
        raise VerificationError(f"the graph returns {output.shape}, expected {expected.shape}; no bundle was written")
    logits, wanted = _flat(output), _flat(ref.logits)
    if head is not None:
        logits = head.weight @ logits + head.bias[:, None]
    tolerance = TOLERANCE * float(wanted.std())
    different = logits.argmax(axis=0) != wanted.argmax(axis=0)
    # Two logits that each move by the tolerance can change places only if they were within twice that.
    unexplained = _margins(wanted[:, different]) > 2 * tolerance
    return Comparison(
        backend=engine.backend,
        version=engine.version,
        error=float(np.abs(output - expected).max()),
        tolerance=TOLERANCE * float(expected.std()),
        logit_error=float(np.abs(logits - wanted).max()),
        logit_tolerance=tolerance,
        different=int(different.sum()),
        unexplained=int(unexplained.sum()),
        voxels=wanted.shape[1],
    )


def _flat(channels: Batch) -> NDArray[np.float32]:
    """(1, C, D, H, W) to (C, voxels)."""
    return channels.reshape(channels.shape[1], -1)


def _margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """By how much the best logit of (C, voxels) exceeds the second."""
    second, best = np.partition(logits, -2, axis=0)[-2:]
    margins: NDArray[np.float32] = best - second
    return margins


def verification_patches(scans: Sequence[Path], network: Network) -> Iterator[Batch]:
    """Patches of real scans, or synthetic ones if there are none; then a small one, where rounding is small too."""
    if scans:
        for scan in scans:
            yield from scan_patches(scan, network)
    else:
        yield from synthetic_patches(network.patch, SYNTHETIC_PATCHES, SEED)
    yield from synthetic_patches(small_shape(network), SYNTHETIC_PATCHES, SEED + 1)


def small_shape(network: Network) -> Shape:
    """A shape near the smallest that the network takes. It is never the patch, so that another size is tried too."""
    d, h, w = network.stride
    small = (3 * d, 2 * h, 2 * w)
    return (3 * d, 2 * h, 3 * w) if small == network.patch else small


def scan_patches(scan: Path, network: Network) -> Iterator[Batch]:
    """Patches of the scan in the file `scan`, prepared as for inference; raises InputError."""
    opened, image = read_scan(scan)
    prepared = preprocess(image, opened.affine, opened.zooms, network)
    yield from crop_patches(prepared.image, network.patch, PATCHES_PER_SCAN)


def crop_patches(volume: Image, patch: Shape, count: int) -> Iterator[Batch]:
    """`count` patches along the diagonal of `volume` (d, h, w), which is padded with zeros if it is smaller."""
    short = [max(side - size, 0) for side, size in zip(patch, volume.shape, strict=True)]
    padded = np.pad(volume, [(side // 2, side - side // 2) for side in short])
    for index in range(1, count + 1):
        starts = [(size - side) * index // (count + 1) for side, size in zip(patch, padded.shape, strict=True)]
        box = tuple(slice(start, start + side) for start, side in zip(starts, patch, strict=True))
        yield np.ascontiguousarray(padded[box][None, None], dtype=np.float32)
