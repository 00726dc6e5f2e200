"""Beside optax: the same numbers where both are right, and where they differ and why.

Values are compared in the tests of each loss; here are the gradients, and the faults of
optax as expected differences. A fault that goes away fails its test, and may then go.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft

ROWS, CLASSES = 8, 5
EPS = np.finfo(np.float32).eps
optax_indices = optax.softmax_cross_entropy_with_integer_labels
optax_probabilities = optax.softmax_cross_entropy
optax_binary = optax.sigmoid_binary_cross_entropy


@pytest.fixture
def given(rng):
    """Moderate logits and everything to compare them with."""

    def floats(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "x": 2 * floats(ROWS, CLASSES),
        "x2": 2 * floats(ROWS, CLASSES),
        "x3": 2 * floats(2, 3, 4),
        "y": jnp.arange(ROWS) % 3,
        "q": jax.nn.softmax(floats(ROWS, CLASSES)),
        "yes": jnp.asarray(rng.random((ROWS, CLASSES)) < 0.5),
        "where": jnp.asarray(np.arange(CLASSES) < 3 + np.arange(ROWS)[:, None] % 3),
    }


def one_hot(y):
    return jax.nn.one_hot(y, CLASSES)


# Names of the arguments, the loss of jaxsoft and that of optax. Floats move.
SAME: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "indices": ("x y", jaxsoft.cross_entropy, optax_indices),
    "indices, where": (
        "x y where",
        lambda x, y, where: jaxsoft.cross_entropy(x, y, where=where),
        lambda x, y, where: optax_indices(x, y, where=where),
    ),
    "indices, first axis": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(x.T, y, axis=0),
        lambda x, y: optax_indices(x.T, y, axis=0),
    ),
    "indices, two axes": (
        "x3",
        lambda x: jaxsoft.cross_entropy(x, jnp.array([7, 11]), axis=(1, 2)),
        lambda x: optax_indices(x, jnp.array([7, 11]), axis=(1, 2)),
    ),
    "indices, mean": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(x, y, reduction="mean"),
        lambda x, y: jnp.mean(optax_indices(x, y)),
    ),
    "indices, mean of weighted": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(
            x, y, sample_weight=jnp.arange(1.0, ROWS + 1), reduction="mean"
        ),
        lambda x, y: jnp.average(
            optax_indices(x, y), weights=jnp.arange(1.0, ROWS + 1)
        ),
    ),
    "indices, temperature": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(x, y, temperature=2.0),
        lambda x, y: optax_indices(x / 2, y),
    ),
    "indices, softcap": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(x, y, softcap=5.0),
        lambda x, y: optax_indices(5 * jnp.tanh(x / 5), y),
    ),
    "indices, smoothing": (
        "x y",
        lambda x, y: jaxsoft.cross_entropy(x, y, label_smoothing=0.2),
        lambda x, y: optax_probabilities(x, optax.smooth_labels(one_hot(y), 0.2)),
    ),
    "probabilities": ("x q", jaxsoft.cross_entropy, optax_probabilities),
    "probabilities that are not normalised": (
        "x q",
        lambda x, q: jaxsoft.cross_entropy(x, 3 * q),
        lambda x, q: optax_probabilities(x, 3 * q),
    ),
    "probabilities, first axis": (
        "x q",
        lambda x, q: jaxsoft.cross_entropy(x, q, axis=0),
        lambda x, q: optax_probabilities(x, q, axis=0),
    ),
    "probabilities, smoothing": (
        "x q",
        lambda x, q: jaxsoft.cross_entropy(x, q, label_smoothing=0.2),
        lambda x, q: optax_probabilities(x, optax.smooth_labels(q, 0.2)),
    ),
    "safe": ("x q", jaxsoft.cross_entropy, optax.safe_softmax_cross_entropy),
    "binary": ("x q", jaxsoft.binary_cross_entropy, optax_binary),
    "binary of booleans": (
        "x yes",
        jaxsoft.binary_cross_entropy,
        lambda x, yes: optax_binary(x, yes.astype(jnp.float32)),
    ),
    "binary, smoothing": (
        "x q",
        lambda x, q: jaxsoft.binary_cross_entropy(x, q, label_smoothing=0.2),
        lambda x, q: optax_binary(x, 0.8 * q + 0.1),
    ),
    "kl_divergence": (
        "x x2",
        jaxsoft.kl_divergence,
        lambda x, x2: optax.kl_divergence(jax.nn.log_softmax(x2), jax.nn.softmax(x)),
    ),
    "kl_divergence with log targets": (
        "x x2",
        lambda x, x2: jaxsoft.kl_divergence(x, x2, temperature=2.0),
        lambda x, x2: optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(x2 / 2), jax.nn.log_softmax(x / 2)
        ),
    ),
    "generalized kl_divergence": (
        "x x2",
        lambda x, x2: jaxsoft.kl_divergence(x, x2, axis=0),
        lambda x, x2: optax.losses.generalized_kl_divergence(
            jax.nn.log_softmax(x2, axis=0), jax.nn.softmax(x, axis=0), axis=0
        ),
    ),
    "Fenchel-Young loss of logsumexp": (
        "x y",
        jaxsoft.cross_entropy,
        lambda x, y: optax.losses.make_fenchel_young_loss(jaxsoft.logsumexp)(
            x, one_hot(y)
        ),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_value_and_gradients_are_the_same(case, given):
    """A few roundings apart, of the largest entry: optax subtracts what we do not."""
    names, ours, theirs = SAME[case]
    arguments = [given[name] for name in names.split()]
    moving = [jnp.issubdtype(a.dtype, jnp.floating) for a in arguments]

    def value_and_gradients(loss):
        def of_floats(*floats):
            rest = iter(floats)
            return loss(*(next(rest) if m else a for a, m in zip(arguments, moving)))

        @jax.jit
        def both(*floats):
            value, pull = jax.vjp(of_floats, *floats)
            return value, *pull(jnp.linspace(1, 2, value.size).reshape(value.shape))

        return both(*(a for a, m in zip(arguments, moving) if m))

    for a, b in zip(value_and_gradients(ours), value_and_gradients(theirs)):
        chex.assert_trees_all_close(a, b, rtol=0, atol=32 * EPS * jnp.max(jnp.abs(b)))


# What optax does otherwise.


def row_and_gradient(loss, x, *others):
    value, pull = jax.vjp(lambda x: loss(x, *others), jnp.asarray(x))
    return np.asarray(value), np.asarray(pull(jnp.ones_like(value))[0])


def test_label_minus_1_wraps():
    """To the last class: a padding label trains the model."""
    x = [[1.0, 2.0, 3.0]]
    wrapped = row_and_gradient(optax_indices, x, jnp.array([-1]))
    of_last_class = row_and_gradient(optax_indices, x, jnp.array([2]))
    chex.assert_trees_all_equal(wrapped, of_last_class)
    for numbers in row_and_gradient(jaxsoft.cross_entropy, x, jnp.array([-1])):
        assert np.all(np.isnan(numbers))


@pytest.mark.parametrize("label", [3, -4])
def test_a_label_out_of_range_has_a_live_gradient(label):
    """Of softmax, beside a loss of NaN; it pushes all classes down."""
    x = [[1.0, 2.0, 3.0]]
    value, gradient = row_and_gradient(optax_indices, x, jnp.array([label]))
    assert np.isnan(value)
    np.testing.assert_allclose(gradient, jax.nn.softmax(jnp.asarray(x)), rtol=1e-6)
    for numbers in row_and_gradient(jaxsoft.cross_entropy, x, jnp.array([label])):
        assert np.all(np.isnan(numbers))


def test_narrow_labels_wrap():
    """-100 is class 200 of 300."""
    x = np.zeros((1, 300), np.float32)
    x[0, 200] = 7
    label = jnp.array([-100], jnp.int8)
    wrapped = optax_indices(jnp.asarray(x), label)
    of_200 = jaxsoft.cross_entropy(jnp.asarray(x), jnp.array([200]))
    np.testing.assert_allclose(wrapped, of_200, rtol=16 * EPS)
    ours = jaxsoft.cross_entropy(jnp.asarray(x), label, ignore_index=None)
    assert np.isnan(ours[0])


def test_the_loss_of_a_masked_label_is_negative():
    """Of probabilities it is 0. That class has probability 0: the loss is infinite."""
    x, where = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, True, False]])
    label = jnp.array([2])
    assert optax_indices(x, label, where=where)[0] < -0.5
    assert optax_probabilities(x, jax.nn.one_hot(label, 3), where=where)[0] == 0
    for labels in (label, jax.nn.one_hot(label, 3)):
        assert np.isposinf(jaxsoft.cross_entropy(x, labels, where=where)[0])


def test_the_loss_of_equal_large_logits_is_0():
    """log 3 is below the last digit of logsumexp([1e8] * 3)."""
    x = jnp.full((1, 3), 1e8)
    assert optax_indices(x, jnp.array([0]))[0] == 0
    ours = jaxsoft.cross_entropy(x, jnp.array([0]))
    np.testing.assert_allclose(ours, [np.log(3)], rtol=2 * EPS)


def test_a_sure_model_has_no_digits():
    """Neither the loss nor the gradient of the label is exp(-20); the rest of the row
    still is, and the row does not sum to 0."""
    x, label = [[20.0, 0.0]], jnp.array([0])
    value, gradient = row_and_gradient(optax_indices, x, label)
    expected = np.exp(-20.0)
    assert value == 0
    assert gradient[0, 0] == 0
    np.testing.assert_allclose(gradient[0, 1], expected, rtol=4 * EPS)
    value, gradient = row_and_gradient(jaxsoft.cross_entropy, x, label)
    np.testing.assert_allclose(value, [expected], rtol=4 * EPS)
    np.testing.assert_allclose(gradient, [[-expected, expected]], rtol=4 * EPS)


def test_infinite_logits_are_nan():
    """-inf under a label probability of 0, and +inf at the label: the loss is 0."""
    below, above = jnp.array([[0.0, -np.inf]]), jnp.array([[np.inf, 0.0]])
    first = jnp.array([[1.0, 0.0]])
    assert np.isnan(optax_probabilities(below, first)[0])
    assert optax.safe_softmax_cross_entropy(below, first)[0] == 0
    assert np.isnan(optax_indices(above, jnp.array([0]))[0])
    for x in (below, above):
        assert jaxsoft.cross_entropy(x, jnp.array([0]))[0] == 0
        assert jaxsoft.cross_entropy(x, first)[0] == 0


def test_binary_of_infinite_logits_is_nan_where_it_is_right():
    x = jnp.array([-np.inf, np.inf, -np.inf, np.inf])
    y = jnp.array([0.0, 0.0, 1.0, 1.0])
    nan, inf = np.nan, np.inf
    np.testing.assert_array_equal(optax_binary(x, y), [nan, inf, inf, nan])
    value, gradient = row_and_gradient(jaxsoft.binary_cross_entropy, x, y)
    np.testing.assert_array_equal(value, [0, inf, inf, 0])
    np.testing.assert_array_equal(gradient, [0, 1, -1, 0])


def test_one_label_is_spread_over_all_rows():
    """A batch of the wrong size is no error."""
    x, label = jnp.zeros((2, 3)), jnp.array([0])
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(optax_indices(x, label), np.log(3), rtol=1e-6)
    with pytest.raises(ValueError, match=r"labels \(1,\) for logits \(2, 3\)"):
        jaxsoft.cross_entropy(x, label)


def test_the_loss_of_half_precision_is_rounded_to_it():
    """To 8 bits, before any mean over the rows."""
    x = jnp.array([[1.0, 2.0, 3.0]], jnp.bfloat16)
    label = jnp.array([0])
    assert optax_indices(x, label).dtype == jnp.bfloat16
    ours = jaxsoft.cross_entropy(x, label)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, [2.4076059644443803], rtol=2 * EPS)
