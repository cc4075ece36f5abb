import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.training import folder, loop, ship, train_muse
from edgemuse.training.distil import CLASSES, Choices, rarity_of
from edgemuse.training.pairs import HELD_OUT
from edgemuse.training.regions import INDICES, class_table

FEATURES = (4, 4, 4, 4, 4)
MODEL = train_muse.muse_model(4.0, 1, FEATURES)
PLAN = loop.Plan(4, 1e-3, warm_up=1, validate_every=2, workers=0)


def recipe(pair, **changes):
    choices = Choices(4.0, voxels=300, boxes=((96.0, 96.0, 96.0),) * 3)
    return replace(train_muse.Distilled([pair], [pair], rarity_of([pair]), MODEL, choices), **changes)


@pytest.fixture
def run():
    return loop.new_run(MODEL, "cpu", None)


def test_the_patch_holds_a_brain_and_the_scores_rest_on_the_whole_crop():
    model = train_muse.muse_model(2.0, 151)
    assert model.patch == (96, 112, 80)
    assert not model.masked
    assert len(model.labels) == 149


def test_features_and_head_are_the_network(run):
    image = torch.randn(1, 1, 16, 16, 32)
    with torch.no_grad():
        logits = train_muse.head(run.network, train_muse.deferred(run.network, image))
        expected = run.network(image)[0]
    assert torch.allclose(logits, expected[0].movedim(0, -1).reshape(-1, CLASSES), atol=1e-4)


def test_the_loss_is_of_the_voxels_drawn_alone(pair, run):
    image, where, wanted = next(iter(loop.batches(recipe(pair).samples(0, 1), PLAN)))
    loss, dice = recipe(pair).loss(run.network, (image, where, wanted))
    assert loss > 3
    assert 0 <= dice < 0.5
    loss.backward()
    assert run.network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("spacing", [2.0, 3.0])
def test_labels_of_a_scan_lie_on_its_own_grid(pair, run, spacing):
    found = train_muse.labels_of(run.network, pair, spacing)
    assert found.shape == pair.image.shape
    assert found.max() < CLASSES


def test_a_right_answer_has_dice_1_and_no_bias(pair):
    truth = class_table()[pair.numbers]
    assert train_muse.compared(truth, truth) == (1.0, 0.0)
    more = truth.copy()
    more[0, 0, :10] = 1
    dice, bias = train_muse.compared(more, truth)
    assert dice < 1
    assert bias == pytest.approx(10 / np.count_nonzero(truth))


def test_an_interrupted_run_ends_where_a_whole_one_does(pair, tmp_path):
    whole, part = (loop.new_run(MODEL, "cpu", None) for _ in range(2))
    for output in ("whole", "part"):
        (tmp_path / output).mkdir()
    loop.train(whole, PLAN, recipe(pair), tmp_path / "whole")
    loop.train(part, replace(PLAN, steps=2, fall=1e-9), recipe(pair), tmp_path / "part")
    again = loop.open_run(MODEL, "cpu", None, tmp_path / "part")
    assert again.step == 2
    again = loop.new_run(MODEL, "cpu", None)
    for sample in loop.batches(recipe(pair).samples(0, 2), PLAN):
        loop.train_step(again, recipe(pair), sample, PLAN.rate_at(again.step))
    loop.train(again, PLAN, recipe(pair), tmp_path / "part")
    for name, value in whole.average.items():
        assert torch.allclose(value, again.average[name], atol=1e-6), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"held_out_dice", "icv_bias", "step"} <= set(lines[-1])


def test_export_reads_the_folder(run, tmp_path):
    folder.write_folder(tmp_path / "model", run.average, MODEL)
    options = ExportOptions(orientation="LPS", labels=tmp_path / "model" / "labels.tsv")
    manifest = open_bundle(export_model(tmp_path / "model", tmp_path / "small.bundle", options)).manifest
    assert [label.index for label in manifest.labels] == list(INDICES)
    assert not manifest.network.normalization.use_mask
    assert manifest.network.deferred_head


@pytest.fixture
def ixi(pair, tmp_path):
    """A folder of two subjects, the second one held out."""
    affine = np.diag([-2.0, -2, 2, 1])
    for name in ("IXI900-HH-0001", HELD_OUT[0]):
        regions = np.where(pair.numbers < 500, pair.numbers, 0)
        for kind, array in (("t1", pair.image), ("dlmuse", regions)):
            (tmp_path / "ixi" / kind).mkdir(parents=True, exist_ok=True)
            stored = nib.Nifti1Image(array.transpose(2, 1, 0).astype(np.uint8), affine)
            suffix = "T1w" if kind == "t1" else "dseg"
            nib.save(stored, tmp_path / "ixi" / kind / f"{name}_{suffix}.nii.gz")
    return tmp_path / "ixi"


def test_the_command_trains_and_goes_on(ixi, tmp_path, monkeypatch):
    monkeypatch.setattr(train_muse, "FEATURES", FEATURES)
    monkeypatch.setattr(train_muse, "muse_model", lambda spacing, cases: replace(MODEL, spacing=spacing, cases=cases))
    monkeypatch.setattr(loop, "batches", lambda samples, plan: iter(()))
    arguments = [str(ixi), "-o", str(tmp_path / "run"), "--spacing", "4", "--device", "cpu"]
    ran = CliRunner().invoke(train_muse.main, arguments)
    assert ran.exit_code == 0, ran.output


def test_shipping_names_the_licence_and_links_the_held_out_scans(run, ixi, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ship, "add_int8", lambda bundle, data: seen.extend(sorted(path.name for path in data.iterdir()))
    )
    folder.write_folder(tmp_path / "run" / "model", run.average, MODEL)
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--model", "muse", "--calibrate", str(ixi)]
    ran = CliRunner().invoke(ship.main, arguments)
    assert ran.exit_code == 0, ran.output
    manifest = open_bundle(tmp_path / "out" / "edgemuse-muse.zip").manifest
    assert manifest.license == "CC-BY-SA-3.0 AND LicenseRef-SBIA-1.1"
    assert manifest.network.orientation == "LPS"
    assert sorted(seen) == [f"{HELD_OUT[0]}_T1w.nii.gz", f"{HELD_OUT[0]}_dseg.nii.gz"]
