"""The network, and its nnU-Net v2 model folder, which `nnUNetPredictor` and `edgemuse export` read.

`python -m edgemuse.training.folder -o FOLDER` makes that of the built-in model again from its bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgemuse.export.checkpoint import read_checkpoint
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.types import Shape
from edgemuse.training.labelmaps import class_labels

NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
CHECKPOINT = "fold_0/checkpoint_final.pth"
SUPERVISION = "decoder.seg_layers."
HEAD = (166.0, 194.0, 166.0)
"""mm, a usual crop around a head; of no consequence for inference."""


@dataclass(frozen=True)
class Model:
    """A network and what its folder says of it.

    Attributes:
        features: of each stage of the encoder.
        patch: d, h, w.
        spacing: mm.
        labels: of the classes.
        dataset: what nnU-Net calls the training data.
        cases: how many label maps were trained on.
        masked: whether z-scores rest on what lies inside the head alone, not on the whole crop.
    """

    features: tuple[int, ...]
    patch: Shape
    spacing: float
    labels: tuple[Label, ...]
    dataset: str
    cases: int
    masked: bool


T1 = Model((16, 32, 64, 128, 256), (128, 176, 128), 1.3, class_labels(), "Dataset902_SynthesisedT1", 16, True)
"""The built-in model of 32 structures."""


def architecture(features: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of PlainConvUNet, with classes named as nnU-Net's plans name them."""
    stages = len(features)
    return {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def build_network(model: Model) -> Any:
    """The network of `architecture`, with deep supervision and He initialisation."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He

    classes = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    arguments = architecture(model.features) | classes
    network = PlainConvUNet(input_channels=1, num_classes=len(model.labels), deep_supervision=True, **arguments)
    return network.apply(InitWeights_He(1e-2))


def start_weights(start: Path, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an nnU-Net model folder or of a bundle; `fresh`: what a new network has."""
    checkpoint = start / CHECKPOINT
    if checkpoint.is_file():
        return dict(read_checkpoint(checkpoint, "0").weights)
    return bundle_weights(start, fresh)


def bundle_weights(path: Path, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the fp32 graph and the head of the bundle at `path`, named as the network names them.

    A bundle does not hold the lower layers of deep supervision: they stay as in `fresh`, a state of the network.
    Raises ValueError if anything else is missing.
    """
    bundle = open_bundle(path)
    graph, head = onnx.load_from_string(bundle.graph("fp32")), bundle.head()
    if head is None:
        raise ValueError(f"{path}: the last layer is in the graph, not beside it")
    stored = {tensor.name.removesuffix(".half"): numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    last = max(name.rpartition(".")[0] for name in fresh if name.startswith(SUPERVISION))
    stored |= {f"folds.0.{last}.weight": head.weight, f"folds.0.{last}.bias": head.bias}
    weights = {}
    for name, value in fresh.items():
        found = stored.get(f"folds.0.{_once(name)}")
        if found is None and not name.startswith(SUPERVISION):
            raise ValueError(f"{path}: no {name} in this bundle")
        weights[name] = value if found is None else torch.from_numpy(found.astype("float32")).reshape(value.shape)
    return weights


def _once(name: str) -> str:
    """The name under which a weight that the network lists several times is exported."""
    plain = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
    return plain if plain.startswith("decoder.") else f"decoder.{plain}"


def write_folder(folder: Path, weights: Mapping[str, Tensor], model: Model) -> None:
    """Write or refresh a model folder; weights are stored in half precision, which loading turns back to single."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "plans.json", _plans(model))
    _write_json(folder / "dataset.json", _dataset(model))
    (folder / "labels.tsv").write_text(label_table(model.labels), encoding="utf-8")
    save(
        {
            "network_weights": {name: weight.detach().cpu().half() for name, weight in weights.items()},
            "init_args": {"configuration": "3d_fullres", "fold": 0},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": None,
        },
        folder / CHECKPOINT,
    )


def label_table(labels: Sequence[Label]) -> str:
    """What `edgemuse export --labels` reads."""
    lines = ["class\tindex\tname\tcolor\tsingle"]
    for label in labels:
        cells = (label.number, label.index, label.name, label.color, "yes" if label.single else "no")
        lines.append("\t".join(map(str, cells)))
    return "\n".join(lines) + "\n"


def save(contents: object, path: Path) -> None:
    """`torch.save` that leaves the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(contents, partial)
    os.replace(partial, path)


def _write_json(path: Path, contents: object) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def _dataset(model: Model) -> dict[str, Any]:
    return {
        "channel_names": {"0": "T1w"},
        "labels": {label.name: label.number for label in model.labels},
        "numTraining": model.cases,
        "file_ending": ".nii.gz",
        "name": model.dataset,
    }


def _plans(model: Model) -> dict[str, Any]:
    """nnU-Net's plans in the layout of nnunetv2 2.3 and later."""
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 1,
        "patch_size": list(model.patch),
        "median_image_size_in_voxels": [round(size / model.spacing, 1) for size in HEAD],
        "spacing": [model.spacing] * 3,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [model.masked],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling | {"order": 3},
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": {
            "network_class_name": NETWORK,
            "arch_kwargs": architecture(model.features),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    intensities = {"max": 1.0, "mean": 0.5, "median": 0.5, "min": 0.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0}
    return {
        "dataset_name": model.dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [192, 224, 192],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities | {"std": 0.2}},
    }


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), default=BUILT_IN, help="Another one like it.")
def main(output: Path, bundle: Path) -> None:
    """Write the model folder of the built-in model, as nnU-Net's own predictor reads it."""
    write_folder(output, bundle_weights(bundle, build_network(T1).state_dict()), T1)
    click.echo(output)


if __name__ == "__main__":
    main()
