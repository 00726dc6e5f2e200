"""The smooth maxima and softargmax against their formulas, at the edges and over them.

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

import jaxsoft
from jaxsoft._smooth.max import boltzmann_max, smooth_max, smooth_min
from jaxsoft._smooth.softargmax import softargmax

MP = mpmath.MPContext()
MP.dps = 150
FAR = MP.mpf(10) ** 12  # stands for infinity
COLD = MP.mpf(10) ** -45  # stands for temperature 0

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
POSITIONS = [0.0, 1.0, 2.0, 3.0]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)


def _weights(x: list[Any], t: Any) -> list[Any]:
    terms = [MP.exp(v / t) for v in x]
    return [e / MP.fsum(terms) for e in terms]


def _expectation(x: list[Any], a: list[Any], t: Any) -> Any:
    return MP.fsum(p * v for p, v in zip(_weights(x, t), a))


FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "smooth_max": (
        smooth_max,
        lambda x, a, t: t * MP.log(MP.fsum(MP.exp(v / t) for v in x)),
    ),
    "smooth_min": (
        smooth_min,
        lambda x, a, t: -t * MP.log(MP.fsum(MP.exp(-v / t) for v in x)),
    ),
    "boltzmann_max": (boltzmann_max, lambda x, a, t: _expectation(x, x, t)),
    "softargmax": (softargmax, _expectation),
}
MAXIMA = ["smooth_max", "smooth_min", "boltzmann_max"]
every_function = pytest.mark.parametrize("name", FORMULAS)
every_maximum = pytest.mark.parametrize("name", MAXIMA)


def exact(values: Any) -> list[Any]:
    return [
        MP.sign(v) * FAR if np.isinf(v) else MP.mpf(v)
        for v in map(float, np.ravel(values))
    ]


def rounded(v: Any) -> float:
    return float(v) if abs(v) < FAR / 1000 else np.inf * int(MP.sign(v))


def expected(name: str, x: Any, t: Any) -> dict[str, np.ndarray]:
    """Value, and derivatives in x, in the positions and in the temperature, of one row;
    each with its scale, the sum of the sizes of the terms of which it is made."""
    formula = FORMULAS[name][1]
    x, a = exact(x), exact(POSITIONS)
    cold = abs(t) < np.finfo(np.float32).tiny
    t = COLD if cold else MP.mpf(float(t))
    step = MP.mpf(10) ** -30 * min(1, abs(t))

    def slope(move: Callable[[Any], Any]) -> Any:
        return (move(step) - move(-step)) / (2 * step)

    def bumped(values: list[Any], i: int, s: Any) -> list[Any]:
        return [v + s if i == j else v for j, v in enumerate(values)]

    in_x = [slope(lambda s, i=i: formula(bumped(x, i, s), a, t)) for i in range(4)]
    in_a = [slope(lambda s, i=i: formula(x, bumped(a, i, s), t)) for i in range(4)]
    in_t = slope(lambda s: formula(x, a, t + s))
    p = _weights([-v for v in x] if name == "smooth_min" else x, t)
    values = a if name == "softargmax" else x
    own = 0 if name == "softargmax" else 1
    gaps = [MP.fsum(q * abs(v - w) for q, w in zip(p, values)) for v in values]
    scale_in_x = [q * (own + gap / abs(t)) for q, gap in zip(p, gaps)]
    if name in ("smooth_max", "smooth_min"):
        scale_in_x = p
    top = max(x) if (t > 0) != (name == "smooth_min") else min(x)
    scale_in_t = MP.fsum(s * abs(v - top) / abs(t) for s, v in zip(scale_in_x, x))
    value = formula(x, a, t)
    results = {
        "value": [value],
        "x": in_x,
        "positions": in_a,
        "temperature": [in_t],
        "scale of value": [abs(value) + max(map(abs, a if own == 0 else [top]))],
        "scale of x": scale_in_x,
        "scale of positions": p,
        "scale of temperature": [abs(in_t) + scale_in_t],
    }
    out = {k: np.array([rounded(v) for v in vs]) for k, vs in results.items()}
    for k in ("x", "temperature"):  # what diverges with the cold is 0 by convention
        out[k] = np.where(cold & np.isinf(out[k]), 0, out[k])
    return out


def derivatives(name: str, x: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
    """For rows x of shape (n, 4) and temperatures (n, 1)."""
    keywords = {} if name in MAXIMA else {"positions": jnp.array(POSITIONS)}

    def of_row(x, t, positions):
        given = {"positions": positions} if keywords else {}
        return FORMULAS[name][0](x, -1, temperature=t, **given)

    def both(x, t, positions):
        value, pull = jax.vjp(of_row, x, t, positions)
        in_x, in_t, in_a = pull(jnp.ones_like(value))
        return {"value": value, "x": in_x, "temperature": in_t, "positions": in_a}

    return jax.jit(jax.vmap(both, (0, 0, None)))(x, t, jnp.array(POSITIONS))


def as_float64(v: jax.Array) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def assert_derivatives(name: str, x: jax.Array, t: jax.Array) -> None:
    actual = derivatives(name, x, t)
    wanted = [expected(name, *row) for row in zip(as_float64(x), as_float64(t)[:, 0])]
    float32_result = x.dtype if name in MAXIMA else jnp.float32
    assert actual["value"].dtype == float32_result
    assert actual["x"].dtype == x.dtype
    for what in ("value", "x", "temperature", "positions"):
        a = as_float64(actual[what]).reshape(len(wanted), -1)
        w, scale = (
            np.stack([row[k] for row in wanted]) for k in (what, f"scale of {what}")
        )
        dtype = actual[what].dtype
        largest = float(jnp.finfo(dtype).max)
        over = np.inf if what == "value" else largest
        w = np.where(np.abs(w) > largest, np.copysign(over, w), w)
        infinite = np.isinf(w)
        np.testing.assert_array_equal(a[infinite], w[infinite])
        assert np.all(np.isfinite(a) | infinite)
        # A dozen operations in float32, then the rounding of the result.
        own = np.where(infinite, 0, np.abs(w)) * float(jnp.finfo(dtype).eps)
        of_terms = np.where(np.isfinite(scale), scale, 0) * 16 * 2.0**-23
        floor = 1e-34 / np.maximum(np.abs(as_float64(t)), 1e-6) + float(
            jnp.finfo(dtype).smallest_subnormal
        )
        allowed = 0.51 * own + of_terms + floor
        error = np.abs(np.where(infinite, 0, a) - np.where(infinite, 0, w))
        bad = ~(error <= allowed)
        assert not np.any(bad), f"{name}, {what}: got {a[bad]}, wanted {w[bad]}"


@every_dtype
@every_function
def test_values_and_derivatives_at_the_edges(name, dtype):
    x = np.repeat(ROWS, len(TEMPERATURES), axis=0)
    t = np.tile(TEMPERATURES, len(ROWS))[:, None]
    if name == "smooth_min":
        x = -x
    with np.errstate(over="ignore"):  # 1e8 is infinite in float16
        assert_derivatives(name, jnp.asarray(x, dtype), jnp.asarray(t, jnp.float32))


@every_function
def test_every_digit_over_many_magnitudes(name, rng):
    x = rng.normal(size=(60, 4)) * 10 ** rng.uniform(-3, 3, (60, 1))
    t = rng.choice([-1, 1], (60, 1)) * 10 ** rng.uniform(-3, 3, (60, 1))
    assert_derivatives(name, jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32))


def test_a_sure_model_keeps_the_digits_of_the_others():
    x = jnp.array([40.0, 0.0, 1.0])
    slope = jax.grad(lambda x: softargmax(x, positions=jnp.array([5.0, 1.0, 7.0])))(x)
    p = [float(v) for v in _weights(exact(x), MP.one)]
    wanted = [p[1] * 4 - p[2] * 2, -4 * p[1], 2 * p[2]]
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)
    slope = jax.grad(boltzmann_max)(x)
    np.testing.assert_allclose(slope[1:], [-39 * p[1], -38 * p[2]], rtol=1e-6)


# Both modes, and all orders.


@every_function
def test_second_derivatives_are_finite_at_the_edges(name):
    x = jnp.asarray(np.repeat(ROWS, len(TEMPERATURES), axis=0), jnp.float32)
    t = jnp.asarray(np.tile(TEMPERATURES, len(ROWS)), jnp.float32)

    def f(x, t):
        return FORMULAS[name][0](x, -1, temperature=t)

    chex.assert_tree_all_finite(jax.jit(jax.vmap(jax.hessian(f, (0, 1))))(x, t))


# Axes, masks, temperature, positions.


@every_function
def test_axes_mask_and_keepdims(name, rng):
    f = FORMULAS[name][0]
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    mask = jnp.asarray(rng.uniform(size=x.shape) < 0.6).at[:, 0, 0].set(True)
    flat = jnp.moveaxis(x, 1, -1).reshape(2, 12)  # axes (2, 1)
    flat_mask = jnp.moveaxis(mask, 1, -1).reshape(2, 12)
    out = f(x, (2, 1), mask)
    chex.assert_shape(out, (2,))
    np.testing.assert_allclose(out, f(flat, -1, flat_mask), rtol=1e-6)
    chex.assert_shape(f(x, (2, 1), mask, keepdims=True), (2, 1, 1))
    np.testing.assert_array_equal(f(x, (2, 1), mask, keepdims=True)[:, 0, 0], out)
    np.testing.assert_allclose(f(x, None), f(x.ravel(), 0), rtol=1e-6)
    kept = np.asarray(flat)[0][np.asarray(flat_mask)[0]]
    if name in MAXIMA:
        np.testing.assert_allclose(out[0], f(jnp.asarray(kept)), rtol=1e-6)

    def total(x):
        return jnp.sum(f(x, (2, 1), mask))

    poisoned = jnp.where(mask, x, jnp.nan)
    np.testing.assert_array_equal(total(poisoned), total(x))
    slope = jax.grad(total)(poisoned)
    np.testing.assert_array_equal(slope, jax.grad(total)(x))
    assert jnp.all(jnp.where(mask, 0, slope) == 0)


@every_function
def test_nothing_included(name):
    f = FORMULAS[name][0]
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    mask = jnp.array([[True, True], [False, False]])
    wanted = {"smooth_min": np.inf, "softargmax": 0.0}.get(name, -np.inf)
    for t in (0.0, 0.5):
        out, pull = jax.vjp(lambda x, t: f(x, 1, mask, temperature=t), x, t)
        assert out[1] == wanted
        assert jnp.isfinite(out[0])
        in_x, in_t = pull(jnp.array([0.0, 1.0]))
        np.testing.assert_array_equal(in_x, 0)
        assert in_t == 0
    assert f(jnp.zeros((0,))) == wanted


@every_maximum
def test_temperature_zero_is_the_hard_function(name):
    hard = jnp.min if name == "smooth_min" else jnp.max
    f = FORMULAS[name][0]
    x = jnp.asarray(ROWS, jnp.float32)
    traced = jax.jit(lambda x, t: f(x, 1, temperature=t))
    for t in (0.0, 0, np.float32(1e-39), jnp.zeros((len(ROWS), 1))):
        np.testing.assert_array_equal(f(x, 1, temperature=t), hard(x, 1))
        np.testing.assert_array_equal(traced(x, t), hard(x, 1))


def test_softargmax_at_temperature_zero_is_the_mean_of_the_ties():
    x = jnp.array([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, -2.0, -5.0], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(softargmax(x, temperature=0.0), [2.0, 0.0, 1.5])
    t = jnp.array([[0.0], [-0.0], [0.0]])
    np.testing.assert_array_equal(
        jax.jit(lambda t: softargmax(x, temperature=t))(t), [2, 0, 1.5]
    )
    assert softargmax(jnp.array([5.0, 2.0, 9.0]), temperature=-1e-6) == 1


@every_function
def test_annealing_to_zero_traces_once(name):
    chex.clear_trace_counter()
    x = jnp.array([0.0, 1.0, 0.7])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def value_and_slope(x, t):
        return jax.value_and_grad(lambda x: FORMULAS[name][0](x, temperature=t))(x)

    values = [value_and_slope(x, t)[0] for t in jnp.array([1.0, 0.3, 0.1, 0.0])]
    hard = {"smooth_min": 0.0}.get(name, 1.0)
    assert values[-1] == hard
    assert abs(values[0] - hard) > abs(values[2] - hard) > 0


def test_negative_temperature_turns_max_into_min(rng):
    x = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    # At temperature 1 the number is known, and rounded less often.
    same = functools.partial(np.testing.assert_allclose, rtol=3e-7)
    for t in (0.01, 1.0, 30.0):
        low = smooth_min(x, 1, temperature=t)
        same(low, -smooth_max(-x, 1, temperature=t))
        same(low, smooth_max(x, 1, temperature=-t))
        same(smooth_min(x, 1, temperature=-t), smooth_max(x, 1, temperature=t))
        boltzmann = boltzmann_max(x, 1, temperature=-t)
        same(boltzmann, -boltzmann_max(-x, 1, temperature=t))
        same(softargmax(x, 1, temperature=-t), softargmax(-x, 1, temperature=t))
    same(smooth_max(x, 1), jaxsoft.logsumexp(x, 1))


def test_bounds_hold_in_floating_point(rng):
    for dtype in DTYPES:
        x = rng.normal(size=(500, 8)) * 10 ** rng.uniform(-3, 3, (500, 1))
        x = jnp.asarray(x, dtype)
        t = jnp.asarray(10 ** rng.uniform(-3, 3, (500, 1)), jnp.float32)
        unit = 2 * float(jnp.finfo(dtype).eps)
        room = as_float64(t)[:, 0] * np.log(8)
        for high, soft in (
            (jnp.max(x, 1), smooth_max(x, 1, temperature=t)),
            (-jnp.min(x, 1), -smooth_min(x, 1, temperature=t)),
        ):
            high, soft = as_float64(high), as_float64(soft)
            assert np.all(soft >= high)
            # The bound is a real number. A value below it may round to the float above.
            assert np.all(soft <= high + room + unit * np.abs(high + room))
        boltzmann = as_float64(boltzmann_max(x, 1, temperature=t))
        assert np.all(boltzmann <= as_float64(jnp.max(x, 1)))
        mean = np.mean(as_float64(x), 1)
        assert np.all(boltzmann >= mean - unit * np.max(np.abs(as_float64(x)), 1))
        place = as_float64(softargmax(x, 1, temperature=t))
        assert np.all((place >= 0) & (place <= 7 * (1 + 1e-6)))


def test_derivatives_are_softmax_entropy_and_covariance(rng, x64):
    x, a, t = rng.normal(size=6), rng.normal(size=6), 0.6

    @jax.jit
    def actual(x, t):
        return [
            jax.grad(lambda x, t, f=f: f(x, temperature=t), (0, 1))(x, t)
            for f in (
                smooth_max,
                boltzmann_max,
                functools.partial(softargmax, positions=a),
            )
        ]

    p = np.asarray(jaxsoft.softmax(x, temperature=t))
    b, mean = np.sum(p * x), np.sum(p * a)
    wanted = [
        (p, np.asarray(jaxsoft.entropy(x, temperature=t))),
        (p * (1 + (x - b) / t), -np.sum(p * (x - b) ** 2) / t**2),
        (p * (a - mean) / t, -np.sum(p * (a - mean) * (x - b)) / t**2),
    ]
    chex.assert_trees_all_close(actual(x, t), wanted, rtol=1e-12)


def test_positions(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    p = jax.nn.softmax(x, 1)
    along = jnp.array([10.0, -5.0, 2.5])
    wanted = jnp.sum(p * along[None, :, None], 1)
    np.testing.assert_allclose(softargmax(x, 1, positions=along), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        softargmax(x, 1, positions=[10, -5, 2]),
        jnp.sum(p * jnp.array([10.0, -5.0, 2.0])[None, :, None], 1),
        rtol=1e-5,
    )
    grid = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    place, pull = jax.vjp(lambda g: softargmax(x, (1, 2), positions=g), grid)
    p = jax.nn.softmax(x, (1, 2))
    np.testing.assert_allclose(place, jnp.sum(p * grid[None], (1, 2)), rtol=1e-5)
    g = jnp.array([2.0, -1.0])
    np.testing.assert_allclose(pull(g)[0], jnp.tensordot(g, p, 1), rtol=1e-5)
    # The position of what does not count is nobody's.
    odd = jnp.array([10.0, jnp.nan, jnp.inf])
    mask = jnp.array([True, False, False])[:, None]
    out, pull = jax.vjp(lambda x: softargmax(x, 1, mask, positions=odd), x)
    np.testing.assert_array_equal(out, 10.0)
    np.testing.assert_array_equal(pull(out)[0], 0.0)


def test_an_index_beyond_half_precision():
    x = jnp.zeros((3000,), jnp.float16).at[2999].set(100)
    place = softargmax(x)
    assert place.dtype == jnp.float32
    assert place == 2999
    tied = jnp.zeros((2,), jnp.float16)
    slope = jax.grad(lambda x: softargmax(x, temperature=1e-6))(tied)
    largest = jnp.finfo(jnp.float16).max
    np.testing.assert_array_equal(slope, jnp.array([-largest, largest]))
    rows = jax.jacfwd(lambda x: softargmax(x, temperature=1e-6))(tied)
    np.testing.assert_allclose(rows, [-2.5e5, 2.5e5], rtol=1e-6)
    t = jnp.float16(1e-6)
    in_t = jax.grad(lambda t: softargmax(jnp.array([0.0, 1e-6]), temperature=t))(t)
    assert in_t == -largest


# Dtypes and errors.


@every_function
def test_dtypes(name, x64):
    def dtype_of(x, **options):
        return jax.eval_shape(lambda x: FORMULAS[name][0](x, **options), x).dtype

    for dtype in (*DTYPES, jnp.float64):
        half = jnp.dtype(dtype).itemsize < 4
        wanted = jnp.float32 if half and name == "softargmax" else dtype
        x = jnp.ones((2, 3), dtype)
        assert dtype_of(x) == wanted
        assert dtype_of(x, temperature=jnp.float64(2)) == wanted
    assert dtype_of(jnp.arange(3, dtype=jnp.int32)) == jnp.float32


def test_unsigned_integers_have_a_minimum():
    assert smooth_min(jnp.array([1, 2], jnp.uint8), temperature=0) == 1


def raises(error: type[Exception], text: str) -> Any:
    return pytest.raises(error, match=f"^{text}")


@every_function
def test_errors_name_the_function_and_both_shapes(name):
    f = FORMULAS[name][0]
    x = jnp.ones((2, 3))
    with raises(TypeError, f"{name}: x must be real; got dtype complex64$"):
        f(x.astype(jnp.complex64))
    with raises(TypeError, f"{name}: x must be numbers; got a boolean array$"):
        f(x > 0)
    with raises(TypeError, f"{name}: where must be boolean; got dtype float32. For "):
        f(x, 1, x)
    with raises(
        ValueError, rf"{name}: where must broadcast to .* \(2, 3\); got \(2,\)"
    ):
        f(x, 1, jnp.ones(2, bool))
    with raises(
        ValueError, rf"{name}: axis must lie in \[-2, 2\) for 2 dimensions; got 2$"
    ):
        f(x, 2)
    with raises(
        TypeError, f"{name}: axis must be an int, a tuple of ints or None; got"
    ):
        f(x, 1.0)
    with raises(TypeError, f"{name}: keepdims must be True or False; got 1$"):
        f(x, 1, keepdims=1)
    with raises(ValueError, rf"{name}: temperature must .* \(2, 1\); got \(3,\)$"):
        f(x, 1, temperature=jnp.ones(3))
    with raises(TypeError, f"{name}: temperature must be real; got dtype complex64$"):
        f(x, 1, temperature=1j)


def test_errors_of_positions():
    x = jnp.ones((2, 3))
    text = (
        r"softargmax: positions of one dimension .* axis 0 of x, \(2, 3\); got \(3,\)$"
    )
    with raises(ValueError, text):
        softargmax(x, 0, positions=jnp.ones(3))
    text = r"softargmax: positions must broadcast to .* \(2, 3\); got \(3, 2\)$"
    with raises(ValueError, text):
        softargmax(x, 0, positions=jnp.ones((3, 2)))
    with raises(TypeError, "softargmax: positions must be real; got dtype complex64$"):
        softargmax(x, positions=jnp.ones(3, jnp.complex64))


def test_softargmax_of_ties_at_a_tiny_temperature():
    """The derivative in x stops at the largest number; that in temperature is 0."""

    def of_ties(x, temperature):
        return softargmax(x, temperature=temperature, positions=jnp.array([0.0, 1e3]))

    x, temperature = jnp.zeros(2), jnp.float32(1e-37)
    in_x, in_temperature = jax.grad(of_ties, (0, 1))(x, temperature)
    largest = jnp.finfo(jnp.float32).max
    np.testing.assert_array_equal(in_x, [-largest, largest])
    assert in_temperature == 0
    assert jax.jvp(lambda t: of_ties(x, t), (temperature,), (1.0,))[1] == 0


@pytest.mark.parametrize(
    "function",
    [
        jaxsoft.softargmax,
        jaxsoft.smooth_step,
        functools.partial(jaxsoft.smooth_clip, lower=0.0, upper=1.0),
    ],
)
def test_a_temperature_whose_square_underflows_twice_differentiated(function):
    def total(x, temperature):
        return jnp.sum(function(x, temperature=temperature))

    for outer in (jax.jacrev, jax.jacfwd):
        for inner in (jax.jacrev, jax.jacfwd):
            hessian = outer(inner(total, (0, 1)), (0, 1))
            for second in jax.tree.leaves(hessian(jnp.array([0.5, 2.0]), 1e-20)):
                np.testing.assert_array_equal(second, 0)
