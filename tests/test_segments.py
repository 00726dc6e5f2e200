"""The functions of segments beyond the laws, where every segment is a row: segments of
all sizes, ids in any order and out of range, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import as_users_have_it, assert_same_bits, assert_within
from test_residuals import saved_by

import jaxsoft

# Of no entry, of one, of many; and ids that belong to no segment.
IDS = np.array([4, 0, 2, 0, -1, 4, 2, 0, 7, 4, 0, 5, 2, -100, 0, 1])
COUNT = 7
FOUND = (IDS >= 0) & (IDS < COUNT)
FEATURES = 5
NAMES = ("segment_logsumexp", "segment_softmax", "segment_log_softmax")
NOTHING = {"segment_logsumexp": -np.inf, "segment_softmax": 0.0}


def every_result(function, x, ids, where, cotangent):
    """The value and the gradient, compiled as users have them."""

    def of(x, cotangent):
        value, pull = jax.vjp(lambda x: function(x, ids, COUNT, where=where), x)
        return value, pull(cotangent)[0]

    return as_users_have_it(of)(x, cotangent)


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_is_a_row(name, rng):
    """With other axes beside the first, and a mask: the numbers of the row function."""
    function, of_row = (
        getattr(jaxsoft, n) for n in (name, name.removeprefix("segment_"))
    )
    x = rng.normal(size=(len(IDS), FEATURES)).astype(np.float32)
    x[FOUND.argmin()] = np.nan  # of no segment
    where = rng.random((len(IDS), FEATURES)) < 0.8
    of_segments = name == "segment_logsumexp"
    shape = (COUNT, FEATURES) if of_segments else x.shape
    cotangent = rng.normal(size=shape).astype(np.float32)
    value, gradient = every_result(function, x, jnp.asarray(IDS), where, cotangent)
    wanted = np.full(shape, NOTHING.get(name, -np.inf), np.float32)
    wanted_gradient = np.zeros_like(x)
    for k in range(COUNT):
        entries = np.equal(IDS, k)
        at = k if of_segments else entries
        row, pull = jax.vjp(
            lambda x, w=where[entries]: of_row(x, 0, where=w), x[entries]
        )
        wanted[at], wanted_gradient[entries] = row, pull(cotangent[at])[0]
    assert_within(value, wanted, 2e-6, f"{name}, value")
    assert_within(gradient, wanted_gradient, 2e-6, f"{name}, gradient")


@pytest.mark.parametrize("name", NAMES)
def test_ids_sorted_narrow_and_unknown(name, rng):
    """Hints and dtypes of the ids change nothing, and their largest is found."""
    function = getattr(jaxsoft, name)
    x = rng.normal(size=300).astype(np.float32)
    ids = np.sort(rng.integers(0, 120, 300)).astype(np.int32)
    wanted = function(x, ids, 200)
    narrow = function(x, ids.astype(np.int8), 200, indices_are_sorted=True)
    assert_within(narrow, wanted, 1e-6, f"{name}, sorted int8")
    whole = function(x, ids)
    assert_same_bits(whole, wanted[: len(whole)], f"{name}, as many as the largest id")
    assert function(x, np.full(300, -1)).shape == ((0,) if len(whole) < 300 else (300,))
    assert function(x[:0], ids[:0], 0).shape == (0,)


def test_a_sure_segment_keeps_its_digits():
    """The tail of the winner, beside a segment that is not sure and one alone."""
    x = jnp.array([20.0, 1.0, 0.0, 1.0, -5.0, 3.0])
    ids = jnp.array([0, 1, 0, 1, 0, 2])
    tail = np.log1p(np.exp(-20.0) + np.exp(-25.0))
    log_p = jaxsoft.segment_log_softmax(x, ids, 3)
    np.testing.assert_allclose(log_p[0], -tail, rtol=1e-6)
    np.testing.assert_allclose(log_p[jnp.array([1, 3])], -np.log(2), rtol=1e-6)
    assert log_p[5] == 0
    shifted = jaxsoft.segment_logsumexp(x - jnp.array([20.0, 0, 20, 0, 20, 3]), ids, 3)
    np.testing.assert_allclose(shifted[0], tail, rtol=1e-6)
    for function in (jaxsoft.segment_softmax, jaxsoft.segment_log_softmax):
        gradient = jax.grad(lambda x, f=function: f(x, ids, 3)[0])(x)
        np.testing.assert_allclose(gradient[0], tail, rtol=1e-6)
        np.testing.assert_allclose(gradient[2], -np.exp(-20.0), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_segment(name):
    x = np.zeros(len(IDS), np.float32)
    x[0] = np.nan  # of segment 4
    function = getattr(jaxsoft, name)

    def total(x):
        value = function(x, IDS, COUNT)
        ids = np.arange(COUNT) if len(value) == COUNT else IDS
        return jnp.sum(jnp.where(ids == 4, 0, jnp.where(value > -jnp.inf, value, 0)))

    value, gradient = jax.value_and_grad(total)(x)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[~FOUND | (IDS == 4)] == 0)
    assert np.isnan(function(x, IDS, COUNT)).sum() == (1 if "logsumexp" in name else 3)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name, capsys):
    """x, the ids and whether they are in range, and two numbers per segment."""
    function = getattr(jaxsoft, name)
    x, ids = jnp.zeros((211, 101)), jnp.zeros(211, jnp.int32)
    saved = saved_by(lambda x: jnp.sum(function(x, ids, 13)), x, capsys=capsys)
    sizes = sorted(np.prod(s.shape, dtype=int) for s in saved)
    assert [n for n in sizes if n > 13 * 101] == [211 * 101]
    assert sum(n == 13 * 101 for n in sizes) <= 2
