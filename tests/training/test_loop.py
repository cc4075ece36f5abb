import json

import pytest
import torch
from torch import nn

from edgemuse.training import loop


def test_the_rate_rises_stays_and_falls():
    plan = loop.Plan(1000, 2.0, warm_up=10, fall=0.4)
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
    assert torch.allclose(loop.normalise_fast(layer, x), layer(x), atol=1e-5)


def test_the_loss_of_a_certain_answer_is_small_and_of_a_wrong_one_large():
    torch.manual_seed(0)
    wanted = torch.randint(0, 3, (64,))
    logits = 30 * nn.functional.one_hot(wanted, 3).float()
    right, dice = loop.overlap_loss(logits, wanted, torch.ones(3))
    assert right == pytest.approx(0, abs=1e-3)
    assert dice == pytest.approx(1, abs=1e-3)
    wrong, dice = loop.overlap_loss(logits.roll(1, 1), wanted, torch.ones(3))
    assert wrong > 10
    assert dice < 0.1


def test_averaged_weights_are_put_back_even_after_an_error():
    network = nn.Linear(2, 1)
    average = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    before = network.weight.detach().clone()
    run = loop.Run(network, average, torch.optim.AdamW(network.parameters()))

    def fail():
        with loop.averaged(run) as shown:
            assert not shown.weight.any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(network.weight, before)


def test_a_line_without_steps_holds_no_loss(tmp_path):
    record = loop.Record(tmp_path / "log.jsonl")
    record.write(step=1, held_out_dice=0.5)
    record.add(2.0, 0.25)
    record.write(step=2)
    without, with_loss = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert set(without) == {"seconds", "step", "held_out_dice"}
    assert (with_loss["loss"], with_loss["dice"]) == (2.0, 0.25)
