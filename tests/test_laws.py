"""What every function satisfies, over the table of laws, against the oracle: values,
gradients and edges. Its transformations are in test_transformations.py.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from absl.testing import parameterized
from laws import (
    LAWS,
    Law,
    assert_close,
    cotangent_for,
    fullest,
    of_floats,
    quickly,
    value_and_pullback,
)

ROWS, CLASSES = 2, 4

every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
every_law_of_rows = pytest.mark.parametrize(
    "law",
    [law for law in LAWS if law.by_row and law.kinds[0] == "logits"],
    ids=lambda law: law.name,
)


# A few operations per entry, each of one rounding, and an exp at |x| < 10, which costs
# 10 of them: 64 is what the library promises.
FORWARD_ROUNDINGS = 64


class TestValues(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((law.name, law) for law in LAWS)
    def test_value_and_gradient_are_those_of_the_oracle(self, law: Law):
        arguments = law.draw(1, ROWS, CLASSES)
        cotangent = cotangent_for(law, arguments, 1)
        given = law.cast(arguments, jnp.float32)
        value, gradients = self.variant(value_and_pullback(law))(
            given, jnp.asarray(cotangent)
        )
        # The oracle sees the float32 numbers that the function sees.
        seen = [np.asarray(a) for a in given]
        assert_close(value, law.meaning(*seen), FORWARD_ROUNDINGS, law.name)
        expected = oracle.pullback(law.meaning, seen, cotangent)
        for position, gradient in zip(law.floats, gradients):
            assert gradient.dtype == given[position].dtype
            kind = law.kinds[position]
            assert_close(gradient, expected[position], FORWARD_ROUNDINGS, kind)


# Eager calls trace every time: one law of each function, that with all its options.
COMPILED_OR_NOT = [("jit", law) for law in LAWS]
COMPILED_OR_NOT += [("eager", law) for law in fullest(LAWS).values()]


@pytest.mark.parametrize(
    ("mode", "law"),
    COMPILED_OR_NOT,
    ids=[f"{mode}-{law.name}" for mode, law in COMPILED_OR_NOT],
)
def test_differentiation_does_not_change_the_value(mode: str, law: Law):
    def value_and_gradient(given):
        f, moving = of_floats(law, given)

        def total(*moving):
            value = f(*moving)
            return jnp.sum(value), value

        positions = tuple(range(len(moving)))
        (_, value), gradient = jax.value_and_grad(total, positions, has_aux=True)(
            *moving
        )
        return value, gradient

    def value_and_tangent(given):
        f, moving = of_floats(law, given)
        return jax.jvp(f, moving, moving)

    wrap = jax.jit if mode == "jit" else lambda f: f
    plain = wrap(lambda given: law.call(*given))
    differentiated = [wrap(value_and_gradient)]
    if mode == "eager":
        differentiated.append(value_and_tangent)
    # Of a width with a remainder for every vector unit.
    for seed in range(6 if mode == "jit" else 1):
        given = law.cast(law.draw(seed, 4, 7), jnp.float32)
        value = plain(given)
        for f in differentiated:
            with_derivative, _ = f(given)
            if law.same_bits:
                np.testing.assert_array_equal(value, with_derivative)
            else:
                assert_close(with_derivative, np.asarray(value), 4, law.name)


@every_law
def test_no_rows_and_one_class(law: Law):
    """An empty batch has empty results; one class is like any other number of them."""
    empty, single = law.draw(4, 0, CLASSES), law.draw(4, ROWS, 1)
    cotangents = [jnp.ones(np.shape(law.meaning(*single)), jnp.float32)]
    of_many = np.shape(law.meaning(*law.draw(4, ROWS, CLASSES)))
    shape = (0, *of_many[1:])[: len(of_many)]
    cotangents.append(jnp.ones(shape, jnp.float32))
    given = [law.cast(single, jnp.float32), law.cast(empty, jnp.float32)]
    both = value_and_pullback(law)
    (value, gradients), (nothing, no_gradients) = quickly(
        lambda given, cotangents: [both(*pair) for pair in zip(given, cotangents)]
    )(given, cotangents)

    seen = [np.asarray(a) for a in given[0]]
    assert_close(value, law.meaning(*seen), FORWARD_ROUNDINGS, "one class")
    expected = oracle.pullback(law.meaning, seen, cotangents[0])
    for position, gradient in zip(law.floats, gradients):
        assert_close(gradient, expected[position], FORWARD_ROUNDINGS, "one class")

    chex.assert_shape(nothing, shape)
    np.testing.assert_array_equal(nothing, np.zeros(shape))
    for argument, gradient in zip([given[1][i] for i in law.floats], no_gradients):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(argument))


FAR_ROWS = [
    [1000.0, 1000.0, 1000.0, 1000.0],
    [-1000.0, -1000.0, -1000.0, -1000.0],
    [1000.0, -1000.0, 999.0, 0.0],
    [-1000.0, 1000.0, 1000.0, 0.0],
    [1e4, 1e4 - 1, -1e4, 1e4],
    [88.0, 89.0, 88.0, 89.0],
    [-104.0, -103.0, -88.0, -89.0],
    [0.0, 0.0, 0.0, 0.0],
    [-0.0, 0.0, 1e-30, -1e-30],
]
INFINITE_ROWS = [
    [-np.inf, 1.0, 2.0, 1.0],
    [1.0, -np.inf, -np.inf, -np.inf],
    [1000.0, -1000.0, -np.inf, 0.0],
    [np.inf, 1.0, 2.0, 3.0],
    [np.inf, 1.0, np.inf, -np.inf],
    [np.inf, np.inf, np.inf, np.inf],
    [-np.inf, 0.0, -np.inf, np.inf],
]


@every_law_of_rows
def test_extreme_logits(law: Law):
    """±1000, ties and infinities: the oracle takes an infinity as a limit."""
    rows = FAR_ROWS + INFINITE_ROWS
    arguments = law.draw(5, len(rows), CLASSES)
    arguments[0] = np.array(rows)
    if "temperature" in law.kinds:  # below 0, what counts is a minimum
        arguments[0] = arguments[0] * np.sign(arguments[law.kinds.index("temperature")])
    if law.function == "smooth_min":
        arguments[0] = -arguments[0]
    if "signed weights" in law.kinds:
        weights = law.kinds.index("signed weights")
        arguments[weights] = np.abs(arguments[weights])  # else some sums are negative
    given = law.cast(arguments, jnp.float32)
    cotangent = cotangent_for(law, arguments, 5)
    value, gradients = jax.jit(value_and_pullback(law))(given, jnp.asarray(cotangent))

    seen: list[Any] = [np.asarray(a) for a in given]
    limit = [oracle.at_limit(seen[0]), *seen[1:]]
    expected = oracle.rounded(law.meaning(*limit))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(np.asarray(value)[infinite], expected[infinite])
    rtol = FORWARD_ROUNDINGS * np.finfo(np.float32).eps
    # Around lse = 0 the sum m + log(1 + s) is as good as its terms, which are below 10.
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=10 * rtol)
    # Two entries of a row meet in a gradient with terms of the size of the cotangent.
    row_gradients = oracle.pullback(law.meaning, limit, cotangent)
    np.testing.assert_allclose(
        gradients[0], oracle.rounded(row_gradients[0]), rtol=rtol, atol=10 * rtol
    )
    # At an infinite logit, a temperature and the like have a limit of their own.
    for position, gradient in zip(law.floats[1:], gradients[1:]):
        assert not np.any(np.isnan(gradient))
        if law.draw(5, 2, 3)[position].shape[:1] == (2,):
            far = len(FAR_ROWS)
            wanted = oracle.rounded(row_gradients[position])[:far]
            scale = np.max(np.abs(wanted))
            np.testing.assert_allclose(gradient[:far], wanted, atol=rtol * scale)


@pytest.mark.parametrize(
    "law",
    [law for law in LAWS if "mask" in law.kinds and law.kinds[0] != "hidden"],
    ids=lambda law: law.name,
)
def test_masked_entries_do_not_count(law: Law):
    """NaN and infinities under the mask change no bit; a row of them has gradient 0."""
    arguments = law.draw(6, 4, CLASSES)
    mask = arguments[law.kinds.index("mask")]
    mask[3] = False
    both = quickly(value_and_pullback(law))
    shape = np.shape(law.meaning(*law.draw(6, 4, CLASSES)))
    cotangent = jnp.ones(shape, jnp.float32)

    results = []
    for junk in (0.0, np.nan, np.inf, -np.inf, 1e30):
        for position, kind in enumerate(law.kinds):
            if kind == "logits":
                arguments[position] = np.where(mask, arguments[position], junk)
            if kind == "probabilities":  # a number would be a claim, NaN is none
                nothing = np.nan if np.isnan(junk) else 0
                arguments[position] = np.where(mask, arguments[position], nothing)
        results.append(both(law.cast(arguments, jnp.float32), cotangent))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], result)

    gradient_in_logits = np.asarray(results[0][1][0])
    assert not np.any(np.isnan(gradient_in_logits))
    np.testing.assert_array_equal(gradient_in_logits[~mask], 0)
