"""Small genuine nnU-Net v2 model folders with random weights, as nnU-Net's training would leave them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

NETWORKS: dict[str, Any] = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}
BLOCKS_KEY = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
CT = {"mean": 40.0, "std": 20.0, "percentile_00_5": -50.0, "percentile_99_5": 120.0}


@dataclass(frozen=True)
class ModelOptions:
    """What a model folder shall be like.

    Attributes:
        network: `PlainConvUNet` or `ResidualEncoderUNet`.
        folds: names of the folds; each gets weights of its own.
        classes: number of classes, background included.
        features: per stage; the first is F.
        strides: per stage, of d, h, w.
        patch: d, h, w.
        spacing: mm along d, h, w.
        normalization: nnU-Net's name of the scheme.
        use_mask: `use_mask_for_norm`.
        transpose: `transpose_forward`.
        mirror_axes: as in the checkpoint; `absent` leaves the key out.
        layout: of the plans: `old` (nnunetv2 2.0 to 2.2) or `new`.
        configuration: the one trained.
        inherits: put the configuration's contents into a parent and grandparent.
        reader: `image_reader_writer`.
        output_order: of the resampling of probabilities.
        prefix: in front of the weights' names, as torch.compile leaves it.
        checkpoint: file name.
        seed: of the weights.
    """

    network: str = "PlainConvUNet"
    folds: Sequence[str] = ("0",)
    classes: int = 7
    features: Sequence[int] = (4, 8, 16)
    strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    patch: Sequence[int] = (16, 16, 16)
    spacing: Sequence[float] = (1.0, 1.0, 1.0)
    normalization: str = "ZScoreNormalization"
    use_mask: bool = True
    transpose: Sequence[int] = (0, 1, 2)
    mirror_axes: Sequence[int] | Literal["absent"] | None = (0, 1, 2)
    layout: Literal["old", "new"] = "new"
    configuration: str = "3d_fullres"
    inherits: bool = False
    reader: str = "SimpleITKIO"
    output_order: int = 1
    prefix: str = ""
    checkpoint: str = "checkpoint_final.pth"
    seed: int = 0


def make_model_folder(path: Path, **options: Any) -> Path:
    """Write a model folder to `path` and return it; `options` are those of `ModelOptions`."""
    chosen = ModelOptions(**options)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "plans.json", plans(chosen))
    write_json(path / "dataset.json", dataset(chosen))
    for index, fold in enumerate(chosen.folds):
        folder = path / f"fold_{fold}"
        folder.mkdir(exist_ok=True)
        torch.save(checkpoint(chosen, chosen.seed + index), folder / chosen.checkpoint)
    return path


def write_json(path: Path, data: Any) -> None:
    """Write `data` as nnU-Net writes its JSON files."""
    path.write_text(json.dumps(data, indent=4))


def dataset(options: ModelOptions) -> dict[str, Any]:
    """The content of `dataset.json`."""
    names = {"background": 0} | {f"region {number}": number for number in range(1, options.classes)}
    return {"channel_names": {"0": "T1"}, "labels": names, "numTraining": 3, "file_ending": ".nii.gz"}


def plans(options: ModelOptions) -> dict[str, Any]:
    """The content of `plans.json`: the configuration trained and a 2D one."""
    name, whole = options.configuration, configuration(options)
    flat = {"2d": whole | {"patch_size": list(options.patch[1:])}}
    if options.inherits:
        keys = sorted(whole)
        chain = {
            "grandparent": {key: whole[key] for key in keys[::2]} | {"spacing": [9.0, 9.0, 9.0]},
            "parent": {"inherits_from": "grandparent"} | {key: whole[key] for key in keys[1::2]},
            name: {"inherits_from": "parent", "spacing": whole["spacing"]},
        }
    else:
        chain = {name: whole}
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": options.reader,
        "transpose_forward": list(options.transpose),
        "transpose_backward": [list(options.transpose).index(axis) for axis in range(3)],
        "configurations": flat | chain,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": CT | {"max": 200.0, "median": 38.0, "min": -90.0}},
    }


def configuration(options: ModelOptions) -> dict[str, Any]:
    """One configuration of the plans, complete."""
    network = old_network(options) if options.layout == "old" else {"architecture": architecture(options)}
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    return {
        "data_identifier": f"nnUNetPlans_{options.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(options.patch),
        "median_image_size_in_voxels": [20.0, 20.0, 20.0],
        "spacing": list(options.spacing),
        "normalization_schemes": [options.normalization],
        "use_mask_for_norm": [options.use_mask],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling | {"order": 3},
        "resampling_fn_seg_kwargs": resampling | {"order": 1, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": options.output_order},
        "batch_dice": False,
        **network,
    }


def architecture(options: ModelOptions) -> dict[str, Any]:
    """The network as nnunetv2 2.3 and later describe it."""
    stages = len(options.features)
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{options.network}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(options.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [list(stride) for stride in options.strides],
            BLOCKS_KEY[options.network]: [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def old_network(options: ModelOptions) -> dict[str, Any]:
    """The network as nnunetv2 2.0 to 2.2 describe it. Features double with every stage up to a maximum."""
    stages = len(options.features)
    return {
        "UNet_class_name": options.network,
        "UNet_base_num_features": options.features[0],
        "unet_max_num_features": max(options.features),
        "n_conv_per_stage_encoder": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "num_pool_per_axis": [2, 2, 2],
        "pool_op_kernel_sizes": [list(stride) for stride in options.strides],
        "conv_kernel_sizes": [[3, 3, 3]] * stages,
    }


def build(options: ModelOptions, seed: int) -> nn.Module:
    """The network with weights drawn so that features vary and every class wins somewhere."""
    arguments = architecture(options)["arch_kwargs"] | {
        "conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU,
    }  # fmt: skip
    network: nn.Module = NETWORKS[options.network](
        input_channels=1, num_classes=options.classes, deep_supervision=True, **arguments
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            fan_in = math.prod(weight.shape[1:]) if weight.ndim > 1 else 4
            weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if name.endswith("norm.weight"):
                weight.abs_().add_(0.5)
    return network


def checkpoint(options: ModelOptions, seed: int) -> dict[str, Any]:
    """What nnU-Net's trainer saves, the numpy numbers of its log included."""
    weights = build(options, seed).state_dict()
    content = {
        "network_weights": {f"{options.prefix}{name}": weight for name, weight in weights.items()},
        "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(1e-5), "params": [0, 1]}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(-0.25)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {
            "plans": plans(options), "configuration": options.configuration, "fold": 0,
            "dataset_json": dataset(options), "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
    }  # fmt: skip
    if options.mirror_axes != "absent":
        content["inference_allowed_mirroring_axes"] = options.mirror_axes
    return content
