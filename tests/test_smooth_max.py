"""The smooth maxima and softargmax against their formulas, at the edges and over them.

The formulas are those of the oracle, at 150 digits and with exponents without limit,
and their derivatives are central differences of them. A function is compiled once for
each dtype: all rows of four numbers pass through that program, `COUNT` at a time.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import as_users_have_it, assert_within

import jaxsoft
from jaxsoft import smooth_max, smooth_min, softargmax

TEMPERATURES = [0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3]
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

SLOW = pytest.mark.slow
every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=SLOW), "float16"]
)
every_function = pytest.mark.parametrize("name", FUNCTIONS)

COUNT = 128


@functools.cache
def program(name: str) -> Any:
    """Value, and derivatives in the rows, the temperature and the positions."""

    def of_row(x, t, positions):
        given = {} if name in MAXIMA else {"positions": positions}
        return getattr(jaxsoft, name)(x, -1, temperature=t, **given)

    def both(x, t, positions):
        value, pull = jax.vjp(of_row, x, t, positions)
        return value, *pull(jnp.ones_like(value))

    return as_users_have_it(jax.vmap(both, (0, 0, None)))


def value_and_slopes(
    name: str, x: Any, t: Any, positions: Any = POSITIONS, dtype: Any = "float32"
) -> dict[str, np.ndarray]:
    """Of rows x of shape (n, 4) of that dtype, at temperatures of shape (n, 1)."""
    with np.errstate(over="ignore"):  # 1e8 is infinite in float16
        x = jnp.asarray(x, dtype)
    t = jnp.asarray(np.broadcast_to(t, (len(x), 1)), jnp.float32)
    size = -(-len(x) // COUNT) * COUNT
    padded = jnp.asarray(np.resize(x, (size, 4))), jnp.asarray(np.resize(t, (size, 1)))
    parts = [
        program(name)(
            *(v[start : start + COUNT] for v in padded), np.float32(positions)
        )
        for start in range(0, size, COUNT)
    ]
    results = [
        np.concatenate([*map(np.asarray, part)])[: len(x)] for part in zip(*parts)
    ]
    return dict(zip(("value", "x", "temperature", "positions"), results))


def value_of(name: str, x: Any, t: Any, dtype: Any = "float32") -> np.ndarray:
    return value_and_slopes(name, x, t, dtype=dtype)["value"].reshape(-1)


def as_float64(v: Any) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def meaning(name: str, x: np.ndarray, t: np.ndarray) -> dict[str, np.ndarray]:
    """The oracle's value and derivatives, for float64 rows and temperatures."""

    def f(x, positions, temperature):
        given = {} if name in MAXIMA else {"positions": positions}
        return getattr(oracle, name)(x, temperature=temperature, **given)

    positions = np.broadcast_to(POSITIONS, x.shape)
    results = oracle.value_and_slopes(f, [oracle.at_limit(x), positions], t)
    return dict(zip(("value", "x", "positions", "temperature"), results))


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
    return {
        "value": np.abs(wanted["value"]) + largest,
        "x": in_x,
        "positions": p,
        "temperature": np.abs(wanted["temperature"]) + in_t,
    }


def assert_accurate(name: str, x: Any, t: Any, dtype: str) -> None:
    actual = value_and_slopes(name, x, t, dtype=dtype)
    with np.errstate(over="ignore"):
        x = as_float64(jnp.asarray(x, dtype))
    t = as_float64(np.float32(np.broadcast_to(t, (len(x), 1))))
    wanted = meaning(name, x, t)
    assert actual["value"].dtype == (dtype if name in MAXIMA else "float32")
    assert actual["x"].dtype == dtype
    for what, scale in scales(name, x, t, wanted).items():
        a, w = actual[what].reshape(wanted[what].shape), wanted[what]
        limits = jnp.finfo(a.dtype)
        largest = float(limits.max)
        over = np.inf if what == "value" else largest
        w = np.where(np.abs(w) > largest, np.copysign(over, w), w)
        # A dozen operations in float32, then the rounding of the result.
        own = np.where(np.isinf(w), 0, np.abs(w)) * float(limits.eps)
        of_terms = np.where(scale < float(oracle.FAR) / 1000, scale, 0) * 16 * 2.0**-23
        floor = 1e-34 / np.maximum(np.abs(t), 1e-6) + float(limits.smallest_subnormal)
        allowed = 0.51 * own + of_terms + floor
        assert_within(a, w, allowed, f"{name}, {dtype}: {what}")


@every_dtype
@every_function
def test_values_and_derivatives_to_every_digit(name, dtype, rng):
    """At the edges, and in float32 over many magnitudes."""
    x = np.repeat(ROWS, len(TEMPERATURES), axis=0)
    t = np.tile(TEMPERATURES, len(ROWS))[:, None]
    if name == "smooth_min":
        x = -x
    if dtype == "float32":
        more = rng.normal(size=(60, 4)) * 10 ** rng.uniform(-3, 3, (60, 1))
        signs = rng.choice([-1, 1], (60, 1))
        x = np.concatenate([x, more])
        t = np.concatenate([t, signs * 10 ** rng.uniform(-3, 3, (60, 1))])
    assert_accurate(name, x, t, dtype)


def test_a_sure_model_keeps_the_digits_of_the_others():
    x = np.array([[40.0, 0.0, 1.0, 2.0]])
    p = oracle.rounded(oracle.softmax(x))[0, 1:]
    slope = value_and_slopes("softargmax", x, 1.0, [5.0, 1.0, 7.0, 9.0])["x"][0]
    others = p * [-4, 2, 4]
    np.testing.assert_allclose(slope, [-np.sum(others), *others], rtol=1e-6)
    slope = value_and_slopes("boltzmann_max", x, 1.0)["x"][0]
    np.testing.assert_allclose(slope[1:], p * [-39, -38, -37], rtol=1e-6)


@every_function
def test_second_derivatives_are_finite_at_the_edges(name):
    x = jnp.asarray(np.repeat(ROWS, len(TEMPERATURES), axis=0), jnp.float32)
    t = jnp.asarray(np.tile(TEMPERATURES, len(ROWS)), jnp.float32)

    def f(x, t):
        return getattr(jaxsoft, name)(x, -1, temperature=t)

    chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.hessian(f, (0, 1))))(x, t))


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
    kept = np.moveaxis(np.asarray(x), 1, -1)[0][np.moveaxis(np.asarray(mask), 1, -1)[0]]
    if name in MAXIMA:
        np.testing.assert_allclose(out[0], jax.jit(f)(kept), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *result["slopes"])
    assert np.all(np.where(mask, 0, result["slopes"][1][1]) == 0)


@every_function
def test_nothing_included(name):
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.array([[True, True], [False, False]])
    wanted = {"smooth_min": np.inf, "softargmax": 0.0}.get(name, -np.inf)
    f = getattr(jaxsoft, name)

    @jax.jit
    def of_second_row(x, t):
        out, pull = jax.vjp(lambda x, t: f(x, 1, mask, temperature=t), x, t)
        return out, *pull(jnp.array([0.0, 1.0])), f(jnp.zeros((0,)))

    for t in (0.0, 0.5):
        out, in_x, in_t, of_nothing = of_second_row(x, t)
        assert out[1] == of_nothing == wanted
        assert jnp.isfinite(out[0])
        np.testing.assert_array_equal(in_x, 0)
        assert in_t == 0


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


def test_softargmax_at_temperature_zero_is_the_mean_of_the_ties():
    x = [[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, -2.0, -5.0], [2.0, 2.0, 2.0, 2.0]]
    x, wanted = np.float32([*x, [5.0, 2.0, 9.0, 3.0]]), [2, 0, 1.5, 1]
    t = np.array([[0.0], [-0.0], [0.0], [-1e-6]])
    np.testing.assert_array_equal(value_of("softargmax", x, t), wanted)
    static = jax.jit(lambda x: softargmax(x, temperature=0.0))(x[:3])
    np.testing.assert_array_equal(static, wanted[:3])
    assert jax.jit(lambda x: softargmax(x, temperature=-1e-6))(x[3]) == 1


def test_negative_temperature_turns_max_into_min(rng):
    x = np.float32(rng.normal(size=(40, 4)))
    # At temperature 1 the number is known, and rounded less often.
    same = functools.partial(np.testing.assert_allclose, rtol=3e-7)
    for t in (0.01, 1.0, 30.0):
        low = value_of("smooth_min", x, t)
        same(low, -value_of("smooth_max", -x, t))
        same(low, value_of("smooth_max", x, -t))
        same(value_of("smooth_min", x, -t), value_of("smooth_max", x, t))
        boltzmann = value_of("boltzmann_max", x, -t)
        same(boltzmann, -value_of("boltzmann_max", -x, t))
        same(value_of("softargmax", x, -t), value_of("softargmax", -x, t))
    without = jax.jit(lambda x: (smooth_max(x, 1), jaxsoft.logsumexp(x, 1)))(x)
    np.testing.assert_allclose(*without, rtol=3e-7)


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
    odd, mask = (
        jnp.array([10.0, jnp.nan, jnp.inf]),
        jnp.array([[True], [False], [False]]),
    )
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
        return softargmax(x), *slopes, jax.grad(of_temperature)(t)

    place, slope, tangents, in_t = everything(
        jnp.zeros((3000,), jnp.float16).at[2999].set(100),
        jnp.zeros((2,), jnp.float16),
        jnp.float16(1e-6),
    )
    assert (place.dtype, place) == (jnp.float32, 2999)
    largest = jnp.finfo(jnp.float16).max
    np.testing.assert_array_equal(slope, jnp.array([-largest, largest]))
    np.testing.assert_allclose(tangents, [-2.5e5, 2.5e5], rtol=1e-6)
    assert in_t == -largest


def test_unsigned_integers_have_a_minimum():
    assert smooth_min(jnp.array([1, 2], jnp.uint8), temperature=0) == 1


def test_softargmax_of_ties_at_a_tiny_temperature():
    """The derivative in x stops at the largest number; that in temperature is 0."""

    def of_ties(x, temperature):
        return softargmax(x, temperature=temperature, positions=jnp.array([0.0, 1e3]))

    @jax.jit
    def slopes(x, t):
        return *jax.grad(of_ties, (0, 1))(x, t), jax.jvp(
            lambda t: of_ties(x, t), (t,), (1.0,)
        )[1]

    in_x, in_temperature, tangent = slopes(jnp.zeros(2), jnp.float32(1e-37))
    largest = jnp.finfo(jnp.float32).max
    np.testing.assert_array_equal(in_x, [-largest, largest])
    assert in_temperature == tangent == 0


@pytest.mark.parametrize(
    "function",
    [
        jaxsoft.softargmax,
        pytest.param(jaxsoft.smooth_step, marks=SLOW),
        pytest.param(
            functools.partial(jaxsoft.smooth_clip, lower=0.0, upper=1.0), marks=SLOW
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
