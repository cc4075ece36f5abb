"""Reads and checks what `plans.json` says about one configuration, in the layouts of nnunetv2 2.0 to 2.8.

A plan is data from elsewhere. The Python objects that it names are looked up in a fixed list and never imported, and
its sizes are limited before anything is built from them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemuse.export.documents import (
    blaming,
    flag,
    mapping,
    read_json,
    real,
    sequence,
    text,
    whole,
)
from edgemuse.runtime.model.checks import short
from edgemuse.runtime.model.manifest import Normalization, NormalizationScheme, Resampling
from edgemuse.runtime.scan.types import Shape, Spacing

PLANS = "plans.json"
MAX_STAGES = 12
MAX_CONVOLUTIONS = 64
MAX_FEATURES = 4096
MAX_PATCH_VOXELS = 1 << 26
"""Four times the largest patch that nnU-Net plans for 80 GB of GPU memory."""
HUGE = 1e9

BLOCKS_KEY = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
"""The networks that can be exported, and the argument of each that gives the number of blocks in every stage."""
SCHEMES: Mapping[str, NormalizationScheme] = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "RescaleTo01Normalization": "rescale01",
    "RGBTo01Normalization": "rgb01",
    "NoNormalization": "none",
}
REORIENTING_READERS = ("NibabelIOWithReorient", "SimpleITKIOWithReorient")
"""Readers that turn every scan to RAS before the network sees it; the others take voxels as they are stored."""
CLASS_NAME = re.compile(
    r"(?:torch\.nn|torch\.nn\.modules\.\w+|dynamic_network_architectures\.(?:architectures|building_blocks)\.\w+)"
    r"\.(\w+)"
)


@dataclass(frozen=True)
class Architecture:
    """The network's name and its checked constructor arguments, classes given by their bare names."""

    network: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """One configuration of `plans.json`. Axes are the network's d, h, w; `transpose` leads there from k, j, i."""

    dataset_name: str
    plans_name: str
    configuration: str
    reader: str
    transpose: Shape
    spacing: Spacing
    patch: Shape
    stride: Shape
    normalization: Normalization
    image_resampling: Resampling
    output_resampling: Resampling
    architecture: Architecture

    @property
    def orientation(self) -> str | None:
        """The orientation that nnU-Net itself brings scans to, if any."""
        return "RAS" if self.reader in REORIENTING_READERS else None


def read_plan(folder: Path, configuration: str) -> Plan:
    """The plan of `configuration` in `folder/plans.json`; raises ModelFolderError with a reason if it is unusable."""
    path = folder / PLANS
    plans = read_json(path)
    with blaming(path):
        config = resolve(mapping(plans["configurations"], "configurations"), configuration)
        _refuse_unsupported(plans, config, configuration)
        return _plan(plans, config, configuration)


def resolve(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration `name` on top of those it inherits from."""
    chain: list[dict[str, Any]] = []
    visited: list[str] = []
    current: Any = name
    while current is not None:
        if current in visited:
            raise ValueError(f"configurations inherit in a circle: {' -> '.join([*visited, current])}")
        if not isinstance(current, str) or current not in configurations:
            known = ", ".join(sorted(configurations))
            raise ValueError(f"there is no configuration {short(current)}, only {known}")
        visited.append(current)
        chain.append(mapping(configurations[current], f"configuration {current}"))
        current = chain[-1].get("inherits_from")
    return {key: value for config in reversed(chain) for key, value in config.items()}


def _refuse_unsupported(plans: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    patch = config["patch_size"]
    if isinstance(patch, list) and len(patch) == 2:
        raise ValueError(f"configuration {name} is 2D; export a 3D one, such as 3d_fullres")
    if config.get("previous_stage") is not None:
        raise ValueError(
            f"configuration {name} is the second stage of a cascade and needs the output of "
            f"{short(config['previous_stage'])} as input; export 3d_fullres or 3d_lowres"
        )
    for key, found, known in (
        ("preprocessor", config["preprocessor_name"], "DefaultPreprocessor"),
        ("label manager", plans.get("label_manager", "LabelManager"), "LabelManager"),
    ):
        if found != known:
            raise ValueError(f"{key} {short(found)} is not supported, only nnU-Net's {known}")


def _plan(plans: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Plan:
    d, h, w = (real(x, 1e-3, 1e3, "spacing") for x in sequence(config["spacing"], 3, "spacing"))
    architecture = _architecture(config)
    stride = _total_stride(architecture.arguments["strides"])
    return Plan(
        dataset_name=text(plans["dataset_name"], "dataset_name"),
        plans_name=text(plans["plans_name"], "plans_name"),
        configuration=name,
        reader=text(plans["image_reader_writer"], "image_reader_writer"),
        transpose=_transpose(plans["transpose_forward"]),
        spacing=(d, h, w),
        patch=_patch(config["patch_size"], stride),
        stride=stride,
        normalization=_normalization(plans, config),
        image_resampling=_resampling(config, "data", max_order=5),
        output_resampling=_resampling(config, "probabilities", max_order=1),
        architecture=architecture,
    )


def _transpose(value: object) -> Shape:
    d, h, w = (whole(axis, 0, 2, "transpose_forward") for axis in sequence(value, 3, "transpose_forward"))
    if {d, h, w} != {0, 1, 2}:
        raise ValueError(f"transpose_forward must be a permutation of 0, 1, 2, found {short(value)}")
    return d, h, w


def _patch(value: object, stride: Shape) -> Shape:
    d, h, w = (whole(side, 1, 4096, "patch_size") for side in sequence(value, 3, "patch_size"))
    if d * h * w > MAX_PATCH_VOXELS:
        raise ValueError(f"patch_size {[d, h, w]} is more than {MAX_PATCH_VOXELS} voxels")
    if any(side % step for side, step in zip((d, h, w), stride, strict=True)):
        raise ValueError(f"patch_size {[d, h, w]} is not a multiple of the total stride {list(stride)}")
    return d, h, w


def _total_stride(strides: list[list[int]]) -> Shape:
    d, h, w = (math.prod(axis) for axis in zip(*strides, strict=True))
    return d, h, w


def _normalization(plans: Mapping[str, Any], config: Mapping[str, Any]) -> Normalization:
    (name,) = sequence(config["normalization_schemes"], 1, "normalization_schemes (one input channel)")
    if name not in SCHEMES:
        raise ValueError(f"unknown normalization {short(name)}; known are {', '.join(SCHEMES)}")
    (use_mask,) = sequence(config["use_mask_for_norm"], 1, "use_mask_for_norm")
    scheme = SCHEMES[name]
    if scheme == "ct":
        return _ct(plans)
    return Normalization(scheme, flag(use_mask, "use_mask_for_norm") and scheme == "zscore")


def _ct(plans: Mapping[str, Any]) -> Normalization:
    key = "foreground_intensity_properties_per_channel"
    if key not in plans and "foreground_intensity_properties_by_modality" in plans:
        key = "foreground_intensity_properties_by_modality"
    found = mapping(mapping(plans[key], key)["0"], f"{key} of channel 0")
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    mean, std, lower, upper = (real(found[name], -HUGE, HUGE, f"{key}: {name}") for name in names)
    return Normalization("ct", False, mean, std, lower, upper)


def _resampling(config: Mapping[str, Any], kind: str, max_order: int) -> Resampling:
    key = f"resampling_fn_{kind}"
    if config[key] != "resample_data_or_seg_to_shape":
        raise ValueError(f"{key} {short(config[key])} is not supported, only nnU-Net's resample_data_or_seg_to_shape")
    kwargs = mapping(config[f"{key}_kwargs"], f"{key}_kwargs")
    _known_keys(kwargs, {"is_seg", "order", "order_z", "force_separate_z"}, f"{key}_kwargs")
    if kwargs.get("is_seg"):
        raise ValueError(f"{key}_kwargs must have is_seg false, found {short(kwargs['is_seg'])}")
    force = kwargs.get("force_separate_z")
    return Resampling(  # what is not given is nnU-Net's default: order 3, order_z 0
        whole(kwargs.get("order", 3), 0, max_order, f"{key}_kwargs: order"),
        whole(kwargs.get("order_z", 0), 0, max_order, f"{key}_kwargs: order_z"),
        None if force is None else flag(force, f"{key}_kwargs: force_separate_z"),
    )


def _architecture(config: Mapping[str, Any]) -> Architecture:
    if "architecture" not in config:
        return _checked(*_from_old_layout(config))
    found = mapping(config["architecture"], "architecture")
    network = _class_name(found["network_class_name"], tuple(BLOCKS_KEY), "architecture")
    return _checked(network, mapping(found["arch_kwargs"], "arch_kwargs"))


def _from_old_layout(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The arguments that nnunetv2 derives from plans made before 2.3, which list the network's numbers one by one."""
    network = config["UNet_class_name"]
    if network not in BLOCKS_KEY:
        raise ValueError(f"unknown architecture {short(network)}; known are {', '.join(BLOCKS_KEY)}")
    stages = len(config["n_conv_per_stage_encoder"])
    base = whole(config["UNet_base_num_features"], 1, MAX_FEATURES, "UNet_base_num_features")
    most = whole(config["unet_max_num_features"], 1, MAX_FEATURES, "unet_max_num_features")
    return network, {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(min(stages, MAX_STAGES))],
        "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": config["conv_kernel_sizes"],
        "strides": config["pool_op_kernel_sizes"],
        BLOCKS_KEY[network]: config["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": config["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _checked(network: str, kwargs: Mapping[str, Any]) -> Architecture:
    blocks = BLOCKS_KEY[network]
    stages = whole(kwargs["n_stages"], 2, MAX_STAGES, "n_stages")
    arguments = {
        "n_stages": stages,
        "features_per_stage": _per_stage(kwargs, "features_per_stage", stages, MAX_FEATURES),
        "kernel_sizes": _per_axis(kwargs, "kernel_sizes", stages, 15),
        "strides": _per_axis(kwargs, "strides", stages, 8),
        blocks: _per_stage(kwargs, blocks, stages, MAX_CONVOLUTIONS),
        "n_conv_per_stage_decoder": _per_stage(kwargs, "n_conv_per_stage_decoder", stages - 1, MAX_CONVOLUTIONS),
        "conv_bias": flag(kwargs.get("conv_bias", False), "conv_bias"),
        **_layers(kwargs),
        **(_plain(kwargs) if network == "PlainConvUNet" else _residual(kwargs, stages)),
    }
    # Deep supervision only matters in training.
    _known_keys(kwargs, {*arguments, "deep_supervision"}, f"arguments of {network}")
    _check_geometry(arguments)
    return Architecture(network, arguments)


def _check_geometry(arguments: Mapping[str, Any]) -> None:
    if arguments["strides"][0] != [1, 1, 1]:
        raise ValueError(f"the first of strides must be [1, 1, 1], found {short(arguments['strides'][0])}")
    if any(size % 2 == 0 for kernel in arguments["kernel_sizes"] for size in kernel):
        raise ValueError(f"kernel_sizes must be odd, found {short(arguments['kernel_sizes'])}")


def _layers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    dropout = _optional_class(kwargs, "dropout_op", "Dropout3d")
    norm = _optional_class(kwargs, "norm_op", "InstanceNorm3d")
    return {
        "conv_op": _class_name(kwargs["conv_op"], ("Conv3d",), "conv_op"),
        "norm_op": norm,
        "norm_op_kwargs": _options(kwargs, "norm_op_kwargs", {"affine": bool, "eps": float}) if norm else None,
        "dropout_op": dropout,
        "dropout_op_kwargs": _options(kwargs, "dropout_op_kwargs", {"p": float, "inplace": bool}) if dropout else None,
        **_nonlinearity(kwargs),
    }


def _nonlinearity(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    name = _optional_class(kwargs, "nonlin", "LeakyReLU", "ReLU")
    known = {"inplace": bool} | ({"negative_slope": float} if name == "LeakyReLU" else {})
    return {"nonlin": name, "nonlin_kwargs": _options(kwargs, "nonlin_kwargs", known) if name else None}


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"nonlin_first": flag(kwargs.get("nonlin_first", False), "nonlin_first")}


def _residual(kwargs: Mapping[str, Any], stages: int) -> dict[str, Any]:
    bottleneck, stem = kwargs.get("bottleneck_channels"), kwargs.get("stem_channels")
    block = kwargs.get("block", "dynamic_network_architectures.building_blocks.residual.BasicBlockD")
    return {
        "block": _class_name(block, ("BasicBlockD", "BottleneckD"), "block"),
        "bottleneck_channels": None
        if bottleneck is None
        else _per_stage(kwargs, "bottleneck_channels", stages, MAX_FEATURES),
        "stem_channels": None if stem is None else whole(stem, 1, MAX_FEATURES, "stem_channels"),
    }


def _per_stage(kwargs: Mapping[str, Any], key: str, stages: int, high: int) -> list[int]:
    value = kwargs[key]
    values = [value] * stages if isinstance(value, int) else sequence(value, stages, key)
    return [whole(entry, 1, high, key) for entry in values]


def _per_axis(kwargs: Mapping[str, Any], key: str, stages: int, high: int) -> list[list[int]]:
    value = kwargs[key]
    values = [value] * stages if isinstance(value, int) else sequence(value, stages, key)
    triples = [[entry] * 3 if isinstance(entry, int) else sequence(entry, 3, key) for entry in values]
    return [[whole(size, 1, high, key) for size in triple] for triple in triples]


def _options(kwargs: Mapping[str, Any], key: str, known: Mapping[str, type]) -> dict[str, Any]:
    options = mapping(kwargs.get(key) or {}, key)
    _known_keys(options, set(known), key)
    return {
        name: flag(value, name) if known[name] is bool else real(value, 0, 1, name) for name, value in options.items()
    }


def _known_keys(found: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(found) - known):
        raise ValueError(f"{what}: {', '.join(unknown)} not supported; known are {', '.join(sorted(known))}")


def _optional_class(kwargs: Mapping[str, Any], key: str, *known: str) -> str | None:
    value = kwargs.get(key)
    return None if value is None else _class_name(value, known, key)


def _class_name(value: object, known: tuple[str, ...], what: str) -> str:
    match = CLASS_NAME.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[1] not in known:
        raise ValueError(f"unknown {what} {short(value)}; known are {', '.join(known)}")
    return match[1]
