"""What every function satisfies, over the table of laws, against the oracle: values,
gradients and edges. Its transformations are in test_transformations.py.

A law has two programs here, its value and its value and gradient, which meet all rows:
ordinary ones, ties, ±1000, infinities, and what a mask hides.
"""

import functools
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import (
    CLASSES,
    FAR_ROWS,
    LAWS,
    Law,
    as_promised,
    as_users_have_it,
    assert_close,
    assert_same_bits,
    assert_within,
    cotangent_for,
    each,
    eager,
    every_law,
    extremes,
    fullest,
    in_segments,
    oracle_pullback,
    plainest,
    problem,
    program,
    rows_of,
    value,
    value_and_pullback,
    value_and_tangent,
)

# A few operations per entry, each of one rounding, and an exp at |x| < 10, which costs
# 10 of them: 64 is what the library promises.
FORWARD_ROUNDINGS = 64


@functools.cache
def expected(law: Law):
    _, seen, cotangent = problem(law)
    return law.meaning(*seen), oracle_pullback(law, seen, cotangent)


def check_value_and_gradient(law: Law, result, gradients, how: str) -> None:
    wanted, wanted_gradients = expected(law)
    what = f"{law.name}, float32, {how}"
    assert_close(result, wanted, FORWARD_ROUNDINGS, f"{what}, value")
    for i, gradient, correct in zip(law.floats, gradients, wanted_gradients):
        of = f"{what}, gradient in argument {i}, {law.kinds[i]}"
        assert gradient.dtype == problem(law)[0][i].dtype, of
        assert_close(gradient, correct, FORWARD_ROUNDINGS, of)


@every_law
def test_value_and_gradient_are_those_of_the_oracle(law: Law, form):
    given, _, cotangent = problem(law)
    both = program(value_and_pullback, law, form, as_promised(law))(given, cotangent)
    check_value_and_gradient(law, *both, "under jit")


@each(law for law in LAWS if law.by_row and law.made is not in_segments)
def test_a_row_of_cotangent_0_has_gradient_0(law: Law, form):
    """Whatever is in it: a loss may be masked afterwards."""
    given, _, cotangent = problem(law)
    dead = np.arange(rows_of(law)) % 2 == 1
    cotangent = np.where(dead.reshape(-1, *[1] * (cotangent.ndim - 1)), 0, cotangent)
    of = program(value_and_pullback, law, form, as_promised(law))
    wanted = of(given, cotangent)[1]
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = [
            np.where(dead.reshape(-1, *[1] * (a.ndim - 1)), _spoiler(a, bad), a)
            if has_rows
            else a
            for a, has_rows in zip(map(np.asarray, given), law.have_rows)
        ]
        found = of(spoilt, cotangent)[1]
        for i, gradient, correct in zip(law.floats, found, wanted):
            what = f"{law.name}, {bad} in dead rows, gradient in {law.kinds[i]}"
            if law.have_rows[i]:
                assert np.all(np.asarray(gradient)[dead] == 0), what
            assert_same_bits(gradient, correct, what)


def _spoiler(a: np.ndarray, bad: float) -> Any:
    """The same for a float, and for a label one that is no class."""
    if a.dtype == np.int32:
        return np.int32(-1)
    return a.dtype.type(bad) if a.dtype != bool else a


@pytest.mark.slow
@each(law for law in LAWS if not law.same_bits)
def test_value_and_gradient_as_users_have_them(law: Law, form):
    given, _, cotangent = problem(law)
    both = program(value_and_pullback, law, form, as_users_have_it)(given, cotangent)
    check_value_and_gradient(law, *both, "as users have it")


def assert_unchanged(law: Law, differentiated, plain, how: str) -> None:
    what = f"{law.name}, float32, value {how}"
    if law.same_bits:
        assert_same_bits(differentiated, plain, what)
    else:
        assert_close(differentiated, np.asarray(plain), 4, what)


@every_law
def test_differentiation_does_not_change_the_value(law: Law, form):
    for seed in range(6):
        given, _, cotangent = problem(law, seed)
        plain = program(value, law, form, as_promised(law))(*given)
        both = program(value_and_pullback, law, form, as_promised(law))
        with_gradient = both(given, cotangent)[0]
        assert_unchanged(law, with_gradient, plain, f"of seed {seed} with a gradient")


# Eager calls trace every time: one law of each function, that with all its options, and
# where these are many another one too.
MANY_OPTIONS = [law for law in LAWS if len(law.kinds) > 6]
FEW_OPTIONS = fullest(law for law in LAWS if law not in MANY_OPTIONS).values()


@each([*FEW_OPTIONS, *MANY_OPTIONS], slow=MANY_OPTIONS)
def test_without_jit(law: Law, form):
    """The numbers of the oracle, and every derivative with the same value."""
    given, _, cotangent = problem(law)
    plain = program(value, law, form, eager)(*given)
    both = program(value_and_pullback, law, form, eager)(given, cotangent)
    check_value_and_gradient(law, *both, "without jit")
    assert_unchanged(law, both[0], plain, "with a gradient, without jit")
    both = program(value_and_tangent, law, form, eager)(given, given)
    assert_unchanged(law, both[0], plain, "with a tangent, without jit")
    assert both[1].dtype == plain.dtype, law.name


# Of a function, the law with all options has one class, and that with none no rows.
@each(fullest(LAWS).values())
def test_one_class(law: Law, form):
    """It is like any other number of them."""
    given = law.cast(law.draw(4, 2, 1), jnp.float32)
    seen = [np.asarray(a) for a in given]
    wanted = law.meaning(*seen)
    cotangent = np.ones(wanted.shape, np.float32)
    both = program(value_and_pullback, law, form)
    result, gradients = both(given, cotangent)
    what = f"{law.name}, float32, one class"
    assert_close(result, wanted, FORWARD_ROUNDINGS, f"{what}, value")
    wanted = oracle_pullback(law, seen, cotangent)
    for i, gradient, correct in zip(law.floats, gradients, wanted):
        of = f"{what}, gradient in argument {i}, {law.kinds[i]}"
        assert_close(gradient, correct, FORWARD_ROUNDINGS, of)


@each(plainest(LAWS).values())
def test_no_rows(law: Law, form):
    """An empty batch has empty results."""
    given = law.cast(law.draw(4, 0, CLASSES), jnp.float32)
    shape = (0, *problem(law)[2].shape[1:])
    both = program(value_and_pullback, law, form)
    result, gradients = both(given, np.zeros(shape, np.float32))
    chex.assert_shape(result, shape)
    for i, gradient in zip(law.floats, gradients):
        what = f"{law.name}, no rows, gradient in argument {i}, {law.kinds[i]}"
        assert_same_bits(gradient, jnp.zeros_like(given[i]), what)


@each(law for law in LAWS if law.by_row and law.kinds[0] == "logits")
def test_extreme_logits(law: Law, form):
    """±1000, ties and infinities: the oracle takes an infinity as a limit."""
    arguments = extremes(law)
    given = law.cast(arguments, jnp.float32)
    cotangent = cotangent_for(law, arguments, 5)
    both = program(value_and_pullback, law, form, as_promised(law))
    result, gradients = both(given, cotangent)

    seen: list[Any] = [np.asarray(a) for a in given]
    limit = [oracle.at_limit(seen[0]), *seen[1:]]
    wanted = oracle.rounded(law.meaning(*limit))
    rtol = FORWARD_ROUNDINGS * np.finfo(np.float32).eps
    # Around lse = 0 the sum m + log(1 + s) is as good as its terms, which are below 10.
    # An infinity is the same infinity.
    size = 10 + np.where(np.isinf(wanted), 0, np.abs(wanted))
    what = f"{law.name}, float32"
    assert_within(result, wanted, rtol * size, f"{what}, value")
    # At an infinite logit, a temperature and the like have a limit of their own.
    of_rows = [i for i in law.floats if law.have_rows[i]]
    in_rows = dict(zip(of_rows, oracle_pullback(law, limit, cotangent, of_rows)))
    # Two entries of a row meet in a gradient with terms of the size of the cotangent.
    wanted = oracle.rounded(in_rows.pop(0))
    size = 10 + np.where(np.isinf(wanted), 0, np.abs(wanted))
    assert_within(gradients[0], wanted, rtol * size, f"{what}, gradient in the logits")
    for i, gradient in zip(law.floats[1:], gradients[1:]):
        of = f"{what}, gradient in argument {i}, {law.kinds[i]}"
        assert not np.any(np.isnan(gradient)), f"{of}: NaN in {gradient}"
        if i in in_rows:
            far = oracle.rounded(in_rows[i])[: len(FAR_ROWS)]
            tolerance = 1e-7 * np.abs(far) + rtol * np.max(np.abs(far))
            assert_within(gradient[: len(far)], far, tolerance, of)


@each(law for law in LAWS if "mask" in law.kinds and law.kinds[0] != "hidden")
def test_masked_entries_do_not_count(law: Law, form):
    """NaN and infinities under the mask change no bit; a row of them has gradient 0."""
    arguments = law.draw(6, rows_of(law), CLASSES)
    mask = arguments[law.kinds.index("mask")]
    mask[3] = False
    cotangent = np.ones(np.shape(problem(law)[2]), np.float32)
    results = []
    for junk in (0.0, np.nan, np.inf, -np.inf, 1e30):
        for position, kind in enumerate(law.kinds):
            if kind == "logits":
                arguments[position] = np.where(mask, arguments[position], junk)
            if kind == "probabilities":  # a number would be a claim, NaN is none
                nothing = np.nan if np.isnan(junk) else 0
                arguments[position] = np.where(mask, arguments[position], nothing)
        given = law.cast(arguments, jnp.float32)
        both = program(value_and_pullback, law, form, as_promised(law))
        result, gradients = both(given, cotangent)
        results.append([result, *gradients])
        names = ["value", *(f"gradient in argument {i}" for i in law.floats)]
        for name, numbers, of_zeros in zip(names, results[-1], results[0], strict=True):
            what = f"{law.name}, float32, {junk} under the mask, {name}"
            assert_same_bits(numbers, of_zeros, what)

    gradient_in_logits = np.asarray(results[0][1])
    what = f"{law.name}, float32, gradient in the logits"
    assert not np.any(np.isnan(gradient_in_logits)), what
    assert_same_bits(np.where(mask, 0, gradient_in_logits), np.zeros(mask.shape), what)
