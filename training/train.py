"""Train the built-in model: `python -m edgemuse.training.train LABELMAPS -o RUN`; the same command goes on with a run.

Every sample is synthesised on the fly and has a number, so a run that is interrupted and continued sees the samples
that one run would have seen. RUN/state.pth is the last checkpoint, RUN/model the nnU-Net folder of the averaged
weights that did best on scans synthesised from held-out label maps, RUN/log.jsonl the record.

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
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from edgemuse.export.checkpoint import read_checkpoint
from edgemuse.runtime.scan.types import Shape
from edgemuse.training import folder
from edgemuse.training.labelmaps import INDICES, LabelMap, class_table, find_label_maps, read_label_map
from edgemuse.training.synthesis import draw_patch, generator

CLASSES = len(INDICES)
SEED, VALIDATION_SEED = 2026, 77
AVERAGE = 0.998
"""Decay of the running mean of the weights."""
LEVELS = (1.0, 0.5, 0.25)
"""Weights of the losses at full, half and quarter resolution."""
VALIDATION_SAMPLES = 12


@dataclass(frozen=True)
class Plan:
    """How a run goes: the rate rises over `warm_up` steps, stays, and falls to 0 over the last share `fall`.

    Attributes:
        steps: in all.
        rate: learning rate before it falls.
        validate_every: steps.
        device: `cpu` or `cuda`.
        patch: d, h, w.
        workers: processes that synthesise samples; 0: this one.
        weighted: whether rare classes count more in the cross-entropy.
        levels: resolutions that count in the loss, from the finest.
        seed: of the stream of samples.
    """

    steps: int
    rate: float
    warm_up: int = 100
    fall: float = 0.8
    validate_every: int = 500
    device: str = "cpu"
    patch: Shape = folder.PATCH
    workers: int = 1
    weighted: bool = True
    levels: int = len(LEVELS)
    seed: int = SEED

    def rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        left = (self.steps - step) / (self.fall * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warm_up, max(left, 0.0))


class Samples(Dataset[tuple[Tensor, Tensor]]):  # type: ignore[misc]
    """Patch number n of the stream that `seed` starts."""

    def __init__(self, maps: list[LabelMap], patch: Shape, seed: int, first: int, end: int) -> None:
        self.maps, self.patch, self.seed, self.first, self.end = maps, patch, seed, first, end

    def __len__(self) -> int:
        return max(self.end - self.first, 0)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        return draw_patch(self.maps, self.patch, folder.SPACING, generator(self.seed, self.first + position))


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


def class_weights(maps: list[LabelMap]) -> Tensor:
    """(C,) square roots of inverse frequencies, clipped so that the rarest class counts ten times the median one."""
    counts = sum(np.bincount(class_table()[labels].ravel(), minlength=CLASSES) for labels in maps)
    weights = torch.from_numpy(np.asarray(counts)).double().clamp_min(1).rsqrt()
    typical = weights[torch.from_numpy(np.asarray(counts)) > 0].median()
    return (weights / typical).clamp(0.05, 10).float()


def overlap_loss(logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy plus one minus the mean soft Dice of the classes present; and that Dice.

    Args:
        logits: (N, C, d, h, w).
        target: (N, d, h, w) classes.
        weights: (C,) of the cross-entropy.
    """
    classes = logits.shape[1]
    flat = torch.movedim(logits, 1, -1).reshape(-1, classes).float()  # no copy where channels are last
    wanted = target.reshape(-1).long()
    log_share = functional.log_softmax(flat, dim=1)
    entropy = functional.nll_loss(log_share, wanted, weights)
    share = log_share.exp()
    hits = torch.zeros(classes, device=flat.device).index_add(0, wanted, share.gather(1, wanted[:, None])[:, 0])
    there = torch.bincount(wanted, minlength=classes)
    dice = (2 * hits + 1) / (share.sum(0) + there + 1)
    present = there[1:] > 0
    mean = dice[1:][present].mean() if present.any() else dice[1:].mean()
    return entropy + 1 - dice[1:].mean(), mean.detach()


def total_loss(outputs: list[Tensor], target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss over the first resolutions of deep supervision, and the Dice at the finest."""
    losses = []
    for level, share in enumerate(LEVELS[: len(outputs)]):
        thinned = target[:, :: 2**level, :: 2**level, :: 2**level]
        losses.append((share, *overlap_loss(outputs[level], thinned, weights)))
    return sum((share * loss for share, loss, _ in losses), torch.zeros(())), losses[0][2]


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


def new_run(features: tuple[int, ...], device: str, start: Path | None) -> Run:
    """A run before its first step, from the weights of the model folder or bundle `start` or from random ones."""
    torch.manual_seed(SEED)
    network = folder.build_network(features)
    if start is not None:
        network.load_state_dict(start_weights(start, network.state_dict()))
    use_fast_normalisation(network)
    network.to(device=device, memory_format=torch.channels_last_3d)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    return Run(network, average, torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2))


def start_weights(start: Path, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an nnU-Net model folder or of a bundle; `fresh`: what a new network has."""
    checkpoint = start / folder.CHECKPOINT
    if checkpoint.is_file():
        return dict(read_checkpoint(checkpoint, "0").weights)
    return folder.bundle_weights(start, fresh)


def half_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where it is faster than float32: on GPUs, and on CPUs that multiply it without converting."""
    native = device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    context: contextlib.AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16, enabled=native)
    return context


def train_step(
    run: Run, image: Tensor, target: Tensor, weights: Tensor, rate: float, levels: int = len(LEVELS)
) -> tuple[float, float]:
    """One step; returns the loss and the Dice of the classes present."""
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    with half_precision(image.device.type):
        outputs = run.network(image)
    loss, dice = total_loss(outputs[:levels], target, weights)
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


def validate(run: Run, samples: Samples, device: str) -> float:
    """Mean Dice of hard labels of the averaged weights, pooled over the held-out samples."""
    kept = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.network.load_state_dict(run.average)
    counts = torch.zeros(3, CLASSES)
    for image, target in (samples[n] for n in range(len(samples))):
        with torch.no_grad(), half_precision(device):
            found = run.network(image[None].to(device))[0].argmax(1)[0].cpu()
        for row, values in enumerate((found[found == target], found, target)):
            counts[row] += torch.bincount(values.reshape(-1).long(), minlength=CLASSES)
    run.network.load_state_dict(kept)
    return float((2 * counts[0] / (counts[1] + counts[2]).clamp_min(1))[1:].mean())


def batches(samples: Samples, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples, synthesised ahead by other processes, on the plan's device."""
    ahead: dict[str, Any] = {}
    if plan.workers:  # spawned, because a fork of a process that has run parallel code may hang
        ahead = {"prefetch_factor": 4, "multiprocessing_context": "spawn", "worker_init_fn": _quiet_worker}
    for image, target in DataLoader(samples, batch_size=1, num_workers=plan.workers, **ahead):
        yield image.to(device=plan.device, memory_format=torch.channels_last_3d), target.to(plan.device)


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


@click.command(context_settings={"show_default": True})
@click.argument("labelmaps", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--start", type=click.Path(path_type=Path, exists=True), help="Model folder or bundle to start from.")
@click.option("--steps", default=20_000, help="Steps in all; may be changed when a run goes on.")
@click.option("--rate", default=1.5e-3, help="Learning rate before it falls.")
@click.option("--validate-every", default=500)
@click.option("--weighted/--unweighted", default=True, help="Whether rare classes count more in the cross-entropy: "
              "a new network does not find them otherwise, a trained one then finds too much of them.")  # fmt: skip
@click.option("--deep-supervision/--no-deep-supervision", default=True, help="Whether half and quarter resolution "
              "count in the loss. A bundle lacks the layers for these; new ones would spoil what the others know, so a "
              "start from a bundle needs --no-deep-supervision, and so does a start from such a run.")  # fmt: skip
@click.option("--seed", default=SEED, help="Of the samples: a run that starts from another's weights sees new ones.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
def main(
    labelmaps: Path,
    output: Path,
    start: Path | None,
    steps: int,
    rate: float,
    validate_every: int,
    weighted: bool,
    deep_supervision: bool,
    seed: int,
    device: str,
) -> None:
    """Train on images synthesised from LABELMAPS, or go on with the run in the output folder."""
    if deep_supervision and start is not None and not (start / folder.CHECKPOINT).is_file():
        raise click.UsageError("--start with a bundle needs --no-deep-supervision")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    output.mkdir(parents=True, exist_ok=True)
    maps = [read_label_map(path) for path in find_label_maps(labelmaps, held_out=False)]
    unseen = [read_label_map(path) for path in find_label_maps(labelmaps, held_out=True)]
    run = new_run(folder.FEATURES, device, start)
    if (output / "state.pth").exists():
        run.restore(torch.load(output / "state.pth", map_location=device, weights_only=True))
    levels = len(LEVELS) if deep_supervision else 1
    plan = Plan(steps, rate, validate_every=validate_every, device=device, weighted=weighted, levels=levels, seed=seed)
    train(run, plan, maps, unseen, output)


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


def train(run: Run, plan: Plan, maps: list[LabelMap], unseen: list[LabelMap], output: Path) -> None:
    """Run the steps that are left; a signal to stop ends it after the current one, with everything saved."""
    record = Record(output / "log.jsonl")
    weights = (class_weights(maps) if plan.weighted else torch.ones(CLASSES)).to(plan.device)
    held_out = Samples(unseen, plan.patch, VALIDATION_SEED, 0, VALIDATION_SAMPLES)
    with stop_signals() as stopped:
        for image, target in batches(Samples(maps, plan.patch, plan.seed, run.step, plan.steps), plan):
            rate = plan.rate_at(run.step)
            record.add(*train_step(run, image, target, weights, rate, plan.levels))
            if run.step % 50 == 0:
                record.write(step=run.step, rate=rate)
            if run.step % plan.validate_every == 0 or run.step == plan.steps:
                _keep_if_best(run, plan, held_out, output, record)
            if run.step % 200 == 0 or run.step == plan.steps or stopped:
                folder.save(run.state(), output / "state.pth")
            if stopped:
                break


def _keep_if_best(run: Run, plan: Plan, held_out: Samples, output: Path, record: Record) -> None:
    score = validate(run, held_out, plan.device)
    record.write(step=run.step, held_out_dice=score)
    if score > run.best:
        run.best = score
        folder.write_folder(output / "model", run.average, folder.FEATURES, plan.patch)


if __name__ == "__main__":
    main()
