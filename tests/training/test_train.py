import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edgemuse.export.checkpoint import read_checkpoint
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.training import folder, loop, train
from edgemuse.training.labelmaps import INDICES

MODEL = replace(folder.T1, features=(4, 8, 8), patch=(16, 16, 16))
PLAN = loop.Plan(4, 1e-3, warm_up=1, validate_every=4, workers=0)


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch):
    monkeypatch.setattr(train, "VALIDATION_SAMPLES", 1)


def recipe(head, **changes):
    return replace(train.Synthesised([head], [head], MODEL, train.class_weights([head])), **changes)


def finish(run, head, output):
    output.mkdir(exist_ok=True)
    loop.train(run, PLAN, recipe(head), output)
    return run


def test_rare_classes_weigh_more(head):
    weights = train.class_weights([head])
    present = {index: weights[INDICES.index(index)] for index in (0, 2, 3, 10)}
    assert present[10] > present[3] > present[0]


@pytest.mark.parametrize(("option", "value"), [("--weighted", 2.0), ("--unweighted", 1.0)])
def test_classes_may_count_alike(option, value, head, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "find_label_maps", lambda folder, held_out: ["a map"])
    monkeypatch.setattr(train, "read_label_map", lambda path: head)
    monkeypatch.setattr(train, "class_weights", lambda maps: torch.full((train.CLASSES,), 2.0))
    monkeypatch.setattr(loop, "open_run", lambda *_: None)
    monkeypatch.setattr(loop, "train", lambda run, plan, recipe, output: seen.extend(recipe.weights.tolist()))
    ran = CliRunner().invoke(train.main, [str(tmp_path), "-o", str(tmp_path / "run"), option])
    assert ran.exit_code == 0, ran.output
    assert set(seen) == {value}


def test_without_deep_supervision_the_lower_layers_stay(head, tmp_path):
    run = loop.new_run(MODEL, "cpu", None)
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    loop.train(run, replace(PLAN, steps=1), recipe(head, levels=1), tmp_path)
    changed = {name for name, value in run.network.state_dict().items() if not torch.equal(value, before[name])}
    layers = {name for name in before if name.startswith(folder.SUPERVISION)}
    finest = max(layers).rpartition(".")[0]
    assert changed & layers == {f"{finest}.weight", f"{finest}.bias"}
    assert "encoder.stages.0.0.convs.0.conv.weight" in changed


def test_a_start_from_a_bundle_needs_training_without_deep_supervision(tmp_path):
    bundle = tmp_path / "model.zip"
    bundle.write_bytes(b"")
    result = CliRunner().invoke(train.main, [str(tmp_path), "-o", str(tmp_path / "run"), "--start", str(bundle)])
    assert result.exit_code == 2
    assert "--no-deep-supervision" in result.output
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_ends_where_a_whole_one_does(head, tmp_path):
    whole = finish(loop.new_run(MODEL, "cpu", None), head, tmp_path / "whole")
    part = loop.new_run(MODEL, "cpu", None)
    for sample in loop.batches(recipe(head).samples(0, 2), PLAN):
        loop.train_step(part, recipe(head), sample, PLAN.rate_at(part.step))
    folder.save(part.state(), tmp_path / "part.pth")
    again = loop.new_run(MODEL, "cpu", None)
    again.restore(torch.load(tmp_path / "part.pth", weights_only=True))
    finish(again, head, tmp_path / "again")
    assert again.step == whole.step == 4
    for name, value in whole.average.items():
        assert torch.allclose(value, again.average[name], atol=1e-6), name


def test_a_signal_saves_and_ends(head, tmp_path, monkeypatch):
    def step(run, *_):
        run.step += 1
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        return 0.0, 0.0

    monkeypatch.setattr(loop, "train_step", step)
    run = finish(loop.new_run(MODEL, "cpu", None), head, tmp_path)
    assert run.step == 1
    assert torch.load(tmp_path / "state.pth", weights_only=True)["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_leaves_a_model_folder_that_starts_the_next(head, tmp_path):
    run = finish(loop.new_run(MODEL, "cpu", None), head, tmp_path)
    model = tmp_path / "model"
    stored = read_checkpoint(model / folder.CHECKPOINT, "0").weights
    assert all(weight.dtype == torch.float16 for weight in stored.values())
    following = loop.new_run(MODEL, "cpu", model)
    for name, value in following.network.state_dict().items():
        assert torch.allclose(value, run.average[name], atol=1e-3), name
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_dice"] == pytest.approx(run.best, abs=1e-6)


def test_nnunet_and_export_read_the_folder(head, tmp_path):
    predict = pytest.importorskip(
        "nnunetv2.inference.predict_from_raw_data", reason="nnunetv2 is not installed: pip install 'edgemuse[dev]'"
    )
    from edgemuse.export.exporter import ExportOptions, export_model
    from edgemuse.runtime.model.bundle import open_bundle

    run = loop.new_run(MODEL, "cpu", None)
    folder.write_folder(tmp_path / "model", run.average, MODEL)
    predictor = predict.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), ("0",), "checkpoint_final.pth")
    assert predictor.configuration_manager.patch_size == list(MODEL.patch)
    options = ExportOptions(orientation="LPS", labels=tmp_path / "model" / "labels.tsv")
    bundle = open_bundle(export_model(tmp_path / "model", tmp_path / "small.bundle", options))
    assert [label.index for label in bundle.manifest.labels] == list(INDICES)
    assert bundle.manifest.network.spacing == (1.3, 1.3, 1.3)


def test_the_built_in_models_folder_is_made_again(tmp_path):
    from click.testing import CliRunner

    from edgemuse.runtime.model.builtin import BUILT_IN
    from edgemuse.runtime.model.bundle import open_bundle

    ran = CliRunner().invoke(folder.main, ["-o", str(tmp_path / "model")])
    assert ran.exit_code == 0, ran.output
    weights = read_checkpoint(tmp_path / "model" / folder.CHECKPOINT, "0").weights
    head = open_bundle(BUILT_IN).head()
    last = max(name for name in weights if name.startswith(folder.SUPERVISION) and name.endswith("weight"))
    np.testing.assert_array_equal(weights[last].flatten(1), head.weight)
    assert json.loads((tmp_path / "model" / "plans.json").read_text())["configurations"]["3d_fullres"][
        "patch_size"
    ] == [*open_bundle(BUILT_IN).manifest.network.patch]


def test_a_run_may_start_from_a_bundle(tmp_path):
    """With every weight of it, rounded to half precision, but those of the lower layers of deep supervision."""
    torch.manual_seed(3)
    network = folder.build_network(MODEL)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    old = network.state_dict()
    folder.write_folder(tmp_path / "model", old, MODEL)
    bundle = export_model(tmp_path / "model", tmp_path / "bundle", ExportOptions())
    new = loop.new_run(MODEL, "cpu", bundle).network.state_dict()
    levels = {name for name in old if name.startswith(folder.SUPERVISION)}
    lost = {name for name in levels if not name.startswith(max(levels).rpartition(".")[0])}
    assert lost
    assert all(torch.equal(new[name], value.half().float()) for name, value in old.items() if name not in lost)
