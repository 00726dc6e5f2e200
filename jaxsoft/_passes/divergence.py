"""The pass that compares two rows of logits, and its pullback.

The letters of `logits` are here twice, for one temperature and one mask: x, m, s, d and
p are those of the target, y, n, r, b and q those of the prediction. With

    delta_i = log q_i - log p_i        phi(delta) = exp(delta) - 1 - delta >= 0

the divergence is

    KL = sum_i p_i log(p_i / q_i) = sum_i p_i phi(delta_i)

since sum_i p_i exp(delta_i) = sum_i q_i = 1: a sum of positive terms, of second order
in the difference of the distributions, as the divergence itself is. What rounding has
made of delta is delta + epsilon, the same in all classes, and known from

    exp(epsilon) - 1 = A = sum_i p_i (exp(delta_i + epsilon) - 1)
    KL = sum_i p_i phi(delta_i + epsilon) - (A - log(1 + A))

Both sums are of the same exponentials. One reduction has them together: of two, XLA
writes the exponentials to memory, as large as the logits.
"""

import math
from collections.abc import Callable
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
    sign_of,
    size_of,
    zero_if_infinite,
)
from jaxsoft._core.mesh import Axes, device_sum, row_sum
from jaxsoft._passes import native
from jaxsoft._passes.merge import Summary
from jaxsoft._passes.primitive import Form, Pass
from jaxsoft._passes.slopes import pull_and_push
from jaxsoft._passes.summary import (
    NO_RIDERS,
    Reduction,
    Riders,
    by_merge,
    in_block,
    maximum_first,
    over_devices,
    without_nothing,
)


class Divergence(NamedTuple):
    """What two rows come to, a number per row each."""

    m: Array
    s: Array
    n: Array
    r: Array
    epsilon: Array
    kl: Array


class Rows(NamedTuple):
    """The target's logits, and those of the prediction, of one mask and temperature."""

    target: Logits
    prediction: Array

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


def _reduced(logits: Logits, m: Array, s: Array) -> Reduced:
    z, t = masked_logits(logits), size_of(logits.temperature)
    half = jnp.where(jnp.isinf(z) | jnp.isinf(m), 0, z) / 2
    half_m = zero_if_infinite(m) / 2
    return Reduced(half, half_m, shifted(z, m, t), exp_shifted(z, m, t), s)


def _compared(
    x: Reduced, y: Reduced, temperature: Array | None, epsilon: Any = 0
) -> Compared:
    p, q = (row.e * (1 / (1 + row.s)) for row in (x, y))
    delta = _log_ratio(x, y, temperature) - epsilon
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


# As p exp(delta) = q, a class with p = 0 keeps its q. The last bits of the general form
# of p phi may be below 0.
def _terms(of: Compared) -> tuple[Array, Array]:
    """p phi(delta), p (exp(delta) - 1)."""
    general = jnp.maximum(of.q - of.p * (1 + of.delta), 0)
    phi = jnp.where(of.near, of.p * _exp_minus_line(of.small), general)
    return phi, _change(of)


def _change(of: Compared) -> Array:
    """q - p = p (exp(delta) - 1)."""
    change = of.p * (of.small + _exp_minus_line(of.small))
    return jnp.where(of.near, change, of.q - of.p)


def _exp_minus_line(v: Array) -> Array:
    """exp(v) - 1 - v by its Taylor series, for |v| < 1/2."""
    terms = 14 if v.dtype == jnp.float64 else 8
    polynomial = jnp.full_like(v, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        polynomial = polynomial * v + 1 / math.factorial(k)
    return polynomial * v**2


def _known_epsilon(excess: Array) -> tuple[Array, Array]:
    """epsilon = log(1 + A), and A; 0 where A is no rounding, but infinite or NaN."""
    excess = jnp.where(jnp.abs(excess) < 0.5, excess, 0)
    return jnp.log1p(excess), excess


def _numbers(x: Summary, y: Summary, is_empty: Any, sums: Any) -> Divergence:
    phi, excess = sums
    epsilon, excess = _known_epsilon(excess)
    kl = jnp.where(is_empty, 0, jnp.maximum(phi - (excess - epsilon), 0))
    return Divergence(x.m, x.s, y.m, y.s, epsilon, kl)


Summarize = Callable[[Axes, Logits, Riders], Summary | None]
Total = Callable[[Axes, tuple[Array, Array]], Any]


def _form(summarize: Summarize, total: Total) -> Form:
    """A form of the pass, made of a reduction of a row and one of two arrays."""

    def form(axes, rows, _):
        of_x, of_y = (summarize(axes, logits, NO_RIDERS) for logits in rows.both)
        if of_x is None or of_y is None:
            return None
        of_x, of_y = _of_all_devices(axes, rows.temperature, (of_x, of_y))
        sums = total(axes, _terms_about(rows, of_x, of_y))
        if axes.mesh_names:
            sums = device_sum(jnp.stack(sums), axes.mesh_names)
        return _numbers(of_x, of_y, jnp.isneginf(of_x.m), sums)

    return form


def _terms_about(rows: Rows, of_x: Summary, of_y: Summary) -> tuple[Array, Array]:
    x, y = rows.both
    x, y = _reduced(x, of_x.m, of_x.s), _reduced(y, of_y.m, of_y.s)
    return _terms(_compared(x, y, rows.temperature))


def _of_all_devices(axes: Axes, temperature: Any, summaries: tuple[Any, Any]) -> Any:
    """In the messages of one row."""
    if not axes.mesh_names:
        return summaries
    t = size_of(temperature)
    stacked = [v._replace(temperature=t) for v in summaries]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *stacked)
    stacked = without_nothing(over_devices(axes.mesh_names, stacked))
    return [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(2)]


def _by(reduce: Reduction) -> Summarize:
    return lambda *given: reduce(*given).summary


def _apart(axes, terms):
    return [jnp.sum(v, axes.dims, keepdims=True) for v in terms]


def _together(axes, terms):
    """As the parts of complex numbers. Of a reduction of two arrays XLA computes each
    for itself, and writes to memory what they share."""
    total = jnp.sum(jax.lax.complex(*terms), axes.dims, keepdims=True)
    return [total.real, total.imag]


_by_merge = _form(_by(by_merge), _together)


# One kernel of XLA. That ends where the logits are used after their maximum is
# subtracted, but for the operand itself, and where a temperature divides.
def _in_block(axes, rows, _):
    if rows.temperature is not None or axes.mesh_names:
        return _by_merge(axes, rows, ())
    (of_x, of_y), (x, y) = _both_in_block(axes, rows)
    sums = _apart(axes, _terms(_compared(x, y, None)))
    return _numbers(of_x.summary, of_y.summary, of_x.is_empty, sums)


def _both_in_block(axes, rows):
    """The two rows as a reduction leaves them, and as they are compared."""
    of = [in_block(axes, logits, NO_RIDERS) for logits in rows.both]
    return of, [_reduced_in_block(axes, v, row) for v, row in zip(rows.both, of)]


def _reduced_in_block(axes, logits, row):
    largest = float(jnp.finfo(row.d.dtype).max)
    # Below an infinite maximum, which `in_block` takes for the largest number.
    d = jnp.where(row.d <= -largest, -jnp.inf, row.d)
    if logits.x.dtype.itemsize < 4:
        # A difference of theirs is exact, unless one is 2^13 times the other.
        half, half_m = zero_if_infinite(d) / 2, jnp.zeros_like(row.summary.s)
    else:
        half = zero_if_infinite(logits.x) / 2
        half_m = jnp.max(jnp.where(d == 0, half, -largest), axes.dims, keepdims=True)
    return Reduced(half, half_m, d, jnp.exp(d), row.summary.s)


def _native(axes, rows, _):
    return _form(native.summary, _apart)(axes, rows, ())


# With the maxima held fixed.
def _smooth(axes, rows, _, results):
    m, s, n, r, *_ = results
    tails = [_smooth_tail(axes, *of) for of in zip(rows.both, (m, n), (s, r))]
    of_x, of_y = Summary(m, tails[0]), Summary(n, tails[1])
    sums = [row_sum(v, axes) for v in _terms_about(rows, of_x, of_y)]
    return _numbers(of_x, of_y, jnp.isneginf(m), sums)


def _smooth_tail(axes, logits, m, s):
    e = exp_shifted(masked_logits(logits), m, size_of(logits.temperature))
    return override_primal(s, True, row_sum(e, axes))


_divergence = Pass(
    "divergence",
    _form(_by(maximum_first), _apart),
    merged=_by_merge,
    in_block=_in_block,
    native=_native,
    smooth=_smooth,
)


def divergence(axes: Axes, rows: Rows) -> Divergence:
    """The arrays keep the class axes with size 1."""
    return _divergence(axes, rows)


# The derivatives of KL:
#     t dz_y = q_i - p_i
#     t dz_x = p_i (log(p_i / q_i) - KL) = -p_i (delta_i + KL)
#     t dt   = -sum_i (t dz_x d_i + t dz_y b_i)
def _slopes(axes, rows, of):
    """Those in z_x, z_y and, of the classes that are here, the temperature; the last
    is None without one."""
    x = _reduced(rows.both[0], of.m, of.s)
    y = _reduced(rows.both[1], of.n, of.r)
    compared = _compared(x, y, rows.temperature, of.epsilon)
    in_x, in_y = _slopes_over_t(compared, of.kl, jnp.isneginf(of.m))
    if rows.temperature is None:
        return in_x, in_y, None
    per_t = inverse_temperature(rows.temperature)
    d, b = (zero_if_infinite(v.d) for v in (x, y))
    both = jnp.sum(in_x * d + in_y * b, axes.dims, keepdims=True)
    in_t = -sign_of(rows.temperature) * both
    return in_x * per_t, in_y * per_t, in_t * per_t


def _slopes_over_t(of, kl, is_empty):
    infinite = jnp.isinf(kl)
    in_x = -of.p * (of.delta + jnp.where(infinite, 0, kl))
    in_x = jnp.where(infinite | (of.p == 0), 0, in_x)
    return in_x, jnp.where(is_empty, 0, _change(of))


# For a derivative the block is reduced anew, and for that of the target once more: to
# write the numbers of the rows, or two arrays, ends the one kernel.
def _slopes_in_block(axes, rows, of):
    if rows.temperature is not None or axes.mesh_names:
        return _slopes(axes, rows, of)
    in_y = _prediction_slopes_of_a_kernel(axes, rows)
    rows = jax.tree.map(jax.lax.optimization_barrier, rows)
    return _target_slopes_of_a_kernel(axes, rows), in_y, None


def _prediction_slopes_of_a_kernel(axes, rows):
    (of_x, _), (x, y) = _both_in_block(axes, rows)
    _, excess = _apart(axes, _terms(_compared(x, y, None)))
    change = _change(_compared(x, y, None, _known_epsilon(excess)[0]))
    is_empty: Any = of_x.is_empty
    return jnp.where(is_empty, 0, change)


# Here -sum_i p_i delta_i is KL enough: what rounding has made of all delta alike leaves
# the difference, and no smaller one is wanted than delta itself has digits for.
def _target_slopes_of_a_kernel(axes, rows):
    _, (x, y) = _both_in_block(axes, rows)
    of = _compared(x, y, None)
    mean = jnp.sum(of.p * of.delta, axes.dims, keepdims=True)
    infinite = jnp.isinf(mean)
    in_x = -of.p * (of.delta - jnp.where(infinite, 0, mean))
    return jnp.where(infinite | (of.p == 0), 0, in_x)


_divergence_pull, _divergence_push = pull_and_push(
    "divergence", _slopes, _slopes_in_block
)


def divergence_pull(axes: Axes, rows: Rows, of: Divergence, g: Array) -> Any:
    """The cotangents of z_x, z_y and the temperature, for a cotangent g of kl; the last
    is None without a temperature."""
    dz_x, dz_y, dt = _divergence_pull(axes, (rows, of), g)
    return dz_x, dz_y, None if dt is None else device_sum(dt, axes.mesh_names)
