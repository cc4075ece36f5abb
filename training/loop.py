"""One training run, whatever it learns: steps, the running mean of the weights, checkpoints, the record and the end.

Every sample has a number, so a run that is interrupted and continued sees the samples that one run would have seen.
RUN/state.pth is the last checkpoint, RUN/model the nnU-Net folder of the averaged weights that did best on what was
held out, RUN/log.jsonl the record. What differs from model to model is a `Recipe`.

On Linux, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keep the memory of a step for the
next one, which takes much of the time of a step on a CPU away.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from edgemuse.training import folder
from edgemuse.training.folder import Model

SEED = 2026
AVERAGE = 0.998
"""Decay of the running mean of the weights."""
SCORE = "held_out_dice"
"""What a validation calls the figure that the best weights are chosen by."""

Sample = tuple[Tensor, ...]
"""The network's input (1, d, h, w), then what the loss needs; a batch of one has a further axis in front."""


@dataclass(frozen=True)
class Plan:
    """How a run goes: the rate rises over `warm_up` steps, stays, and falls to 0 over the last share `fall`.

    Attributes:
        steps: in all.
        rate: learning rate before it falls.
        validate_every: steps.
        device: `cpu` or `cuda`.
        workers: processes that make samples; 0: this one.
    """

    steps: int
    rate: float
    warm_up: int = 100
    fall: float = 0.8
    validate_every: int = 500
    device: str = "cpu"
    workers: int = 1

    def rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        left = (self.steps - step) / (self.fall * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up, max(left, 0.0))


class Recipe(Protocol):
    """What a run learns.

    Contract:
        - sample n is the same whatever other samples are asked for, and in every process;
        - `loss` and `validate` get the network in training mode, its weights on the device of the sample;
        - `validate` leaves the network as it is and gives at least `SCORE`, higher is better.
    """

    def samples(self, first: int, end: int) -> Dataset[Sample]:
        """The samples from number `first` on, `end` excluded."""

    def loss(self, network: Any, sample: Sample) -> tuple[Tensor, Tensor]:
        """What a step lessens, and the soft Dice that the record shows; `sample` is a batch of one."""

    def validate(self, network: Any) -> dict[str, float]:
        """How good the weights are on what was held out."""

    def write(self, weights: Mapping[str, Tensor], output: Path) -> None:
        """Write the nnU-Net folder."""


class Numbered(Dataset[Sample]):  # type: ignore[misc]
    """Samples `first` to `end`, of which a subclass makes number n in `make`."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def __len__(self) -> int:
        return max(self.end - self.first, 0)

    def __getitem__(self, position: int) -> Sample:
        return self.make(self.first + position)

    def make(self, number: int) -> Sample:
        """Sample `number` of the stream."""
        raise NotImplementedError


def normalise_fast(layer: nn.InstanceNorm3d, x: Tensor) -> Tensor:
    """Instance normalisation of one sample: batch normalisation without memory, which keeps channels last."""
    if x.shape[0] > 1:
        return functional.instance_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    return functional.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)


def use_fast_normalisation(network: nn.Module) -> None:
    """Make every InstanceNorm3d of `network` run `normalise_fast`."""
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            module.forward = normalise_fast.__get__(module)


@dataclass
class Run:
    """Everything that a checkpoint keeps."""

    network: Any
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int = 0
    best: float = -1.0

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best = state["step"], state["best"]


def new_run(model: Model, device: str, start: Path | None) -> Run:
    """A run before its first step, from the weights of the model folder or bundle `start` or from random ones."""
    torch.manual_seed(SEED)
    network = folder.build_network(model)
    if start is not None:
        network.load_state_dict(folder.start_weights(start, network.state_dict()))
    use_fast_normalisation(network)
    network.to(device=device, memory_format=torch.channels_last_3d)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return Run(network, average, torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2))


def open_run(model: Model, device: str, start: Path | None, output: Path) -> Run:
    """The run in the folder `output`, or a new one there."""
    output.mkdir(parents=True, exist_ok=True)
    run = new_run(model, device, start)
    if (output / "state.pth").exists():
        run.restore(torch.load(output / "state.pth", map_location=device, weights_only=True))
    return run


def best_device(asked: str) -> str:
    """`cuda` or `cpu` for `auto`."""
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def half_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where it is faster than float32: on GPUs, and on CPUs that multiply it without converting."""
    native = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    context: contextlib.AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16, enabled=native)
    return context


def overlap_loss(logits: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy plus one minus the mean soft Dice of the classes; and that Dice of the classes present.

    Args:
        logits: (M, C).
        wanted: (M,) classes.
        weights: (C,) of the cross-entropy.
    """
    classes = logits.shape[1]
    log_share = functional.log_softmax(logits, dim=1)
    entropy = functional.nll_loss(log_share, wanted, weights)
    share = log_share.exp()
    hits = torch.zeros(classes, device=logits.device).index_add(0, wanted, share.gather(1, wanted[:, None])[:, 0])
    there = torch.bincount(wanted, minlength=classes)
    dice = (2 * hits + 1) / (share.sum(0) + there + 1)
    present = there[1:] > 0
    mean = dice[1:][present].mean() if present.any() else dice[1:].mean()
    return entropy + 1 - dice[1:].mean(), mean.detach()


def train_step(run: Run, recipe: Recipe, sample: Sample, rate: float) -> tuple[float, float]:
    """One step; returns the loss and the Dice of the classes present."""
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    loss, dice = recipe.loss(run.network, sample)
    run.optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.network.parameters(), 12.0)
    run.optimiser.step()
    run.step += 1
    decay = min(AVERAGE, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        for name, value in run.network.state_dict().items():
            run.average[name].lerp_(value, 1 - decay)
    return float(loss.detach()), float(dice)


@contextlib.contextmanager
def averaged(run: Run) -> Iterator[Any]:
    """The network with its averaged weights, and without gradients."""
    kept = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.network.load_state_dict(run.average)
    try:
        with torch.no_grad():
            yield run.network
    finally:
        run.network.load_state_dict(kept)


def batches(samples: Dataset[Sample], plan: Plan) -> Iterator[Sample]:
    """The samples, made ahead by other processes, each as a batch of one on the plan's device."""
    ahead: dict[str, Any] = {}
    if plan.workers:  # spawned, because a fork of a process that has run parallel code may hang
        ahead = {"prefetch_factor": 4, "multiprocessing_context": "spawn", "worker_init_fn": _quiet_worker}
    for image, *rest in DataLoader(samples, batch_size=1, num_workers=plan.workers, **ahead):
        image = image.to(device=plan.device, memory_format=torch.channels_last_3d)
        yield image, *(part.to(plan.device) for part in rest)


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends it


class Record:
    """Lines on the terminal and in RUN/log.jsonl: means since the last line."""

    def __init__(self, path: Path) -> None:
        self.path, self.since = path, time.perf_counter()
        self.rows: list[tuple[float, float]] = []

    def add(self, loss: float, dice: float) -> None:
        """Take one step in."""
        self.rows.append((loss, dice))

    def write(self, **more: float) -> None:
        """Write a line and begin anew."""
        now = time.perf_counter()
        line = {"seconds": (now - self.since) / max(len(self.rows), 1)} | more
        if self.rows:
            loss, dice = np.mean(self.rows, axis=0)
            line = {"loss": loss, "dice": dice} | line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: round(float(value), 6) for key, value in line.items()}) + "\n")
        click.echo("  ".join(f"{key} {value:.4g}" for key, value in line.items()))
        self.rows, self.since = [], now


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM instead of their ending the process."""
    received: list[int] = []
    kept = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def train(run: Run, plan: Plan, recipe: Recipe, output: Path) -> None:
    """Run the steps that are left; a signal to stop ends it after the current one, with everything saved."""
    record = Record(output / "log.jsonl")
    with stop_signals() as stopped:
        for sample in batches(recipe.samples(run.step, plan.steps), plan):
            rate = plan.rate_at(run.step)
            record.add(*train_step(run, recipe, sample, rate))
            if run.step % 50 == 0:
                record.write(step=run.step, rate=rate)
            if run.step % plan.validate_every == 0 or run.step == plan.steps:
                _keep_if_best(run, recipe, output, record)
            if run.step % 200 == 0 or run.step == plan.steps or stopped:
                folder.save(run.state(), output / "state.pth")
            if stopped:
                break


def _keep_if_best(run: Run, recipe: Recipe, output: Path, record: Record) -> None:
    with averaged(run) as network:
        found = recipe.validate(network)
    record.write(step=run.step, **found)
    if found[SCORE] > run.best:
        run.best = found[SCORE]
        recipe.write(run.average, output / "model")
