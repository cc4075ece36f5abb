"""Builds nnU-Net's network from a plan and a checkpoint, and splits it into a backbone (features) and a head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from torch import nn

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.checkpoint import Checkpoint
from edgemuse.export.plans import Architecture
from edgemuse.runtime.model.bundle import Head

NETWORKS: Mapping[str, Any] = {"PlainConvUNet": PlainConvUNet, "ResidualEncoderUNet": ResidualEncoderUNet}
CLASSES: Mapping[str, Any] = {
    "Conv3d": nn.Conv3d,
    "InstanceNorm3d": nn.InstanceNorm3d,
    "LeakyReLU": nn.LeakyReLU,
    "ReLU": nn.ReLU,
    "Dropout3d": nn.Dropout3d,
    "BasicBlockD": BasicBlockD,
    "BottleneckD": BottleneckD,
}
CLASS_ARGUMENTS = ("conv_op", "norm_op", "nonlin", "dropout_op", "block")
INPUT_CONVOLUTION = ("encoder.stem.convs.0.conv.weight", "encoder.stages.0.0.convs.0.conv.weight")
MAX_CLASSES = 1 << 16
SHOWN = 3
"""An error message lists so many differences between checkpoint and plan."""


def build_network(architecture: Architecture, channels: int, classes: int) -> nn.Module:
    """The network in evaluation mode on the `meta` device: without weights, it takes no memory whatever its size."""
    arguments = dict(architecture.arguments)
    for key in CLASS_ARGUMENTS:
        if arguments.get(key) is not None:
            arguments[key] = CLASSES[arguments[key]]
    with torch.device("meta"):
        network: nn.Module = NETWORKS[architecture.network](
            input_channels=channels, num_classes=classes, deep_supervision=False, **arguments
        )
    return network.eval()


def load_network(architecture: Architecture, checkpoint: Checkpoint) -> nn.Module:
    """The trained network of one fold; raises ModelFolderError where plan and checkpoint do not belong together."""
    weights = checkpoint.weights
    channels = _size(weights, INPUT_CONVOLUTION, axis=1)
    if channels != 1:
        raise ModelFolderError(f"fold {checkpoint.fold}: the network takes {channels} input channels, expected 1")
    network = build_network(architecture, channels, count_classes(architecture, checkpoint))
    _compare(network, checkpoint)
    _check_finite(checkpoint)
    network.load_state_dict({name: weights[name].float() for name in network.state_dict()}, assign=True)
    return network.requires_grad_(False).eval()


def count_classes(architecture: Architecture, checkpoint: Checkpoint) -> int:
    """Classes of the network by its last layer; raises ModelFolderError."""
    last = architecture.arguments["n_stages"] - 2
    classes = _size(checkpoint.weights, (f"decoder.seg_layers.{last}.weight",), axis=0)
    if not 2 <= classes <= MAX_CLASSES:
        raise ModelFolderError(f"fold {checkpoint.fold}: {classes} classes, expected 2 to {MAX_CLASSES}")
    return classes


def _size(weights: Mapping[str, torch.Tensor], names: Sequence[str], axis: int) -> int:
    for name in names:
        if name in weights and weights[name].ndim == 5:
            return int(weights[name].shape[axis])
    raise ModelFolderError(
        f"the checkpoint has no 3D convolution {' or '.join(names)}, so it is not of the network in plans.json"
    )


def _compare(network: nn.Module, checkpoint: Checkpoint) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    differences = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in [*expected, *(name for name in found if name not in expected)]
        if found.get(name) != expected.get(name)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise ModelFolderError(
            f"fold {checkpoint.fold}: the weights are not of the network in plans.json: "
            f"{'; '.join(differences[:SHOWN])}{more}; was it trained with another trainer or other plans?"
        )


def _check_finite(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.weights.items():
        # In float32: half precision could hold what is finite there, double precision what is not.
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ModelFolderError(
                f"fold {checkpoint.fold}: weight {name} is not finite: its training diverged; choose another checkpoint"
            )


def head_layer(network: nn.Module) -> nn.Conv3d:
    """The last layer: a 1x1x1 convolution from features to logits."""
    layer: nn.Conv3d = network.get_submodule("decoder.seg_layers")[-1]
    return layer


def without_head(network: nn.Module) -> nn.Module:
    """A copy of `network` that returns features. It shares the weights, so it costs no memory."""
    shared = {id(weight): weight for weight in network.parameters()}
    backbone = copy.deepcopy(network, shared)
    layers = backbone.get_submodule("decoder.seg_layers")
    layers[len(layers) - 1] = nn.Identity()
    return backbone


def defers_head(networks: Sequence[nn.Module]) -> bool:
    """Whether the features of all folds together have fewer channels than the logits."""
    head = head_layer(networks[0])
    return bool(len(networks) * head.in_channels < head.out_channels)


def merge_heads(networks: Sequence[nn.Module]) -> Head:
    """One head for the concatenated features of all folds, equal to the mean of their logits."""
    heads = [head_layer(network) for network in networks]
    weights = [head.weight.detach().flatten(1).numpy().astype(np.float64) for head in heads]
    biases = [head.bias.detach().numpy().astype(np.float64) for head in heads]
    weight = np.concatenate(weights, axis=1) / len(heads)
    of_folds = np.asarray(biases, np.float32) if len(heads) > 1 else None
    return Head(np.ascontiguousarray(weight, np.float32), np.mean(biases, axis=0).astype(np.float32), of_folds)


class FeatureEnsemble(nn.Module):  # type: ignore[misc]  # torch is Any to mypy
    """The features of every fold, side by side along the channels."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(without_head(network) for network in networks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 1, D, H, W) to (1, K * F, D, H, W)."""
        features = [fold(image) for fold in self.folds]
        return features[0] if len(features) == 1 else torch.cat(features, dim=1)


class LogitEnsemble(nn.Module):  # type: ignore[misc]
    """The mean of the folds' logits."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.folds = nn.ModuleList(networks)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(1, 1, D, H, W) to (1, C, D, H, W)."""
        total = self.folds[0](image)
        for index in range(1, len(self.folds)):
            total = total + self.folds[index](image)
        return total if len(self.folds) == 1 else total / len(self.folds)


def backbone(networks: Sequence[nn.Module]) -> nn.Module:
    """What the graph computes: features of all folds where the head is deferred, else their mean logits."""
    ensemble = FeatureEnsemble if defers_head(networks) else LogitEnsemble
    return ensemble(networks).eval()
