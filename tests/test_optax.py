"""Beside optax: the same numbers where both are right, and where they differ and why.

The faults of optax are expected differences. A fault that goes away fails its test, and
may then go.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beside_optax import LOSSES, optax_binary, optax_indices, optax_probabilities
from laws import assert_within

import jaxsoft

ROWS, CLASSES = 8, 5
EPS = np.finfo(np.float32).eps


@pytest.fixture
def given(rng):
    """Moderate logits and everything to compare them with."""

    def floats(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    where = jnp.asarray(np.arange(CLASSES) < 3 + np.arange(ROWS)[:, None] % 3)
    return {
        "x": 2 * floats(ROWS, CLASSES),
        "x2": 2 * floats(ROWS, CLASSES),
        "y": jnp.arange(ROWS) % 3,
        "q": jax.nn.softmax(floats(ROWS, CLASSES), where=where),
        "where": where,
    }


@pytest.mark.parametrize("case", LOSSES)
def test_value_and_gradients_are_the_same(case, given):
    """A few roundings apart, of the largest entry: optax subtracts what we do not."""
    names, *losses = LOSSES[case]
    every = {name: given[source] for name, source in names.items()}
    every["logits"] = given["x"]
    floats = {n: a for n, a in every.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    @jax.jit
    def of_ours_and_theirs(floats):
        results = []
        for loss in losses:
            value, pull = jax.vjp(lambda v, f=loss: f(**{**every, **v}), floats)
            cotangent = jnp.linspace(1, 2, value.size).reshape(value.shape)
            results.append({"value": value, **pull(cotangent)[0]})
        return results

    ours, theirs = of_ours_and_theirs(floats)
    for what, expected in theirs.items():
        tolerance = 32 * EPS * np.max(np.abs(expected))
        assert_within(ours[what], expected, tolerance, f"{case}: {what}")


# What optax does otherwise.


def row_and_gradient(loss, x, *others):
    @jax.jit
    def both(x, *others):
        value, pull = jax.vjp(lambda x: loss(x, *others), x)
        return value, pull(jnp.ones_like(value))[0]

    return tuple(map(np.asarray, both(jnp.asarray(x), *others)))


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
    ours = functools.partial(jaxsoft.cross_entropy, ignore_index=None)
    wrapped = jax.jit(optax_indices)(jnp.asarray(x), label)
    of_200 = jax.jit(ours)(jnp.asarray(x), jnp.array([200]))
    np.testing.assert_allclose(wrapped, of_200, rtol=16 * EPS)
    ours = jax.jit(ours)(jnp.asarray(x), label)
    assert np.isnan(ours[0])


def test_the_loss_of_a_masked_label_is_negative():
    """Of probabilities it is 0. That class has probability 0: the loss is infinite."""
    x, where = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, True, False]])
    label = jnp.array([2])
    one_hot = jax.nn.one_hot(label, 3)
    assert optax_indices(x, label, where=where)[0] < -0.5
    assert optax_probabilities(x, one_hot, where=where)[0] == 0
    ours = jax.jit(functools.partial(jaxsoft.cross_entropy, where=where))
    for labels in (label, one_hot):
        assert np.isposinf(ours(x, labels)[0])


def test_the_loss_of_equal_large_logits_is_0():
    """log 3 is below the last digit of logsumexp([1e8] * 3)."""
    x = jnp.full((1, 3), 1e8)
    assert optax_indices(x, jnp.array([0]))[0] == 0
    ours = jax.jit(jaxsoft.cross_entropy)(x, jnp.array([0]))
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
    ours = jax.jit(jaxsoft.cross_entropy)
    for x in (below, above):
        assert ours(x, jnp.array([0]))[0] == 0
        assert ours(x, first)[0] == 0


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
    ours = jax.jit(jaxsoft.cross_entropy)(x, label)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, [2.4076059644443803], rtol=2 * EPS)
