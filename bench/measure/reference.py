"""nnU-Net's own predictor, which is the reference, and its steps with sums in float64, which judge between two."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from numpy.typing import NDArray
from scipy import ndimage

from edgemuse.runtime.network.tiles import TilePlan, gaussian_window, plan_tiles


class Reference:
    """nnU-Net's predictor for a model folder, on the CPU, step 0.5, Gaussian weights; all folds if none are named."""

    def __init__(
        self,
        folder: Path,
        mirroring: bool,
        folds: tuple[int | str, ...] | None = None,
        checkpoint: str = "checkpoint_final.pth",
    ) -> None:
        with _quiet():
            self.predictor = nnUNetPredictor(
                tile_step_size=0.5, use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)

    def labels(self, scan: Path, sums: torch.dtype = torch.half) -> NDArray[np.int64]:
        """Predict class numbers (i, j, k) on the stored grid.

        nnU-Net adds the logits of its tiles up in half precision. Other `sums` change that and nothing else.
        """
        image, properties = SimpleITKIO().read_images([str(scan)])
        with _quiet(), mock.patch.object(torch, "half", sums):
            segmentation = self.predictor.predict_single_npy_array(image, properties)
        return np.asarray(segmentation).T.astype(np.int64)

    def run_as(self, variant: str, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run the network as one of `VARIANTS` from now on, with every call of it `timed` as `infer`."""
        network = self.predictor.network
        network.forward = timed("infer", VARIANTS[variant](network))

    def segment(self, scan: Path, target: Path, stage: Callable[[str], Any]) -> None:
        """Segment `scan` into `target`, a label map of class numbers, with `stage` around every step."""
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        with _quiet():
            with stage("load"):
                image, properties = SimpleITKIO().read_images([str(scan)])
            with stage("preprocess"):
                data, _, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
                    image, None, properties, plans, configuration, self.predictor.dataset_json
                )
            with stage("merge"):
                logits = self.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
            with stage("restore"):
                labels = convert_predicted_logits_to_segmentation_with_correct_shape(
                    logits, plans, configuration, self.predictor.label_manager, properties
                )
            with stage("write"):
                SimpleITKIO().write_seg(labels, str(target), properties)

    def exact(self, scan: Path) -> Exact:
        """Take the same steps with every sum over tiles, mirrorings and folds in float64."""
        image, properties = SimpleITKIO().read_images([str(scan)])
        plans, configuration = self.predictor.plans_manager, self.predictor.configuration_manager
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            image, None, properties, plans, configuration, self.predictor.dataset_json
        )
        plan = plan_tiles(data.shape[1:], tuple(configuration.patch_size), 0.5)
        logits = sum(self._merged(data, weights, plan) for weights in self.predictor.list_of_parameters)
        logits /= len(self.predictor.list_of_parameters)
        spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        logits = configuration.resampling_fn_probabilities(logits, shape, configuration.spacing, spacing)
        box = tuple(slice(first, last) for first, last in properties["bbox_used_for_cropping"])
        return Exact(
            logits,
            box,
            properties["shape_before_cropping"],
            tuple(plans.transpose_backward),
            half_precision_error(plan),
        )

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _merged(self, data: NDArray[np.float32], weights: dict[str, Any], plan: TilePlan) -> NDArray[np.float64]:
        network = self.predictor.network
        network.load_state_dict(weights)
        network.eval()
        padded = np.pad(data, [(0, 0), *plan.pad])
        window = compute_gaussian(plan.patch, 1 / 8, 10, device=torch.device("cpu")).numpy().astype(np.float64)
        total, weight = None, np.zeros(padded.shape[1:])
        for where in self.predictor._internal_get_sliding_window_slicers(padded.shape[1:]):
            logits = self._mirrored(torch.from_numpy(padded[where][None]))
            total = np.zeros((len(logits), *padded.shape[1:])) if total is None else total
            total[where] += logits * window
            weight[where[1:]] += window
        assert total is not None
        total /= weight
        merged: NDArray[np.float64] = total[(slice(None), *_inner(plan))]
        return merged

    def _mirrored(self, tile: torch.Tensor) -> NDArray[np.float64]:
        axes = (self.predictor.allowed_mirroring_axes or ()) if self.predictor.use_mirroring else ()
        flips = [c for n in range(len(axes) + 1) for c in itertools.combinations([axis + 2 for axis in axes], n)]
        copies = (self.predictor.network(tile.flip(flip)).flip(flip)[0].double().numpy() for flip in flips)
        mean: NDArray[np.float64] = sum(copies) / len(flips)
        return mean


def _channels_last(network: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    forward = network.to(memory_format=torch.channels_last_3d).forward
    return lambda tile: forward(tile.contiguous(memory_format=torch.channels_last_3d))


def _bf16(network: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    forward = network.forward

    def run(tile: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: torch.Tensor = forward(tile)
        return logits.float()

    return run


VARIANTS: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "eager": lambda network: network.forward,
    "compile": lambda network: torch.compile(network.forward),
    "channels-last": _channels_last,
    "bf16": _bf16,
}
"""Ways to run a network in PyTorch; each returns what is called instead of the network's `forward`."""


class Exact:
    """Logits in float64 (C, d, h, w) inside the crop, and how far sums in half precision may be off."""

    def __init__(
        self,
        logits: NDArray[np.float64],
        box: tuple[slice, ...],
        shape: tuple[int, ...],
        back: tuple[int, ...],
        error: Callable[[tuple[int, ...]], tuple[float, NDArray[np.float64]]],
    ) -> None:
        self.logits, self._box, self._shape, self._back, self._error = logits, box, shape, back, error

    def labels(self) -> NDArray[np.int64]:
        """Return class numbers (i, j, k) on the stored grid."""
        whole = np.zeros(self._shape, np.int64)
        whole[self._box] = self.logits.argmax(0)
        return whole.transpose(self._back).T

    def explained(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
        """Share of the voxels where two label maps (i, j, k) differ that half-precision sums can account for.

        There the exact logits of the two labels are no further apart than two such sums may be off. 1 if none differ.
        """
        one, two = (labels.T.transpose(np.argsort(self._back))[self._box] for labels in (first, second))
        differ = one != two
        here = self.logits[:, differ]
        columns = np.arange(here.shape[1])
        gap = np.abs(here[one[differ], columns] - here[two[differ], columns])
        relative, absolute = self._error(differ.shape)
        bound = 2 * (relative * np.abs(here).max(0, initial=0.0) + absolute[differ])
        return float(np.mean(gap <= bound)) if len(gap) else 1.0


def half_precision_error(plan: TilePlan) -> Callable[[tuple[int, ...]], tuple[float, NDArray[np.float64]]]:
    """How far a logit may be off when its weighted sum over tiles is kept in half precision.

    Every addition rounds to 11 bits, relative error 2^-11, or by 2^-25 where numbers are subnormal; the quotient, a
    resampling and a mean over folds round once more each. Towards the corners of the volume the window's weights are
    as small as 2^-24, so there the second kind decides. Returns a function of the shape of the crop on the scan's
    grid, which gives the relative error and the absolute one at each voxel: where grids differ, that of the smallest
    weight among the neighbours.
    """
    window = gaussian_window(plan.patch)
    padded = np.zeros([size + before + after for size, (before, after) in zip(plan.shape, plan.pad, strict=True)])
    count = np.zeros(padded.shape, np.int64)
    for corner in itertools.product(*plan.starts):
        where = tuple(slice(start, start + size) for start, size in zip(corner, plan.patch, strict=True))
        padded[where] += window
        count[where] += 1
    additions = int(count.max())
    weight = ndimage.minimum_filter(padded, 3)[_inner(plan)]

    def at(shape: tuple[int, ...]) -> tuple[float, NDArray[np.float64]]:
        rows = [np.arange(new) * old // new for old, new in zip(weight.shape, shape, strict=True)]
        return (additions + 4) * 2.0**-11, additions * 2.0**-25 / weight[np.ix_(*rows)]

    return at


def _inner(plan: TilePlan) -> tuple[slice, ...]:
    return tuple(slice(before, before + size) for size, (before, _) in zip(plan.shape, plan.pad, strict=True))


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
