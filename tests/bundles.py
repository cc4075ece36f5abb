"""Tiny bundles and scans for tests: a whole bundle is written in milliseconds and without PyTorch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy import ndimage

from edgemuse.engines.private import NAME as PRIVATE
from edgemuse.engines.private import TAG
from edgemuse.export.selftest import new_selftest, selftest_bytes, with_features
from edgemuse.export.writer import write_cascade
from edgemuse.runtime.cli import main
from edgemuse.runtime.model.bundle import file_entry, open_bundle
from edgemuse.runtime.model.cascade import CascadeManifest
from edgemuse.runtime.model.graph import inspect_graph
from edgemuse.runtime.model.manifest import MANIFEST, GateRow, Manifest, Network, Normalization, Resampling
from edgemuse.runtime.model.selftest import SELFTEST
from edgemuse.runtime.regions.labels import Label

OPSET, IR_VERSION = 18, 8
SLOPE = 0.01
"""Of the LeakyRelu, nnU-Net's own."""


@dataclass(frozen=True)
class Tiny:
    """What can be varied of a tiny bundle. The network is a 3x3x3 convolution of `features`, then LeakyRelu."""

    classes: int = 6
    features: int = 4
    deferred: bool = True
    orientation: str | None = "LPS"
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)
    patch: tuple[int, int, int] = (16, 16, 16)
    stride: tuple[int, int, int] = (1, 1, 1)
    mirror_axes: tuple[int, ...] = ()
    use_mask: bool = False
    labels: tuple[Label, ...] | None = None
    seed: int = 0
    threshold: bool = False  # no random weights: class 1 where the mean of 27 voxels is over the scan's

    @property
    def channels(self) -> int:
        """Channels that the graph returns."""
        return self.features if self.deferred else self.classes


def conv_weights(tiny: Tiny) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (channels, 1, 3, 3, 3) and bias (channels,) of the network."""
    if tiny.threshold:
        weight = np.zeros((tiny.channels, 1, 3, 3, 3), np.float32)
        weight[1] = 1 / 27
        return weight, np.zeros(tiny.channels, np.float32)
    rng = np.random.default_rng(tiny.seed)
    weight = rng.normal(0, 0.3, (tiny.channels, 1, 3, 3, 3)).astype(np.float32)
    return weight, rng.normal(0, 0.1, tiny.channels).astype(np.float32)


def head_weights(tiny: Tiny) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (classes, features) and bias (classes,) of the head."""
    rng = np.random.default_rng(tiny.seed + 1)
    weight = rng.normal(0, 1, (tiny.classes, tiny.features)).astype(np.float32)
    return weight, rng.normal(0, 0.1, tiny.classes).astype(np.float32)


def tiny_graph(tiny: Tiny | None = None) -> bytes:
    """The network as ONNX: `image` (1, 1, depth, height, width) to `features`, its sizes free."""
    weight, bias = conv_weights(tiny or Tiny())
    sizes = ["depth", "height", "width"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "weight", "bias"], ["conv"], pads=[1] * 6, kernel_shape=[3, 3, 3]),
            helper.make_node("LeakyRelu", ["conv"], ["features"], alpha=SLOPE),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, *sizes])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, len(weight), *sizes])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def tiny_oracle(image: NDArray[Any], tiny: Tiny | None = None) -> NDArray[np.float64]:
    """What the network gives for (d, h, w), as (channels, d, h, w), by scipy in float64."""
    weight, bias = (array.astype(np.float64) for array in conv_weights(tiny or Tiny()))
    # zeros outside, as the graph pads; correlation, as networks call convolution
    conv = np.stack([ndimage.correlate(image.astype(np.float64), kernel[0], mode="constant") for kernel in weight])
    conv += bias[:, None, None, None]
    return np.where(conv < 0, SLOPE * conv, conv)


def npz_bytes(**arrays: NDArray[Any]) -> bytes:
    """The bytes of a `.npz` file."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def tiny_manifest(tiny: Tiny, contents: dict[str, bytes]) -> Manifest:
    """The manifest of a bundle of `contents`."""
    network = Network(
        orientation=tiny.orientation,
        transpose=(0, 1, 2),
        spacing=tiny.spacing,
        patch=tiny.patch,
        stride=tiny.stride,
        mirror_axes=tiny.mirror_axes,
        normalization=Normalization("zscore", tiny.use_mask),
        image_resampling=Resampling(3, 0),
        output_resampling=Resampling(1, 0),
        channels_out=tiny.channels,
        classes=tiny.classes,
        deferred_head=tiny.deferred,
        activation_bytes=4 * (1 + 2 * tiny.channels),
    )
    labels = tiny.labels or tuple(
        Label(n, 10 * n, f"structure {n}" if n else "background") for n in range(tiny.classes)
    )
    return Manifest(
        name="tiny",
        license="CC0-1.0",
        network=network,
        labels=labels,
        graphs={"fp32": "fp32.onnx"},
        files={name: file_entry(data) for name, data in contents.items()},
        source={"made_by": "tests/bundles.py"},
        verification={"max_abs_error": 0.0},
    )


def tiny_bundle(folder: Path, **changes: Any) -> Path:
    """Write a valid bundle into the new `folder`; `changes` are the fields of `Tiny`. Returns `folder`."""
    tiny = replace(Tiny(), **changes)
    contents = {"fp32.onnx": tiny_graph(tiny)}
    if tiny.deferred:
        weight, bias = head_weights(tiny)
        contents["head.npz"] = npz_bytes(weight=weight, bias=bias)
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(tiny_manifest(tiny, contents).to_json())
    return folder


def add_selftest(folder: Path, **changes: Any) -> Path:
    """Store a tile in the tiny bundle in `folder` and what scipy makes of it, for fp32 and for int8."""
    bundle = open_bundle(folder)
    selftest = new_selftest(bundle.manifest.network)
    output = tiny_oracle(selftest.tile[0, 0], replace(Tiny(), **changes))[None].astype(np.float32)
    selftest = with_features(selftest, {"fp32": output, "int8": output})
    return replace_file(folder, SELFTEST, selftest_bytes(selftest))


def tiny_cascade(path: Path, mask: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a cascade to `path`: a mask of the brighter half of the scan, then a random network of 6 classes.

    `mask` changes the first network, `changes` are fields of CascadeManifest. Returns `path`.
    """
    with tempfile.TemporaryDirectory() as folder:
        first = {"classes": 2, "deferred": False, "threshold": True} | (mask or {})
        bundles = tiny_bundle(Path(folder) / "mask", **first), tiny_bundle(Path(folder) / "regions", seed=3)
        opened = [open_bundle(bundle) for bundle in bundles]
        manifest = CascadeManifest(
            name="tiny cascade",
            license="CC0-1.0",
            orientation="LPS",
            stages={role: bundle.sha256 for role, bundle in zip(("mask", "regions"), opened, strict=True)},
            padding_percent=10,
            keep_largest=False,
            plausible_mm3=None,
            fill=Label(6, 1, "filled"),
        )
        return write_cascade(path, replace(manifest, **changes), *opened)


def gate_row(**changes: Any) -> GateRow:
    """A row of the gate that passed: OpenVINO, int8, `balanced`."""
    row = GateRow(
        backend="openvino",
        version="2026.4",
        device="CPU",
        precision="int8",
        profile="balanced",
        processor="a processor",
        scans=2,
        seconds=1.5,
        agreement=0.987,
        dice=0.7,
        reference_dice=0.701,
        drop=0.01,
        worst="structure 3",
    )
    return replace(row, **changes)


def edit_manifest(folder: Path, **changes: Any) -> Path:
    """Change top-level keys of the bundle's manifest; returns `folder`."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def replace_file(folder: Path, name: str, data: bytes) -> Path:
    """Put `data` into the bundle as `name`, with the manifest in agreement; returns `folder`."""
    (folder / name).write_bytes(data)
    entry = file_entry(data)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return edit_manifest(folder, files=files | {name: {"bytes": entry.bytes, "sha256": entry.sha256}})


def replace_graph(folder: Path, data: bytes) -> Path:
    """Put the graph `data` into the bundle as fp32, and the memory it takes into the manifest; returns `folder`."""
    replace_file(folder, "fp32.onnx", data)
    network = json.loads((folder / MANIFEST).read_text())["network"]
    return edit_manifest(folder, network=network | {"activation_bytes": inspect_graph(data).activation_bytes})


def zip_bundle(folder: Path, path: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """The bundle in `folder` as the zip file `path`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder))
    return path


def head_image(shape: Sequence[int] = (24, 28, 20), seed: int = 0) -> NDArray[np.int16]:
    """An ellipsoid with an inner core and noise on an empty background: a T1 as far as the pipeline can tell."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij", sparse=True)
    radius = sum(axis**2 for axis in grid)
    image = np.where(radius < 0.3, 700.0, 400.0) + rng.normal(0, 40, shape)
    return np.where(radius < 1, np.clip(image, 1, None), 0).astype(np.int16)


def write_scan(
    path: Path,
    data: NDArray[Any] | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    affine: NDArray[np.float64] | None = None,
) -> Path:
    """Write `data` (default: `head_image()`) as NIfTI with sform and qform of `affine` (default: RAS at `spacing`)."""
    if affine is None:
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -20, -30, 10
    data = head_image() if data is None else data
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    image.header.set_qform(affine, 1)
    image.header.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


@dataclass(frozen=True)
class Ran:
    """What a command did.

    `flags`: the lines of `err` that ask to look at a result. Tiny scans always give some, so they stand apart.
    """

    code: int
    out: str
    err: str
    flags: tuple[str, ...] = ()


def ran(code: int, out: str, err: str) -> Ran:
    """What a command did, from its exit code and its two streams."""
    flags = tuple(line for line in err.splitlines() if ": look at this result: " in line)
    return Ran(code, out, "".join(line for line in err.splitlines(True) if line.rstrip("\n") not in flags), flags)


class CommandLine:
    """Calls the command line in this process; `capfd` catches what it prints. Logging and environment are put back."""

    def __init__(self, capfd: Any, cache_dir: Path) -> None:
        self.capfd, self.cache_dir = capfd, cache_dir

    def __call__(self, *arguments: object) -> Ran:
        """Run `edgemuse ARGUMENTS`."""
        loggers = [logging.getLogger(name) for name in ("edgemuse", "nibabel.global")]
        before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
        argv = ["edgemuse", *map(str, arguments)]
        self.capfd.readouterr()
        with (
            mock.patch.dict(os.environ, EDGEMUSE_CACHE_DIR=str(self.cache_dir)),
            mock.patch.object(sys, "argv", argv),
        ):
            code = _exit_code(main)
        for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers, logger.propagate = handlers, propagate
        return ran(code, *self.capfd.readouterr())


def _exit_code(function: Callable[[], None]) -> int:
    try:
        function()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    raise AssertionError("main() returned without sys.exit()")


def run_process(*arguments: object, cache_dir: Path, prelude: str = "", timeout: float = 120) -> Ran:
    """Run the command line in a fresh interpreter, the Python code `prelude` first; give up after `timeout` seconds."""
    code = f"{prelude}\nfrom edgemuse.runtime.cli import main\nmain()"
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return ran(done.returncode, done.stdout, done.stderr)


def cached(folder: Path, suffix: str = "") -> list[Path]:
    """What is kept in a cache in `folder`, without the tag that says that it is one; sorted."""
    places = (folder / PRIVATE).iterdir() if (folder / PRIVATE).exists() else ()
    return sorted(path for path in places if path.name != TAG and path.name.endswith(suffix))


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, hidden ones too; `folder` for a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def little_memory(most: int = 8 << 20) -> Iterator[None]:
    """Inside the block Python takes at most `most` bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
