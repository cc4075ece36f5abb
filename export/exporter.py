"""The steps of `edgemuse export`: an nnU-Net v2 model folder becomes a verified bundle."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from edgemuse.engines.errors import MemoryLimitError, ModelFolderError
from edgemuse.engines.hardware import available_memory
from edgemuse.export.architecture import backbone, defers_head, head_layer, load_network, merge_heads
from edgemuse.export.checkpoint import Checkpoint, find_folds, read_checkpoints
from edgemuse.export.dataset import Dataset, class_labels, read_dataset, read_label_table
from edgemuse.export.graph import export_graph
from edgemuse.export.plans import Plan, read_plan
from edgemuse.export.selftest import new_selftest, selftest_bytes, with_features
from edgemuse.export.verify import reference, verification_patches, verify
from edgemuse.export.writer import HEAD, check_output, head_bytes, write_bundle
from edgemuse.runtime.model.bundle import Head, file_entry
from edgemuse.runtime.model.checks import is_orientation
from edgemuse.runtime.model.graph import inspect_graph
from edgemuse.runtime.model.manifest import Manifest, Network
from edgemuse.runtime.model.selftest import SELFTEST
from edgemuse.runtime.regions.labels import Label

GRAPH = "backbone.fp32.onnx"
RECORDED_PACKAGES = ("edgemuse", "torch", "onnx", "dynamic-network-architectures")


def _quiet(_: str) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class ExportOptions:
    """What the user may choose about an export.

    Attributes:
        folds: the folds to export, numbers or `all`; None takes every fold that has the checkpoint.
        checkpoint: the checkpoint's file name inside the folder of a fold.
        configuration: a configuration of plans.json; None takes the one that the checkpoint was trained with.
        orientation: axis codes that scans are turned to, such as `LPS`; None does what nnU-Net itself does.
        labels: the labels of the classes, or a table with the columns class, index, name, color; None takes the names
            in dataset.json.
        name: the bundle's name; None takes that of the data set.
        license: the licence of the weights, an SPDX expression or a sentence.
        scans: the scans to verify on, besides a small synthetic patch; if empty, all patches are synthetic.
        progress: is called with a line of text at every step.
        origin: what else the bundle records about where the folder came from.
    """

    folds: tuple[str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    configuration: str | None = None
    orientation: str | None = None
    labels: Path | tuple[Label, ...] | None = None
    name: str | None = None
    license: str | None = None
    scans: tuple[Path, ...] = ()
    progress: Callable[[str], None] = _quiet
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A model folder that was read and checked."""

    plan: Plan
    dataset: Dataset
    checkpoints: tuple[Checkpoint, ...]
    networks: tuple[nn.Module, ...]
    labels: tuple[Label, ...]


def export_model(folder: Path, output: Path, options: ExportOptions | None = None) -> Path:
    """Turn the nnU-Net model `folder` into a bundle at `output`, verified against PyTorch.

    Returns:
        `output`, which exists only if every step succeeded.

    Raises:
        ModelFolderError: the folder is damaged, or holds a model that edgemuse cannot run.
        VerificationError: the exported graph does not give what PyTorch gives.
        MemoryLimitError: one patch needs more memory than there is.
        OutputError: `output` exists or cannot be written.
        InputError: a scan of `options.scans` cannot be used.
    """
    options = options or ExportOptions()
    check_output(output)
    model = _read_model(folder, options)
    options.progress("tracing the network")
    graph = export_graph(backbone(model.networks), model.plan.patch)
    head = merge_heads(model.networks) if defers_head(model.networks) else None
    network = _network(model, head, inspect_graph(graph).activation_bytes, options)
    _check_memory(network)
    if network.orientation is None:
        options.progress("no --orientation: a scan that is not stored as the training data were will get wrong labels")
    patches = verification_patches(options.scans, network)
    source = [scan.name for scan in options.scans] or "synthetic phantoms; name real scans with --scan"
    verification = {"patches": source} | verify(model.networks, graph, head, patches, options.progress)
    files = {GRAPH: graph, SELFTEST: _selftest(model, network)} | ({} if head is None else {HEAD: head_bytes(head)})
    options.progress(f"writing {output}")
    return write_bundle(output, _manifest(model, network, files, verification, options), files)


def _read_model(folder: Path, options: ExportOptions) -> Model:
    _check_options(options)
    options.progress(f"reading {folder}")
    dataset = read_dataset(folder)
    folds = tuple(dict.fromkeys(options.folds or find_folds(folder, options.checkpoint)))
    checkpoints = read_checkpoints(folder, folds, options.checkpoint)
    plan = read_plan(folder, options.configuration or checkpoints[0].configuration)
    networks = tuple(load_network(plan.architecture, checkpoint) for checkpoint in checkpoints)
    _check_alike(networks)
    return Model(plan, dataset, checkpoints, networks, _labels(dataset, networks, options))


def _check_options(options: ExportOptions) -> None:
    if options.orientation is not None and not is_orientation(options.orientation):
        raise ModelFolderError(f"orientation {options.orientation!r} is not three axis codes such as LPS or RAS")
    for fold in options.folds or ():
        if not re.fullmatch(r"\d+|all", fold):
            raise ModelFolderError(f"fold {fold!r} is neither a number nor 'all'")
    if Path(options.checkpoint).name != options.checkpoint:
        raise ModelFolderError(f"checkpoint {options.checkpoint!r} must be a file name, without its folder")


def _check_alike(networks: Sequence[nn.Module]) -> None:
    found = sorted({head_layer(network).out_channels for network in networks})
    if len(found) > 1:
        raise ModelFolderError(f"the folds have different numbers of classes ({found}); choose with --fold")


def _labels(dataset: Dataset, networks: Sequence[nn.Module], options: ExportOptions) -> tuple[Label, ...]:
    classes = head_layer(networks[0]).out_channels
    if options.labels is None:
        return class_labels(dataset, classes)
    if isinstance(options.labels, Path):
        return read_label_table(options.labels, classes)
    if len(options.labels) != classes:
        raise ModelFolderError(f"the network has {classes} classes where {len(options.labels)} were expected")
    return options.labels


def _network(model: Model, head: Head | None, live_bytes: int, options: ExportOptions) -> Network:
    plan, classes = model.plan, len(model.labels)
    return Network(
        orientation=options.orientation or plan.orientation,
        transpose=plan.transpose,
        spacing=plan.spacing,
        patch=plan.patch,
        stride=plan.stride,
        mirror_axes=model.checkpoints[0].mirror_axes,
        normalization=plan.normalization,
        image_resampling=plan.image_resampling,
        output_resampling=plan.output_resampling,
        channels_out=classes if head is None else head.weight.shape[1],
        classes=classes,
        deferred_head=head is not None,
        activation_bytes=live_bytes,
    )


def _selftest(model: Model, network: Network) -> bytes:
    """A tile and what PyTorch makes of it."""
    selftest = new_selftest(network)
    expected = reference(model.networks, selftest.tile)
    output = expected.features if network.deferred_head else expected.logits
    return selftest_bytes(with_features(selftest, {"fp32": output}))


def _check_memory(network: Network) -> None:
    """A plan may ask for any patch and width: better refused than killed halfway."""
    needed, free = network.activation_bytes * math.prod(network.patch), available_memory()
    if needed > free:
        raise MemoryLimitError(
            f"verifying one patch of {network.patch} takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} are free; "
            "export on a machine with more memory"
        )


def _manifest(
    model: Model,
    network: Network,
    files: dict[str, bytes],
    verification: dict[str, Any],
    options: ExportOptions,
) -> Manifest:
    return Manifest(
        name=options.name or model.plan.dataset_name,
        license=options.license,
        network=network,
        labels=model.labels,
        graphs={"fp32": GRAPH},
        files={name: file_entry(data) for name, data in files.items()},
        source=_source(model) | dict(options.origin),
        verification=verification,
    )


def _source(model: Model) -> dict[str, Any]:
    plan, checkpoints = model.plan, model.checkpoints
    return {
        "dataset_name": plan.dataset_name,
        "plans_name": plan.plans_name,
        "configuration": plan.configuration,
        "folds": [checkpoint.fold for checkpoint in checkpoints],
        "trainer": checkpoints[0].trainer,
        "checkpoint_sha256": {checkpoint.fold: checkpoint.sha256 for checkpoint in checkpoints},
        "file_ending": model.dataset.file_ending,
        "image_reader_writer": plan.reader,
        "versions": {package: version(package) for package in RECORDED_PACKAGES},
    }
