"""Arithmetic in half precision, against NumPy's, number by number."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgemuse.engines.openvino_half import adder, divider

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 4)
FINITE = EVERY[np.isfinite(EVERY).all(1)]
ADD, DIVIDE = adder(None, 1), divider(1)


def added(total, values):
    return ADD(total, values, np.ones((len(total), 1), np.float32))


def halves(values):
    return added(np.zeros(values.shape, np.float16), values)


def test_every_half_is_kept():
    zero = np.zeros(FINITE.shape, np.float32)
    np.testing.assert_array_equal(added(FINITE, zero), FINITE)
    np.testing.assert_array_equal(halves(FINITE.astype(np.float32)), FINITE)


def test_numbers_between_two_halves_go_to_the_nearest_and_ties_to_even():
    positive = np.sort(FINITE[FINITE >= 0].astype(np.float32))
    middle = (positive[1:] + positive[:-1]) / 2
    for values in (middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))):
        for signed in (values, -values):
            np.testing.assert_array_equal(halves(signed[:, None])[:, 0], signed.astype(np.float16))


NUMBERS = st.floats(-65519, 65519, width=32)


@given(arrays(np.float32, (5, 4), elements=NUMBERS), arrays(np.float16, (5, 4), elements=st.floats(-99, 99, width=16)))
def test_a_sum_is_rounded_once(values, total):
    with np.errstate(over="ignore"):
        expected = (total.astype(np.float32) + values).astype(np.float16)
    np.testing.assert_array_equal(added(total, values), expected)


@pytest.mark.parametrize("value", [65520, -65520, 1e30, np.inf, -np.inf, np.nan])
def test_what_half_precision_cannot_hold_becomes_infinity_and_nan_stays(value):
    with np.errstate(over="ignore"):
        expected = np.float32(value).astype(np.float16)
    np.testing.assert_array_equal(halves(np.array([[1, value]], np.float32)), [[1, expected]])


def test_quotients_are_numpys():
    rng = np.random.default_rng(0)
    total = rng.choice(FINITE.reshape(-1), (1000, 7))
    weights = rng.uniform(0.01, 80, (1000, 1)).astype(np.float16)
    with np.errstate(over="ignore"):
        expected = (total.astype(np.float32) / weights.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(DIVIDE(total, weights), expected)


def test_the_head_is_applied_before_the_weights():
    rng = np.random.default_rng(1)
    weight, bias = rng.integers(-8, 9, (5, 3)).astype(np.float32), rng.integers(-8, 9, 5).astype(np.float32)
    features = rng.integers(-8, 9, (6, 3)).astype(np.float32)
    weights = rng.integers(1, 5, (6, 1)).astype(np.float32)
    total = rng.integers(-8, 9, (6, 5)).astype(np.float16)
    found = adder((weight, bias), 1)(total, features, weights)
    np.testing.assert_array_equal(found, total + (features @ weight.T + bias) * weights)


def test_threads_and_shapes_do_not_get_in_each_others_way():
    rng = np.random.default_rng(2)
    tasks = [rng.normal(size=(int(rows), 9)).astype(np.float32)[:, ::2] for rows in rng.integers(1, 400, 200)]
    add = adder(None, 3)

    def run(values):
        zero = np.zeros(values.shape, np.float16)
        return add(zero, values, np.ones((len(values), 1), np.float32)).copy()

    with ThreadPoolExecutor(3) as pool:
        for values, found in zip(tasks, pool.map(run, tasks), strict=True):
            np.testing.assert_array_equal(found, values.astype(np.float16))
