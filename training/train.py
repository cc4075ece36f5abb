"""Train the built-in model: `python -m edgemuse.training.train LABELMAPS -o RUN`; the same command goes on with a run.

Every sample is synthesised on the fly from a label map; see `loop` for what a run leaves in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from edgemuse.training import folder, loop
from edgemuse.training.folder import Model
from edgemuse.training.labelmaps import INDICES, LabelMap, class_table, find_label_maps, read_label_map
from edgemuse.training.loop import SCORE, SEED, Numbered, Sample, half_precision, overlap_loss
from edgemuse.training.synthesis import draw_patch, generator

CLASSES = len(INDICES)
VALIDATION_SEED = 77
LEVELS = (1.0, 0.5, 0.25)
"""Weights of the losses at full, half and quarter resolution."""
VALIDATION_SAMPLES = 12


class Samples(Numbered):
    """Patch number n of the stream that `seed` starts, as `draw_patch` makes it."""

    def __init__(self, maps: list[LabelMap], model: Model, seed: int, first: int, end: int) -> None:
        super().__init__(first, end)
        self.maps, self.model, self.seed = maps, model, seed

    def make(self, number: int) -> Sample:
        """An image and its classes."""
        return draw_patch(self.maps, self.model.patch, self.model.spacing, generator(self.seed, number))


def class_weights(maps: list[LabelMap]) -> Tensor:
    """(C,) square roots of inverse frequencies, clipped so that the rarest class counts ten times the median one."""
    counts = sum(np.bincount(class_table()[labels].ravel(), minlength=CLASSES) for labels in maps)
    weights = torch.from_numpy(np.asarray(counts)).double().clamp_min(1).rsqrt()
    typical = weights[torch.from_numpy(np.asarray(counts)) > 0].median()
    return (weights / typical).clamp(0.05, 10).float()


def patch_loss(logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`overlap_loss` over a patch: logits (N, C, d, h, w), target (N, d, h, w)."""
    flat = torch.movedim(logits, 1, -1).reshape(-1, logits.shape[1]).float()  # no copy where channels are last
    return overlap_loss(flat, target.reshape(-1).long(), weights)


def total_loss(outputs: list[Tensor], target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The loss over the first resolutions of deep supervision, and the Dice at the finest."""
    losses = []
    for level, share in enumerate(LEVELS[: len(outputs)]):
        thinned = target[:, :: 2**level, :: 2**level, :: 2**level]
        losses.append((share, *patch_loss(outputs[level], thinned, weights)))
    return sum((share * loss for share, loss, _ in losses), torch.zeros(())), losses[0][2]


@dataclass(frozen=True)
class Synthesised:
    """The recipe: patches synthesised from label maps, every voxel counts.

    Attributes:
        maps: for training.
        unseen: held out.
        model: what is trained.
        weights: (C,) of the cross-entropy.
        levels: resolutions that count in the loss, from the finest.
        seed: of the stream of samples.
    """

    maps: list[LabelMap]
    unseen: list[LabelMap]
    model: Model
    weights: Tensor
    levels: int = len(LEVELS)
    seed: int = SEED

    def samples(self, first: int, end: int) -> Samples:
        """Patches of the training maps."""
        return Samples(self.maps, self.model, self.seed, first, end)

    def loss(self, network: Any, sample: Sample) -> tuple[Tensor, Tensor]:
        """Over every voxel at every resolution that counts."""
        image, target = sample
        with half_precision(image.device.type):
            outputs = network(image)
        return total_loss(outputs[: self.levels], target, self.weights)

    def validate(self, network: Any) -> dict[str, float]:
        """Mean Dice of hard labels, pooled over patches of the held-out maps."""
        samples, device = Samples(self.unseen, self.model, VALIDATION_SEED, 0, VALIDATION_SAMPLES), self.weights.device
        counts = torch.zeros(3, CLASSES)
        for image, target in (samples[n] for n in range(len(samples))):
            with half_precision(device.type):
                found = network(image[None].to(device))[0].argmax(1)[0].cpu()
            for row, values in enumerate((found[found == target], found, target)):
                counts[row] += torch.bincount(values.reshape(-1).long(), minlength=CLASSES)
        return {SCORE: float((2 * counts[0] / (counts[1] + counts[2]).clamp_min(1))[1:].mean())}

    def write(self, weights: Mapping[str, Tensor], output: Path) -> None:
        """The folder of the model."""
        folder.write_folder(output, weights, self.model)


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
    device = loop.best_device(device)
    maps = [read_label_map(path) for path in find_label_maps(labelmaps, held_out=False)]
    unseen = [read_label_map(path) for path in find_label_maps(labelmaps, held_out=True)]
    weights = (class_weights(maps) if weighted else torch.ones(CLASSES)).to(device)
    recipe = Synthesised(maps, unseen, folder.T1, weights, len(LEVELS) if deep_supervision else 1, seed)
    plan = loop.Plan(steps, rate, validate_every=validate_every, device=device)
    loop.train(loop.open_run(folder.T1, device, start, output), plan, recipe, output)


if __name__ == "__main__":
    main()
