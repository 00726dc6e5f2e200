"""Rows taken apart into lanes: every class counts once, whatever the number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import quickly

import jaxsoft
from jaxsoft._core.lanes import OF_COMPUTED, OF_GIVEN, lanes_of, part_of, unseen
from jaxsoft._core.mesh import Axes
from jaxsoft._passes import max_and_tail as _max_and_tail

# One lane, a few, several groups, primes, and blocks that divide and that do not.
COUNTS = (1, 7, 16, 33, 161, 1000, 1031, 8209)


@pytest.mark.parametrize("cut", [OF_GIVEN, OF_COMPUTED], ids=["given", "computed"])
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("classes", COUNTS)
def test_every_class_is_in_one_lane(classes, inner, cut):
    v = np.broadcast_to(np.arange(classes)[None, :, None], (2, classes, inner))

    @quickly
    def parts_of(v):
        return [
            unseen(part_of(v, k, lanes, 1), k, lanes, 1, -1)
            for lanes in lanes_of(v.shape, 1, cut)
            for k in range(lanes.parts)
        ]

    found = np.concatenate([np.ravel(part) for part in parts_of(v)])
    expected = np.repeat(np.arange(classes), 2 * inner)
    np.testing.assert_array_equal(np.sort(found[found >= 0]), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", COUNTS)
def test_ties_wherever_they_are(classes, axis, rng):
    """All equal, a few at the maximum, one; with masked classes above them."""
    x = np.sort(rng.normal(size=(3, classes)).astype(np.float32) - 5)
    x[0] = 2
    x[1, rng.permutation(classes)[:5]] = 3
    x[2, classes // 2] = 40
    where = rng.random(x.shape) < 0.7
    where[:, classes // 2] = True
    x = np.where(where, x, np.float32(50))
    masked = np.where(where, x.astype(np.float64), -np.inf)
    above = masked - np.max(masked, -1, keepdims=True)
    e = np.exp(above)
    total = np.sum(e, -1)
    expected = np.max(masked, -1) + np.log(total)
    given = (x, where) if axis == 1 else (x.T, where.T)
    log_sum = jax.jit(lambda x, w: jaxsoft.logsumexp(x, axis=axis, where=w))(*given)
    np.testing.assert_allclose(log_sum, expected, rtol=2 * 2**-23)
    expected = (
        np.log(total)
        - np.sum(np.where(e > 0, e, 0) * np.where(e > 0, above, 0), -1) / total
    )
    entropy = jax.jit(lambda x, w: jaxsoft.entropy(x, axis=axis, where=w))(*given)
    np.testing.assert_allclose(entropy, expected, rtol=8 * 2**-23, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [9, 10, 25, 26, 33, 49])
def test_the_last_class_is_the_maximum(classes, dtype):
    """Along an axis that is not the last, where neighbours are no classes."""
    x = jnp.zeros((classes, 16), dtype).at[-1].set(30)
    labels = jnp.full(16, classes - 1)
    losses = [
        quickly(lambda x, axis=axis: jaxsoft.cross_entropy(x, labels, axis=axis))(
            logits
        )
        for logits, axis in ((x, 0), (x.T, 1))
    ]
    expected = np.log1p((classes - 1) * np.exp(-30.0))
    np.testing.assert_allclose(np.float64(losses), expected, rtol=1e-6)


@pytest.mark.parametrize("classes", [10, 161, 1031])
def test_logits_that_a_pass_computes_anew(classes, rng):
    """XLA may compute them in every pass over a row, and not always to the last bit."""
    x = 20 * rng.normal(size=(8, classes)).astype(np.float32)
    bias = rng.normal(size=(1, classes)).astype(np.float32)
    for compiled in (jax.jit, quickly):
        for logits in (
            lambda x: 0.3 * x + bias,
            lambda x: 30 * jnp.tanh(x / 30),
            lambda x: x / 1.7 - bias * jnp.exp(-jnp.abs(x)),
        ):
            z = np.float64(jax.jit(logits)(x))
            top = np.max(z, -1, keepdims=True)
            expected = top[:, 0] + np.log(np.sum(np.exp(z - top), -1))
            f = compiled(lambda x, z=logits: jaxsoft.logsumexp(z(x), axis=-1))
            np.testing.assert_allclose(f(x), expected, rtol=4e-7)


@pytest.mark.parametrize("ulps", [-4, 4])
@pytest.mark.parametrize("classes", [10, 161, 1031])
def test_the_maximum_is_not_the_same_bits_in_both_passes(
    classes, ulps, rng, monkeypatch
):
    """What XLA computes anew depends on its version; here all logits are a bit off."""
    x = 3 * rng.normal(size=(8, classes)).astype(np.float32)
    x[np.arange(8), rng.integers(0, classes, 8)] += np.geomspace(1, 60, 8)
    all_lanes = lanes_of(x.shape, 1)
    of_first_pass = 0 if len(all_lanes) == 1 and all_lanes[0].number == 1 else 1
    left = of_first_pass * sum(lanes.parts for lanes in all_lanes)

    def part_computed_anew(v, k, lanes, axis):
        nonlocal left
        left -= 1
        part = part_of(v, k, lanes, axis)
        return part if left >= 0 else part * np.float32(1 + ulps * 2.0**-23)

    monkeypatch.setattr(_max_and_tail, "part_of", part_computed_anew)
    m, s = _max_and_tail.max_and_tail(jnp.asarray(x), None, None, Axes((1,)))
    top = np.max(np.float64(x), 1, keepdims=True)
    np.testing.assert_array_equal(m, top)
    e = np.sort(np.exp(np.float64(x) - top))[:, :-1]
    np.testing.assert_allclose(s[:, 0], np.sum(e, 1), rtol=1e-3)


@pytest.mark.parametrize("classes", [10, 25])
def test_a_row_that_is_one_lane_is_summed_once(classes):
    """Two kernels of the gradient use the sum; XLA would compute it in both."""
    loss = jax.grad(lambda x, y: jnp.mean(jaxsoft.cross_entropy(x, y)))
    logits, labels = jnp.zeros((64, classes)), jnp.zeros(64, jnp.int32)
    program = jax.jit(loss).lower(logits, labels).compile().as_text()
    # Every exponential has one: of a class in the sum, and of one in the gradient.
    assert 1 < program.count(" shift-left(") <= classes + 1
