"""Plans of every layout that can be run are understood alike, and every other one is refused with a reason."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.plans import Plan, read_plan

FULLRES = "3d_fullres"
DLMUSE = Path(__file__).parents[2].parent / "shared" / "data" / "dlmuse"


@pytest.fixture
def tiny_plans(nnunet_models: ModuleType) -> dict[str, Any]:
    return copy.deepcopy(nnunet_models.plans(nnunet_models.ModelOptions()))


def read(folder: Path, plans: Any, configuration: str = FULLRES) -> Plan:
    (folder / "plans.json").write_text(json.dumps(plans))
    return read_plan(folder, configuration)


def put(plans: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        plans = plans[key]
    plans[last] = value


@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("inherits", [False, True])
def test_old_and_new_layout_say_the_same(
    nnunet_models: ModuleType, tmp_path: Path, network: str, inherits: bool
) -> None:
    options = {"network": network, "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)), "spacing": (2.0, 1.0, 1.0)}
    new = read(tmp_path, nnunet_models.plans(nnunet_models.ModelOptions(**options)))
    old = read(tmp_path, nnunet_models.plans(nnunet_models.ModelOptions(**options, layout="old", inherits=inherits)))
    assert old == new
    assert new.stride == (2, 4, 4)
    assert new.spacing == (2.0, 1.0, 1.0)
    assert new.architecture.arguments["features_per_stage"] == [4, 8, 16]


def test_lowres_and_other_names_are_configurations_too(nnunet_models: ModuleType, tmp_path: Path) -> None:
    plans = nnunet_models.plans(nnunet_models.ModelOptions(configuration="3d_lowres"))
    plans["configurations"]["3d_lowres"]["next_stage"] = "3d_cascade_fullres"
    assert read(tmp_path, plans, "3d_lowres").configuration == "3d_lowres"


@pytest.mark.parametrize("key", ["per_channel", "by_modality"])
def test_ct_takes_the_training_intensities(nnunet_models: ModuleType, tmp_path: Path, key: str) -> None:
    plans = nnunet_models.plans(nnunet_models.ModelOptions(normalization="CTNormalization"))
    properties = plans.pop("foreground_intensity_properties_per_channel")
    plans[f"foreground_intensity_properties_{key}"] = properties
    found = read(tmp_path, plans).normalization
    assert (found.scheme, found.mean, found.std, found.lower, found.upper) == ("ct", 40.0, 20.0, -50.0, 120.0)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("ZScoreNormalization", "zscore"),
        ("NoNormalization", "none"),
        ("RescaleTo01Normalization", "rescale01"),
        ("RGBTo01Normalization", "rgb01"),
    ],
)
def test_normalizations(nnunet_models: ModuleType, tmp_path: Path, name: str, scheme: str) -> None:
    found = read(tmp_path, nnunet_models.plans(nnunet_models.ModelOptions(normalization=name))).normalization
    assert found.scheme == scheme
    assert found.use_mask == (scheme == "zscore")


@pytest.mark.parametrize(
    ("reader", "orientation"),
    [
        ("SimpleITKIO", None),
        ("NibabelIO", None),
        ("NibabelIOWithReorient", "RAS"),
        ("SimpleITKIOWithReorient", "RAS"),
    ],
)
def test_reader_decides_the_orientation(
    nnunet_models: ModuleType, tmp_path: Path, reader: str, orientation: str | None
) -> None:
    plan = read(tmp_path, nnunet_models.plans(nnunet_models.ModelOptions(reader=reader)))
    assert plan.orientation == orientation


def test_scalars_stand_for_every_stage_and_axis(tiny_plans: dict[str, Any], tmp_path: Path) -> None:
    arguments = tiny_plans["configurations"][FULLRES]["architecture"]["arch_kwargs"]
    arguments |= {"kernel_sizes": 3, "n_conv_per_stage": 1, "strides": [1, 2, [2, 2, 2]]}
    plan = read(tmp_path, tiny_plans)
    assert plan.architecture.arguments["kernel_sizes"] == [[3, 3, 3]] * 3
    assert plan.architecture.arguments["n_conv_per_stage"] == [1, 1, 1]
    assert plan.stride == (4, 4, 4)


CONFIG = f"configurations/{FULLRES}"
KWARGS = f"{CONFIG}/architecture/arch_kwargs"
REFUSED = [
    (f"{CONFIG}/previous_stage", "3d_lowres", "cascade"),
    (f"{CONFIG}/preprocessor_name", "CTPreprocessor", "DefaultPreprocessor"),
    ("label_manager", "MyLabelManager", "LabelManager"),
    (f"{CONFIG}/resampling_fn_data", "resample_torch_fornnunet", "resample_data_or_seg_to_shape"),
    (f"{CONFIG}/resampling_fn_probabilities", "no_resampling", "resample_data_or_seg_to_shape"),
    (f"{CONFIG}/resampling_fn_probabilities_kwargs/order", 3, "order must be a whole number from 0 to 1"),
    (f"{CONFIG}/resampling_fn_data_kwargs/is_seg", True, "is_seg"),
    (f"{CONFIG}/resampling_fn_data_kwargs/separate_z_anisotropy_threshold", 2, "not supported"),
    (f"{CONFIG}/normalization_schemes", ["MyNormalization"], "unknown normalization 'MyNormalization'"),
    (f"{CONFIG}/normalization_schemes", ["ZScoreNormalization"] * 2, "one input channel"),
    (f"{CONFIG}/architecture/network_class_name", "my_package.PlainConvUNet", "unknown architecture"),
    (f"{CONFIG}/architecture/network_class_name", "os.system", "unknown architecture"),
    (f"{CONFIG}/architecture/network_class_name", ["PlainConvUNet"], "unknown architecture"),
    (f"{KWARGS}/conv_op", "torch.nn.Conv2d", "conv_op"),
    (f"{KWARGS}/conv_op", "subprocess.Conv3d", "conv_op"),
    (f"{KWARGS}/norm_op", "torch.nn.BatchNorm3d", "norm_op"),
    (f"{KWARGS}/norm_op_kwargs", {"track_running_stats": True}, "track_running_stats"),
    (f"{KWARGS}/nonlin", "builtins.eval", "nonlin"),
    (f"{KWARGS}/dropout_op", "torch.nn.Linear", "dropout_op"),
    (f"{KWARGS}/squeeze_excitation", True, "squeeze_excitation"),
    (f"{KWARGS}/n_stages", 10**9, "n_stages"),
    (f"{KWARGS}/n_stages", True, "n_stages"),
    (f"{KWARGS}/features_per_stage", [4, 8, 10**9], "features_per_stage"),
    (f"{KWARGS}/features_per_stage", [4, 8], "features_per_stage"),
    (f"{KWARGS}/n_conv_per_stage", [10**6] * 3, "n_conv_per_stage"),
    (f"{KWARGS}/kernel_sizes", [[3, 3]] * 3, "kernel_sizes"),
    (f"{KWARGS}/kernel_sizes", 2, "odd"),
    (f"{KWARGS}/strides", 2, "first of strides"),
    (f"{CONFIG}/patch_size", [18, 16, 16], "multiple"),
    (f"{CONFIG}/patch_size", [4096, 4096, 4096], "voxels"),
    (f"{CONFIG}/patch_size", 16, "patch_size"),
    (f"{CONFIG}/spacing", [1.0, 1.0, 0.0], "spacing"),
    (f"{CONFIG}/spacing", [1.0, 1.0, float("nan")], "spacing"),
    (f"{CONFIG}/spacing", [1.0, 1.0, 10**400], "spacing"),
    (f"{CONFIG}/inherits_from", FULLRES, "circle"),
    (f"{CONFIG}/inherits_from", "nowhere", "no configuration 'nowhere'"),
    (f"{CONFIG}/inherits_from", ["2d"], "no configuration"),
    ("transpose_forward", [0, 1, 1], "permutation"),
    ("image_reader_writer", "two\nlines", "one line"),
    ("configurations", [], "configurations must map names to values"),
]


@pytest.mark.parametrize(("path", "value", "reason"), REFUSED)
def test_refused_with_a_reason(tiny_plans: dict[str, Any], tmp_path: Path, path: str, value: Any, reason: str) -> None:
    put(tiny_plans, path, value)
    with pytest.raises(ModelFolderError, match=re.escape(reason)) as caught:
        read(tmp_path, tiny_plans)
    assert "\n" not in str(caught.value)
    assert "plans.json" in str(caught.value)


def test_2d_and_unknown_configurations_are_refused(tiny_plans: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="is 2D; export a 3D one"):
        read(tmp_path, tiny_plans, "2d")
    with pytest.raises(ModelFolderError, match="no configuration '3d_other', only 2d, 3d_fullres"):
        read(tmp_path, tiny_plans, "3d_other")


def test_long_circle_of_inheritance(tiny_plans: dict[str, Any], tmp_path: Path) -> None:
    tiny_plans["configurations"] |= {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}
    with pytest.raises(ModelFolderError, match="a -> b -> a"):
        read(tmp_path, tiny_plans, "a")


def _refusal(folder: Path, plans: Any) -> str | None:
    try:
        read(folder, plans)
    except ModelFolderError as error:
        return str(error)
    return None


def _keys(data: dict[str, Any], prefix: str = "") -> list[str]:
    return [prefix + key for key in data]


@pytest.mark.parametrize("layout", ["old", "new"])
def test_every_missing_key_is_one_clear_line_or_not_needed(
    nnunet_models: ModuleType, tmp_path: Path, layout: str
) -> None:
    whole = nnunet_models.plans(nnunet_models.ModelOptions(layout=layout))
    complete = read(tmp_path, whole)
    missed = 0
    for path in [*_keys(whole), *_keys(whole["configurations"][FULLRES], f"{CONFIG}/")]:
        plans = copy.deepcopy(whole)
        parent = plans["configurations"][FULLRES] if "/" in path else plans
        key = path.rpartition("/")[2]
        del parent[key]
        reason = _refusal(tmp_path, plans)
        if reason is None:
            assert read(tmp_path, plans) == complete
            continue
        assert key in reason or key == "architecture"
        assert "\n" not in reason
        missed += 1
    assert missed >= 15


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"configurations": 1}', "[" * 100_000, "\xff"])
def test_files_that_are_not_plans(tmp_path: Path, text: str) -> None:
    (tmp_path / "plans.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFolderError, match=r"plans\.json"):
        read_plan(tmp_path, FULLRES)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such file; name the folder that holds"):
        read_plan(tmp_path, FULLRES)


@pytest.mark.skipif(not DLMUSE.is_dir(), reason="DLMUSE's plans.json is not beside this checkout")
def test_dlmuse() -> None:
    plan = read_plan(DLMUSE, FULLRES)
    assert (plan.patch, plan.stride, plan.spacing) == ((112, 128, 96), (16, 16, 16), (1.0, 1.0, 1.0))
    assert plan.architecture.arguments["features_per_stage"] == [32, 64, 128, 256, 320]
    assert plan.normalization.scheme == "zscore"
    assert plan.normalization.use_mask
    assert plan.image_resampling.order == 3
    assert plan.output_resampling.order == 1
