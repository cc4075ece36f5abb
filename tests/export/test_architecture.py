"""The networks built are nnU-Net's own, and taking the head off changes nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="building networks needs PyTorch")

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.architecture import (
    backbone,
    build_network,
    defers_head,
    load_network,
    merge_heads,
    without_head,
)
from edgemuse.export.checkpoint import read_checkpoint, read_checkpoints
from edgemuse.export.plans import read_plan

Make = Callable[..., Path]
DLMUSE = Path(__file__).parents[2].parent / "shared" / "data" / "dlmuse"


def nnunets_network(plans: dict[str, Any], configuration: str, classes: int) -> Any:
    with warnings.catch_warnings():  # nnU-Net warns about plans of its own older versions
        warnings.simplefilter("ignore")
        pytest.importorskip("nnunetv2", reason="the reference is nnunetv2: pip install '.[bench]'")
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        config = PlansManager(plans).get_configuration(configuration)
        # For old residual plans nnU-Net names a module that is gone, and looks for it by importing everything.
        name = config.network_arch_class_name.replace("architectures.residual_unet.", "architectures.unet.")
        with torch.device("meta"):
            return get_network_from_plans(
                name, config.network_arch_init_kwargs,
                config.network_arch_init_kwargs_req_import, 1, classes, allow_init=False, deep_supervision=False,
            ).eval()  # fmt: skip


def shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_same_network_as_nnunet_builds(nnunet_models: ModuleType, model_folder: Make, name: str, layout: str) -> None:
    options = {
        "network": name,
        "layout": layout,
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "inherits": True,
    }
    folder = model_folder(**options)
    ours = build_network(read_plan(folder, "3d_fullres").architecture, 1, 7)
    theirs = nnunets_network(json.loads((folder / "plans.json").read_text()), "3d_fullres", 7)
    assert shapes(ours) == shapes(theirs)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"nonlin": "torch.nn.ReLU", "dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.2}},
        {"nonlin_kwargs": {"negative_slope": 0.2}, "conv_bias": False, "norm_op_kwargs": {"eps": 0.1}},
        {
            "nonlin_first": True,
            "n_conv_per_stage": [1, 2, 3],
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [5, 3, 3]],
        },
    ],
)
def test_every_argument_reaches_the_network(model_folder: Make, change: dict[str, Any]) -> None:
    folder = model_folder()
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= change
    (folder / "plans.json").write_text(json.dumps(plans))
    ours = build_network(read_plan(folder, "3d_fullres").architecture, 1, 7)
    assert repr(ours) == repr(nnunets_network(plans, "3d_fullres", 7))


def test_residual_blocks_with_a_bottleneck(model_folder: Make) -> None:
    folder = model_folder(network="ResidualEncoderUNet")
    plans = json.loads((folder / "plans.json").read_text())
    block = "dynamic_network_architectures.building_blocks.residual.BottleneckD"
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"block": block, "bottleneck_channels": [2, 4, 8], "stem_channels": 6}
    (folder / "plans.json").write_text(json.dumps(plans))
    plans["configurations"]["3d_fullres"]["architecture"]["_kw_requires_import"].append("block")
    ours = build_network(read_plan(folder, "3d_fullres").architecture, 1, 7)
    assert repr(ours) == repr(nnunets_network(plans, "3d_fullres", 7))


@pytest.mark.skipif(not DLMUSE.is_dir(), reason="DLMUSE's plans.json is not beside this checkout")
def test_dlmuses_network() -> None:
    ours = build_network(read_plan(DLMUSE, "3d_fullres").architecture, 1, 152)
    theirs = nnunets_network(json.loads((DLMUSE / "plans.json").read_text()), "3d_fullres", 152)
    assert shapes(ours) == shapes(theirs)
    assert repr(ours) == repr(theirs)


def test_the_largest_plan_accepted_takes_no_memory(model_folder: Make) -> None:
    folder = model_folder()
    plans = json.loads((folder / "plans.json").read_text())
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"features_per_stage": 4096, "kernel_sizes": 15, "n_conv_per_stage": 64}
    (folder / "plans.json").write_text(json.dumps(plans))
    architecture = read_plan(folder, "3d_fullres").architecture
    with pytest.raises(ModelFolderError, match="not of the network in plans"):
        load_network(architecture, read_checkpoint(folder / "fold_0" / "checkpoint_final.pth", "0"))


def load(folder: Path, *folds: str) -> list[Any]:
    checkpoints = read_checkpoints(folder, folds, "checkpoint_final.pth")
    return [load_network(read_plan(folder, "3d_fullres").architecture, found) for found in checkpoints]


def resave(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    change(content["network_weights"])
    torch.save(content, path)


def test_first_mismatches_are_listed(model_folder: Make) -> None:
    folder = model_folder()
    resave(folder, lambda weights: weights.pop("encoder.stages.1.0.convs.0.conv.bias"))
    with pytest.raises(
        ModelFolderError, match=r"encoder\.stages\.1\.0\.convs\.0\.conv\.bias is missing, expected \(8,\)"
    ):
        load(folder, "0")
    resave(folder, lambda weights: weights.update({"extra": torch.zeros(2)}))
    with pytest.raises(ModelFolderError, match=r"extra is \(2,\), expected none"):
        load(folder, "0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(model_folder: Make, value: float) -> None:
    folder = model_folder()
    resave(folder, lambda weights: weights["decoder.seg_layers.1.bias"].fill_(value))
    with pytest.raises(ModelFolderError, match=r"decoder\.seg_layers\.1\.bias is not finite"):
        load(folder, "0")


def test_more_than_one_input_channel(model_folder: Make) -> None:
    folder = model_folder()
    name = "encoder.stages.0.0.convs.0.conv.weight"
    resave(folder, lambda weights: weights.update({name: weights[name].repeat(1, 2, 1, 1, 1)}))
    with pytest.raises(ModelFolderError, match="takes 2 input channels"):
        load(folder, "0")


def test_a_network_of_another_kind(model_folder: Make) -> None:
    folder = model_folder()
    resave(folder, lambda weights: weights.clear())
    with pytest.raises(ModelFolderError, match="no 3D convolution"):
        load(folder, "0")


def test_loaded_network_computes_what_was_saved(nnunet_models: ModuleType, model_folder: Make) -> None:
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    (loaded,) = load(model_folder(seed=3), "0")
    original = nnunet_models.build(nnunet_models.ModelOptions(), 3).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(image), original(image)[0])


def test_half_precision_weights_become_float32(model_folder: Make) -> None:
    folder = model_folder()
    resave(folder, lambda weights: weights.update({name: x.half() for name, x in weights.items()}))
    (loaded,) = load(folder, "0")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("folds", "classes", "deferred"),
    [
        (("0",), 5, True),
        (("0",), 4, False),
        (("0", "1"), 9, True),
        (("0", "1"), 8, False),
        (("0", "1", "2"), 13, True),
    ],
)
def test_deferred_or_not_the_logits_are_the_mean_of_the_folds(
    model_folder: Make, folds: tuple[str, ...], classes: int, deferred: bool
) -> None:
    networks = load(model_folder(folds=folds, classes=classes), *folds)
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torch.stack([network(image) for network in networks]).mean(0).numpy()
        output = backbone(networks)(image).numpy()
    assert np.ptp(expected.argmax(axis=1)) > 0
    assert defers_head(networks) == deferred
    if deferred:
        head = merge_heads(networks)
        assert output.shape[1] == 4 * len(folds) < classes
        output = np.einsum("cf,nfdhw->ncdhw", head.weight, output) + head.bias[:, None, None, None]
    np.testing.assert_allclose(output, expected, atol=1e-5 * expected.std())


def test_taking_the_head_off_shares_weights_and_leaves_the_network_whole(model_folder: Make) -> None:
    (network,) = load(model_folder(), "0")
    bare = without_head(network)
    image = torch.zeros(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert bare(image).shape[1] == 4
        assert network(image).shape[1] == 7
    assert {id(x) for x in bare.parameters()} < {id(x) for x in network.parameters()}
