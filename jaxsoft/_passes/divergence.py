"""The pass that compares two rows of logits, and its pullback.

The formulas are those of `compared`. One reduction has all sums of a row together: of
two, XLA writes the exponentials to memory, as large as the logits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import (
    Logits,
    exp_shifted,
    inverse_temperature,
    masked_logits,
    override_primal,
    sign_of,
    size_of,
    zero_if_infinite,
)
from jaxsoft._core.mesh import Axes, device_sum, row_sum
from jaxsoft._passes import native
from jaxsoft._passes.compared import (
    Divergence,
    Reduced,
    Rows,
    change,
    compared,
    divergence_of,
    is_empty,
    known_epsilon,
    reduced,
    slopes_over_t,
    terms,
)
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

Summarize = Callable[[Axes, Logits, Riders], Summary | None]
Total = Callable[[Axes, tuple[Array, ...]], Any]


def _form(summarize: Summarize, total: Total) -> Form:
    """A form of the pass, made of a reduction of a row and one of two arrays."""

    def form(axes, rows, _):
        of_x, of_y = (summarize(axes, logits, NO_RIDERS) for logits in rows.both)
        if of_x is None or of_y is None:
            return None
        of_x, of_y = both_of_all_devices(axes, rows.temperature, (of_x, of_y))
        sums = total(axes, _terms_about(rows, of_x, of_y))
        if axes.mesh_names:
            sums = device_sum(jnp.stack(sums), axes.mesh_names)
        empty = is_empty(of_x.m, of_y.m, rows.beta)
        return divergence_of(of_x, of_y, empty, sums, rows.beta)

    return form


def _terms_about(rows: Rows, of_x: Summary, of_y: Summary) -> tuple[Array, ...]:
    x, y = rows.both
    x, y = reduced(x, of_x.m, of_x.s), reduced(y, of_y.m, of_y.s)
    return terms(compared(x, y, rows.temperature), rows.beta)


def both_of_all_devices(
    axes: Axes, temperature: Any, summaries: tuple[Any, Any]
) -> Any:
    """Two summaries, in the messages of one."""
    if not axes.mesh_names:
        return summaries
    t = size_of(temperature)
    stacked = [v._replace(temperature=t) for v in summaries]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *stacked)
    stacked = without_nothing(over_devices(axes.mesh_names, stacked))
    return [jax.tree.map(lambda v, i=i: v[i], stacked) for i in range(2)]


def _by(reduce: Reduction) -> Summarize:
    return lambda *given: reduce(*given).summary


def _apart(axes, of_classes):
    return [jnp.sum(v, axes.dims, keepdims=True) for v in of_classes]


def _together(axes, of_classes):
    """Two as the parts of complex numbers. Of a reduction of two arrays XLA computes
    each for itself, and writes to memory what they share."""
    *first, last_but_one, last = of_classes
    total = jnp.sum(jax.lax.complex(last_but_one, last), axes.dims, keepdims=True)
    return [*_apart(axes, first), total.real, total.imag]


_by_merge = _form(_by(by_merge), _together)


# One kernel of XLA. That ends where the logits are used after their maximum is
# subtracted, but for the operand itself, and where a temperature divides.
def _in_block(axes, rows, _):
    if _leaves_a_block(axes, rows):
        return _by_merge(axes, rows, ())
    (of_x, of_y), (x, y) = _both_in_block(axes, rows)
    sums = _apart(axes, terms(compared(x, y, None)))
    return divergence_of(of_x.summary, of_y.summary, of_x.is_empty, sums, 0)


def _leaves_a_block(axes, rows):
    return rows.temperature is not None or bool(axes.mesh_names) or rows.beta > 0


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
    return divergence_of(of_x, of_y, is_empty(m, n, rows.beta), sums, rows.beta)


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


# With the slopes t dz of the two rows,
#     t dt = -sum_i (t dz_x d_i + t dz_y b_i)
def _slopes(axes, rows, of):
    """Those in z_x, z_y and, of the classes that are here, the temperature; the last
    is None without one."""
    x = reduced(rows.both[0], of.m, of.s)
    y = reduced(rows.both[1], of.n, of.r)
    of_classes = compared(x, y, rows.temperature, of.epsilon)
    in_x, in_y = slopes_over_t(of_classes, of, rows.beta)
    if rows.temperature is None:
        return in_x, in_y, None
    per_t = inverse_temperature(rows.temperature)
    d, b = (zero_if_infinite(v.d) for v in (x, y))
    both = jnp.sum(in_x * d + in_y * b, axes.dims, keepdims=True)
    in_t = -sign_of(rows.temperature) * both
    return in_x * per_t, in_y * per_t, in_t * per_t


# For a derivative the block is reduced anew, and for that of the target once more: to
# write the numbers of the rows, or two arrays, ends the one kernel.
def _slopes_in_block(axes, rows, of):
    if _leaves_a_block(axes, rows):
        return _slopes(axes, rows, of)
    in_y = _prediction_slopes_of_a_kernel(axes, rows)
    rows = jax.tree.map(jax.lax.optimization_barrier, rows)
    return _target_slopes_of_a_kernel(axes, rows), in_y, None


def _prediction_slopes_of_a_kernel(axes, rows):
    (of_x, _), (x, y) = _both_in_block(axes, rows)
    _, excess = _apart(axes, terms(compared(x, y, None)))
    of = compared(x, y, None, known_epsilon(excess)[0])
    empty: Any = of_x.is_empty
    return jnp.where(empty, 0, change(of))


# Here -sum_i p_i delta_i is KL enough: what rounding has made of all delta alike leaves
# the difference, and no smaller one is wanted than delta itself has digits for.
def _target_slopes_of_a_kernel(axes, rows):
    _, (x, y) = _both_in_block(axes, rows)
    of = compared(x, y, None)
    mean = jnp.sum(of.p * of.delta, axes.dims, keepdims=True)
    infinite = jnp.isinf(mean)
    in_x = -of.p * (of.delta - jnp.where(infinite, 0, mean))
    return jnp.where(infinite | (of.p == 0), 0, in_x)


_divergence_pull, _divergence_push = pull_and_push(
    "divergence", _slopes, _slopes_in_block
)


def divergence_pull(axes: Axes, rows: Rows, of: Divergence, g: Array) -> Any:
    """The cotangents of z_x, z_y and the temperature, for a cotangent g of the mixed
    divergence; the last is None without a temperature."""
    dz_x, dz_y, dt = _divergence_pull(axes, (rows, of), g)
    return dz_x, dz_y, None if dt is None else device_sum(dt, axes.mesh_names)
