"""logcumsumexp: the log of the sum of exponentials of every prefix of an axis.

In the letters of `logits`, with the maximum m_i and the tail s_i of z_1, ..., z_i,

    L_i = sigma (m_i + t log(1 + s_i))
    dL_i/dx_j = p_ij = exp((z_j - m_i)/t) / (1 + s_i)        for j <= i, else 0

A cotangent g of L is pulled back with one more scan, of e_j = exp((z_j - m_j)/t):

    dx_j = sum_{i >= j} g_i p_ij
         = e_j sum_{i >= j} exp((m_j - m_i)/t) g_i / (1 + s_i)

All exponents are <= 0, since m never falls. The sum is not that of g_i exp(-L_i/t),
which overflows, nor the recurrence with the factors exp((L_j - L_{j+1})/t), which have
the rounding of L: 6e-5 at L = 1000. With u_i = sum_j p_ij (z_j - m_i)/t,

    dL_i/dtau = log(1 + s_i) - u_i, the entropy of the prefix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    as_axes,
    as_flag,
    as_integer,
    as_mask,
    as_real,
    as_temperature,
)
from jaxsoft._core.dtypes import widened
from jaxsoft._hints import with_hints
from jaxsoft._passes.prefixes import prefix_summary, suffix_sum
from jaxsoft._passes.product import product
from jaxsoft._row import Row, logits_of, row_rule


@with_hints
def logcumsumexp(
    x: ArrayLike,
    axis: int = 0,
    *,
    reverse: bool = False,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Cumulative log of the sum of exponentials: the smooth running maximum.

    ``L_i = temperature * log(sum(exp(x_j / temperature)))`` over the ``j <= i`` along
    ``axis``. `jax.lax.cumlogsumexp` with a mask, a temperature, and derivatives that
    are right at infinities.

    Args:
        x: array of any shape but ().
        axis: the axis along which it runs.
        reverse: sum over the ``j >= i`` in place of those before.
        where: boolean, broadcastable to ``x``; True includes an entry. At an excluded
            one the result is that of the entries before it.
        temperature: in the units of ``x``; larger is softer. Broadcastable to ``x``
            with size 1 along ``axis``; may be traced and differentiated. At 0 the
            result is the running maximum; below 0 it is the smooth running minimum.

    Returns:
        The shape and dtype of ``x``, in its units; integers give floats. Half precision
        is computed in float32.

    Raises:
        TypeError: ``x`` is not an array of real numbers, ``axis`` is not an int,
            ``reverse`` is not a bool, ``where`` is not boolean.
        ValueError: ``axis`` is out of range; ``where`` or ``temperature`` would enlarge
            ``x``.

    Gradient:
        dL_i/dx_j = exp((x_j - L_i) / temperature) for j <= i.
        dL_i/dtemperature = entropy of the softmax of the prefix.
        Residuals: the arguments; the scan is repeated for the gradient.

    Edge cases:
        Before the first entry above -inf: -inf (+inf below temperature 0) with gradient
        0. From an entry +inf on: +inf; those so far share the gradient equally. NaN
        only from the first included NaN on.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x = jnp.array([-jnp.inf, 0.0, 0.0, 1000.0])
        >>> print(jaxsoft.logcumsumexp(x))
        [        -inf 0.000000e+00 6.931472e-01 1.000000e+03]
    """
    name = "logcumsumexp"
    x = as_real(name, "x", x)
    if as_integer(axis) is None:
        raise TypeError(f"{name}: axis must be an int; got {axis!r}")
    axes = as_axes(name, axis, x.ndim)
    as_flag(name, "reverse", reverse)
    where = as_mask(name, "where", where, x.shape)
    tau = as_temperature(name, temperature, x, axes)
    return _logcumsumexp_jit(x, where, tau, axes, reverse)


@functools.partial(jax.jit, static_argnames=("axes", "reverse"))
def _logcumsumexp_jit(x, where, temperature, axes, reverse):
    logits = logits_of(x, where, temperature, axes)
    return _logcumsumexp((axes, reverse), logits)


def _value(along, logits):
    axes, reverse = along
    m, s, *_ = prefix_summary(axes, logits, reverse=reverse)
    row = Row(axes, logits, m, s)
    log_total = jnp.log1p(s)
    # An infinite temperature may meet a log of 0.
    excess = log_total if row.t is None else jnp.where(s == 0, 0, row.t * log_total)
    log_sum = row.sign * jnp.where(jnp.isinf(m), m, m + excess)
    return log_sum.astype(logits.x.dtype), ()


# Of the logits alone: m and s would be two arrays more of their size. Where value and
# gradient are one program, XLA finds the scan that it has.
def _pullback(along, logits, _, g):
    axes, reverse = along
    with_slope = logits.temperature is not None
    summary = prefix_summary(axes, logits, reverse=reverse, with_e_d=with_slope)
    row = Row(axes, logits, summary.m, summary.s)
    g = widened(g, row.m.dtype)
    per_total = jnp.where(jnp.isneginf(row.m), 0, 1 / (1 + row.s))
    v = product(g, per_total)
    dz = product(suffix_sum(axes, row.m, row.t, v, reverse=reverse), row.sign * row.e)
    if not with_slope:
        return row.to_x(dz), None
    entropy = jnp.log1p(row.s) - summary.e_d * per_total
    return row.to_x(dz), row.sum(product(g, entropy))


_logcumsumexp = row_rule(_value, _pullback)
