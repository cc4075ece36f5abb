"""nnU-Net's own sums: logits of each tile added up in half precision, so that even its rounding is repeated.

nnU-Net's predictor keeps the weighted logits of its tiles, and the weights, as float16; every addition, the quotient,
the sum over folds and the resampled logits are rounded to it. Labels depend on that where two logits are nearly tied.
It costs the deferred head: logits, not features, have to be added up.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BackendError
from edgemuse.runtime.model.bundle import Head
from edgemuse.runtime.network.tiles import Index, Sums, TilePlan
from edgemuse.runtime.scan.types import Features, Half

UP = np.float32(2.0**112)
"""Half precision's smallest normal number is 2^-14 and float32's 2^-126: after this shift of the exponent, a half's
bits are the upper bits of the float32, for subnormal numbers as well."""
DROPPED = 13
"""Bits of the mantissa that float32 has and half precision has not."""
NOT_FINITE = "the network returned NaN or infinity; try --precision fp32 or another --backend"
TOO_LARGE = "the network's logits are too large for nnU-Net's sums in half precision; use --profile balanced"


def to_single(half: Half) -> NDArray[np.float32]:
    """Finite `half` in float32."""
    values = np.empty(half.shape, np.float32)
    bits = values.view(np.int32)
    np.copyto(bits, half.view(np.int16))
    bits <<= DROPPED
    bits &= ~(0b111 << 28)  # where the sign was extended to
    values *= UP
    return values


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`values`, which are overwritten, with half precision's eleven bits, halves to even; its range is not imitated."""
    bits = values.view(np.uint32)
    addend = bits >> np.uint32(DROPPED)
    addend &= 1
    addend += (1 << DROPPED - 1) - 1
    bits += addend
    bits &= ~np.uint32((1 << DROPPED) - 1)
    return values


def fold_head(head: Head) -> Head:
    """From the features of K folds to the logits of each: K times C rows, in the order of the folds."""
    if head.fold_bias is None:
        return head
    folds, classes = head.fold_bias.shape
    weight = np.zeros((folds, classes, folds, head.weight.shape[1] // folds), np.float32)
    for fold, own in enumerate(np.split(head.weight * np.float32(folds), folds, axis=1)):
        weight[fold, :, fold] = own
    return Head(weight.reshape(folds * classes, -1), head.fold_bias.reshape(-1))


class HalfSums(Sums):
    """Sums of logits in half precision, of each fold apart.

    Args:
        plan, window, pool, slabs: as for `Sums`.
        head: from features to logits; None where the network returns logits, those of all folds together.
        threads: of `pool`.
    """

    dtype = np.float16

    def __init__(
        self,
        plan: TilePlan,
        window: NDArray[np.float32],
        pool: Executor,
        slabs: bool,
        head: Head | None = None,
        threads: int = 1,
    ) -> None:
        super().__init__(plan, window, pool, slabs)
        from edgemuse.engines import openvino_half  # takes a while, and other profiles do without

        self.folds = 1 if head is None else head.folds
        self._head = None if head is None else fold_head(head)
        # compiled for each scan: if it is kept, memory grows by several MB with every scan
        self._add = openvino_half.adder((self._head.weight, self._head.bias) if self._head else None, threads)
        self._divide = openvino_half.divider(threads)

    def channels(self, features: Features) -> int:
        """Number of logits of all folds together."""
        return int(features.shape[-1] if self._head is None else len(self._head.weight))

    def add_piece(self, total: Features, features: Features, weights: NDArray[np.float32]) -> None:
        """Add the logits of `features` (d, h, w, F), weighted by `weights` (d, h, w), to `total` (d, h, w, K * C)."""
        if not np.isfinite(features.sum()):
            raise BackendError(NOT_FINITE)
        total[...] = self._add(_rows(total), _rows(features), weights.reshape(-1, 1)).reshape(total.shape)

    def divide_piece(self, total: Features, weights: Features) -> None:
        """Divide `total` (d, h, w, K * C) by `weights` (d, h, w)."""
        quotient = self._divide(_rows(total), weights.reshape(-1, 1))
        if not np.isfinite(quotient).all():
            raise BackendError(TOO_LARGE)
        total[...] = quotient.reshape(total.shape)

    def take(self, where: Index) -> Features:
        """The mean logits (d, h, w, C) of all folds in the block that begins at `where`; its sums are dropped."""
        block = super().take(where)
        if self.folds == 1:
            return block
        first, *others = np.moveaxis(block.reshape(*block.shape[:-1], self.folds, -1), -2, 0)
        mean: Half = first.copy()
        with np.errstate(over="ignore"):  # what follows looks for infinity
            for other in others:
                mean += other
        mean /= np.float16(self.folds)
        if not np.isfinite(mean).all():
            raise BackendError(TOO_LARGE)
        return mean


def _rows(array: Features) -> Features:
    """`values` (d, h, w, C) as rows (n, C)."""
    return array.reshape(-1, array.shape[-1])
