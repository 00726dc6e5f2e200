"""Digits of values and gradients, beside the peers, against 80-digit arithmetic."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft
from evidence.points import SIZES, adversarial_rows, best_and_other
from evidence.tests import oracle

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Below, a dtype has few digits left, and processors flush to 0.
FLUSHED = {
    "float32": 1e-36,
    "bfloat16": 1e-36,
    "float16": 6.2e-5,
    "float64": 1e-300,
}
# The part of an exact number by which one may be off before it counts as wrong, if it
# is off by more than a unit in the last place.
WRONG = 1e-5
# Digits of the arithmetic: a tail of 1e-300 beside 1 has to keep 16.
DIGITS = {"float32": 80, "bfloat16": 80, "float16": 80, "float64": 340}
TAU = 0.75  # exact in every dtype, and no power of 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one size and dtype, and what functions want beside them."""

    x: np.ndarray
    best: np.ndarray
    other: np.ndarray

    @functools.cached_property
    def p(self) -> np.ndarray:
        return oracle.softmax(self.x)

    @property
    def one_class(self) -> np.ndarray:
        """A cotangent of one class, alternately the best and another: one row of the
        jacobian, in which nothing has to cancel."""
        chosen = np.where(np.arange(len(self.x)) % 2, self.best, self.other)
        return np.arange(self.x.shape[-1]) == chosen[:, None]

    @property
    def yes(self) -> np.ndarray:
        return np.arange(self.x.size).reshape(self.x.shape) % 2 == 0


@dataclasses.dataclass(frozen=True)
class Function:
    """The libraries that have it, called as f(logits, other), and its formula."""

    name: str
    of: dict[str, Callable[..., jax.Array]]
    value: Callable[[Rows], np.ndarray]
    # Of the sum of the values, or of one class of each row. None where a gradient is a
    # difference of two terms, whose digits it does not have (tests/test_precision.py).
    gradient: Callable[[Rows], np.ndarray] | None
    other: Callable[[Rows], Any] = lambda rows: ()
    cotangent: Callable[[Rows], Any] | None = None


def _multilabel_gradient(rows: Rows) -> np.ndarray:
    e = oracle.exp(np.where(rows.yes, -1, 1) * oracle.exact(rows.x))
    sums = [np.sum(np.where(rows.yes == k, e, 0), -1, keepdims=True) for k in (0, 1)]
    no_slope, yes_slope = (e / (1 + s) for s in sums)
    return np.where(rows.yes, -yes_slope, no_slope)


def _at_tau(rows: Rows) -> Rows:
    return Rows(oracle.exact(rows.x) / oracle.exact(TAU), rows.best, rows.other)


optax_indices = optax.softmax_cross_entropy_with_integer_labels


def jax_nn_indices(x: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of class indices, as one writes it with jax.nn."""
    return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], -1)[:, 0]


def _of_label(which: str, label: Callable[[Rows], np.ndarray]) -> Function:
    return Function(
        f"cross_entropy, {which}",
        {
            "jaxsoft": jaxsoft.cross_entropy,
            "jax.nn": jax_nn_indices,
            "optax": optax_indices,
        },
        lambda rows: oracle.cross_entropy(rows.x, label(rows)),
        lambda rows: oracle.cross_entropy_gradient(rows.p, label(rows)),
        label,
    )


FUNCTIONS = [
    Function(
        "logsumexp",
        {
            "jaxsoft": lambda x, _: jaxsoft.logsumexp(x, -1),
            "jax.nn": lambda x, _: jax.nn.logsumexp(x, -1),
        },
        lambda rows: oracle.logsumexp(rows.x),
        lambda rows: rows.p,
    ),
    Function(
        "softmax",
        {
            "jaxsoft": lambda x, _: jaxsoft.softmax(x),
            "jax.nn": lambda x, _: jax.nn.softmax(x),
        },
        lambda rows: rows.p,
        lambda rows: oracle.softmax_pullback(rows.p, rows.one_class),
        cotangent=lambda rows: rows.one_class,
    ),
    Function(
        "log_softmax",
        {
            "jaxsoft": lambda x, _: jaxsoft.log_softmax(x),
            "jax.nn": lambda x, _: jax.nn.log_softmax(x),
        },
        lambda rows: oracle.log_softmax(rows.x),
        lambda rows: oracle.log_softmax_pullback(rows.p, rows.one_class),
        cotangent=lambda rows: rows.one_class,
    ),
    Function(
        "entropy",
        {"jaxsoft": lambda x, _: jaxsoft.entropy(x)},
        lambda rows: oracle.entropy(rows.x),
        None,
    ),
    _of_label("label at the maximum", lambda rows: rows.best),
    _of_label("another label", lambda rows: rows.other),
    Function(
        f"cross_entropy at temperature {TAU}",
        {
            "jaxsoft": lambda x, y: jaxsoft.cross_entropy(x, y, temperature=TAU),
            "optax": lambda x, y: optax_indices(x / TAU, y),
        },
        lambda rows: oracle.cross_entropy(_at_tau(rows).x, rows.best),
        lambda rows: (
            oracle.cross_entropy_gradient(_at_tau(rows).p, rows.best)
            / oracle.exact(TAU)
        ),
        lambda rows: rows.best,
    ),
    Function(
        "kl_divergence",
        {
            "jaxsoft": lambda x, _: jaxsoft.kl_divergence(x, jnp.roll(x, 1, -1)),
            "optax": lambda x, _: optax.kl_divergence(
                jax.nn.log_softmax(x), jax.nn.softmax(jnp.roll(x, 1, -1))
            ),
        },
        lambda rows: oracle.kl_divergence(rows.x, np.roll(rows.x, 1, -1)),
        None,
    ),
    Function(
        "binary_cross_entropy",
        {
            "jaxsoft": jaxsoft.binary_cross_entropy,
            "optax": lambda x, y: optax.sigmoid_binary_cross_entropy(
                x, y.astype(x.dtype)
            ),
        },
        lambda rows: oracle.softplus(np.where(rows.yes, -rows.x, rows.x)),
        lambda rows: np.where(
            rows.yes, -oracle.smooth_step(-rows.x), oracle.smooth_step(rows.x)
        ),
        lambda rows: rows.yes,
    ),
    Function(
        "multilabel_cross_entropy",
        {"jaxsoft": jaxsoft.multilabel_cross_entropy},
        lambda rows: oracle.multilabel_cross_entropy(rows.x, rows.yes),
        _multilabel_gradient,
        lambda rows: rows.yes,
    ),
    Function(
        "softplus",
        {
            "jaxsoft": lambda x, _: jaxsoft.softplus(x),
            "jax.nn": lambda x, _: jax.nn.softplus(x),
        },
        lambda rows: oracle.softplus(rows.x),
        lambda rows: oracle.smooth_step(rows.x),
    ),
    Function(
        "smooth_step",
        {
            "jaxsoft": lambda x, _: jaxsoft.smooth_step(x),
            "jax.nn": lambda x, _: jax.nn.sigmoid(x),
        },
        lambda rows: oracle.smooth_step(rows.x),
        lambda rows: oracle.smooth_step(rows.x) * oracle.smooth_step(-rows.x),
    ),
    Function(
        "smooth_sign",
        {
            "jaxsoft": lambda x, _: jaxsoft.smooth_sign(x),
            "jax.nn": lambda x, _: jax.nn.tanh(x),
        },
        lambda rows: oracle.smooth_sign(rows.x),
        lambda rows: (
            4 * oracle.smooth_step(2 * rows.x) * oracle.smooth_step(-2 * rows.x)
        ),
    ),
]


def rows_of(dtype: str) -> Iterator[Rows]:
    """The rows of the tests, as the dtype holds them."""
    rng = np.random.default_rng(20251121)
    for size in SIZES:
        x = np.asarray(jnp.asarray(adversarial_rows(size, rng)).astype(dtype))
        yield Rows(x.astype(np.float64), *best_and_other(x, rng))


def roundings(actual: Any, exact: np.ndarray, dtype: str) -> tuple[Any, Any]:
    """(error in units of the last place of the dtype, whether it is wrong), of the
    numbers that the dtype has all digits of."""
    actual, nearest = np.asarray(actual, np.float64), oracle.rounded(exact)
    rest = oracle.rounded(exact - oracle.exact(nearest)) if dtype == "float64" else 0
    with np.errstate(invalid="ignore"):
        error = np.abs((actual - nearest) - rest)
    error = np.where(np.isfinite(error), error, np.inf)
    info = jnp.finfo(dtype)
    _, exponent = np.frexp(nearest)
    place = np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)
    wrong = (error > WRONG * np.abs(nearest)) & (error > place)
    # What is not flushed where it should be shows too.
    shows = np.maximum(np.abs(nearest), np.abs(actual) / 2) >= FLUSHED[dtype]
    return (error / place)[shows], wrong[shows]


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def value_and_gradient(
    f: Callable[..., jax.Array], compiled: Compiler
) -> Callable[..., Any]:
    @compiled
    def both(x, other, cotangent):
        value, pull = jax.vjp(lambda x: f(x, other), x)
        ones = jnp.ones_like(value) if cotangent is None else cotangent
        return value, pull(ones.astype(value.dtype))[0]

    return both


def summary(parts: list[tuple[Any, Any]]) -> dict[str, Any]:
    errors, wrong = map(np.concatenate, zip(*parts))
    worst = float(np.max(errors))
    return {
        "numbers": errors.size,
        "worst_ulp": worst if np.isfinite(worst) else "not finite",
        "median_ulp": float(np.median(errors)),
        "wrong_share": float(np.mean(wrong)),
    }


def measured(
    function: Function, dtype: str, rows: list[Rows], compiled: Compiler = jax.jit
) -> list[dict[str, Any]]:
    """One entry for each library."""
    with oracle.MP.workdps(DIGITS[dtype]):
        return _measured(function, dtype, rows, compiled)


def _measured(
    function: Function, dtype: str, rows: list[Rows], compiled: Compiler
) -> list[dict[str, Any]]:
    exact = [
        {
            "value": function.value(r),
            "gradient": function.gradient and function.gradient(r),
        }
        for r in rows
    ]
    entries = []
    for library, f in function.of.items():
        both = value_and_gradient(f, compiled)
        parts: dict[str, list[Any]] = {"value": [], "gradient": []}
        for r, wanted in zip(rows, exact):
            g = function.cotangent and jnp.asarray(function.cotangent(r))
            x = jnp.asarray(r.x).astype(dtype)
            for what, actual in zip(parts, both(x, function.other(r), g)):
                if wanted[what] is not None:
                    part = roundings(actual, wanted[what], dtype)
                    parts[what].append(part)
        entry = {"function": function.name, "dtype": dtype, "library": library}
        entries.append(entry | {what: summary(p) for what, p in parts.items() if p})
    return entries
