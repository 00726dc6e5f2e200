"""The elementwise smooth functions against their formulas, at the edges and over them.

The formulas are taken at their word, in mpmath with exponents without limit, and their
derivatives are central differences of them: nothing is shared with the code under test.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from laws import quickly

from jaxsoft._smooth.clip import smooth_clip
from jaxsoft._smooth.elementwise import (
    smooth_abs,
    smooth_maximum,
    smooth_minimum,
    smooth_sign,
    smooth_step,
    softplus,
)
from jaxsoft._smooth.max import smooth_max

MP = mpmath.MPContext()
MP.dps = 150
FAR = MP.mpf(10) ** 12  # stands for infinity, and FAR^2 for an infinite bound
COLD = MP.mpf(10) ** -45  # stands for temperature 0

TEMPERATURES = [0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3]
POINTS = [0.0, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3, 1e8, -1e8, np.inf, -np.inf]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def _relu(x, t):
    return t * MP.log(1 + MP.exp(x / t))


def _log_sum(x, y, t):
    return t * MP.log(MP.exp(x / t) + MP.exp(y / t))


def _clip(x, lower, upper, t):
    return lower + _relu(x - lower, t) - _relu(x - upper, t)


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "softplus": (softplus, _relu),
    "smooth_abs": (smooth_abs, lambda x, t: _log_sum(x, -x, t)),
    "smooth_sign": (smooth_sign, lambda x, t: MP.tanh(x / t)),
    "smooth_step": (smooth_step, lambda x, t: 1 / (1 + MP.exp(-x / t))),
    "smooth_maximum": (smooth_maximum, _log_sum),
    "smooth_minimum": (smooth_minimum, lambda x, y, t: -_log_sum(-x, -y, t)),
    "smooth_clip": (smooth_clip, _clip),
}
OF_ONE = ["softplus", "smooth_abs", "smooth_sign", "smooth_step"]
OF_TWO = ["smooth_maximum", "smooth_minimum"]
every_function = pytest.mark.parametrize("name", FORMULAS)
every_function_of_one = pytest.mark.parametrize("name", OF_ONE)
every_function_of_two = pytest.mark.parametrize("name", OF_TWO)
LOG2 = np.log(np.float32(2))


def exact(v: Any, infinity: Any = FAR) -> Any:
    v = float(v)
    return MP.sign(v) * infinity if np.isinf(v) else MP.mpf(v)


def derivatives(formula: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The formula, and its central differences in every argument."""
    step = MP.mpf(10) ** -30 * min(1, abs(arguments[-1]))
    results = [formula(*arguments)]
    for i in range(len(arguments)):
        ahead, behind = (
            formula(*arguments[:i], arguments[i] + s, *arguments[i + 1 :])
            for s in (step, -step)
        )
        results.append((ahead - behind) / (2 * step))
    return results


def expected(name: str, *arguments: Any) -> list[np.ndarray]:
    """Value and derivatives in float64, for arrays of arguments of one dimension. A
    derivative that diverges as the temperature goes to 0 is 0 by convention."""
    rows = []
    for *numbers, t in zip(*(np.asarray(a, np.float64) for a in arguments)):
        infinities = [FAR, FAR**2, FAR**2] if name == "smooth_clip" else [FAR, FAR]
        numbers = list(map(exact, numbers, infinities))
        t = exact(t) if abs(t) >= np.finfo(np.float32).tiny else COLD
        row = derivatives(FORMULAS[name][1], *numbers, t)
        value, *slopes = (
            float(v) if abs(v) < FAR / 1000 else np.inf * int(MP.sign(v)) for v in row
        )
        rows.append([value, *(0 if t == COLD and np.isinf(s) else s for s in slopes)])
    return [np.array(column) for column in zip(*rows)]


def value_and_derivatives(name: str, *arguments: jax.Array) -> list[jax.Array]:
    """For arrays of one dimension, the last of which is the temperature."""
    function = FORMULAS[name][0]

    def with_value(*arguments):
        value = function(*arguments[:-1], temperature=arguments[-1])
        return value.astype(jnp.float32), value

    def of_scalars(*arguments):
        positions = tuple(range(len(arguments)))
        grad = jax.value_and_grad(with_value, positions, has_aux=True)
        (_, value), slopes = grad(*arguments)
        return value, *slopes

    return jax.jit(jax.vmap(of_scalars))(*arguments)


def as_float64(v: jax.Array) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def assert_within(
    actual: jax.Array, wanted: np.ndarray, allowed: np.ndarray, what: str
) -> None:
    actual = as_float64(actual)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(actual[~finite], wanted[~finite], what)
    actual, wanted, allowed = actual[finite], wanted[finite], allowed[finite]
    error = np.abs(actual - wanted)
    bad = ~(error <= allowed)
    assert not np.any(bad), f"{what}: got {actual[bad]}, wanted {wanted[bad]}"


def relative_tolerance(dtype: Any) -> float:
    """A dozen operations in float32; in half precision the rounding of the result, and
    little else."""
    half = jnp.dtype(dtype).itemsize < 4
    return float(jnp.finfo(dtype).eps) * (0.51 if half else 16)


def assert_accurate(
    actual: jax.Array, wanted: np.ndarray, temperature: jax.Array, what: str
) -> None:
    """Every entry relative to itself. Where exp underflows, it may be 0: the smallest
    normal number times what the formula multiplies exp by."""
    t = np.abs(as_float64(temperature))
    t = np.where(t < np.finfo(np.float32).tiny, 1, t)
    factor = np.maximum(np.maximum(t, 100 / t), 1)
    floor = factor * float(np.finfo(np.float32).tiny)
    floor = floor + float(jnp.finfo(actual.dtype).smallest_subnormal)
    relative = relative_tolerance(actual.dtype)
    finite = np.where(np.isfinite(wanted), wanted, 0)
    assert_within(actual, wanted, relative * np.abs(finite) + floor, what)


def limited(wanted: np.ndarray, dtype: Any) -> np.ndarray:
    """Derivatives stop at the largest finite number of the dtype."""
    largest = float(jnp.finfo(dtype).max)
    return np.clip(wanted, -largest, largest)


def in_range(wanted: np.ndarray, dtype: Any) -> np.ndarray:
    """Values round to infinity."""
    largest = float(jnp.finfo(dtype).max)
    return np.where(np.abs(wanted) > largest, np.copysign(np.inf, wanted), wanted)


def assert_values_and_derivatives(name: str, *arguments: jax.Array) -> None:
    actual = value_and_derivatives(name, *arguments)
    wanted = expected(name, *map(as_float64, arguments))
    assert actual[0].dtype == arguments[0].dtype
    value = in_range(wanted[0], arguments[0].dtype)
    assert_accurate(actual[0], value, arguments[-1], name)
    for i, argument in enumerate(arguments):
        assert actual[1 + i].dtype == argument.dtype
        slope = limited(wanted[1 + i], argument.dtype)
        what = f"{name}, derivative in argument {i}"
        assert_accurate(actual[1 + i], slope, arguments[-1], what)


def grid(dtype: Any, *axes: Any) -> list[jax.Array]:
    """Every combination, with temperatures in float32 as the last array."""
    *numbers, t = (v.ravel() for v in np.meshgrid(*axes, TEMPERATURES))
    with np.errstate(over="ignore"):  # 1e8 is infinite in float16
        return [*(jnp.asarray(v, dtype) for v in numbers), jnp.asarray(t, jnp.float32)]


@every_dtype
@every_function_of_one
def test_values_and_derivatives_at_the_edges(name, dtype):
    assert_values_and_derivatives(name, *grid(dtype, POINTS))


@every_dtype
@every_function_of_two
def test_values_and_derivatives_of_two_at_the_edges(name, dtype):
    largest = 3e4 if dtype == jnp.float16 else 1e8
    assert_values_and_derivatives(name, *grid(dtype, POINTS, [0.0, 1.0, -1e3, largest]))


@every_function_of_two
def test_infinities_of_two(name):
    """At both infinite, a tie at the top shares, and one at the bottom is nothing."""
    sign = 1.0 if name == "smooth_maximum" else -1.0
    x = sign * jnp.array([np.inf, np.inf, -np.inf, -np.inf, 3.0])
    y = sign * jnp.array([np.inf, -np.inf, np.inf, -np.inf, np.inf])
    for t in (-1.0, 0.0, 1.0):
        out = [sign * np.inf] * 3 + [-sign * np.inf, sign * np.inf]
        in_x, in_y = [0.5, 1, 0, 0, 0], [0.5, 0, 1, 0, 1]
        in_t = [sign * LOG2, 0, 0, 0, 0]
        if t < 0:
            out = [sign * np.inf] + [-sign * np.inf] * 3 + [sign * 3.0]
            in_x, in_y = [0, 0, 1, 0.5, 1], [0, 1, 0, 0.5, 0]
            in_t = [0, 0, 0, sign * LOG2, 0]
        actual = value_and_derivatives(name, x, y, jnp.full(x.shape, t))
        for a, wanted in zip(actual, (out, in_x, in_y, in_t)):
            np.testing.assert_allclose(a, wanted, rtol=2e-7)


BOUNDS = [
    (0.0, 1.0),
    (-1.0, 1e-3),
    (1e3, 1e3),
    (-1e8, 1e8),
    (-np.inf, 0.0),
    (1.0, np.inf),
    (-np.inf, np.inf),
]


def assert_clip_is_accurate(*arguments: jax.Array) -> None:
    x, lower, upper, t = arguments
    value, *slopes, in_t = value_and_derivatives("smooth_clip", *arguments)
    wanted = expected("smooth_clip", *map(as_float64, arguments))
    assert np.all((value >= lower) & (value <= upper))
    assert value.dtype == x.dtype
    for slope, w, what in zip(slopes, wanted[1:4], ("x", "lower", "upper")):
        assert_accurate(slope, w, t, what)
    # Each of these two is a sum whose terms may cancel: the value is right to the
    # rounding of clip(x), the derivative in the temperature to that of an entropy.
    hard = np.clip(*map(as_float64, (x, lower, upper)))
    scale = np.maximum(np.abs(hard), np.abs(wanted[0]))
    scale = np.where(np.isfinite(scale), scale, 0)
    allowed = relative_tolerance(x.dtype) * scale + 1e-7
    assert_within(value, in_range(wanted[0], x.dtype), allowed, "value")
    np.testing.assert_allclose(in_t, wanted[4], rtol=0, atol=2e-7)


@every_dtype
def test_smooth_clip_at_the_edges(dtype):
    x, which, t = grid(dtype, POINTS, np.arange(len(BOUNDS)))
    lower, upper = np.asarray(BOUNDS)[np.asarray(which, int)].T
    with np.errstate(over="ignore"):
        assert_clip_is_accurate(
            x, jnp.asarray(lower, dtype), jnp.asarray(upper, dtype), t
        )


def over_magnitudes(
    rng: np.random.Generator, n: int, dtype: Any = jnp.float32
) -> jax.Array:
    signs = rng.choice([-1, 1], n)
    return jnp.asarray(signs * 10 ** rng.uniform(-4, 3, n), dtype)


@pytest.mark.parametrize("name", OF_ONE + OF_TWO)
def test_every_digit_over_many_magnitudes(name, rng):
    x, y, t = (over_magnitudes(rng, 100) for _ in range(3))
    if name in OF_ONE:
        return assert_values_and_derivatives(name, x, t)
    # Of one sign, so that the result is no sum near 0 of a positive and a negative one.
    sign = 1 if name == "smooth_maximum" else -1
    x, y = sign * jnp.abs(x), sign * jnp.abs(y).at[:50].set(jnp.abs(x[:50]) * 1.00001)
    return assert_values_and_derivatives(name, x, y, jnp.abs(t))


def test_every_digit_of_smooth_clip_over_many_magnitudes(rng):
    x, a, b, t = (over_magnitudes(rng, 100) for _ in range(4))
    assert_clip_is_accurate(x, jnp.minimum(a, b), jnp.maximum(a, b), jnp.abs(t))


def test_tail_of_softplus_has_all_digits():
    x = jnp.array([-20.0, -50.0, -87.0])
    wanted = [float(MP.log1p(MP.exp(MP.mpf(v)))) for v in (-20, -50, -87)]
    np.testing.assert_allclose(softplus(x), wanted, rtol=3e-7)


# Both modes, and all orders.


def with_the_rest(name: str) -> tuple[float, ...]:
    """Values for the arguments between x and the temperature."""
    if name == "smooth_clip":
        return (-0.5, 0.8)
    return (0.6,) if name in OF_TWO else ()


def of_vector(name: str) -> Callable[[jax.Array], jax.Array]:
    return lambda v: FORMULAS[name][0](*v[:-1], temperature=v[-1])


def test_third_derivative_of_softplus(x64):
    third = jax.grad(jax.grad(jax.grad(lambda x: softplus(x, temperature=0.5))))
    step = MP.mpf(10) ** -20
    terms = ((-1, -3), (3, -1), (-3, 1), (1, 3))
    moved = (c * _relu(MP.mpf(0.3) + k * step, MP.mpf(0.5)) for c, k in terms)
    wanted = sum(moved) / (2 * step) ** 3
    np.testing.assert_allclose(jax.jit(third)(0.3), float(wanted), rtol=1e-12)


@every_function
def test_second_derivatives_are_finite_at_the_edges(name):
    x, t = grid(jnp.float32, POINTS)
    rest = [jnp.full(x.shape, r) for r in with_the_rest(name)]
    vectors = jnp.stack([x, *rest, t], -1)
    hessians = jax.jit(jax.vmap(jax.hessian(of_vector(name))))(vectors)
    chex.assert_tree_all_finite(hessians)


@every_function
def test_modes_agree_and_leave_the_value(name):
    x, t = grid(jnp.float32, POINTS)
    rest = [jnp.full(x.shape, r) for r in with_the_rest(name)]
    vectors = jnp.stack([x, *rest, t], -1)

    def both(v):
        reverse = jax.value_and_grad(of_vector(name))(v)
        rows = jnp.eye(v.size)
        forward = [jax.jvp(of_vector(name), (v,), (row,)) for row in rows]
        return reverse, forward

    value = jax.jit(jax.vmap(of_vector(name)))(vectors)
    (reverse_value, reverse), forward = jax.jit(jax.vmap(both))(vectors)
    np.testing.assert_array_equal(reverse_value, value)
    for i, (forward_value, slope) in enumerate(forward):
        np.testing.assert_array_equal(forward_value, value)
        np.testing.assert_allclose(slope, reverse[:, i], rtol=1e-6)


@every_function
def test_what_does_not_move_costs_and_saves_nothing(name):
    """One array is saved for each argument that moves."""
    x = t = jnp.full((5, 3), 0.3)
    for moving in ((0,), (1,), (0, 1)):

        def of_moving(*values, moving=moving):
            arguments = dict(enumerate((x, t))) | dict(zip(moving, values))
            rest = with_the_rest(name)
            return FORMULAS[name][0](arguments[0], *rest, temperature=arguments[1])

        _, pull = jax.vjp(of_moving, *(x for _ in moving))
        shapes = [v.shape for v in jax.tree.leaves(pull)]
        assert shapes == [x.shape] * len(moving)


# Half precision: what its range cannot hold.


@pytest.mark.parametrize("name", ["smooth_step", "smooth_sign"])
def test_derivatives_beyond_float16_stop_at_its_largest_number(name):
    x = jnp.array([0.0, 1e-7, 1.0], jnp.float16)
    largest = float(jnp.finfo(jnp.float16).max)
    wanted = jnp.array([largest, largest, 0], jnp.float16)

    def f(x):
        return FORMULAS[name][0](x, temperature=1e-6)

    ones = jnp.ones_like(x)
    slopes = {
        "reverse": jax.vjp(f, x)[1](3 * ones)[0],
        "jit": jax.jit(lambda x: jax.vjp(f, x)[1](ones)[0])(x),
        "forward": jax.jvp(f, (x,), (ones,))[1],
        "linearize": jax.linearize(f, x)[1](ones),
        "vmap": jax.vmap(jax.grad(f))(x),
        "jacrev": jnp.diag(jax.jacrev(f)(x)),
        "jacfwd": jnp.diag(jax.jacfwd(f)(x)),
    }
    for way, slope in slopes.items():
        assert slope.dtype == jnp.float16, way
        np.testing.assert_array_equal(slope, wanted, way)


def test_float16_temperature_has_finite_derivatives():
    x = jnp.array([2e-6, -2e-6], jnp.float16)
    t = jnp.array([1e-6, 1e-6], jnp.float16)
    slope = jax.vmap(jax.grad(lambda t, x: smooth_step(x, temperature=t)))(t, x)
    largest = jnp.finfo(jnp.float16).max
    np.testing.assert_array_equal(slope, jnp.array([-largest, largest]))


# Temperature.

HARD = {
    "softplus": jax.nn.relu,
    "smooth_abs": jnp.abs,
    "smooth_sign": jnp.sign,
    "smooth_step": lambda x: jnp.heaviside(x, jnp.float32(0.5)),
    "smooth_maximum": jnp.maximum,
    "smooth_minimum": jnp.minimum,
    "smooth_clip": jnp.clip,
}


@every_function
def test_temperature_zero_is_the_hard_function(name):
    x = jnp.asarray(POINTS, jnp.float32)
    rest = [jnp.full(x.shape, r) for r in with_the_rest(name)]
    soft, hard = FORMULAS[name][0], HARD[name](x, *rest)
    traced = jax.jit(lambda x, t: soft(x, *rest, temperature=t))
    for t in (0.0, -0.0, 0, jnp.float32(0), jnp.zeros(x.shape), np.float32(1e-39)):
        np.testing.assert_array_equal(soft(x, *rest, temperature=t), hard)
        np.testing.assert_array_equal(traced(x, t), hard)


def test_derivatives_at_temperature_zero():
    def assert_slopes(function, arguments, wanted):
        def f(x, t):
            return function(x, *arguments[1:], temperature=t)

        slopes = jax.jit(jax.grad(f, (0, 1)))(arguments[0], 0.0)
        np.testing.assert_allclose(slopes, wanted, rtol=2e-7)

    for x, step in ((0.0, 0.5), (1e-3, 1.0), (-1e-3, 0.0)):
        log2_at_0 = LOG2 if x == 0 else 0
        assert_slopes(softplus, (x,), (step, log2_at_0))
        assert_slopes(smooth_abs, (x,), (np.sign(x), log2_at_0))
        assert_slopes(smooth_step, (x,), (0, 0))
        assert_slopes(smooth_sign, (x,), (0, 0))
    assert_slopes(smooth_maximum, (2.0, 2.0), (0.5, LOG2))
    assert_slopes(smooth_minimum, (2.0, 2.0), (0.5, -LOG2))
    assert_slopes(smooth_clip, (2.0, 2.0, 5.0), (0.5, LOG2))
    assert_slopes(smooth_clip, (5.0, 2.0, 5.0), (0.5, -LOG2))
    assert_slopes(smooth_clip, (5.0, 5.0, 5.0), (0, 0))


@every_function
def test_annealing_to_zero_traces_once(name):
    function, rest = FORMULAS[name][0], with_the_rest(name)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value_and_slope(x, t):
        def total(x):
            return jnp.sum(function(x, *rest, temperature=t))

        return jax.value_and_grad(total)(x)

    x = jnp.linspace(-2, 3, 7)
    values = [value_and_slope(x, t)[0] for t in jnp.array([1.0, 0.1, 1e-3, 0.0])]
    np.testing.assert_allclose(values[-1], jnp.sum(HARD[name](x, *rest)), rtol=1e-6)
    assert abs(values[0] - values[-1]) > 0.01


def test_negative_temperatures():
    x = jnp.asarray(POINTS, jnp.float32)
    y = jnp.float32(1e-3)
    same = np.testing.assert_array_equal
    for t in jnp.array([1e-3, 1.0, 1e3]):
        same(softplus(x, temperature=-t), -softplus(-x, temperature=t))
        same(smooth_abs(x, temperature=-t), -smooth_abs(x, temperature=t))
        same(smooth_sign(x, temperature=-t), -smooth_sign(x, temperature=t))
        same(smooth_step(x, temperature=-t), smooth_step(-x, temperature=t))
        minimum = smooth_minimum(x, y, temperature=t)
        same(smooth_maximum(x, y, temperature=-t), minimum)
        same(smooth_minimum(x, y, temperature=-t), smooth_maximum(x, y, temperature=t))
        clipped = smooth_clip(x, -1.0, y, temperature=t)
        same(smooth_clip(x, -1.0, y, temperature=-t), clipped)
    slope = jax.grad(lambda t: smooth_clip(-1.0, -1.0, 1.0, temperature=t))
    assert slope(-0.2) == -slope(0.2)
    assert slope(0.2) > 0.69


@every_function
def test_temperature_broadcasts_to_x(name):
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    rest = with_the_rest(name)

    @quickly
    def slopes(x, t):
        def total(x, t):
            return jnp.sum(jnp.sin(FORMULAS[name][0](x, *rest, temperature=t)))

        return jax.grad(total, (0, 1))(x, t)

    for shape in ((), (4,), (3, 1), (3, 4)):
        t = jnp.linspace(0.1, 2, int(np.prod(shape))).reshape(shape)
        kept = (1,) * (2 - t.ndim) + shape
        in_x, in_t = slopes(x, t)
        wanted_in_x, entries = slopes(x, jnp.broadcast_to(t.reshape(kept), x.shape))
        np.testing.assert_allclose(in_x, wanted_in_x, rtol=1e-6)
        shared = tuple(i for i in range(2) if kept[i] != x.shape[i])
        wanted = jnp.sum(entries, shared).reshape(shape)
        assert in_t.shape == shape
        np.testing.assert_allclose(in_t, wanted, rtol=1e-5, atol=1e-6)


@every_dtype
def test_inside_shard_map(dtype):
    """With one temperature for all shards, and x different on each."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, shared = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    x, t = jnp.linspace(-2, 2, 5).astype(dtype), jnp.float32(1e-3)

    def slopes(x, t):
        def total(x, t):
            return jnp.sum(smooth_step(x, temperature=t).astype(jnp.float32))

        return jax.grad(total, (0, 1))(x, t)

    specs = {"in_specs": (rows, shared), "out_specs": (rows, shared)}
    sharded = jax.jit(jax.shard_map(slopes, mesh=mesh, **specs))(x, t)
    chex.assert_trees_all_close(sharded, jax.jit(slopes)(x, t), rtol=1e-6)


# Bounds and identities.


@every_dtype
def test_bounds_hold_in_floating_point(dtype, rng):
    x, y = (over_magnitudes(rng, 4000, dtype) for _ in range(2))
    t = jnp.abs(over_magnitudes(rng, 4000))

    def assert_between(lowest, value, room):
        assert jnp.all(value >= lowest)
        # The bound is a real number. A value below it may round to the float above.
        highest = as_float64(lowest) + room
        spacing = 2 * float(jnp.finfo(dtype).eps) * np.abs(highest)
        assert np.all(as_float64(value) <= highest + spacing)
        return np.mean(as_float64(value) > as_float64(lowest))

    room = as_float64(t) * np.log(2)
    functions = {
        "relu": (jnp.maximum(x, 0), softplus(x, temperature=t)),
        "abs": (jnp.abs(x), smooth_abs(x, temperature=t)),
        "maximum": (jnp.maximum(x, y), smooth_maximum(x, y, temperature=t)),
        "-minimum": (-jnp.minimum(x, y), -smooth_minimum(x, y, temperature=t)),
    }
    for hard, soft in functions.values():
        assert assert_between(hard, soft, room) > 0.3
    assert jnp.all(jnp.abs(smooth_sign(x, temperature=t)) <= 1)
    step = smooth_step(x, temperature=t)
    assert jnp.all((step >= 0) & (step <= 1))
    lower, upper = jnp.minimum(y, y[::-1]), jnp.maximum(y, y[::-1])
    clipped = smooth_clip(x, lower, upper, temperature=t)
    assert jnp.all((clipped >= lower) & (clipped <= upper))


def test_smooth_clip_stays_in_the_narrowest_interval(rng):
    lower = over_magnitudes(rng, 4000)
    upper = jnp.nextafter(lower, jnp.full_like(lower, jnp.inf))
    x = lower + (upper - lower) * rng.integers(-3, 4, 4000).astype(np.float32)
    for t in (1e-6, 1.0, 1e6):
        clipped = smooth_clip(x, lower, upper, temperature=t)
        assert jnp.all((clipped == lower) | (clipped == upper))


def slope_in_x(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    *numbers, t = arguments

    def total(x):
        return jnp.sum(function(x, *numbers[1:], temperature=t))

    return jax.jit(jax.grad(total))(numbers[0])


def test_derivatives_are_members_of_the_family(rng):
    x, y, t = (over_magnitudes(rng, 500) for _ in range(3))
    close = chex.assert_trees_all_close
    close(slope_in_x(softplus, x, t), smooth_step(x, temperature=t), rtol=1e-6)
    close(slope_in_x(smooth_abs, x, t), smooth_sign(x, temperature=t), rtol=1e-6)
    # x - y is rounded here, and exp makes 88 times as much of it.
    weight = smooth_step(x - y, temperature=t)
    close(slope_in_x(smooth_maximum, x, y, t), weight, rtol=2e-5, atol=1e-36)
    close(slope_in_x(smooth_minimum, y, x, t), weight, rtol=2e-5, atol=1e-36)


def test_relations_within_the_family(rng):
    x, y, t = (over_magnitudes(rng, 500) for _ in range(3))
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-36)
    close(smooth_maximum(x, 0.0, temperature=t), softplus(x, temperature=t))
    close(smooth_maximum(x, -x, temperature=t), smooth_abs(x, temperature=t))
    close(smooth_maximum(x, y, temperature=t), smooth_maximum(y, x, temperature=t))
    below, above = smooth_step(-x, temperature=t), smooth_step(x, temperature=t)
    close(above + below, jnp.ones_like(x))
    t = jnp.abs(t)
    close(smooth_clip(x, 0.0, jnp.inf, temperature=t), softplus(x, temperature=t))
    clipped = smooth_clip(x, -0.5, 1.0, temperature=t)
    reflected = -smooth_clip(-x, -1.0, 0.5, temperature=t)
    close(reflected, clipped, atol=2e-7)
    moved = smooth_clip(x + 4096.0, 4095.5, 4097.0, temperature=t) - 4096
    close(moved, clipped, atol=1e-3)


def test_clip_with_crossed_bounds_is_the_upper_as_in_jax():
    x, lower, upper = jnp.array([0.0, 3.0, 9.0]), jnp.full(3, 5.0), jnp.full(3, 2.0)
    arguments = (x, lower, upper, jnp.full(3, 0.5))
    value, *slopes = value_and_derivatives("smooth_clip", *arguments)
    np.testing.assert_array_equal(value, jnp.clip(x, lower, upper))
    np.testing.assert_allclose(slopes, [[0] * 3, [0] * 3, [1] * 3, [0] * 3], rtol=2e-7)


def test_smooth_maximum_is_smooth_max_of_the_pair():
    x, y, t = grid(jnp.float32, POINTS, POINTS)
    t = jnp.concatenate([t, -t])
    x, y = jnp.concatenate([x, x]), jnp.concatenate([y, y])

    def both(x, y, t):
        def of_pair(x, y, t):
            return smooth_maximum(x, y, temperature=t)

        def of_stack(x, y, t):
            return smooth_max(jnp.stack([x, y]), temperature=t)

        return [jax.value_and_grad(f, (0, 1, 2))(x, y, t) for f in (of_pair, of_stack)]

    pair, stack = jax.jit(jax.vmap(both))(x, y, t)
    chex.assert_trees_all_close(pair, stack, rtol=1e-6, atol=1e-34)


OF_JAX = {
    "softplus": jax.nn.softplus,
    "smooth_step": jax.nn.sigmoid,
    "smooth_sign": jax.nn.tanh,
    "smooth_maximum": jnp.logaddexp,
}


@every_dtype
@pytest.mark.parametrize("name", OF_JAX)
def test_at_temperature_one_it_is_that_of_jax(name, dtype):
    x = jnp.linspace(-12, 12, 301, dtype=dtype)
    arguments = (x, x[::-1] * 2) if name == "smooth_maximum" else (x,)
    theirs, ours = OF_JAX[name], FORMULAS[name][0]
    actual = ours(*arguments)
    assert actual.dtype == theirs(*arguments).dtype
    # Theirs computes in half precision what is half: compared in float32, then rounded.
    wide = [a.astype(jnp.float32) for a in arguments]
    unit = float(jnp.finfo(dtype).eps)
    close = functools.partial(np.testing.assert_allclose, rtol=unit + 1e-6)
    close(as_float64(actual), theirs(*wide), atol=4e-8)

    def slope(f, arguments):
        return as_float64(jax.jit(jax.vmap(jax.grad(f)))(*arguments))

    # Theirs is 1 - tanh^2, in roundings of 1.
    close(slope(ours, arguments), slope(theirs, wide), atol=1e-6)


# Shapes, dtypes, errors.


@every_function_of_one
def test_shapes_and_dtypes_of_one(name, x64):
    function = FORMULAS[name][0]

    def out(x, temperature=1.0):
        return jax.eval_shape(lambda x, t: function(x, temperature=t), x, temperature)

    for dtype in (*DTYPES, jnp.float64):
        y = out(jnp.ones((2, 0, 3), dtype), jnp.float32(2))
        assert y.shape == (2, 0, 3)
        assert y.dtype == dtype
    assert out(jnp.arange(3, dtype=jnp.int32)).dtype == jnp.float32
    assert out(0.5).shape == ()
    x = jnp.float32(0.5)
    in_t = jax.grad(lambda t: function(x, temperature=t))(jnp.float64(2))
    assert in_t.dtype == jnp.float64


def test_nan_stays_where_it_is():
    x = jnp.array([jnp.nan, 1.0])
    for name in FORMULAS:
        for t in (0.0, 1.0):
            out = FORMULAS[name][0](x, *with_the_rest(name), temperature=t)
            np.testing.assert_array_equal(jnp.isnan(out), [True, False], name)


def test_two_arrays_promote_and_broadcast_as_in_jax():
    x, y = jnp.ones((3, 1), jnp.float16), jnp.ones((4,), jnp.float16)
    chex.assert_shape(smooth_maximum(x, y), (3, 4))
    assert smooth_maximum(x, 1.0).dtype == jnp.float16
    assert smooth_maximum(1, x).dtype == jnp.float16
    assert smooth_minimum(jnp.arange(3), 2).dtype == jnp.float32
    with pytest.raises(ValueError, match="float16"):  # as strict promotion demands
        smooth_maximum(jnp.ones(3, jnp.float32), x)


def test_dtypes_of_clip(x64):
    x = jnp.array([-1.0, 0.5, 2.0], jnp.bfloat16)
    lower, upper = jnp.float32(0.1), jnp.full(3, 0.7, jnp.float64)
    out, pull = jax.vjp(lambda *a: smooth_clip(*a, temperature=0.1), x, lower, upper)
    assert out.dtype == jnp.bfloat16
    assert jnp.all((out >= jnp.bfloat16(0.1)) & (out <= jnp.bfloat16(0.7)))
    chex.assert_trees_all_equal_shapes_and_dtypes(pull(out), (x, lower, upper))


def raises(error: type[Exception], text: str) -> Any:
    return pytest.raises(error, match=f"^{text}$")


def test_errors_name_the_function_and_both_shapes():
    x = jnp.ones((2, 3))
    for name in FORMULAS:
        function, rest = FORMULAS[name][0], with_the_rest(name)
        text = rf"{name}: temperature must broadcast to the shape of x, \(2, 3\); got "
        with raises(ValueError, text + r"\(2,\)"):
            function(x, *rest, temperature=jnp.ones(2))
        with raises(ValueError, text + r"\(4, 2, 3\)"):
            function(x, *rest, temperature=jnp.ones((4, 2, 3)))
        with raises(
            TypeError, f"{name}: temperature must be real; got dtype complex64"
        ):
            function(x, *rest, temperature=1j)
        with raises(TypeError, f"{name}: x must be real; got dtype complex64"):
            function(x.astype(jnp.complex64), *rest)
        with raises(TypeError, f"{name}: x must be numbers; got a boolean array"):
            function(x > 0, *rest)
        with raises(TypeError, f"{name}: x must be an array of numbers; got str"):
            function("x", *rest)
    for name in OF_TWO:
        text = (
            rf"{name}: x and y must broadcast together; got shapes \(2, 3\) and \(2,\)"
        )
        with raises(ValueError, text):
            FORMULAS[name][0](x, jnp.ones(2))
        with raises(TypeError, f"{name}: y must be numbers; got a boolean array"):
            FORMULAS[name][0](x, x > 0)
    with raises(ValueError, "smooth_clip: lower must not exceed upper; got 2 and 1.0"):
        smooth_clip(x, 2, 1.0)
    text = r"smooth_clip: upper must broadcast to the shape of x, \(2, 3\); got \(2,\)"
    with raises(ValueError, text):
        smooth_clip(x, 0.0, jnp.ones(2))
    with raises(TypeError, "smooth_clip: lower must be real; got dtype complex64"):
        smooth_clip(x, 1j, 1.0)


@pytest.mark.parametrize("temperature", [np.inf, 1e38, 1e30, 1e8])
def test_smooth_clip_at_the_softest_temperatures(temperature):
    """The middle of the bounds, however large the temperature and small their gap."""
    x = jnp.array([-3.0, 0.3, 1.0, 5.0])
    np.testing.assert_allclose(smooth_clip(x, 0.0, 1.0, temperature=temperature), 0.5)
    x, lower, upper = jnp.array([-1e-10, 0.0]), -1e-9, 1e-10
    middle = smooth_clip(x, lower, upper, temperature=temperature)
    np.testing.assert_allclose(middle, -4.5e-10, rtol=1e-6)


def test_smooth_clip_between_equal_bounds():
    for bound in (2.0, jnp.inf, -jnp.inf):
        assert smooth_clip(bound, bound, bound) == bound
        assert smooth_clip(1.0, bound, bound, temperature=0.5) == bound
