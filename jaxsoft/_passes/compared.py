"""Two rows of logits, compared class by class: the formulas of their divergence.

The letters of `logits` are here twice, for one temperature and one mask: x, m, s, d and
p are those of the target, y, n, r, b and q those of the prediction. With

    delta_i = log q_i - log p_i        phi(delta) = exp(delta) - 1 - delta >= 0

the Kullback-Leibler divergence is

    KL(p || q) = sum_i p_i log(p_i / q_i) = sum_i p_i phi(delta_i)

since sum_i p_i exp(delta_i) = sum_i q_i = 1: a sum of positive terms, of second order
in the difference of the distributions, as the divergence itself is. The divergence of
Jensen and Shannon is two of these, from the mixture M = beta p + (1 - beta) q:

    JS = beta KL(p || M) + (1 - beta) KL(q || M)
    log(M_i / p_i) = log(1 + (1 - beta) (exp(delta_i) - 1))
    log(M_i / q_i) = log(1 + beta (exp(-delta_i) - 1))

What rounding has made of delta is delta + epsilon, the same in all classes, and known
from A = sum_i p_i (exp(delta_i + epsilon) - 1) = exp(epsilon) - 1. The sums of phi are
too large by

    A - log(1 + A)    for KL(p || q)
    (1 - beta)^2 of this for KL(p || M), and beta^2 of this for KL(q || M)

but for epsilon^3. All sums are of the same exponentials.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import (
    Logits,
    exp_shifted,
    inverse_temperature,
    is_hard,
    is_maximum,
    masked_logits,
    override_primal,
    rounding_of_difference,
    shifted,
    size_of,
    zero_if_infinite,
)


class Divergence(NamedTuple):
    """What two rows come to, a number per row each."""

    m: Array
    s: Array
    n: Array
    r: Array
    epsilon: Array
    kl: Array  # KL(p || M), or with beta 0 KL(p || q)
    reverse: Array | None = None  # KL(q || M)

    def mixed(self, beta: float) -> Array:
        """The divergence: with beta 0 that of Kullback and Leibler."""
        if self.reverse is None:
            return self.kl
        return beta * self.kl + (1 - beta) * self.reverse


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("target", "prediction"),
    meta_fields=("beta",),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """The target's logits, and those of the prediction, of one mask and temperature;
    and the target's part in the mixture, from 0 (no mixture, but the prediction) to
    less than 1."""

    target: Logits
    prediction: Array
    beta: float = 0.0

    @property
    def both(self) -> tuple[Logits, Logits]:
        return self.target, self.target._replace(x=self.prediction)

    @property
    def temperature(self) -> Array | None:
        return self.target.temperature


class Reduced(NamedTuple):
    """One of the two rows. half and half_m are z/2 and m/2, finite: where one of them
    is infinite they are 0, and d tells."""

    half: Array
    half_m: Array
    d: Array
    e: Array
    s: Array


class Compared(NamedTuple):
    """Of every class. small is delta where that is near 0, and 0 elsewhere."""

    p: Array
    q: Array
    delta: Array
    near: Array
    small: Array


def reduced(logits: Logits, m: Array, s: Array) -> Reduced:
    z, t = masked_logits(logits), size_of(logits.temperature)
    half = jnp.where(jnp.isinf(z) | jnp.isinf(m), 0, z) / 2
    half_m = zero_if_infinite(m) / 2
    return Reduced(half, half_m, shifted(z, m, t), exp_shifted(z, m, t), s)


def compared(
    x: Reduced, y: Reduced, temperature: Array | None, epsilon: Any = 0
) -> Compared:
    p, q = (row.e * (1 / (1 + row.s)) for row in (x, y))
    return _with_log_ratio(p, q, _log_ratio(x, y, temperature) - epsilon)


def _with_log_ratio(p: Array, q: Array, delta: Array) -> Compared:
    near = (jnp.abs(delta) < 0.5) & (p > 0)
    return Compared(p, q, delta, near, jnp.where(near, delta, 0))


# (z_y - n) - (z_x - m) = (z_y - z_x) - (n - m), where the first form would lose the
# digits of a delta that is far smaller than z - m. In halves, whose difference does not
# overflow; and with the roundings of both differences, which are known exactly.
def _log_ratio(x: Reduced, y: Reduced, temperature: Array | None) -> Array:
    """delta + epsilon, and 0 where p is 0."""
    gap, rounding = _difference(y.half, x.half)
    shift, rounding_of_shift = _difference(y.half_m, x.half_m)
    gap = 2 * ((gap - shift) + (rounding - rounding_of_shift))
    # XLA may have computed the logits of the maximum anew, and not to the same bits.
    gap = override_primal(0, is_maximum(x.d, x.s) & is_maximum(y.d, y.s), gap)
    ratio = _over_temperature(gap, x, y, temperature)
    ratio = ratio - (jnp.log1p(y.s) - jnp.log1p(x.s))
    return jnp.where(x.e == 0, 0, ratio)


def _difference(a: Array, b: Array) -> tuple[Array, Array]:
    """a - b of two halves, which is finite, and what this lacks. A choice between
    numbers here would end the one kernel of a block."""
    difference = a - b
    rounding = rounding_of_difference(a, b, difference)
    return difference, jax.lax.stop_gradient(rounding)


def _over_temperature(gap, x, y, temperature):
    """gap/t; of the d at infinite logits and at t = 0."""
    by_d = jnp.isneginf(y.d)
    if temperature is not None:
        by_d = by_d | is_hard(temperature)
        gap = jnp.where(by_d, 0, gap) * inverse_temperature(temperature)
    return jnp.where(by_d, y.d - zero_if_infinite(x.d), gap)


def to_mixture(of: Compared, beta: float) -> tuple[Compared, Compared]:
    """p and q, each compared with M. Where delta is near 0 both logarithms are taken of
    a number near 1; where it is not, one of them is, and their difference is delta."""
    mixture = beta * of.p + (1 - beta) * of.q
    up = jnp.log1p((1 - beta) * jnp.expm1(jnp.minimum(of.delta, 0.5)))
    down = jnp.log1p(beta * jnp.expm1(jnp.minimum(-of.delta, 0.5)))
    # M is at least beta p, and at least (1 - beta) q. In float32 1 - beta may be 1.
    least, least_of_q = math.log(beta), math.log1p(-beta)
    up, down = jnp.maximum(up, least), jnp.maximum(down, least_of_q)
    of_p = jnp.where(of.delta < 0.5, up, down + of.delta)
    of_q = jnp.where(of.delta > -0.5, down, up - of.delta)
    of_q = jnp.where(of.p == 0, least_of_q, of_q)
    return (
        _with_log_ratio(of.p, mixture, of_p),
        _with_log_ratio(of.q, mixture, jnp.where(of.q == 0, 0, of_q)),
    )


def terms(of: Compared, beta: float = 0.0) -> tuple[Array, ...]:
    """What is summed over the classes of a row, as `divergence_of` takes it."""
    if beta == 0:
        return _term(of), change(of)
    of_p, of_q = to_mixture(of, beta)
    return _term(of_p), _term(of_q), change(of)


# As p exp(delta) = q, a class with p = 0 keeps its q. The last bits of the general form
# of p phi may be below 0.
def _term(of: Compared) -> Array:
    """p phi(delta)."""
    general = jnp.maximum(of.q - of.p * (1 + of.delta), 0)
    return jnp.where(of.near, of.p * _exp_minus_line(of.small), general)


def change(of: Compared) -> Array:
    """q - p = p (exp(delta) - 1)."""
    of_small = of.p * (of.small + _exp_minus_line(of.small))
    return jnp.where(of.near, of_small, of.q - of.p)


def _exp_minus_line(v: Array) -> Array:
    """exp(v) - 1 - v by its Taylor series, for |v| < 1/2."""
    degree = 14 if v.dtype == jnp.float64 else 8
    polynomial = jnp.full_like(v, 1 / math.factorial(degree))
    for k in range(degree - 1, 1, -1):
        polynomial = polynomial * v + 1 / math.factorial(k)
    return polynomial * v**2


def known_epsilon(excess: Array) -> tuple[Array, Array]:
    """epsilon = log(1 + A), and A; 0 where A is no rounding, but infinite or NaN."""
    excess = jnp.where(jnp.abs(excess) < 0.5, excess, 0)
    return jnp.log1p(excess), excess


def divergence_of(x: Any, y: Any, is_empty: Any, sums: Any, beta: float) -> Divergence:
    """Of the two summaries, and the sums of `terms`."""
    *of_phi, excess = sums
    epsilon, excess = known_epsilon(excess)
    too_large = excess - epsilon

    def divergence(phi: Array, part: float) -> Array:
        surplus = too_large if part == 1 else part**2 * too_large
        return jnp.where(is_empty, 0, jnp.maximum(phi - surplus, 0))

    parts = (1 - beta, beta)
    kls = [divergence(phi, part) for phi, part in zip(of_phi, parts)]
    return Divergence(x.m, x.s, y.m, y.s, epsilon, *kls)


def is_empty(m: Array, n: Array, beta: float) -> Array:
    """Whether the divergence is 0 since one of the rows has no logit above -inf. Next
    to a target that has some, no prediction at all is an infinite KL."""
    return jnp.isneginf(m) if beta == 0 else jnp.isneginf(m) | jnp.isneginf(n)


# The derivatives of KL(p || q):
#     t dz_y = q_i - p_i
#     t dz_x = p_i (log(p_i / q_i) - KL) = -p_i (delta_i + KL)
# and of JS
#     t dz_x = -beta p_i (log(M_i / p_i) + KL(p || M))
#     t dz_y = -(1 - beta) q_i (log(M_i / q_i) + KL(q || M))
def slopes_over_t(of: Compared, row: Divergence, beta: float) -> tuple[Array, Array]:
    """t dz_x and t dz_y."""
    empty = is_empty(row.m, row.n, beta)
    if row.reverse is None:
        return _own_slope(of, row.kl), jnp.where(empty, 0, change(of))
    of_p, of_q = to_mixture(of, beta)
    in_x, in_y = _own_slope(of_p, row.kl), _own_slope(of_q, row.reverse)
    in_x, in_y = beta * in_x, (1 - beta) * in_y
    return jnp.where(empty, 0, in_x), jnp.where(empty, 0, in_y)


def _own_slope(of: Compared, kl: Array) -> Array:
    """-p (delta + KL), the derivative of KL(p || q) in log p."""
    infinite = jnp.isinf(kl)
    slope = -of.p * (of.delta + jnp.where(infinite, 0, kl))
    return jnp.where(infinite | (of.p == 0), 0, slope)
