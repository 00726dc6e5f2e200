"""Between and beyond the points of the grid: hypothesis searches for a NaN, and for a
number that is not that of the formula.

One compiled program has all functions along one axis; hypothesis draws logits, mask,
labels and temperature. `HYPOTHESIS_PROFILE=thorough` has more shapes, axes, dtypes and
examples.
"""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

import jaxsoft

THOROUGH = hypothesis.settings.get_current_profile_name() == "thorough"
# (shape, axis): of several class axes, of none in a row, of one, and of no rows.
LAYOUTS: list[tuple[tuple[int, ...], Any]] = [((2, 3), -1), ((2, 1, 2), (2, 0))]
LAYOUTS += [((1, 0), 1)]
if THOROUGH:
    LAYOUTS += [((0, 2), -1), ((1,), None), ((3, 2), -2), ((1, 5), (1,)), ((4,), 0)]
DTYPES = ["float32"]
if THOROUGH:
    DTYPES += ["bfloat16", "float16", "float64"]

FLOAT32 = np.finfo(np.float32)
# Subnormal ones; gaps that leave a small tail (7, 16) or a subnormal one (88, 104).
AWKWARD = [0.0, 1e-45, 1e-38, 1e-30, 1e-3, 1.0, 7.0, 16.0, 88.0, 104.0, 1e3, 1e8, 1e38]


def floats(awkward: list[float]) -> st.SearchStrategy[float]:
    """Awkward numbers, their negatives, and any other."""
    signed = [float(np.float32(sign * v)) for v in awkward for sign in (1, -1)]
    return st.sampled_from(signed) | st.floats(allow_nan=False, width=32)


LOGITS = floats([*AWKWARD, np.inf])
# From 8.5e37 on, 1 / temperature is subnormal, and processors flush it to 0.
TEMPERATURES = floats(AWKWARD[:-1]).filter(lambda t: abs(t) < 1e37)


def of_logits(name: str) -> Any:
    return lambda x, y, labels, **options: getattr(jaxsoft, name)(x, **options)


def divergence(x, y, labels, **options):
    return jaxsoft.kl_divergence(y, x, **options)


def loss(x, y, labels, **options):
    return jaxsoft.cross_entropy(x, labels, **options)


def multilabel(x, y, labels, temperature, **options):
    return jaxsoft.multilabel_cross_entropy(x, y > 0, **options)


ALONE = ("logsumexp", "logmeanexp", "softmax", "log_softmax", "entropy")
ALONE += ("boltzmann_max", "softargmax")
# Of logits, others and labels along an axis.
OF_ROWS: dict[str, Any] = {
    **{name: of_logits(name) for name in ALONE},
    "kl_divergence": divergence,
    "cross_entropy": loss,
    "cross_entropy, z_loss": functools.partial(loss, z_loss=0.1, label_smoothing=0.1),
    "multilabel_cross_entropy": multilabel,
}


def of_numbers(name: str) -> Any:
    """The function of x, or of x and y where it has two arguments."""
    f, of_two = getattr(jaxsoft, name), name in ("smooth_maximum", "smooth_minimum")
    return lambda x, y, t: f(*((x, y) if of_two else (x,)), temperature=t)


ELEMENTWISE = ("softplus", "smooth_abs", "smooth_sign", "smooth_step")
ELEMENTWISE += ("smooth_maximum", "smooth_minimum")
OF_NUMBERS: dict[str, Any] = {
    **{name: of_numbers(name) for name in ELEMENTWISE},
    "smooth_clip": lambda x, y, t: jaxsoft.smooth_clip(x, -1.0, y, temperature=t),
    "binary_cross_entropy": lambda x, y, t: jaxsoft.binary_cross_entropy(x, y > 0),
}


@functools.cache
def program(axis: Any) -> Any:
    """Values, gradients in logits and temperature, and tangents in the logits."""

    def derivatives(f, x, t):
        value, pull = jax.vjp(f, x, t)
        tangent = jax.jvp(lambda x: f(x, t), (x,), (jnp.ones_like(x),))[1]
        in_x, in_t = pull(jnp.ones_like(value))
        return {"value": value, "in x": in_x, "in t": in_t, "tangent": tangent}

    @jax.jit
    def everything(x, y, where, labels, t):
        results = {}
        # Of its own for each, or infinite derivatives of both signs would be summed.
        per_row = jnp.sum(where, axis, keepdims=True).shape
        for name, function in OF_ROWS.items():
            f = functools.partial(function, labels=labels, axis=axis, where=where)
            results[name] = derivatives(
                lambda x, t, f=f: f(x, y, temperature=t),
                x,
                jnp.broadcast_to(t, per_row),
            )
        x_or_0, y_or_0 = (jnp.where(where, v, 0) for v in (x, y))
        for name, f in OF_NUMBERS.items():
            results[name] = derivatives(
                lambda x, t, f=f: f(x, y_or_0, t), x_or_0, jnp.broadcast_to(t, x.shape)
            )
        return results

    return everything


def by_rows(x: Any, axis: Any) -> np.ndarray:
    """Of shape (rows, classes), the classes in the order of axis."""
    x = np.asarray(x)
    axes = [a % x.ndim for a in (range(x.ndim) if axis is None else np.ravel(axis))]
    rows = [i for i in range(x.ndim) if i not in axes]
    count, classes = (int(np.prod([x.shape[i] for i in of])) for of in (rows, axes))
    return np.transpose(x, (*rows, *axes)).reshape(count, classes)


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    shape, axis = draw(st.sampled_from(LAYOUTS))
    size = int(np.prod(shape))

    def array(of: st.SearchStrategy[Any]) -> np.ndarray:
        return np.array(draw(st.lists(of, min_size=size, max_size=size))).reshape(shape)

    x, y, where = array(LOGITS), array(LOGITS), array(st.booleans()).astype(bool)
    rows, classes = by_rows(x, axis).shape
    label = st.sampled_from([-100, *range(classes)])
    labels = draw(st.lists(label, min_size=rows, max_size=rows))
    t = draw(TEMPERATURES)
    return {"x": x, "y": y, "where": where, "labels": labels, "axis": axis, "t": t}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(problem=problems())
def test_no_nan_and_the_numbers_of_the_formulas(dtype: str, problem: dict[str, Any]):
    check_problem(dtype, problem)


def test_some_problems_of_the_search():
    """With a shape, and with numbers that are mostly the awkward ones."""
    rng = np.random.default_rng(20251121)
    shape, axis = LAYOUTS[0]
    for _ in range(40):
        awkward = rng.choice([*AWKWARD, np.inf], (2, *shape))
        x, y = np.float32(rng.choice([-1, 1], awkward.shape) * awkward)
        t = float(np.float32(rng.choice([-1, 1]) * rng.choice(AWKWARD[:-1])))
        where = rng.random(shape) < 0.8
        labels = rng.choice([-100, 0, 1, 2], shape[0])
        problem = {"x": x, "y": y, "where": where, "labels": labels}
        check_problem("float32", {**problem, "axis": axis, "t": t})


def check_problem(dtype: str, problem: dict[str, Any]) -> None:
    axis, where = problem["axis"], problem["where"]
    with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        x, y = (jnp.asarray(problem[name]).astype(dtype) for name in ("x", "y"))
        wide = dtype if dtype == "float64" else "float32"
        t = jnp.asarray(problem["t"]).astype(wide)
        reduced = jax.eval_shape(lambda x: jnp.sum(x, axis), x).shape
        labels = np.array(problem["labels"], np.int32).reshape(reduced)
        # A NaN that is masked is in nobody's way.
        given = [jnp.where(where, v, jnp.nan) for v in (x, y)]
        results = jax.tree.map(
            lambda v: np.asarray(v, np.float64),
            program(axis)(*given, where, labels, t),
        )
    for name, numbers in results.items():
        for what, array in numbers.items():
            assert not np.any(np.isnan(array)), (name, what, dtype, problem)
    if dtype == "float32":
        check_formulas(results, np.asarray(x), where, labels, axis, float(t))


MP = oracle.MP
FAR, COLD = MP.mpf(10) ** 120, MP.mpf(10) ** -100  # for infinity, and temperature 0
DIGITS = 350  # of which 220 are those of FAR / COLD
# exp makes 88 times as much of the roundings of (x - m) / t, as relative errors.
RELATIVE = 2e-5
FLOOR = 1e-33  # what a sum loses where processors flush to 0


def assert_near(actual: Any, wanted: Any, scale: Any, what: str) -> None:
    """To a part of the number, or of the larger terms that it is a sum of."""
    largest = FLOAT32.max * (1 - RELATIVE)
    for a, w, s in zip(*map(np.ravel, (actual, wanted, scale)), strict=True):
        if abs(w) > largest:  # or infinite
            near = abs(a) > largest and np.sign(a) == MP.sign(w)
        else:
            allowed = RELATIVE * float(min(abs(s), MP.mpf(10) ** 300)) + FLOOR
            near = abs(a - float(w)) <= allowed
        assert near, f"{what}: {a}, and by the formula {float(w)}"


def check_formulas(results: Any, x: Any, where: Any, labels: Any, axis: Any, t: float):
    if np.any(np.abs(x[where & (x != 0)]) < 1e-30):
        return  # by what these differ is flushed to 0
    with MP.workdps(DIGITS):
        tau = oracle.exact(t).item()
        if abs(t) < FLOAT32.tiny:
            tau = -COLD if t < 0 else COLD
        x = oracle.at_limit(x, FAR)
        rows = zip(by_rows(x, axis), by_rows(where, axis), np.ravel(labels))
        for row, (numbers, counts, label) in enumerate(rows):
            included = np.flatnonzero(counts)
            # A row without anything is in test_stability.py.
            if included.size and max(numbers[included] / tau) > -FAR / abs(tau):
                of_row = {
                    (name, what): by_rows(results[name][what], axis)[row, included]
                    if what == "in x" or "softmax" in name
                    else np.ravel(results[name][what])[row]
                    for name in OF_ROWS
                    for what in ("value", "in x")
                }
                check_row(of_row, numbers[included], included, int(label), tau)
        for name in ("softplus", "smooth_abs", "smooth_step", "smooth_sign"):
            wanted = getattr(oracle, name)(x[where], temperature=tau)
            flushed = abs(tau) * MP.mpf(10) ** -28  # t times what exp loses / RELATIVE
            flushed = flushed if name in ("softplus", "smooth_abs") else 0
            scale = np.abs(wanted) + flushed
            assert_near(results[name]["value"][where], wanted, scale, name)


def check_row(of_row: Any, x: Any, included: Any, label: int, tau: Any) -> None:
    def meaning(name: str, **options: Any) -> Any:
        return getattr(oracle, name)(x[None], temperature=tau, **options)[0]

    value = {name: of_row[name, "value"] for name in OF_ROWS}
    p, nll = meaning("softmax"), -meaning("log_softmax")
    m = x[np.argmax(x / tau)]
    scale = abs(m) + abs(tau) * MP.log(len(x))
    for name in ("logsumexp", "logmeanexp"):
        assert_near(value[name], meaning(name), scale, name)
    scale = abs(m) + np.sum(p * np.abs(x - m))
    assert_near(value["boltzmann_max"], np.sum(p * x), scale, "boltzmann_max")
    position = np.sum(p * included)
    for name, wanted in [
        ("entropy", meaning("entropy")),
        ("softargmax", position),
        ("softmax", p),
    ]:
        assert_near(value[name], wanted, wanted, name)
    assert_near(value["log_softmax"], -nll, nll, "log_softmax")
    assert_near(of_row["logsumexp", "in x"], p, p, "logsumexp in x")
    loss = value["cross_entropy"]
    if label == -100:
        assert loss == 0
    elif label not in included:
        assert loss == np.inf
    else:
        of_label = nll[included == label]
        assert_near(loss, of_label, of_label, "cross_entropy")
