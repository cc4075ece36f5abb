"""nnU-Net's own sums: logits of each tile added up in half precision, so that even its rounding is repeated.

nnU-Net's predictor keeps the weighted logits of its tiles, and the weights, as float16; every addition, the quotient,
the sum over folds and the resampled logits are rounded to it. Labels depend on that where two logits are nearly tied.
It costs the deferred head: logits, not features, have to be added up. NumPy converts float16 a number at a time;
here the same is done with operations on whole arrays.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from edgemuse.engines.errors import BackendError
from edgemuse.runtime.bundle import Head
from edgemuse.runtime.tiles import Index, Sums, TilePlan
from edgemuse.runtime.types import Features, Half

OVERFLOW = 65520.0
"""From here on half precision rounds to infinity."""
DOWN, UP = np.float32(2.0**-112), np.float32(2.0**112)
"""Half precision's smallest normal number is 2^-14 and float32's 2^-126: after this shift of the exponent, a half's
bits are the upper bits of the float32, for subnormal numbers as well."""
DROPPED = 13
"""Bits of the mantissa that float32 has and half precision has not."""
TOO_LARGE = "the network's logits are too large for nnU-Net's sums in half precision; use --profile balanced"


def to_half(values: NDArray[np.float32], out: Half) -> None:
    """Round `values`, which are overwritten, to the nearest float16, halves to even, into `out` of the same shape.

    Below 2^-14, where half precision is subnormal, what lies within 2^-37 of a half counts as a half.

    Raises:
        OverflowError: a value is NaN or too large for half precision.
    """
    if not max(values.max(initial=0), -values.min(initial=0)) < OVERFLOW:
        raise OverflowError
    values *= DOWN
    bits = values.view(np.uint32)
    bits += _to_nearest(bits)
    bits >>= DROPPED
    sign = bits >> (31 - DROPPED - 15)  # from bit 31 - 13 to bit 15
    sign &= 1 << 15
    bits |= sign
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


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
    bits += _to_nearest(bits)
    bits &= ~np.uint32((1 << DROPPED) - 1)
    return values


def _to_nearest(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What to add to `bits` so that leaving the lowest `DROPPED` out rounds to the nearest, halves to even."""
    addend: NDArray[np.uint32] = bits >> np.uint32(DROPPED)
    addend &= 1
    addend += (1 << DROPPED - 1) - 1
    return addend


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
    """

    dtype = np.float16

    def __init__(
        self, plan: TilePlan, window: NDArray[np.float32], pool: Executor, slabs: bool, head: Head | None = None
    ) -> None:
        super().__init__(plan, window, pool, slabs)
        self.folds = 1 if head is None else head.folds
        self._head: NDArray[np.float32] | None = None
        if head is not None:
            every = fold_head(head)
            self._head = np.vstack([every.weight.T, every.bias])

    def channels(self, features: Features) -> int:
        """Logits of all folds."""
        return int((features if self._head is None else self._head).shape[-1])

    def add_piece(self, total: Features, features: Features, weights: NDArray[np.float32]) -> None:
        """Add `features` (d, h, w, F), weighted by `weights` (d, h, w), to `total` (d, h, w, K * C)."""
        product = self._weighted(features, weights)
        product += to_single(total)
        try:
            to_half(product, total)
        except OverflowError:
            raise BackendError(_reason(features)) from None

    def _weighted(self, features: Features, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits times weights: features are weighted instead, because they are fewer."""
        if self._head is None:
            product: NDArray[np.float32] = features * weights[..., None]
            return product
        block = np.empty((*weights.shape, len(self._head)), np.float32)
        np.multiply(features, weights[..., None], out=block[..., :-1])
        block[..., -1] = weights
        product = block.reshape(-1, len(self._head)) @ self._head
        return product.reshape(*weights.shape, -1)

    def divide_piece(self, total: Features, weights: Features) -> None:
        """Divide `total` (d, h, w, K * C) by `weights` (d, h, w)."""
        quotient = to_single(total)
        quotient /= to_single(weights)[..., None]
        try:
            to_half(quotient, total)
        except OverflowError:
            raise BackendError(TOO_LARGE) from None

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


def _reason(features: Features) -> str:
    if np.isfinite(features).all():
        return TOO_LARGE
    return "the network returned NaN or infinity; try --precision fp32 or another --backend"
