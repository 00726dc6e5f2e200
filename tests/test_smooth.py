"""The elementwise smooth functions against their formulas, at the edges and over them.

The formulas are those of the oracle, at 150 digits and with exponents without limit,
and their derivatives are central differences of them. A function is compiled once for
each dtype: all numbers pass through that program, `SIZE` at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import as_users_have_it, assert_within

import jaxsoft
from jaxsoft import (
    smooth_abs,
    smooth_clip,
    smooth_maximum,
    smooth_minimum,
    smooth_sign,
    smooth_step,
    softplus,
)

TEMPERATURES = [0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3]
POINTS = [0.0, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3, 1e8, -1e8, np.inf, -np.inf]
DTYPES = ["float32", "bfloat16", "float16"]
LOG2 = np.log(np.float32(2))

# Values for the arguments between x and the temperature.
REST: dict[str, tuple[float, ...]] = {
    "softplus": (),
    "smooth_abs": (),
    "smooth_sign": (),
    "smooth_step": (),
    "smooth_maximum": (0.6,),
    "smooth_minimum": (0.6,),
    "smooth_clip": (-0.5, 0.8),
}
HARD = {
    "softplus": jax.nn.relu,
    "smooth_abs": jnp.abs,
    "smooth_sign": jnp.sign,
    "smooth_step": lambda x: jnp.heaviside(x, jnp.float32(0.5)),
    "smooth_maximum": jnp.maximum,
    "smooth_minimum": jnp.minimum,
    "smooth_clip": jnp.clip,
}
OF_TWO = ["smooth_maximum", "smooth_minimum"]
OF_ROWS = ["smooth_max", "smooth_min", "boltzmann_max", "softargmax"]

SLOW = pytest.mark.slow
every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=SLOW), "float16"]
)
every_function = pytest.mark.parametrize("name", REST)
# Of one argument, of two and of three; the others take the same ways.
FAST = ("smooth_abs", "smooth_minimum", "smooth_clip")
some_functions = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else SLOW) for name in REST]
)
every_function_of_two = pytest.mark.parametrize("name", OF_TWO)

SIZE = 512


@functools.cache
def program(name: str) -> Any:
    """Value and derivatives, for arrays of one dimension; the temperature is last."""

    def with_value(*arguments):
        *numbers, t = arguments
        value = getattr(jaxsoft, name)(*numbers, temperature=t)
        return value.astype(jnp.float32), value

    def of_numbers(*arguments):
        positions = tuple(range(len(arguments)))
        grad = jax.value_and_grad(with_value, positions, has_aux=True)
        (_, value), slopes = grad(*arguments)
        return value, *slopes

    return as_users_have_it(jax.vmap(of_numbers))


def value_and_slopes(name: str, *arguments: Any, dtype: Any = "float32") -> Any:
    """Of numbers that broadcast together, of that dtype; the temperature is last."""
    *numbers, t = np.broadcast_arrays(*arguments)
    with np.errstate(over="ignore"):  # 1e8 is infinite in float16
        given = [*(jnp.asarray(v, dtype) for v in numbers), jnp.asarray(t, "float32")]
    size = -(-t.size // SIZE) * SIZE
    flat = [jnp.asarray(np.resize(v, size)) for v in given]
    parts = [
        program(name)(*(v[start : start + SIZE] for v in flat))
        for start in range(0, size, SIZE)
    ]
    return [
        np.concatenate(part)[: t.size].reshape(t.shape)
        for part in zip(*(map(np.asarray, part) for part in parts), strict=True)
    ]


def value_of(name: str, *arguments: Any, dtype: Any = "float32") -> np.ndarray:
    return value_and_slopes(name, *arguments, dtype=dtype)[0]


def as_float64(v: Any) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def meaning(name: str, *arguments: Any) -> list[np.ndarray]:
    """The oracle's value and derivatives, for arrays of one dimension."""
    *numbers, t = (as_float64(a)[:, None] for a in arguments)
    # Infinite bounds are farther away than what they bound.
    fars = [oracle.FAR] + [oracle.FAR ** (len(numbers) - 1)] * 2
    numbers = [oracle.at_limit(v, far) for v, far in zip(numbers, fars)]
    results = oracle.value_and_slopes(getattr(oracle, name), numbers, t)
    return [v[:, 0] for v in results]


def relative_tolerance(dtype: Any) -> float:
    """A dozen operations in float32; in half precision the rounding of the result, and
    little else."""
    half = jnp.dtype(dtype).itemsize < 4
    return float(jnp.finfo(dtype).eps) * (0.51 if half else 16)


def assert_accurate(actual: Any, wanted: Any, t: Any, what: str) -> None:
    """Every entry relative to itself. Where exp underflows, it may be 0: the smallest
    normal number times what the formula multiplies exp by."""
    t = np.abs(as_float64(t))
    t = np.where(t < np.finfo(np.float32).tiny, 1, t)
    floor = np.maximum(np.maximum(t, 100 / t), 1) * float(np.finfo(np.float32).tiny)
    floor = floor + float(jnp.finfo(actual.dtype).smallest_subnormal)
    size = np.where(np.isfinite(wanted), np.abs(wanted), 0)
    allowed = relative_tolerance(actual.dtype) * size + floor
    assert_within(actual, wanted, allowed, what)


def limited(wanted: np.ndarray, dtype: Any) -> np.ndarray:
    """Derivatives stop at the largest finite number of the dtype."""
    largest = float(jnp.finfo(dtype).max)
    return np.clip(wanted, -largest, largest)


def in_range(wanted: np.ndarray, dtype: Any) -> np.ndarray:
    """Values round to infinity."""
    largest = float(jnp.finfo(dtype).max)
    return np.where(np.abs(wanted) > largest, np.copysign(np.inf, wanted), wanted)


def grid(*axes: Any) -> list[np.ndarray]:
    """Every combination; the temperature is last."""
    return [v.ravel() for v in np.meshgrid(*axes, TEMPERATURES)]


def over_magnitudes(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([-1, 1], n) * 10 ** rng.uniform(-4, 3, n)


def numbers_for(name: str, dtype: str, rng: np.random.Generator) -> list[jax.Array]:
    """The edges, and numbers of many magnitudes; of the dtype but for the last."""
    x, y, t = (over_magnitudes(rng, 100) for _ in range(3))
    edges, others = grid(POINTS), [x, t]
    if name in OF_TWO:
        edges = grid(POINTS, [0.0, 1.0, -1e3, 3e4 if dtype == "float16" else 1e8])
        # Of one sign, so that the result is no sum near 0 of a positive and a negative.
        sign = 1 if name == "smooth_maximum" else -1
        y[:50] = np.abs(x[:50]) * 1.00001
        others = [sign * np.abs(x), sign * np.abs(y), np.abs(t)]
    *numbers, t = (np.concatenate(pair) for pair in zip(edges, others))
    with np.errstate(over="ignore"):
        return [*(jnp.asarray(v, dtype) for v in numbers), jnp.asarray(t, "float32")]


@every_dtype
@pytest.mark.parametrize("name", [name for name in REST if name != "smooth_clip"])
def test_values_and_derivatives_to_every_digit(name, dtype, rng):
    given = numbers_for(name, dtype, rng)
    actual = value_and_slopes(name, *given, dtype=dtype)
    wanted = meaning(name, *given)
    assert [a.dtype for a in actual[1:]] == [g.dtype for g in given]
    assert actual[0].dtype == given[0].dtype
    what = f"{name}, {dtype}: "
    value = in_range(wanted[0], dtype)
    assert_accurate(actual[0], value, given[-1], what + "the value")
    for i, (slope, w) in enumerate(zip(actual[1:], wanted[1:])):
        w = limited(w, slope.dtype)
        assert_accurate(slope, w, given[-1], what + f"derivative in argument {i}")


@every_function_of_two
def test_infinities_of_two(name):
    """At both infinite, a tie at the top shares, and one at the bottom is nothing."""
    sign = 1.0 if name == "smooth_maximum" else -1.0
    x = sign * np.array([np.inf, np.inf, -np.inf, -np.inf, 3.0])
    y = sign * np.array([np.inf, -np.inf, np.inf, -np.inf, np.inf])
    for t in (-1.0, 0.0, 1.0):
        out = [sign * np.inf] * 3 + [-sign * np.inf, sign * np.inf]
        in_x, in_y = [0.5, 1, 0, 0, 0], [0.5, 0, 1, 0, 1]
        in_t = [sign * LOG2, 0, 0, 0, 0]
        if t < 0:
            out = [sign * np.inf] + [-sign * np.inf] * 3 + [sign * 3.0]
            in_x, in_y = [0, 0, 1, 0.5, 1], [0, 1, 0, 0.5, 0]
            in_t = [0, 0, 0, sign * LOG2, 0]
        actual = value_and_slopes(name, x, y, t)
        for a, wanted in zip(actual, (out, in_x, in_y, in_t)):
            np.testing.assert_allclose(a, wanted, rtol=2e-7, err_msg=f"{name} at {t}")


BOUNDS = [
    (0.0, 1.0),
    (-1.0, 1e-3),
    (1e3, 1e3),
    (-1e8, 1e8),
    (-np.inf, 0.0),
    (1.0, np.inf),
    (-np.inf, np.inf),
]


@every_dtype
def test_smooth_clip_to_every_digit(dtype, rng):
    """At the edges, and in float32 over many magnitudes."""
    x, which, t = grid(POINTS, np.arange(len(BOUNDS)))
    lower, upper = np.asarray(BOUNDS)[which.astype(int)].T
    numbers = [x, lower, upper, t]
    if dtype == "float32":
        x, a, b, t = (over_magnitudes(rng, 100) for _ in range(4))
        others = [x, np.minimum(a, b), np.maximum(a, b), np.abs(t)]
        numbers = [np.concatenate(pair) for pair in zip(numbers, others)]
    with np.errstate(over="ignore"):
        *numbers, t = numbers
        given = [*(jnp.asarray(v, dtype) for v in numbers), jnp.asarray(t, "float32")]
    x, lower, upper, t = given
    value, *slopes, in_t = value_and_slopes("smooth_clip", *given, dtype=dtype)
    wanted = meaning("smooth_clip", *given)
    assert np.all((value >= lower) & (value <= upper))
    assert value.dtype == x.dtype
    for slope, w, what in zip(slopes, wanted[1:4], ("x", "lower", "upper")):
        assert_accurate(slope, w, t, f"smooth_clip, {dtype}: in {what}")
    # Each of these two is a sum whose terms may cancel: the value is right to the
    # rounding of clip(x), the derivative in the temperature to that of an entropy.
    hard = np.clip(*map(as_float64, (x, lower, upper)))
    scale = np.maximum(np.abs(hard), np.abs(wanted[0]))
    scale = np.where(np.isfinite(scale), scale, 0)
    allowed = relative_tolerance(dtype) * scale + 1e-7
    of_value = in_range(wanted[0], dtype)
    assert_within(value, of_value, allowed, f"smooth_clip, {dtype}")
    assert_within(in_t, wanted[4], 2e-7, f"smooth_clip, {dtype}: in t")


def test_tail_of_softplus_has_all_digits():
    x = np.array([-20.0, -50.0, -87.0])
    wanted = meaning("softplus", x, np.ones(3))[0]
    np.testing.assert_allclose(value_of("softplus", x, 1.0), wanted, rtol=3e-7)


# Both modes, and all orders.


def test_third_derivative_of_softplus(x64):
    third = jax.grad(jax.grad(jax.grad(lambda x: softplus(x, temperature=0.5))))
    step = functools.partial(oracle.smooth_step, temperature=0.5)  # its derivative
    wanted = oracle.rounded(oracle.hessian(step, [np.array([0.3])], np.ones(1)))
    np.testing.assert_allclose(jax.jit(third)(0.3), wanted.item(), rtol=1e-12)


@some_functions
def test_modes_agree_at_the_edges_and_second_derivatives_are_finite(name):
    x, t = grid(POINTS)
    rest = [np.full(x.shape, r) for r in REST[name]]
    vectors = jnp.asarray(np.stack([x, *rest, t], -1), jnp.float32)

    def of_vector(v):
        return getattr(jaxsoft, name)(*v[:-1], temperature=v[-1])

    def every(v):
        forward = [jax.jvp(of_vector, (v,), (row,)) for row in jnp.eye(v.size)]
        return jax.value_and_grad(of_vector)(v), forward

    value = as_users_have_it(jax.vmap(of_vector))(vectors)
    (its_value, reverse), forward = as_users_have_it(jax.vmap(every))(vectors)
    chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.hessian(of_vector)))(vectors))
    np.testing.assert_array_equal(its_value, value)
    for i, (its_value, slope) in enumerate(forward):
        np.testing.assert_array_equal(its_value, value)
        np.testing.assert_allclose(slope, reverse[:, i], rtol=1e-6)


@every_function
def test_what_does_not_move_costs_and_saves_nothing(name):
    """One array is saved for each argument that moves."""
    x = t = jnp.full((5, 3), 0.3)
    for moving in ((0,), (1,), (0, 1)):

        def of_moving(*values, moving=moving):
            x_, t_ = (dict(enumerate((x, t))) | dict(zip(moving, values))).values()
            return getattr(jaxsoft, name)(x_, *REST[name], temperature=t_)

        _, pull = jax.eval_shape(
            lambda *values, f=of_moving: jax.vjp(f, *values), *(x for _ in moving)
        )
        shapes = [v.shape for v in jax.tree.leaves(pull)]
        assert shapes == [x.shape] * len(moving), moving


# Half precision: what its range cannot hold.


@pytest.mark.parametrize("name", ["smooth_step", "smooth_sign"])
def test_derivatives_beyond_float16_stop_at_its_largest_number(name):
    x = jnp.array([0.0, 1e-7, 1.0], jnp.float16)
    largest = float(jnp.finfo(jnp.float16).max)
    wanted = jnp.array([largest, largest, 0], jnp.float16)

    def f(x):
        return getattr(jaxsoft, name)(x, temperature=1e-6)

    def every_way(x):
        ones = jnp.ones_like(x)
        return {
            "reverse": jax.vjp(f, x)[1](3 * ones)[0],
            "forward": jax.jvp(f, (x,), (ones,))[1],
            "linearize": jax.linearize(f, x)[1](ones),
            "vmap": jax.vmap(jax.grad(f))(x),
            "jacrev": jnp.diag(jax.jacrev(f)(x)),
            "jacfwd": jnp.diag(jax.jacfwd(f)(x)),
        }

    slopes = jax.jit(every_way)(x)
    slopes["without jit"] = jax.vjp(f, x)[1](jnp.ones_like(x))[0]
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


@every_function
def test_temperature_zero_is_the_hard_function(name):
    x = jnp.asarray(POINTS, jnp.float32)
    rest = [jnp.full(x.shape, r) for r in REST[name]]
    soft, hard = getattr(jaxsoft, name), HARD[name](x, *rest)
    zeros = (0.0, -0.0, 0, jnp.float32(0), jnp.zeros(x.shape), np.float32(1e-39))
    traced = jax.jit(lambda x, zeros: [soft(x, *rest, temperature=t) for t in zeros])(
        x, zeros
    )
    for t, with_traced in zip(zeros, traced):
        message = f"{name} at temperature {t!r}"
        with_static = soft(x, *rest, temperature=t)
        np.testing.assert_array_equal(with_static, hard, message)
        np.testing.assert_array_equal(with_traced, hard, message)
        np.testing.assert_array_equal(value_of(name, x, *rest, t), hard, message)


# Arguments before the temperature, and the derivatives in the first and in that.
AT_TEMPERATURE_ZERO = [
    *(
        (name, (x,), (slope, LOG2 if x == 0 and has_log2 else 0))
        for x, step in ((0.0, 0.5), (1e-3, 1.0), (-1e-3, 0.0))
        for name, slope, has_log2 in (
            ("softplus", step, True),
            ("smooth_abs", np.sign(x), True),
            ("smooth_step", 0, False),
            ("smooth_sign", 0, False),
        )
    ),
    ("smooth_maximum", (2.0, 2.0), (0.5, LOG2)),
    ("smooth_minimum", (2.0, 2.0), (0.5, -LOG2)),
    ("smooth_clip", (2.0, 2.0, 5.0), (0.5, LOG2)),
    ("smooth_clip", (5.0, 2.0, 5.0), (0.5, -LOG2)),
    ("smooth_clip", (5.0, 5.0, 5.0), (0, 0)),
]


def test_derivatives_at_temperature_zero():
    for name, arguments, wanted in AT_TEMPERATURE_ZERO:
        _, in_x, *_, in_t = value_and_slopes(name, *arguments, 0.0)
        what = f"{name} of {arguments}"
        np.testing.assert_allclose((in_x, in_t), wanted, rtol=2e-7, err_msg=what)


@pytest.mark.parametrize("name", [*REST, *OF_ROWS])
def test_annealing_to_zero_traces_once(name):
    rest = REST.get(name, ())
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value_and_slope(x, t):
        def total(x):
            return jnp.sum(getattr(jaxsoft, name)(x, *rest, temperature=t))

        return jax.value_and_grad(total)(x)

    x = jnp.linspace(-2, 3, 7)
    values = [value_and_slope(x, t)[0] for t in jnp.array([1.0, 0.3, 1e-3, 0.0])]
    of_rows = {"smooth_min": -2.0, "softargmax": 6.0}.get(name, 3.0)
    hard = jnp.sum(HARD[name](x, *rest)) if name in HARD else of_rows
    np.testing.assert_allclose(values[-1], hard, rtol=1e-6)
    assert abs(values[0] - hard) > 0.01
    if name in OF_ROWS:
        assert abs(values[0] - hard) > abs(values[1] - hard) > 0


def test_negative_temperatures():
    x, t = (v.ravel() for v in np.meshgrid(np.float32(POINTS), [1e-3, 1.0, 1e3]))
    y = np.full(x.shape, 1e-3, np.float32)
    for name, arguments, other, sign in [
        ("softplus", (x, -t), ("softplus", -x, t), -1),
        ("smooth_abs", (x, -t), ("smooth_abs", x, t), -1),
        ("smooth_sign", (x, -t), ("smooth_sign", x, t), -1),
        ("smooth_step", (x, -t), ("smooth_step", -x, t), 1),
        ("smooth_maximum", (x, y, -t), ("smooth_minimum", x, y, t), 1),
        ("smooth_minimum", (x, y, -t), ("smooth_maximum", x, y, t), 1),
        ("smooth_clip", (x, -1.0, y, -t), ("smooth_clip", x, -1.0, y, t), 1),
    ]:
        given, wanted = value_of(name, *arguments), sign * value_of(*other)
        np.testing.assert_array_equal(given, wanted, name)
    *_, in_t = value_and_slopes("smooth_clip", -1.0, -1.0, 1.0, np.array([-0.2, 0.2]))
    assert in_t[0] == -in_t[1]
    assert in_t[1] > 0.69


@some_functions
def test_temperature_broadcasts_to_x(name):
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    shapes = ((), (4,), (3, 1), (3, 4))
    temperatures = [
        jnp.linspace(0.1, 2, int(np.prod(shape))).reshape(shape) for shape in shapes
    ]

    def slopes(x, t):
        def total(x, t):
            value = getattr(jaxsoft, name)(x, *REST[name], temperature=t)
            return jnp.sum(jnp.sin(value))

        return jax.grad(total, (0, 1))(x, t)

    @jax.jit
    def shared_and_not(x, temperatures):
        per_row = [t.reshape((1,) * (2 - t.ndim) + t.shape) for t in temperatures]
        entries = [slopes(x, jnp.broadcast_to(t, x.shape)) for t in per_row]
        return [slopes(x, t) for t in temperatures], entries

    for shape, (in_x, in_t), (wanted_in_x, entries) in zip(
        shapes, *shared_and_not(x, temperatures), strict=True
    ):
        np.testing.assert_allclose(in_x, wanted_in_x, rtol=1e-6)
        kept = (1,) * (2 - len(shape)) + shape
        shared = tuple(i for i in range(2) if kept[i] != x.shape[i])
        wanted = jnp.sum(entries, shared).reshape(shape)
        assert in_t.shape == shape
        np.testing.assert_allclose(in_t, wanted, rtol=1e-5, atol=1e-6)


def test_inside_shard_map():
    """With one temperature for all shards, and x different on each."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, shared = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    x, t = jnp.linspace(-2, 2, 5), jnp.float32(1e-3)

    def slopes(xs, t):
        def total(x, t):
            return jnp.sum(smooth_step(x, temperature=t).astype(jnp.float32))

        return [jax.grad(total, (0, 1))(x, t) for x in xs]

    specs = {"in_specs": (rows, shared), "out_specs": (rows, shared)}
    specs["out_specs"] = [specs["out_specs"] for _ in DTYPES]
    sharded = jax.shard_map(slopes, mesh=mesh, **specs)
    of_shards, plain = jax.jit(lambda xs, t: (sharded(xs, t), slopes(xs, t)))(
        [x.astype(dtype) for dtype in DTYPES], t
    )
    chex.assert_trees_all_close(of_shards, plain, rtol=1e-6)


# Bounds and identities.


@every_dtype
def test_bounds_hold_in_floating_point(dtype, rng):
    x, y = (jnp.asarray(over_magnitudes(rng, 4096), dtype) for _ in range(2))
    t = jnp.asarray(np.abs(over_magnitudes(rng, 4096)), jnp.float32)
    of = functools.partial(value_of, dtype=dtype)

    def assert_between(what, lowest, value):
        assert np.all(value >= lowest), what
        # The bound is a real number. A value below it may round to the float above.
        highest = as_float64(lowest) + as_float64(t) * np.log(2)
        spacing = 2 * float(jnp.finfo(dtype).eps) * np.abs(highest)
        assert np.all(as_float64(value) <= highest + spacing), what
        assert np.mean(as_float64(value) > as_float64(lowest)) > 0.3, what

    assert_between("relu", jnp.maximum(x, 0), of("softplus", x, t))
    assert_between("abs", jnp.abs(x), of("smooth_abs", x, t))
    assert_between("maximum", jnp.maximum(x, y), of("smooth_maximum", x, y, t))
    assert_between("-minimum", -jnp.minimum(x, y), -of("smooth_minimum", x, y, t))
    assert np.all(np.abs(of("smooth_sign", x, t)) <= 1)
    step = of("smooth_step", x, t)
    assert np.all((step >= 0) & (step <= 1))
    lower, upper = jnp.minimum(y, y[::-1]), jnp.maximum(y, y[::-1])
    clipped = of("smooth_clip", x, lower, upper, t)
    assert np.all((clipped >= lower) & (clipped <= upper))


def test_smooth_clip_stays_in_the_narrowest_interval(rng):
    lower = np.float32(over_magnitudes(rng, 4096))
    upper = np.nextafter(lower, np.float32(np.inf))
    x = lower + (upper - lower) * rng.integers(-3, 4, 4096).astype(np.float32)
    for t in (1e-6, 1.0, 1e6):
        clipped = value_of("smooth_clip", x, lower, upper, t)
        assert np.all((clipped == lower) | (clipped == upper)), t


def test_clip_with_crossed_bounds_is_the_upper_as_in_jax():
    x = np.float32([0.0, 3.0, 9.0])
    value, *slopes = value_and_slopes("smooth_clip", x, 5.0, 2.0, 0.5)
    np.testing.assert_array_equal(value, jnp.clip(x, 5.0, 2.0))
    np.testing.assert_allclose(slopes, [[0] * 3, [0] * 3, [1] * 3, [0] * 3], rtol=2e-7)


OF_JAX = {
    "softplus": jax.nn.softplus,
    "smooth_step": jax.nn.sigmoid,
    "smooth_sign": jax.nn.tanh,
    "smooth_maximum": jnp.logaddexp,
}


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=SLOW) for d in DTYPES[1:])]
)
@pytest.mark.parametrize("name", OF_JAX)
def test_at_temperature_one_it_is_that_of_jax(name, dtype):
    x = jnp.linspace(-12, 12, 301, dtype=dtype)
    arguments = (x, x[::-1] * 2) if name == "smooth_maximum" else (x,)
    theirs = OF_JAX[name]

    @jax.jit
    def value_and_slope(*arguments):
        def total(*arguments):
            value = getattr(jaxsoft, name)(*arguments)  # without a temperature
            return jnp.sum(value.astype(jnp.float32)), value

        (_, value), slope = jax.value_and_grad(total, has_aux=True)(*arguments)
        # Theirs computes in half precision what is half: compared in float32.
        wide = [a.astype(jnp.float32) for a in arguments]
        their_slope = jax.vmap(jax.grad(theirs))(*wide)
        return value, slope, theirs(*wide), their_slope

    value, slope, their_value, their_slope = value_and_slope(*arguments)
    assert value.dtype == jax.eval_shape(theirs, *arguments).dtype
    unit = float(jnp.finfo(dtype).eps)
    close = functools.partial(np.testing.assert_allclose, rtol=unit + 1e-6)
    close(as_float64(value), their_value, atol=4e-8)
    # Theirs is 1 - tanh^2, in roundings of 1.
    close(as_float64(slope), their_slope, atol=1e-6)


# Shapes, dtypes, errors.


@pytest.mark.parametrize("name", [*REST, *OF_ROWS])
def test_dtypes(name, x64):
    """Also of integers and of no array; a temperature of 64 bits widens nothing."""
    rest = REST.get(name, ())

    def out(x, temperature=1.0):
        f = getattr(jaxsoft, name)
        return jax.eval_shape(lambda x, t: f(x, *rest, temperature=t), x, temperature)

    for dtype in (*DTYPES, "float64"):
        half = jnp.dtype(dtype).itemsize < 4
        wanted = "float32" if half and name == "softargmax" else dtype
        for temperature in (jnp.float32(2), jnp.float64(2)):
            assert out(jnp.ones((2, 0, 3), dtype), temperature).dtype == wanted, dtype
    if name not in OF_TWO:
        assert out(jnp.arange(3, dtype=jnp.int32)).dtype == jnp.float32
    if name in REST:
        assert out(jnp.ones((2, 0, 3), "float32")).shape == (2, 0, 3)
        assert out(0.5).shape == ()
    in_t = jax.eval_shape(
        jax.grad(lambda t, x: getattr(jaxsoft, name)(x, *rest, temperature=t)),
        jnp.float64(2),
        jnp.float32(0.5) if name in REST else jnp.ones(3, jnp.float32),
    )
    assert in_t.dtype == jnp.float64


def test_nan_stays_where_it_is():
    for name in REST:
        for t in (0.0, 1.0):
            out = value_of(name, np.array([np.nan, 1.0]), *REST[name], t)
            np.testing.assert_array_equal(np.isnan(out), [True, False], name)


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


X = jnp.ones((2, 3))
ERRORS: list[tuple[Callable[..., Any], type[Exception], str]] = [
    (
        lambda: smooth_abs(X, temperature=jnp.ones((4, 2, 3))),
        ValueError,
        "smooth_abs: temperature must broadcast to the shape of x, (2, 3); "
        "got (4, 2, 3)",
    ),
    (
        lambda: smooth_sign(X > 0),
        TypeError,
        "smooth_sign: x must be numbers; got a boolean array",
    ),
    *(
        (
            lambda name=name: getattr(jaxsoft, name)(X, jnp.ones(2)),
            ValueError,
            f"{name}: x and y must broadcast together; got shapes (2, 3) and (2,)",
        )
        for name in OF_TWO
    ),
    (
        lambda: smooth_clip(X, 2, 1.0),
        ValueError,
        "smooth_clip: lower must not exceed upper; got 2 and 1.0",
    ),
    (
        lambda: smooth_clip(X, 0.0, jnp.ones(2)),
        ValueError,
        "smooth_clip: upper must broadcast to the shape of x, (2, 3); got (2,)",
    ),
    (
        lambda: jaxsoft.smooth_max(X, temperature=jnp.ones(3)),
        ValueError,
        "smooth_max: temperature must broadcast to the reduced result with the reduced "
        "axes kept, shape (1, 1); got (3,)",
    ),
    (
        lambda: jaxsoft.softargmax(X, 0, positions=jnp.ones(3)),
        ValueError,
        "softargmax: positions of one dimension must have the length of axis 0 of x, "
        "(2, 3); got (3,)",
    ),
    (
        lambda: jaxsoft.softargmax(X, 0, positions=jnp.ones((3, 2))),
        ValueError,
        "softargmax: positions must broadcast to the shape of x, (2, 3); got (3, 2)",
    ),
]


def test_errors():
    """Those of these modules. Every argument of every function: test_bad_input.py."""
    for call, error, text in ERRORS:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == text


@pytest.mark.parametrize("temperature", [np.inf, 1e38, 1e30, 1e8])
def test_smooth_clip_at_the_softest_temperatures(temperature):
    """The middle of the bounds, however large the temperature and small their gap."""
    x = np.array([-3.0, 0.3, 1.0, 5.0])
    given = value_of("smooth_clip", x, 0.0, 1.0, temperature)
    np.testing.assert_allclose(given, 0.5)
    x, lower, upper = np.array([-1e-10, 0.0]), -1e-9, 1e-10
    middle = value_of("smooth_clip", x, lower, upper, temperature)
    np.testing.assert_allclose(middle, -4.5e-10, rtol=1e-6)


def test_smooth_clip_between_equal_bounds():
    bound = np.array([2.0, np.inf, -np.inf])
    for x, t in ((bound, 1.0), (1.0, 0.5)):
        clipped = value_of("smooth_clip", x, bound, bound, t)
        np.testing.assert_array_equal(clipped, bound)
