"""Model folders in nnU-Net's own format for measurements: variants of a trained one, and ones with random weights."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from edgemuse.bench.measure import scans
from edgemuse.export.exporter import ExportOptions, export_model

DLMUSE_SHAPE = (163, 214, 155)
"""Voxels of 1 mm of a T1 that was cropped to the brain."""


Progress: TypeAlias = Callable[[str], None]


def made(target: Path, make: Callable[[Path], object]) -> Path:
    """Return `target`, made by `make` if it is absent: under another name first, so that it is never half made."""
    if not target.exists():
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was interrupted
        make(part)
        part.rename(target)
    return target


def exported(folder: Path, bundle: Path, labels: Path | None = None, progress: Progress = lambda _: None) -> Path:
    """Return the bundle of a model folder, exported if it is not there yet."""
    if not bundle.exists():
        export_model(folder, bundle, ExportOptions(orientation="LPS", labels=labels, progress=progress))
    return bundle


def development_bundle(shared: Path, work: Path, progress: Progress = lambda _: None) -> Path:
    """Return the bundle of the development model with FreeSurfer's numbers, exported if `work` does not hold it."""
    folder = shared / "data" / "devmodel"
    return exported(folder, work / "dev.bundle", folder / "labels.tsv", progress)


def parity_models(shared: Path, work: Path) -> dict[str, Path]:
    """Make the models of the parity page: the development model in three variants, and two with random weights."""
    trained = shared / "data" / "devmodel"
    return {
        "dev": trained,
        "dev, mirrored": _mirrored(trained, work / "mirrored"),
        "dev, two folds": _ensemble(trained, work / "ensemble"),
        "residual encoder": _residual(trained, work / "residual"),
        "DLMUSE, random weights": random_dlmuse(shared, work / "dlmuse"),
    }


def random_dlmuse(shared: Path, folder: Path, mirror_axes: tuple[int, ...] | None = None) -> Path:
    """Make DLMUSE's network of its own plans with random weights, because upstream's may not be passed on."""
    facts = shared / "data" / "dlmuse"
    return random_model(facts / "plans.json", facts / "dataset.json", 152, folder, mirror_axes=mirror_axes)


def dlmuse_scan(shared: Path, work: Path) -> Path:
    """Make a real T1 of `DLMUSE_SHAPE` at 1 mm, LPS, alone in a folder in `work`."""
    upright = scans.reoriented(shared / "data" / "t1" / "crop_T1w.nii.gz", work / "upright.nii.gz", "LPS")
    (work / "scan").mkdir(exist_ok=True)
    return scans.centre_crop(upright, work / "scan" / "brain_T1w.nii.gz", DLMUSE_SHAPE)


def random_model(
    plans: Path,
    dataset: Path,
    classes: int,
    folder: Path,
    seed: int = 0,
    mirror_axes: tuple[int, ...] | None = None,
) -> Path:
    """Make a model folder with one fold of random weights for the 3d_fullres network of `plans`."""
    folder.mkdir(parents=True)
    shutil.copy(plans, folder / "plans.json")
    content = json.loads(dataset.read_text())
    content["labels"] = {"background": 0} | {f"class_{n}": n for n in range(1, classes)}
    (folder / "dataset.json").write_text(json.dumps(content))
    _save_random(json.loads(plans.read_text()), classes, folder, seed, mirror_axes)
    return folder


def _save_random(
    plans: dict[str, Any], classes: int, folder: Path, seed: int, mirror_axes: tuple[int, ...] | None = None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnunetv2 warns about old plans
        configuration = PlansManager(plans).get_configuration("3d_fullres")
    torch.manual_seed(seed)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        classes,
        deep_supervision=False,
    )
    save_fold(network.state_dict(), mirror_axes, folder / "fold_0")


def save_fold(weights: dict[str, torch.Tensor], mirror_axes: tuple[int, ...] | None, fold: Path) -> None:
    """Write the checkpoint of one fold as nnU-Net's training leaves it."""
    fold.mkdir(parents=True, exist_ok=True)
    content = {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "inference_allowed_mirroring_axes": mirror_axes,
    }
    torch.save(content, fold / "checkpoint_final.pth")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    weights: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return weights


def _copy_plans(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(source / name, target / name)


def _mirrored(trained: Path, target: Path) -> Path:
    _copy_plans(trained, target)
    save_fold(_weights(trained), (0, 1, 2), target / "fold_0")
    return target


def _ensemble(trained: Path, target: Path) -> Path:
    """Make two folds: the second is the first with noise of a twentieth of each weight tensor's spread."""
    _copy_plans(trained, target)
    weights = _weights(trained)
    torch.manual_seed(1)
    noisy = {k: v + 0.05 * v.std(correction=0) * torch.randn_like(v) for k, v in weights.items()}
    save_fold(weights, None, target / "fold_0")
    save_fold(noisy, None, target / "fold_1")
    return target


def _residual(trained: Path, target: Path) -> Path:
    """Make a residual encoder network with random weights from the trained model's plans."""
    plans = json.loads((trained / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    arguments = architecture["arch_kwargs"]
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    _copy_plans(trained, target)
    (target / "plans.json").write_text(json.dumps(plans))
    _save_random(plans, 33, target, seed=2)
    return target
