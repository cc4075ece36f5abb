"""Train the model of MUSE regions: `python -m edgemuse.training.train_muse IXI -o RUN`; again to go on with a run.

It learns from DLMUSE's label maps of real scans, see `pairs` and `distil`; `loop` says what a run leaves in its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgemuse.training import folder, loop
from edgemuse.training.distil import BOXES, CLASSES, PAINTED, STRIDE, Choices, Samples, grid_shape, rarity_of, scored
from edgemuse.training.folder import Model
from edgemuse.training.loop import SCORE, SEED, Sample, half_precision, overlap_loss
from edgemuse.training.pairs import Pair, find_subjects, read_pair
from edgemuse.training.regions import class_labels, class_table

FEATURES = (24, 48, 96, 160, 224)
SPACING = 2.0
"""mm"""
DATASET = "Dataset904_DLMUSEofIXI"


def muse_model(spacing: float, cases: int, features: tuple[int, ...] = FEATURES) -> Model:
    """The network; its patch holds a brain, and z-scores rest on the whole crop, so that cut-away tissue is dark."""
    patch = grid_shape(BOXES[1], spacing)
    return Model(features, patch, spacing, class_labels(), DATASET, cases, masked=False)


def deferred(network: Any, image: Tensor) -> Tensor:
    """(d * h * w, F) what the last layer of `network` gets of a batch of one: 149 classes everywhere are too many."""
    skips = network.encoder(image)
    decoder, found = network.decoder, skips[-1]
    for rise, stage, skip in zip(decoder.transpconvs, decoder.stages, skips[-2::-1], strict=True):
        found = stage(torch.cat((rise(found), skip), 1))
    return torch.movedim(found[0], 0, -1).reshape(-1, found.shape[1])  # no copy where channels are last


def head(network: Any, features: Tensor) -> Tensor:
    """(M, C) logits of (M, F) features."""
    last = network.decoder.seg_layers[-1]
    return functional.linear(features, last.weight.flatten(1), last.bias)


def labels_of(network: Any, pair: Pair, spacing: float) -> NDArray[np.uint8]:
    """(d, h, w) classes of a whole scan on its own grid, in one pass as the runtime's profile `fast` makes it."""
    device = next(network.parameters()).device
    image, own = torch.from_numpy(pair.image).float(), pair.image.shape
    sizes = [round(size * pair.spacing / spacing) for size in own]
    image = functional.interpolate(scored(image, 0.0)[None, None], sizes, mode="trilinear")
    pad = [(-size % STRIDE) // 2 for size in sizes]
    rest = [-size % STRIDE - before for size, before in zip(sizes, pad, strict=True)]
    padded = functional.pad(image, [side for axis in (2, 1, 0) for side in (pad[axis], rest[axis])])
    with torch.no_grad(), half_precision(device.type):
        flat = deferred(network, padded.to(device=device, memory_format=torch.channels_last_3d))
        whole = flat.reshape(*padded.shape[2:], -1)
        inner = whole[tuple(slice(before, before + size) for before, size in zip(pad, sizes, strict=True))]
        if sizes != list(own):
            inner = functional.interpolate(inner.movedim(-1, 0)[None].float(), own, mode="trilinear")[0].movedim(0, -1)
        found = [head(network, slab.reshape(-1, slab.shape[-1])).argmax(1).to(torch.uint8).cpu() for slab in inner]
    labels: NDArray[np.uint8] = torch.stack(found).reshape(own).numpy()
    return labels


def compared(found: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean Dice over the classes in `truth`, and by which share the whole of all classes is too large."""
    sizes = [np.bincount(labels.ravel(), minlength=CLASSES)[1:] for labels in (found[found == truth], found, truth)]
    there = sizes[2] > 0
    dice = 2 * sizes[0][there] / (sizes[1] + sizes[2])[there]
    return float(dice.mean()), float(sizes[1].sum() / sizes[2].sum() - 1)


@dataclass(frozen=True)
class Distilled:
    """The recipe: real scans and what is made of them, some voxels of each count.

    Attributes:
        pairs: for training.
        unseen: held out.
        rarity: (C,) of the classes.
        model: what is trained.
        choices: how samples are made.
        seed: of the stream of samples.
    """

    pairs: list[Pair]
    unseen: list[Pair]
    rarity: Tensor
    model: Model
    choices: Choices
    seed: int = SEED

    def samples(self, first: int, end: int) -> Samples:
        """Samples of the training pairs."""
        return Samples(self.pairs, self.rarity, self.choices, self.seed, first, end)

    def loss(self, network: Any, sample: Sample) -> tuple[Tensor, Tensor]:
        """Over the voxels drawn; the last layer sees no others."""
        image, where, wanted = sample
        with half_precision(image.device.type):
            logits = head(network, deferred(network, image)[where[0]])
        return overlap_loss(logits.float(), wanted[0], torch.ones(CLASSES, device=image.device))

    def validate(self, network: Any) -> dict[str, float]:
        """Mean Dice of the held-out scans, and the mean bias of their intracranial volume."""
        table = class_table()
        rows = [compared(labels_of(network, pair, self.model.spacing), table[pair.numbers]) for pair in self.unseen]
        dice, bias = np.mean(rows, axis=0)
        return {SCORE: float(dice), "icv_bias": float(bias)}

    def write(self, weights: Mapping[str, Tensor], output: Path) -> None:
        """The folder of the model."""
        folder.write_folder(output, weights, self.model)


@click.command(context_settings={"show_default": True})
@click.argument("ixi", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--start", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder to start from.")
@click.option("--steps", default=20_000, help="Steps in all; may be changed when a run goes on.")
@click.option("--rate", default=1.2e-3, help="Learning rate before it falls.")
@click.option("--fall", default=0.3, help="Share of the steps, at the end, in which the rate falls.")
@click.option("--spacing", default=SPACING, help="mm; of another run only.")
@click.option("--painted", default=PAINTED, help="Share of the samples whose tissues are painted anew.")
@click.option("--validate-every", default=500)
@click.option("--seed", default=SEED, help="Of the samples: a run that starts from another's weights sees new ones.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
def main(
    ixi: Path,
    output: Path,
    start: Path | None,
    steps: int,
    rate: float,
    fall: float,
    spacing: float,
    painted: float,
    validate_every: int,
    seed: int,
    device: str,
) -> None:
    """Train on the scans in IXI and DLMUSE's maps of them, or go on with the run in the output folder."""
    device = loop.best_device(device)
    pairs = [read_pair(ixi, name) for name in find_subjects(ixi, held_out=False)]
    unseen = [read_pair(ixi, name) for name in find_subjects(ixi, held_out=True)]
    model = muse_model(spacing, len(pairs))
    recipe = Distilled(pairs, unseen, rarity_of(pairs), model, Choices(spacing, painted), seed)
    plan = loop.Plan(steps, rate, fall=fall, validate_every=validate_every, device=device)
    loop.train(loop.open_run(model, device, start, output), plan, recipe, output)


if __name__ == "__main__":
    main()
