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
from edgemuse.training import folder, train
from edgemuse.training.labelmaps import INDICES

FEATURES, PATCH = (4, 8, 8), (16, 16, 16)


@pytest.fixture
def small(monkeypatch):
    """A network and a validation that take no time."""
    monkeypatch.setattr(folder, "FEATURES", FEATURES)
    monkeypatch.setattr(train, "VALIDATION_SAMPLES", 1)


PLAN = train.Plan(4, 1e-3, warm_up=1, validate_every=4, patch=PATCH, workers=0)


def finish(run, head, output):
    output.mkdir(exist_ok=True)
    train.train(run, PLAN, [head], [head], output)
    return run


def test_the_rate_rises_stays_and_falls():
    plan = train.Plan(1000, 2.0, warm_up=10, fall=0.4)
    assert plan.rate_at(0) == pytest.approx(0.2)
    assert plan.rate_at(500) == 2.0
    assert plan.rate_at(800) == pytest.approx(1.0)
    assert plan.rate_at(1000) == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_fast_normalisation_is_instance_normalisation(batch):
    torch.manual_seed(0)
    layer = nn.InstanceNorm3d(5, affine=True)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(batch, 5, 6, 7, 8) * 3 + 2
    assert torch.allclose(train.normalise_fast(layer, x), layer(x), atol=1e-5)


def test_the_loss_of_a_certain_answer_is_small_and_of_a_wrong_one_large():
    torch.manual_seed(0)
    target = torch.randint(0, 3, (1, 4, 4, 4))
    logits = 30 * torch.movedim(nn.functional.one_hot(target.long(), 3).float(), -1, 1)
    right, dice = train.overlap_loss(logits, target, torch.ones(3))
    assert right == pytest.approx(0, abs=1e-3)
    assert dice == pytest.approx(1, abs=1e-3)
    wrong, dice = train.overlap_loss(logits.roll(1, 1), target, torch.ones(3))
    assert wrong > 10
    assert dice < 0.1


def test_rare_classes_weigh_more(head):
    weights = train.class_weights([head])
    present = {index: weights[INDICES.index(index)] for index in (0, 2, 3, 10)}
    assert present[10] > present[3] > present[0]


@pytest.mark.parametrize(("weighted", "value"), [(True, 2.0), (False, 1.0)])
def test_classes_may_count_alike(weighted, value, small, head, tmp_path, monkeypatch):
    seen, loss = [], train.total_loss

    def hear(outputs, target, weights):
        seen.extend(weights.tolist())
        return loss(outputs, target, weights)

    monkeypatch.setattr(train, "class_weights", lambda _: torch.full((train.CLASSES,), 2.0))
    monkeypatch.setattr(train, "total_loss", hear)
    plan = replace(PLAN, steps=1, weighted=weighted)
    train.train(train.new_run(FEATURES, "cpu", None), plan, [head], [head], tmp_path)
    assert set(seen) == {value}


def test_without_deep_supervision_the_lower_layers_stay(small, head, tmp_path):
    run = train.new_run(FEATURES, "cpu", None)
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    train.train(run, replace(PLAN, steps=1, levels=1), [head], [head], tmp_path)
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


def test_an_interrupted_run_ends_where_a_whole_one_does(small, head, tmp_path):
    whole = finish(train.new_run(FEATURES, "cpu", None), head, tmp_path / "whole")
    part, weights = train.new_run(FEATURES, "cpu", None), train.class_weights([head])
    for image, target in train.batches(train.Samples([head], PATCH, train.SEED, 0, 2), PLAN):
        train.train_step(part, image, target, weights, PLAN.rate_at(part.step))
    folder.save(part.state(), tmp_path / "part.pth")
    again = train.new_run(FEATURES, "cpu", None)
    again.restore(torch.load(tmp_path / "part.pth", weights_only=True))
    finish(again, head, tmp_path / "again")
    assert again.step == whole.step == 4
    for name, value in whole.average.items():
        assert torch.allclose(value, again.average[name], atol=1e-6), name


def test_a_signal_saves_and_ends(small, head, tmp_path, monkeypatch):
    def step(run, *_):
        run.step += 1
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        return 0.0, 0.0

    monkeypatch.setattr(train, "train_step", step)
    run = finish(train.new_run(FEATURES, "cpu", None), head, tmp_path)
    assert run.step == 1
    assert torch.load(tmp_path / "state.pth", weights_only=True)["step"] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_leaves_a_model_folder_that_starts_the_next(small, head, tmp_path):
    run = finish(train.new_run(FEATURES, "cpu", None), head, tmp_path)
    model = tmp_path / "model"
    stored = read_checkpoint(model / folder.CHECKPOINT, "0").weights
    assert all(weight.dtype == torch.float16 for weight in stored.values())
    following = train.new_run(FEATURES, "cpu", model)
    for name, value in following.network.state_dict().items():
        assert torch.allclose(value, run.average[name], atol=1e-3), name
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_dice"] == pytest.approx(run.best, abs=1e-6)


def test_a_line_without_steps_holds_no_loss(tmp_path):
    record = train.Record(tmp_path / "log.jsonl")
    record.write(step=1, held_out_dice=0.5)
    record.add(2.0, 0.25)
    record.write(step=2)
    without, with_loss = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert set(without) == {"seconds", "step", "held_out_dice"}
    assert (with_loss["loss"], with_loss["dice"]) == (2.0, 0.25)


def test_nnunet_and_export_read_the_folder(small, head, tmp_path):
    predict = pytest.importorskip(
        "nnunetv2.inference.predict_from_raw_data", reason="nnunetv2 is not installed: pip install '.[dev]'"
    )
    from edgemuse.export.exporter import ExportOptions, export_model
    from edgemuse.runtime.model.bundle import open_bundle

    run = train.new_run(FEATURES, "cpu", None)
    folder.write_folder(tmp_path / "model", run.average, FEATURES, PATCH)
    predictor = predict.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), ("0",), "checkpoint_final.pth")
    assert predictor.configuration_manager.patch_size == list(PATCH)
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


def test_a_run_may_start_from_a_bundle(small, tmp_path):
    """With every weight of it, rounded to half precision, but those of the lower layers of deep supervision."""
    torch.manual_seed(3)
    network = folder.build_network(FEATURES)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    old = network.state_dict()
    folder.write_folder(tmp_path / "model", old, FEATURES, PATCH)
    bundle = export_model(tmp_path / "model", tmp_path / "bundle", ExportOptions())
    new = train.new_run(FEATURES, "cpu", bundle).network.state_dict()
    levels = {name for name in old if name.startswith(folder.SUPERVISION)}
    lost = {name for name in levels if not name.startswith(max(levels).rpartition(".")[0])}
    assert lost
    assert all(torch.equal(new[name], value.half().float()) for name, value in old.items() if name not in lost)
