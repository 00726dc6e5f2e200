"""The elementwise smooth functions against their formulas, at the edges and over them.

How they are compared, and through which programs: rows.py.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows
from laws import assert_within
from rows import TEMPERATURES, as_float64, every_dtype, in_dtype, in_range

import jaxsoft
from jaxsoft import smooth_clip, smooth_maximum, smooth_minimum, smooth_step, softplus

POINTS = [0.0, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3, 1e8, -1e8, np.inf, -np.inf]
BOUNDS = [(0.0, 1.0), (-1.0, 1e-3), (1e3, 1e3), (-1e8, 1e8)]
BOUNDS += [(-np.inf, 0.0), (1.0, np.inf), (-np.inf, np.inf)]
DTYPES = ["float32", "bfloat16", "float16"]
LOG2 = np.log(np.float32(2))

# Values for the arguments between x and the temperature.
REST: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("softplus", "smooth_abs", "smooth_sign", "smooth_step"), ()),
    **dict.fromkeys(("smooth_maximum", "smooth_minimum"), (0.6,)),
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

every_function = pytest.mark.parametrize("name", REST)


def each_but(fast: str) -> pytest.MarkDecorator:
    """Every function, of which those that take the same ways are slow."""
    slow = pytest.mark.slow
    names = [pytest.param(n, marks=() if n in fast.split() else slow) for n in REST]
    return pytest.mark.parametrize("name", names)


def value_and_slopes(name: str, *arguments: Any, dtype: Any = "float32") -> Any:
    """Of numbers that broadcast together; the temperature is last."""
    numbers = np.broadcast_arrays(*arguments)
    columns = [v.reshape(-1, 1) for v in numbers]
    results = rows.value_and_slopes(name, *columns, dtype=dtype)
    return [v.reshape(numbers[0].shape) for v in results]


def value_of(name: str, *arguments: Any, dtype: Any = "float32") -> np.ndarray:
    return value_and_slopes(name, *arguments, dtype=dtype)[0]


def over_magnitudes(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([-1, 1], n) * 10 ** rng.uniform(-4, 3, n)


def grid(*axes: Any) -> list[np.ndarray]:
    """Every combination; the temperature is last."""
    return [v.ravel() for v in np.meshgrid(*axes, TEMPERATURES)]


def numbers_for(name: str, dtype: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The edges, and numbers of many magnitudes."""
    x, y, z, t = (over_magnitudes(rng, 100) for _ in range(4))
    edges, others = grid(POINTS), [x, t]
    if name in OF_TWO:
        edges = grid(POINTS, [0.0, 1.0, -1e3, 3e4 if dtype == "float16" else 1e8])
        # Of one sign, so that the result is no sum near 0 of a positive and a negative.
        sign = np.sign(t) if name == "smooth_maximum" else -np.sign(t)
        y[:50] = np.abs(x[:50]) * 1.00001
        others = [sign * np.abs(x), sign * np.abs(y), t]
    if name == "smooth_clip":
        points, which, temperatures = grid(POINTS, np.arange(len(BOUNDS)))
        edges = [points, *np.asarray(BOUNDS)[which.astype(int)].T, temperatures]
        others = [x, np.minimum(y, z), np.maximum(y, z), t]
    return [np.concatenate(pair) for pair in zip(edges, others)]


def tolerances(name: str, given: Any, actual: Any, wanted: Any) -> list[np.ndarray]:
    """A dozen operations in float32; in half precision the rounding of the result, and
    little else. Every entry is relative to itself."""
    t = np.abs(as_float64(given[-1]))
    t = np.where(t < np.finfo(np.float32).tiny, 1, t)
    # Where exp underflows, a number may be 0: the smallest normal number times what the
    # formula multiplies exp by.
    floor = np.maximum(np.maximum(t, 100 / t), 1) * float(np.finfo(np.float32).tiny)
    allowed = []
    for a, w in zip(actual, wanted):
        limits = jnp.finfo(a.dtype)
        relative = float(limits.eps) * (16 if limits.bits > 16 else 0.51)
        size = np.where(np.isfinite(w), np.abs(w), 0)
        allowed.append(relative * size + floor + float(limits.smallest_subnormal))
    if name == "smooth_clip":
        # Two are sums whose terms may cancel: the value is right to the rounding of
        # clip(x), the derivative in the temperature to that of an entropy.
        hard = np.abs(np.clip(*map(as_float64, given[:3])))
        half = jnp.finfo(actual[0].dtype).bits < 32
        unit = float(jnp.finfo(actual[0].dtype).eps) * (0.51 if half else 16)
        allowed[0] += unit * np.where(np.isfinite(hard), hard, 0) + 1e-7
        allowed[-1] = 2e-7 + 0 * t
    return allowed


@every_dtype
@every_function
def test_values_and_derivatives_to_every_digit(name, dtype, rng):
    given = in_dtype(dtype, *(v[:, None] for v in numbers_for(name, dtype, rng)))
    actual = rows.value_and_slopes(name, *given, dtype=dtype)
    assert [a.dtype for a in actual] == [given[0].dtype, *(g.dtype for g in given)]
    if name == "smooth_clip":
        assert np.all((actual[0] >= given[1]) & (actual[0] <= given[2]))
    whats = ["value", *(f"derivative in argument {i}" for i in range(len(given)))]
    wanted = [
        in_range(w, a.dtype, what)
        for what, a, w in zip(whats, actual, rows.meaning(name, *given, dtype=dtype))
    ]
    allowed = tolerances(name, given, actual, wanted)
    for what, a, w, tolerance in zip(whats, actual, wanted, allowed, strict=True):
        assert_within(a, w, tolerance, f"{name}, {dtype}: {what}")


@pytest.mark.parametrize("name", OF_TWO)
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


# Both modes, and all orders.


def test_third_derivative_of_softplus(x64):
    third = jax.grad(jax.grad(jax.grad(lambda x: softplus(x, temperature=0.5))))
    s = 1 / (1 + np.exp(-0.3 / 0.5))
    wanted = s * (1 - s) * (1 - 2 * s) / 0.5**2
    np.testing.assert_allclose(jax.jit(third)(0.3), wanted, rtol=1e-12)


@each_but("smooth_abs smooth_minimum smooth_clip")
def test_modes_agree_at_the_edges_and_second_derivatives_are_finite(name):
    x, t = grid(POINTS)
    columns = [x, *(np.full(x.shape, r) for r in REST[name]), t]
    vectors = jnp.asarray(np.stack(columns, -1), jnp.float32)

    def of_vector(v):
        return getattr(jaxsoft, name)(*v[:-1], temperature=v[-1])

    def first_and_second(v):
        forward = [jax.jvp(of_vector, (v,), (row,))[1] for row in jnp.eye(v.size)]
        return jax.grad(of_vector)(v), jnp.stack(forward), jax.hessian(of_vector)(v)

    reverse, forward, hessian = jax.jit(jax.vmap(first_and_second))(vectors)
    np.testing.assert_allclose(forward, reverse, rtol=1e-6, err_msg=name)
    assert np.all(np.isfinite(hessian)), name


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
        assert shapes == [x.shape] * len(moving), (name, moving)


@pytest.mark.parametrize("name", ["smooth_step", "smooth_sign"])
def test_derivatives_beyond_float16_stop_at_its_largest_number(name):
    x = jnp.array([0.0, 1e-7, 1.0], jnp.float16)
    largest = float(jnp.finfo(jnp.float16).max)

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
        np.testing.assert_array_equal(slope, jnp.float16([largest, largest, 0]), way)


def test_float16_temperature_has_finite_derivatives():
    x, t = jnp.float16([2e-6, -2e-6]), jnp.float16([1e-6, 1e-6])
    slope = jax.vmap(jax.grad(lambda t, x: smooth_step(x, temperature=t)))(t, x)
    largest = jnp.finfo(jnp.float16).max
    np.testing.assert_array_equal(slope, jnp.array([-largest, largest]))


# Temperature.


@every_function
def test_temperature_zero_is_the_hard_function(name):
    x = jnp.asarray(POINTS, jnp.float32)
    soft, hard = getattr(jaxsoft, name), HARD[name](x, *REST[name])
    zeros = (0.0, -0.0, 0, np.float32(1e-39))
    of_static = jax.jit(lambda x: [soft(x, *REST[name], temperature=t) for t in zeros])
    for t, with_static in zip(zeros, of_static(x)):
        message = f"{name} at temperature {t!r}"
        np.testing.assert_array_equal(with_static, hard, message)
        np.testing.assert_array_equal(value_of(name, x, *REST[name], t), hard, message)


@each_but("smooth_clip")
def test_temperature_broadcasts_to_x(name):
    """One that is shared has the sum of the derivatives of those who share it."""
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)

    @jax.jit
    @jax.grad
    def slope(t):
        value = getattr(jaxsoft, name)(x, *REST[name], temperature=t)
        return jnp.sum(jnp.sin(value))

    def as_x(t):
        return jnp.broadcast_to(t, x.shape)

    for shape in ((), (4,), (3, 1)):
        t = jnp.linspace(0.1, 2, int(np.prod(shape))).reshape(shape)
        wanted = jax.vjp(as_x, t)[1](slope(as_x(t)))[0]
        np.testing.assert_allclose(slope(t), wanted, 1e-5, 1e-6, err_msg=str(shape))


def test_inside_shard_map():
    """With one temperature for all shards, and x different on each."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    split, shared = jax.sharding.PartitionSpec("i"), jax.sharding.PartitionSpec()
    xs = [jnp.linspace(-2, 2, 5, dtype=dtype) for dtype in DTYPES]

    def slopes(xs, t):
        def total(x, t):
            return jnp.sum(smooth_step(x, temperature=t).astype(jnp.float32))

        return [jax.grad(total, (0, 1))(x, t) for x in xs]

    specs = {"in_specs": (split, shared), "out_specs": [(split, shared)] * len(xs)}
    sharded = jax.shard_map(slopes, mesh=mesh, **specs)
    both = jax.jit(lambda xs, t: (sharded(xs, t), slopes(xs, t)))
    chex.assert_trees_all_close(*both(xs, jnp.float32(1e-3)), rtol=1e-6)


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


def test_smooth_clip_at_the_softest_temperatures():
    """The middle of the bounds, however large the temperature and small their gap; and
    the bounds themselves, where these are equal."""
    x = np.array([-3.0, 0.3, 1.0, 5.0])
    for t in (np.inf, 1e38, 1e30, 1e8):
        given = value_of("smooth_clip", x, 0.0, 1.0, t)
        np.testing.assert_allclose(given, 0.5, err_msg=f"at {t}")
        given = value_of("smooth_clip", np.array([-1e-10, 0.0]), -1e-9, 1e-10, t)
        np.testing.assert_allclose(given, -4.5e-10, rtol=1e-6, err_msg=f"at {t}")
    bound = np.array([2.0, np.inf, -np.inf])
    for x, t in ((bound, 1.0), (1.0, 0.5)):
        clipped = value_of("smooth_clip", x, bound, bound, t)
        np.testing.assert_array_equal(clipped, bound)


def test_without_a_temperature_it_is_that_of_jax():
    of_jax = (jax.nn.softplus, jax.nn.sigmoid, jax.nn.tanh, jnp.logaddexp)
    names = ("softplus", "smooth_step", "smooth_sign", "smooth_maximum")
    for name, theirs in zip(names, of_jax, strict=True):
        for dtype in DTYPES:
            x = jnp.linspace(-12, 12, 301, dtype=dtype)
            arguments = (x, x[::-1] * 2) if name == "smooth_maximum" else (x,)
            value = getattr(jaxsoft, name)(*arguments)
            assert value.dtype == jax.eval_shape(theirs, *arguments).dtype
            # Theirs computes in half precision what is half: compared in float32.
            wanted = theirs(*(a.astype(jnp.float32) for a in arguments))
            rtol = float(jnp.finfo(dtype).eps) + 1e-6
            np.testing.assert_allclose(
                as_float64(value), wanted, rtol, 4e-8, err_msg=f"{name}, {dtype}"
            )


# Shapes and dtypes: what test_transformations.py does not ask of every law.


@pytest.mark.parametrize("name", [*REST, *OF_ROWS])
def test_dtypes(name, x64):
    """Integers give floats; a temperature of 64 bits widens only its own derivative."""
    t = jax.ShapeDtypeStruct((), "float64")

    def f(x, t):
        return getattr(jaxsoft, name)(x, *REST.get(name, ()), temperature=t)

    def value_and_slope(x, t):
        return f(x, t), jax.grad(lambda t: jnp.sum(f(x, t)))(t)

    for dtype in ("int32", *DTYPES, "float64"):
        wanted = "float32" if dtype == "int32" else dtype
        x = jax.ShapeDtypeStruct((2, 3), dtype)
        if dtype != "int32" or name not in OF_TWO:  # whose partner is a float
            value, slope = jax.eval_shape(value_and_slope, x, t)
            assert (value.dtype, slope.dtype) == (wanted, "float64"), dtype


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
