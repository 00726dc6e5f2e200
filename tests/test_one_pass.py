"""Splits about a label or a sample: the numbers of the split about the maximum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft import _one_pass, _softmax
from jaxsoft._core.exp import HIGHEST
from jaxsoft._core.numerics import exp_about
from jaxsoft._passes.one_pass import SAMPLE

INF = np.inf
# By how much a class lies above the label: to the edge of what is summed, and beyond.
GAPS = (-200, -60, -20, -1, 0, 1, 40, 60, 68, 70, HIGHEST, 88, 90, 200, 3000)
ULP = 2.0**-23


def split(x):
    """In float64: the maximum of every row, and exp(x - maximum)."""
    x = np.float64(x)
    m = np.max(x, -1, keepdims=True)
    return m, np.exp(x - np.where(np.isfinite(m), m, 0))


def exact_losses(x, labels):
    """And their gradients, without a subtraction of nearly equal numbers."""
    rows = np.arange(len(x))
    m, e = split(x)
    others = e.copy()
    others[rows, labels] = 0
    e_of_label, others = e[rows, labels], np.sum(others, -1)
    gap = (m[:, 0] - np.float64(x)[rows, labels]).clip(0)
    losses = np.where(
        e_of_label > 0.5,
        np.log1p(others / np.where(e_of_label == 0, 1, e_of_label)),
        gap + np.log(e_of_label + others),
    )
    gradient = e / (e_of_label + others)[:, None]
    gradient[rows, labels] = -others / (e_of_label + others)
    return losses, gradient


def losses_and_gradient(x, labels, **options):
    losses, pull = jax.vjp(
        lambda x: jaxsoft.cross_entropy(x, labels, **options), jnp.asarray(x)
    )
    return losses, pull(jnp.ones_like(losses))[0]


def check(given, expected, ulps):
    """Normal numbers, and infinities."""
    given, expected = np.float64(given), np.float64(expected)
    normal = np.abs(expected) > 1e-36
    np.testing.assert_allclose(given[normal], expected[normal], rtol=ulps * ULP)
    np.testing.assert_array_less(np.abs(given[~normal]), 1.1e-36)


@pytest.mark.parametrize("classes", [70, 300])
@pytest.mark.parametrize("gap", GAPS)
def test_a_class_far_from_the_label(gap, classes, rng):
    """In one row of some; the others keep their digits, whichever way is taken."""
    x = (3 * rng.normal(size=(6, classes))).astype(np.float32)
    labels = rng.integers(0, classes - 1, 6)
    x[0] -= 20
    x[0, labels[0]], x[0, -1] = 5, 5 + gap
    expected = exact_losses(x, labels)
    for given, wanted in zip(jax.jit(losses_and_gradient)(x, labels), expected):
        check(given, wanted, ulps=8)


@pytest.mark.parametrize("classes", [70, 300])
def test_labels_without_a_finite_logit(classes, rng):
    x = rng.normal(size=(7, classes)).astype(np.float32)
    labels = np.full(7, 2)
    x[0, 2] = -INF
    x[1, 2] = INF
    x[2, 2] = x[2, 5] = INF
    x[3, 5] = INF
    x[4] = -INF
    x[5, 7] = np.nan
    losses, gradient = map(np.asarray, jax.jit(losses_and_gradient)(x, labels))
    np.testing.assert_allclose(losses[:3], [INF, 0, np.log(2)], rtol=ULP)
    np.testing.assert_array_equal(losses[3:6], [INF, INF, np.nan])
    assert np.all(np.isnan(gradient[5]))
    np.testing.assert_array_equal(gradient[[1, 4]], 0)
    np.testing.assert_allclose(np.sum(gradient[[0, 2, 3]], 1), 0, atol=1e-6)
    assert gradient[0, 2] == -1
    np.testing.assert_allclose(gradient[2, [2, 5]], [-0.5, 0.5])
    wanted = exact_losses(x[6:], labels[6:])
    check(losses[6:], wanted[0], ulps=4)
    check(gradient[6:], wanted[1], ulps=4)


def test_masked_ignored_and_invalid_labels(rng):
    """They need no second look at the others, and leave them alone."""
    x = rng.normal(size=(5, 300)).astype(np.float32)
    x[1:3] += 1000  # whatever stands in for their label is far below
    labels = np.array([4, -100, -1, 7, 9])
    where = np.ones(x.shape, bool)
    where[3, 7] = False
    losses, gradient = map(
        np.asarray,
        jax.jit(lambda x: losses_and_gradient(x, labels, where=where))(x),
    )
    np.testing.assert_array_equal(losses[1:4], [0, np.nan, INF])
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.all(np.isnan(gradient[2]))
    assert gradient[3, 7] == 0
    np.testing.assert_allclose(np.sum(gradient[3]), 1, rtol=1e-6)
    wanted = exact_losses(x[[0, 4]], labels[[0, 4]])
    check(losses[[0, 4]], wanted[0], ulps=4)
    check(gradient[[0, 4]], wanted[1], ulps=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("softcap", [30.0, 1.0, None])
def test_softcap_masks_and_other_layouts(softcap, axis, dtype, rng):
    x = jnp.asarray(10 * rng.normal(size=(5, 70)), dtype)
    labels = rng.integers(0, 70, 5)
    where = rng.random(x.shape) < 0.5
    where[np.arange(5), labels] = True

    def loss(x, where):
        return jaxsoft.cross_entropy(x, labels, axis=axis, where=where, softcap=softcap)

    given = jax.jit(loss)(*((x, where) if axis == 1 else (x.T, where.T)))
    z = np.float64(x)
    z = np.where(where, z if softcap is None else softcap * np.tanh(z / softcap), -INF)
    # What the cap rounds off at 30 is of the size of 1e-6.
    np.testing.assert_allclose(given, exact_losses(z, labels)[0], rtol=1e-5)


@pytest.mark.parametrize("gap", [0, 3, 20])
def test_a_logsumexp_near_0_in_z_loss(gap, rng):
    """Its square has the digits of the tail, for any label."""
    x = rng.normal(size=(3, 100)).astype(np.float32) - 30
    x[:, -1] = 0
    x[1] += np.float32(0.01)
    labels = np.array([3, 99, 98])
    x[2, 98] = x[2, 99] - gap
    m, e = split(x)
    tail = np.sum(np.sort(e, -1)[:, :-1], -1)
    square = (m[:, 0] + np.log1p(tail)) ** 2

    def slope(x, label):
        loss = functools.partial(jaxsoft.cross_entropy, x, label)
        return jax.grad(lambda z: loss(z_loss=z))(0.5)

    slopes = jax.jit(jax.vmap(slope))(jnp.asarray(x), labels)
    np.testing.assert_allclose(slopes, square, rtol=1e-5)


@pytest.mark.parametrize("scale", [3, 40])
def test_under_vmap(scale, rng):
    """One branch for the batch, with the numbers of a batched call."""
    x = (scale * rng.normal(size=(4, 6, 90))).astype(np.float32)
    labels = rng.integers(0, 90, (4, 6))
    f = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(jaxsoft.cross_entropy))))
    compiled = f.lower(x, labels).compile()
    assert "conditional(" in compiled.as_text()
    losses, gradient = compiled(x, labels)
    wanted = exact_losses(x.reshape(24, 90), labels.reshape(24))
    check(losses.reshape(24), wanted[0], ulps=4)
    check(gradient.reshape(24, 90), wanted[1], ulps=8)


@pytest.mark.parametrize("far", [False, True])
def test_the_maximum_is_looked_for_where_it_is_needed(far, monkeypatch):
    """Without it, the losses are right exactly if no class is far above its label."""

    def no_split(x, where, temperature, axes, softcap=None):
        m = jnp.max(x, axes, keepdims=True)
        return jnp.full_like(m, jnp.nan), jnp.full_like(m, jnp.nan)

    monkeypatch.setattr(_one_pass, "max_and_tail", no_split)
    x = np.zeros((2, 299 + far), np.float32)  # a shape that no other test compiles
    x[0, 30] = 100 if far else 10
    losses = jax.jit(lambda x: jaxsoft.cross_entropy(x, jnp.array([0, 1])))(x)
    log_sums = jax.jit(lambda x: jaxsoft.logsumexp(x, axis=-1))(x)
    assert np.all(np.isnan(losses)) == far
    assert np.all(np.isnan(log_sums)) == far


@pytest.mark.parametrize("where_is_the_maximum", [0, SAMPLE, -1])
@pytest.mark.parametrize("shift", [0, -30, 1000])
@pytest.mark.parametrize("gap", [5, 20, 60, 80, 200])
def test_a_maximum_outside_the_sample(where_is_the_maximum, shift, gap, rng):
    """Where logsumexp is near 0, it has the digits of the tail."""
    x = rng.normal(size=(3, 300)).astype(np.float32) - gap
    x[0, where_is_the_maximum] = 0
    x[1] += gap
    x[2] = x[2] * 0 - np.float32(np.log(x.shape[1]))  # normalised: nearly 0
    x += np.float32(shift)
    m, e = split(x)
    total = np.sum(e, -1)
    tail = np.sum(np.sort(e, -1)[:, :-1], -1)
    expected = m[:, 0] + np.log1p(tail)
    log_sum, pull = jax.vjp(lambda x: jaxsoft.logsumexp(x, axis=-1), jnp.asarray(x))
    check(log_sum[:2], expected[:2], ulps=4)
    np.testing.assert_allclose(log_sum[2], expected[2], atol=2e-6, rtol=ULP)
    check(pull(jnp.ones(3))[0], e / total[:, None], ulps=4)


def test_what_a_sample_does_not_show(rng):
    """Infinities and NaN inside and outside of it; masks."""
    x = rng.normal(size=(8, 9000)).astype(np.float32)
    where = np.ones(x.shape, bool)
    x[0, : 2 * SAMPLE] = -INF
    where[1, : 2 * SAMPLE] = False
    x[1, 0] = np.nan
    where[2] = False
    x[3] = -INF
    x[4, 0] = INF
    x[5, -1] = INF
    x[6, -1] = np.nan
    counted = np.where(where, x, -INF)
    m, e = split(counted[[0, 1, 7]])
    total = np.sum(e, -1, keepdims=True)
    log_sum = jax.jit(lambda x, w: jaxsoft.logsumexp(x, -1, where=w))(x, where)
    np.testing.assert_array_equal(log_sum[2:7], [-INF, -INF, INF, INF, np.nan])
    check(log_sum[np.array([0, 1, 7])], (m + np.log(total))[:, 0], ulps=4)
    p = np.asarray(jax.jit(lambda x, w: jaxsoft.softmax(x, where=w))(x, where))
    np.testing.assert_array_equal(np.sum(p[2:7], 1), [0, 0, 1, 1, np.nan])
    check(p[[0, 1, 7]], e / total, ulps=4)
    slope = jax.grad(lambda x: jnp.sum(jaxsoft.logsumexp(x, -1, where=where)))(x)
    np.testing.assert_array_equal(slope[2:6], p[2:6])


@pytest.mark.parametrize("ulps", [0, 4])
def test_no_probability_is_above_1(ulps, rng, monkeypatch):
    """Also where XLA computes logits anew, and not to the same bits."""

    def exp_a_bit_off(z, m):
        return exp_about(z, m) * np.float32(1 + ulps * ULP)

    monkeypatch.setattr(_softmax, "exp_about", exp_a_bit_off)
    x = rng.normal(size=(64, 9001 + ulps)).astype(np.float32)  # compiled here alone
    x[np.arange(64), rng.integers(SAMPLE, 9000, 64)] += rng.uniform(15, 60, 64)
    p = jax.jit(jaxsoft.softmax)(x)
    assert float(jnp.max(p)) == 1


def log_of_sum(x):
    return jaxsoft.logsumexp(x, axis=-1)


def loss_of_first(x):
    return jaxsoft.cross_entropy(x, jnp.zeros(x.shape[:-1], jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("f", [log_of_sum, loss_of_first])
def test_all_derivatives(f, rng):
    """Also in a scan that is differentiated twice, in which JAX drops rules."""

    def scanned(x):
        _, values = jax.lax.scan(lambda x, _: (x * 1.0, f(x)), x, length=2)
        return jnp.sum(values) / 2

    @jax.jit
    def derivatives(x, t):
        def of(g):
            slope = jax.grad(g)
            twice = jax.grad(lambda x: jnp.vdot(slope(x), t))
            _, pushed = jax.jvp(g, (x,), (t,))
            return slope(x), pushed, jax.jvp(slope, (x,), (t,))[1], twice(x)

        return of(f), of(scanned)

    x, t = rng.normal(size=(2, 300)).astype(np.float32)
    for gap in (0, 100):
        x[-1] = 5 + gap
        _, e = split(x)
        p = e / np.sum(e)
        slope = p - (np.arange(len(p)) == 0) * (f is loss_of_first)
        curvature = p * (t - p @ np.float64(t))
        expected = slope, slope @ t, curvature, curvature
        for given in derivatives(x, t):
            for derivative, wanted in zip(given, expected):
                np.testing.assert_allclose(derivative, wanted, rtol=1e-5, atol=1e-6)
