"""The divergences of two rows beyond the laws: small ones, infinities, two dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import as_users_have_it

import jaxsoft

ROUNDINGS = 64 * np.finfo(np.float32).eps


@pytest.fixture
def pair(rng):
    return [jnp.asarray(3 * rng.normal(size=(4, 5)), jnp.float32) for _ in range(2)]


@pytest.mark.parametrize("axis", [0, 1])
def test_sure_logits_made_in_the_same_program(axis, rng):
    """XLA may compute those of the maximum anew, with other roundings."""
    rows, classes = 1024, 17
    label = np.arange(rows), rng.integers(0, classes, rows)

    def hidden():
        h = np.float32(8 * rng.normal(size=(rows, classes)))
        h[label] += 70
        return h if axis == 1 else h.T.copy()

    def centred(h):
        return h - jnp.mean(h, axis, keepdims=True)

    def loss(x, y):
        return jaxsoft.kl_divergence(centred(y), centred(x), axis=axis)

    def expected(x, y):
        z, w = (
            np.moveaxis(np.float64(as_users_have_it(centred)(v)), axis, 1)
            for v in (x, y)
        )
        # Of the others: a label has both logarithms near 0.
        (p, log_p), (q, log_q) = map(without_label, (z, w))
        return np.sum(p * (log_p - log_q) + (q - p), 1)

    def without_label(z):
        e = np.exp(z - z[label][:, None])
        e[label] = 0
        total = 1 + np.sum(e, 1, keepdims=True)
        return e / total, z - z[label][:, None] - np.log(total)

    x, y = hidden(), hidden()
    kl = as_users_have_it(loss)(x, y)
    np.testing.assert_allclose(kl, expected(x, y), rtol=1e-4)


@pytest.mark.parametrize("shift", [0, 100])
def test_nearly_equal_distributions_keep_their_digits(shift, rng, record_property):
    """The divergence is of second order in the difference: at a difference of 1e-4 the
    difference of the logarithms has lost all digits of it. A shift of all logits of one
    row rounds the differences between the two."""
    x = rng.normal(size=(8, 5)).astype(np.float32)
    step = rng.normal(size=(8, 5)) * np.logspace(-4, 0, 8)[:, None]
    y = (x + step + shift).astype(np.float32)
    value, (in_y, in_x) = value_and_gradients(y, x)
    expected = oracle.rounded(oracle.kl_divergence(y, x))
    errors = np.abs(np.asarray(value, np.float64) / expected - 1)
    record_property("kl_divergence", f"worst relative error {errors.max():.1e}")
    np.testing.assert_allclose(value, expected, rtol=ROUNDINGS)
    assert expected.min() < 1e-7
    for position, gradient in enumerate((in_y, in_x)):
        wanted = oracle.pullback(oracle.kl_divergence, [y, x], np.ones(8))[position]
        wanted = oracle.rounded(wanted)
        # Entries of a row sum to 0: each is as good as the row's largest.
        scale = np.max(np.abs(wanted), axis=-1, keepdims=True)
        np.testing.assert_allclose(gradient / scale, wanted / scale, atol=ROUNDINGS)


@jax.jit
def value_and_gradients(logits, target_logits):
    value, pull = jax.vjp(jaxsoft.kl_divergence, logits, target_logits)
    return value, pull(jnp.ones_like(value))


def test_equal_logits_have_exactly_none(pair):
    x, _ = pair
    for shift in (0.0, 1000.0, -1000.0):
        value, gradients = value_and_gradients(x + shift, x + shift)
        np.testing.assert_array_equal(value, 0)
        np.testing.assert_array_equal(gradients, 0)


def test_it_is_never_negative(rng):
    x = jnp.asarray(rng.normal(size=(500, 3)), jnp.float32)
    y = x + jnp.asarray(1e-3 * rng.normal(size=(500, 3)), jnp.float32)
    assert np.all(value_and_gradients(y, x)[0] >= 0)


def test_infinite_logits():
    inf = jnp.inf
    x = jnp.array([[1.0, -inf, 2.0], [1.0, 1.0, 2.0], [1.0, -inf, 2.0], [-inf] * 3])
    y = jnp.array([[1.0, 5.0, 2.0], [1.0, -inf, 2.0], [1.0, -inf, 2.0], [1.0] * 3])
    value, (in_y, in_x) = value_and_gradients(y, x)
    chex.assert_tree_all_finite((in_x, in_y))
    assert np.isposinf(value[1])
    np.testing.assert_array_equal(value[2:], 0)
    np.testing.assert_array_equal(in_x[jnp.array([1, 3])], 0)
    # A class that the target excludes adds 0 log 0 = 0.
    p, q = (
        np.exp([1, 2]) / np.exp([1, 2]).sum(),
        np.exp([1, 2]) / np.exp([1, 5, 2]).sum(),
    )
    np.testing.assert_allclose(value[0], np.sum(p * np.log(p / q)), rtol=ROUNDINGS)


def test_logits_of_two_dtypes(pair):
    """A teacher in half precision and a student in float32."""
    x, y = pair
    half = x.astype(jnp.bfloat16)
    value, gradients = value_and_gradients(y, half)
    expected, _ = value_and_gradients(y, half.astype(jnp.float32))
    np.testing.assert_array_equal(value, expected)
    assert [g.dtype for g in gradients] == [jnp.float32, jnp.bfloat16]


def test_the_gradient_of_a_large_divergence():
    """q - p, not the difference of a log ratio and the divergence."""
    distance = np.array([3.0, 300.0, 1e5, 1e8])
    target = jnp.tile(jnp.array([0.0, -1.0]), (4, 1))
    logits = jnp.asarray(np.stack([0 * distance, -distance], 1), jnp.float32)
    _, (gradient, _) = value_and_gradients(logits, target)
    difference = 1 / (1 + np.exp(-distance)) - 1 / (1 + np.exp(-1))
    expected = np.stack([difference, -difference], 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


# Jensen and Shannon's.


@jax.jit
def jensen_shannon(logits, target_logits):
    """Of several parts of the target, value and gradients."""

    def of(beta):
        f = functools.partial(jaxsoft.jensen_shannon, beta=beta)
        value, pull = jax.vjp(f, logits, target_logits)
        return value, pull(jnp.ones_like(value))

    return {beta: of(beta) for beta in BETAS}


BETAS = (0.3, 0.9)


def test_nearly_equal_rows_keep_the_digits_of_their_mixture(rng):
    x = rng.normal(size=(4, 5)).astype(np.float32)
    step = rng.normal(size=(4, 5)) * np.logspace(-4, 0, 4)[:, None]
    y = (x + step + 100).astype(np.float32)
    for beta, (value, gradients) in jensen_shannon(y, x).items():
        meaning = functools.partial(oracle.jensen_shannon, beta=beta)
        expected = oracle.rounded(meaning(y, x))
        np.testing.assert_allclose(value, expected, rtol=ROUNDINGS)
        assert expected.min() < 1e-7
        for i, gradient in enumerate(gradients):
            wanted = oracle.rounded(oracle.pullback(meaning, [y, x], np.ones(4))[i])
            scale = np.max(np.abs(wanted), axis=-1, keepdims=True)
            actual = gradient / scale
            np.testing.assert_allclose(actual, wanted / scale, atol=ROUNDINGS)


def test_many_nearly_equal_classes(rng):
    """Of 4000 the rounding of log(1 + s) has a square of 1e-4 of the divergence."""
    x = rng.normal(size=(16, 4000)).astype(np.float32)
    y = (x + 1e-4 * rng.normal(size=x.shape)).astype(np.float32)
    p, q = (np.exp(np.float64(v)) for v in (x, y))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    for beta, (value, _) in jensen_shannon(y, x).items():
        m = beta * p + (1 - beta) * q
        # Of the relative differences u, the sum of u - log(1 + u).
        of_p, of_q = (u - np.log1p(u) for u in ((m - p) / p, (m - q) / q))
        expected = np.sum(beta * p * of_p + (1 - beta) * q * of_q, 1)
        np.testing.assert_allclose(value, expected, rtol=ROUNDINGS)


def test_the_ends_are_the_divergences_of_kullback_and_leibler(pair):
    x, y = pair

    @jax.jit
    def both(x, y):
        ends = [jaxsoft.jensen_shannon(y, x, beta=beta) for beta in (0, 1)]
        return ends, [jaxsoft.kl_divergence(y, x), jaxsoft.kl_divergence(x, y)]

    np.testing.assert_array_equal(*both(x, y))


def test_a_mixture_has_no_infinities_and_no_negative_divergence(rng):
    inf = np.inf
    x = np.array([[1.0, -inf, 2.0], [1.0, 1.0, 2.0], [0.0, -inf, -inf], [-inf] * 3])
    y = np.array([[1.0, 5.0, 2.0], [1.0, -inf, 2.0], [-inf, 0.0, 0.0], [1.0] * 3])
    x, y = np.float32([*x, y[3]]), np.float32([*y, x[3]])
    for beta, (value, gradients) in jensen_shannon(y, x).items():
        chex.assert_tree_all_finite((value, gradients))
        largest = -beta * np.log(beta) - (1 - beta) * np.log1p(-beta)
        np.testing.assert_allclose(value[2], largest, rtol=1e-6)
        np.testing.assert_array_equal(value[3:], 0)
        np.testing.assert_array_equal([g[3:] for g in gradients], 0)
    x = rng.normal(size=(500, 3)).astype(np.float32)
    y = np.float32(x + 1e-3 * rng.normal(size=(500, 3)))
    assert all(np.all(value >= 0) for value, _ in jensen_shannon(y, x).values())
