"""The smooth maxima and softargmax against their formulas, at the edges and over them.

How they are compared, and through which programs: rows.py.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import rows
from laws import assert_within
from rows import TEMPERATURES, as_float64, every_dtype, in_dtype, in_range

import jaxsoft
from jaxsoft import smooth_max, smooth_min, softargmax

ROWS = [
    [0.0, 0.0, 0.0, 0.0],
    [1e-3, -1e-3, 0.0, 1e-3],
    [1.0, 1.0, -1.0, 0.5],
    [1000.0, -1000.0, 0.0, 999.0],
    [1e8, -1e8, 1e8, 0.0],
    [-1e8, -1000.0, -1000.0, -1e8],
    [20.0, 0.0, 1.0, -3.0],
    [np.inf, 0.0, -np.inf, 1.0],
    [np.inf, 5.0, np.inf, -1e8],
    [-np.inf, 0.0, -1.0, -np.inf],
]
POSITIONS = np.arange(4.0)
MAXIMA = ["smooth_max", "smooth_min", "boltzmann_max"]
FUNCTIONS = [*MAXIMA, "softargmax"]

every_function = pytest.mark.parametrize("name", FUNCTIONS)


def arguments_of(name: str, x: Any, t: Any, positions: Any = POSITIONS) -> list[Any]:
    """Rows of the logits, of the positions where there are some, of the temperature."""
    x = np.asarray(x)
    t = np.broadcast_to(t, (len(x), 1))
    return [x, t] if name in MAXIMA else [x, np.broadcast_to(positions, x.shape), t]


def value_and_slopes(
    name: str, x: Any, t: Any, positions: Any = POSITIONS, dtype: Any = "float32"
) -> list[np.ndarray]:
    arguments = arguments_of(name, x, t, positions)
    return rows.value_and_slopes(name, *arguments, dtype=dtype)


def value_of(name: str, x: Any, t: Any, dtype: Any = "float32") -> np.ndarray:
    return value_and_slopes(name, x, t, dtype=dtype)[0]


def scales(name: str, x: np.ndarray, t: np.ndarray, wanted: Any) -> dict[str, Any]:
    """The sums of the sizes of the terms of which the numbers are made."""
    x = as_float64(oracle.at_limit(x))
    t = np.where(np.abs(t) < np.finfo(np.float32).tiny, float(oracle.COLD), t)
    p = oracle.rounded(oracle.softmax(-x if name == "smooth_min" else x, temperature=t))
    values = x if name in MAXIMA else np.broadcast_to(POSITIONS, x.shape)
    gaps = np.sum(p[:, None] * np.abs(values[:, :, None] - values[:, None]), -1)
    own = 0 if name == "softargmax" else 1
    in_x = p if name in ("smooth_max", "smooth_min") else p * (own + gaps / np.abs(t))
    of_max = (t > 0) != (name == "smooth_min")
    top = np.where(of_max, np.max(x, 1, keepdims=True), np.min(x, 1, keepdims=True))
    in_t = np.sum(in_x * np.abs(x - top) / np.abs(t), 1, keepdims=True)
    largest = np.abs(top) if own else np.max(POSITIONS)
    in_positions = {} if name in MAXIMA else {"derivative in positions": p}
    return {
        "value": np.abs(wanted[0]) + largest,
        "derivative in x": in_x,
        **in_positions,
        "derivative in temperature": np.abs(wanted[-1]) + in_t,
    }


@every_dtype
@every_function
def test_values_and_derivatives_to_every_digit(name, dtype, rng):
    """At the edges, and in float32 over many magnitudes."""
    # A dozen operations. Without the compiled kernels exp turns the rounding of a shift
    # of up to 128 into 64.
    roundings = 16 if jaxsoft.cpu_kernels() else 64
    x = np.repeat(ROWS, len(TEMPERATURES), axis=0)
    t = np.tile(TEMPERATURES, len(ROWS))[:, None]
    if name == "smooth_min":
        x = -x
    if dtype == "float32":
        more = rng.normal(size=(60, 4)) * 10 ** rng.uniform(-3, 3, (60, 1))
        signs = rng.choice([-1, 1], (60, 1))
        x = np.concatenate([x, more])
        t = np.concatenate([t, signs * 10 ** rng.uniform(-3, 3, (60, 1))])
    given = in_dtype(dtype, *arguments_of(name, x, t))
    results = rows.value_and_slopes(name, *given, dtype=dtype)
    assert results[0].dtype == results[1].dtype == dtype
    meant = rows.meaning(name, *given, dtype=dtype)
    x, t = as_float64(given[0]), as_float64(given[-1])
    of_terms = scales(name, x, t, meant)
    for (what, scale), a, w in zip(of_terms.items(), results, meant, strict=True):
        a, limits = a.reshape(w.shape), jnp.finfo(a.dtype)
        w = in_range(w, a.dtype, what)
        # The operations in float32, then the rounding of the result.
        own = np.where(np.isinf(w), 0, np.abs(w)) * float(limits.eps)
        terms = np.where(scale < float(oracle.FAR) / 1000, scale, 0)
        terms = terms * roundings * 2.0**-23
        floor = 1e-34 / np.maximum(np.abs(t), 1e-6) + float(limits.smallest_subnormal)
        assert_within(a, w, 0.51 * own + terms + floor, f"{name}, {dtype}: {what}")


def test_a_sure_model_keeps_the_digits_of_the_others():
    x = np.array([[40.0, 0.0, 1.0, 2.0]])
    p = oracle.rounded(oracle.softmax(x))[0, 1:]
    slope = value_and_slopes("softargmax", x, 1.0, [5.0, 1.0, 7.0, 9.0])[1][0]
    others = p * [-4, 2, 4]
    np.testing.assert_allclose(slope, [-np.sum(others), *others], rtol=1e-6)
    slope = value_and_slopes("boltzmann_max", x, 1.0)[1][0]
    np.testing.assert_allclose(slope[1:], p * [-39, -38, -37], rtol=1e-6)


@every_function
def test_second_derivatives_are_finite_at_the_edges(name):
    x = jnp.asarray(np.repeat(ROWS, len(TEMPERATURES), axis=0), jnp.float32)
    t = jnp.asarray(np.tile(TEMPERATURES, len(ROWS)), jnp.float32)

    def f(x, t):
        return getattr(jaxsoft, name)(x, -1, temperature=t)

    hessians = jax.jit(jax.vmap(jax.hessian(f, (0, 1))))(x, t)
    for hessian in jax.tree.leaves(hessians):
        assert np.all(np.isfinite(hessian)), name


# Axes, masks, temperature, positions.


@every_function
def test_axes_mask_and_keepdims(name, rng):
    f = getattr(jaxsoft, name)
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    mask = jnp.asarray(rng.uniform(size=x.shape) < 0.6).at[:, 0, 0].set(True)

    def over_two(x):
        return jnp.sum(f(x, (2, 1), mask))

    @jax.jit
    def everything(x, poisoned):
        flat, flat_mask = (jnp.moveaxis(v, 1, -1).reshape(2, 12) for v in (x, mask))
        return {
            "out": f(x, (2, 1), mask),
            "flat": f(flat, -1, flat_mask),
            "kept": f(x, (2, 1), mask, keepdims=True),
            "of all": (f(x, None), f(x.ravel(), 0)),
            "slopes": [jax.value_and_grad(over_two)(v) for v in (x, poisoned)],
        }

    result = everything(x, jnp.where(mask, x, jnp.nan))
    out = result["out"]
    chex.assert_shape(out, (2,))
    np.testing.assert_allclose(out, result["flat"], rtol=1e-6)
    chex.assert_shape(result["kept"], (2, 1, 1))
    np.testing.assert_array_equal(result["kept"][:, 0, 0], out)
    np.testing.assert_allclose(*result["of all"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *result["slopes"])
    assert np.all(np.where(mask, 0, result["slopes"][1][1]) == 0)


@pytest.mark.parametrize("name", MAXIMA)
def test_temperature_zero_is_the_hard_function(name):
    x = np.float32(ROWS)
    hard = np.min(x, 1) if name == "smooth_min" else np.max(x, 1)
    f = getattr(jaxsoft, name)
    zeros = (0.0, 0, np.float32(1e-39), jnp.zeros((len(ROWS), 1)))
    of_static = jax.jit(lambda x: [f(x, 1, temperature=t) for t in zeros])(x)
    for t, value in zip(zeros, of_static):
        np.testing.assert_array_equal(value, hard, f"{name} at {t!r}")
        np.testing.assert_array_equal(value_of(name, x, t), hard, f"{name} at {t!r}")


def test_without_a_temperature_smooth_max_is_logsumexp(rng):
    x = np.float32(rng.normal(size=(40, 4)))
    np.testing.assert_allclose(smooth_max(x, 1), jaxsoft.logsumexp(x, 1), rtol=3e-7)


@every_dtype
def test_bounds_hold_in_floating_point(dtype, rng):
    x = rng.normal(size=(1024, 4)) * 10 ** rng.uniform(-3, 3, (1024, 1))
    x = np.asarray(jnp.asarray(x, dtype))
    t = np.float32(10 ** rng.uniform(-3, 3, (1024, 1)))
    unit = 2 * float(jnp.finfo(dtype).eps)
    room = as_float64(t)[:, 0] * np.log(4)
    of = {name: as_float64(value_of(name, x, t, dtype)) for name in FUNCTIONS}
    x = as_float64(x)
    for high, soft in (
        (np.max(x, 1), of["smooth_max"]),
        (-np.min(x, 1), -of["smooth_min"]),
    ):
        assert np.all(soft >= high)
        # The bound is a real number. A value below it may round to the float above.
        assert np.all(soft <= high + room + unit * np.abs(high + room))
    assert np.all(of["boltzmann_max"] <= np.max(x, 1))
    lowest = np.mean(x, 1) - unit * np.max(np.abs(x), 1)
    assert np.all(of["boltzmann_max"] >= lowest)
    assert np.all((of["softargmax"] >= 0) & (of["softargmax"] <= 3 * (1 + 1e-6)))


def test_positions(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    along, grid = [10.0, -5.0, 2.5], np.float32(rng.normal(size=(3, 4)))
    # The position of what does not count is nobody's.
    odd = jnp.array([10.0, jnp.nan, jnp.inf])
    mask = jnp.array([[True], [False], [False]])
    g = jnp.array([2.0, -1.0])

    @jax.jit
    def everything(x, along, grid):
        place, pull = jax.vjp(lambda grid: softargmax(x, (1, 2), positions=grid), grid)
        of_one, to_one = jax.vjp(lambda x: softargmax(x, 1, mask, positions=odd), x)
        of_integers = softargmax(x, 1, positions=[10, -5, 2])
        of_axis = softargmax(x, 1, positions=along)
        return of_axis, of_integers, place, pull(g)[0], of_one, to_one(of_one)[0]

    results = everything(x, jnp.array(along), grid)
    p, of_two = (as_float64(jax.nn.softmax(x, axis)) for axis in (1, (1, 2)))
    wanted = [
        np.sum(p * np.array(along)[:, None], 1),
        np.sum(p * np.array([10, -5, 2])[:, None], 1),
        np.sum(of_two * grid, (1, 2)),
        np.tensordot(g, of_two, 1),
    ]
    for given, w in zip(results, wanted):
        np.testing.assert_allclose(given, w, rtol=1e-5)
    np.testing.assert_array_equal(results[4], 10.0)
    np.testing.assert_array_equal(results[5], 0.0)


def test_an_index_beyond_half_precision():
    @jax.jit
    def everything(x, tied, t):
        def of_tied(x):
            return softargmax(x, temperature=1e-6)

        def of_temperature(t):
            return softargmax(jnp.array([0.0, 1e-6]), temperature=t)

        slopes = jax.grad(of_tied)(tied), jax.jacfwd(of_tied)(tied)
        place = softargmax(x, positions=jnp.arange(3000.0))
        return place, *slopes, jax.grad(of_temperature)(t)

    place, slope, tangents, in_t = everything(
        jnp.zeros((3000,), jnp.float16).at[2999].set(100),
        jnp.zeros((2,), jnp.float16),
        jnp.float16(1e-6),
    )
    assert (place.dtype, place) == (jnp.float32, 2999)
    largest = jnp.finfo(jnp.float16).max
    np.testing.assert_array_equal(slope, jnp.array([-largest, largest]))
    np.testing.assert_array_equal(tangents, jnp.array([-largest, largest]))
    assert in_t == -largest


def test_unsigned_integers_have_a_minimum():
    assert smooth_min(jnp.array([1, 2], jnp.uint8), temperature=0) == 1


def test_softargmax_of_ties_at_a_tiny_temperature():
    """The derivative in x stops at the largest number; that in temperature is 0."""
    x, positions = np.zeros((1, 4)), [0.0, 1e3, 0.0, 1e3]
    _, in_x, _, in_t = value_and_slopes("softargmax", x, 1e-37, positions)
    largest = jnp.finfo(jnp.float32).max
    np.testing.assert_array_equal(in_x, [[-largest, largest] * 2])
    assert in_t == 0

    def at(t):
        return softargmax(x, temperature=t, positions=jnp.array(positions))

    assert jax.jvp(at, (jnp.float32(1e-37),), (1.0,))[1] == 0


@pytest.mark.parametrize(
    "function",
    [
        jaxsoft.softargmax,
        *(
            pytest.param(function, marks=pytest.mark.slow)
            for function in (
                jaxsoft.smooth_step,
                functools.partial(jaxsoft.smooth_clip, lower=0.0, upper=1.0),
            )
        ),
    ],
)
def test_a_temperature_whose_square_underflows_twice_differentiated(function):
    def total(x, temperature):
        return jnp.sum(function(x, temperature=temperature))

    modes = (jax.jacrev, jax.jacfwd)

    @jax.jit
    def hessians(x, temperature):
        return [
            outer(inner(total, (0, 1)), (0, 1))(x, temperature)
            for outer in modes
            for inner in modes
        ]

    for second in jax.tree.leaves(hessians(jnp.array([0.5, 2.0]), 1e-20)):
        np.testing.assert_array_equal(second, 0)
