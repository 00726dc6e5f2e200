"""logsumexp, the smooth maximum, and logmeanexp.

    L(x; tau) = tau log sum_i b_i exp(x_i / tau)

The rule saves x and two numbers a row where autodiff would save every exp(x_i), and has
the right derivative where autodiff gives NaN: at +inf, in an empty sum, at tau = 0.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    AxisName,
    as_array,
    as_axes,
    as_flag,
    as_inexact,
    as_mask,
    as_temperature,
    check_split,
    is_of,
    reject_options,
)
from jaxsoft._core.dtypes import accumulation_dtype, widened
from jaxsoft._core.logits import is_hard, nan_where, shifted, zero_if_infinite
from jaxsoft._core.mesh import broadcast_like, match_varying, reshard_together, row_sum
from jaxsoft._hints import with_hints
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import Riders
from jaxsoft._row import Row, logits_of, row_rule, summarized


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> tuple[Array, Array]: ...


@overload
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]: ...


@with_hints
def logsumexp(
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]:
    """Log of the sum of exponentials: the smooth maximum.

    ``L(a; temperature) = temperature * log(sum(b * exp(a / temperature)))``, and
    ``max(a) <= L <= max(a) + temperature * log(n)`` for ``b = 1``. A drop-in for
    `jax.nn.logsumexp`; ``temperature`` is new.

    Args:
        a: array of any shape; real or complex.
        axis: axis or axes to reduce; None reduces all.
        b: signed weights of the exponentials; ``a`` and ``b`` broadcast together.
        keepdims: keep the reduced axes with size 1.
        return_sign: return ``(log of the absolute sum, sign)``. Without it a negative
            sum gives NaN. For complex ``a`` the sign is the phase of the sum.
        where: boolean, broadcastable to ``a``; True includes an entry.
        temperature: in the units of ``a``; larger is softer. Broadcastable to the
            result with the reduced axes kept; may be traced and differentiated. At 0
            the result is the maximum; below 0 it is the smooth minimum,
            ``L(a; -t) = -L(-a; t)``. Real ``a`` only.
        axis_name: mesh axis (or tuple of them) over which ``axis`` is split, inside
            `jax.shard_map`: ``a``, ``b`` and ``where`` hold the slice of this device,
            and every device gets the result of the whole. Real ``a`` only.

    Returns:
        The reduced array (in the units of ``a``; nats at temperature 1) in the dtype of
        ``a``; integers give floats. Half precision is computed in float32.

    Raises:
        TypeError: ``a`` or ``b`` is not an array of numbers, ``where`` is not boolean,
            ``axis`` is not an int, ``temperature`` is complex or used with complex
            ``a``.
        ValueError: ``axis`` is out of range or repeated; ``where`` or ``temperature``
            would enlarge the result; ``a`` and ``b`` do not broadcast.

    Gradient:
        dL/da = p = b exp((a - L) / temperature), the softmax for b = 1.
        dL/db = temperature * exp((a - L) / temperature), also where b = 0.
        dL/dtemperature = entropy of p (for b = 1). The sign has derivative 0.
        Residuals: the arguments and two numbers per reduced row.

    Edge cases:
        Nothing included, or all -inf: -inf with gradient 0 (at temperature < 0 an empty
        minimum is +inf). Entries +inf: +inf; they share the gradient equally, as tied
        maxima do at temperature 0. A sum of exactly 0: -inf with sign 0, gradient 0.
        NaN only if an included entry is NaN, or infinities of both signs are added.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.logsumexp(jnp.array([1000.0, 1000.0]))
        Array(1000.6932, dtype=float32)
        >>> jaxsoft.logsumexp(jnp.array([1.0, 3.0, 6.0]), temperature=0.0)
        Array(6., dtype=float32)

    References:
        P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp
        and softmax functions", IMA Journal of Numerical Analysis 41 (2021). The weights
        and the sign are those of `scipy.special.logsumexp`.
    """
    name = "logsumexp"
    a = as_array(name, "a", a)
    a = a.astype(jnp.int8) if a.dtype == bool else a
    as_flag(name, "keepdims", keepdims)
    as_flag(name, "return_sign", return_sign)
    if b is not None:
        a, b = _broadcast_together(a, as_array(name, "b", b))
        b = as_inexact(name, "b", b)
    a = as_inexact(name, "a", a)
    axes = as_axes(name, axis, a.ndim, axis_name)
    where = as_mask(name, "where", where, a.shape)
    if is_of(a.dtype, jnp.complexfloating):
        reject_options(name, a, temperature, axis_name)
        return jax.nn.logsumexp(a, axes.dims, b, keepdims, return_sign, where)
    check_split(name, axes, {"a": a}, {})
    tau = as_temperature(name, temperature, a, axes)
    log_sum, sign = _logsumexp_jit(a, b, where, tau, axes, keepdims)
    if return_sign:
        return log_sum, sign
    return log_sum if b is None else log_sum + nan_where(sign < 0, log_sum.dtype)


@with_hints
def logmeanexp(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    """Log of the mean of exponentials; with a temperature, the mellowmax.

    ``M(x; temperature) = temperature * log(mean(exp(x / temperature)))``, which is
    ``logsumexp(x) - temperature * log(n)`` over the n included entries. It lies between
    the mean (large temperature) and the maximum (small). A drop-in for
    `jax.nn.logmeanexp`; ``temperature`` is new.

    Args:
        x: array of any shape; real or complex.
        axis: axis or axes to reduce; None reduces all.
        where: boolean, broadcastable to ``x``; True includes an entry.
        keepdims: keep the reduced axes with size 1.
        temperature: in the units of ``x``, as in `logsumexp`. At 0 the maximum; below 0
            it approaches the minimum.
        axis_name: as in `logsumexp`.

    Returns:
        The reduced array in the units and the dtype of ``x``; integers give floats.

    Raises:
        TypeError, ValueError: as `logsumexp`.

    Gradient:
        dM/dx = softmax(x / temperature); dM/dtemperature = entropy - log(n).
        Residuals: the arguments and two numbers per reduced row.

    Edge cases:
        The mean of nothing is -inf (+inf below temperature 0) with gradient 0; a mean
        of equal entries is that entry exactly. At an infinite temperature, the mean.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.logmeanexp(jnp.array([1.0, 2.0, 3.0]))
        Array(2.3089938, dtype=float32)

    References:
        K. Asadi, M. L. Littman, "An alternative softmax operator for reinforcement
        learning", ICML 2017 (mellowmax).
    """
    name = "logmeanexp"
    x = as_array(name, "x", x)
    x = as_inexact(name, "x", x.astype(jnp.int8) if x.dtype == bool else x)
    as_flag(name, "keepdims", keepdims)
    axes = as_axes(name, axis, x.ndim, axis_name)
    where = as_mask(name, "where", where, x.shape)
    if is_of(x.dtype, jnp.complexfloating):
        reject_options(name, x, temperature, axis_name)
        return jax.nn.logmeanexp(x, axes.dims, where, keepdims)
    check_split(name, axes, {"x": x}, {})
    tau = as_temperature(name, temperature, x, axes)
    return _logmeanexp_jit(x, where, tau, axes, keepdims)


@functools.partial(jax.jit, static_argnames=("axes", "keepdims"))
def _logsumexp_jit(x, b, where, temperature, axes, keepdims):
    if b is not None:
        b, x = reshard_together(b, x)
        b, _ = match_varying(axes, (b, x), temperature)[0]
    logits = logits_of(x, where, temperature, axes)
    results = _logsumexp(axes, logits) if b is None else _weighted(axes, logits, b)
    return results if keepdims else tuple(jnp.squeeze(r, axes.dims) for r in results)


# With S = sum_j e_j = 1 + s, and sigma the sign of tau,
#     L = sigma (m + t log S)
#     dL/dx_i = p_i             sigma cancels: once from L, once from z
#     dL/dtau = log S - sum_i p_i d_i, the entropy of p
# A rule, since autodiff keeps every e_i, and has NaN at +inf, in an empty row and at
# tau = 0.
def _value(axes, logits):
    with_slope = logits.temperature is not None
    row, summary = summarized(axes, logits, Riders(with_e_d=with_slope))
    log_total = jnp.log1p(row.s)
    entropy = log_total - summary.e_d / (1 + row.s) if with_slope else None
    sign = jnp.where(jnp.isneginf(row.m), 0, jnp.ones_like(row.s))
    results = _results(row, _times_t(row, log_total), sign)
    return results, (row.m, row.s, entropy)


def _pullback(axes, logits, kept, cotangents):
    m, s, entropy = kept
    row = Row(axes, logits, m, s)
    g = widened(cotangents[0], s.dtype)
    dx = to_classes(axes, logits, m, product(g, row.sign / (1 + s)))
    return dx, None if entropy is None else product(g, entropy)


_logsumexp = row_rule(_value, _pullback)


def _times_t(row, v):
    """t v. An infinite temperature may meet a v of 0."""
    return v if row.t is None else jnp.where(v == 0, 0, row.t * v)


def _results(row, excess, sign):
    """sigma (m + excess) and the sign of the sum, in the dtype of x."""
    log_sum = row.sign * jnp.where(jnp.isinf(row.m), row.m, row.m + excess)
    dtype = row.logits.x.dtype
    return log_sum.astype(dtype), sign.astype(dtype)


# With weights, m is the maximum where b is not 0, and S = sum_j b_j e_j = b_m + r, with
# the sum r of the others. p_i = b_i e_i / S,
#     L = sigma (m + t log|S|)
#     dL/dx_i = p_i
#     dL/db_i = tau e_i / S     also where b_i = 0, and x_i may lie far above m
#     dL/dtau = log|S| - sum_i p_i d_i
def _weighted_value(axes, logits, b):
    logits = _counting(logits, b)
    weights = b.astype(accumulation_dtype(b.dtype))
    row, summary = summarized(axes, logits, Riders(weights=weights))
    log_total = _log_of_sum(summary.weight, summary.s)
    total = summary.weight + summary.s
    sign = jnp.where(jnp.isneginf(row.m), 0, jnp.sign(total))
    results = _results(row, _times_t(row, log_total), sign)
    return results, (row.m, total, log_total)


def _weighted_pullback(axes, logits, b, kept, cotangents):
    m, total, log_total = kept
    row = Row(axes, _counting(logits, b), m, jnp.zeros_like(m))
    g = widened(cotangents[0], m.dtype)
    # A sum of 0 has the derivative 0.
    per_total = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
    z, e = row.z, row.e
    largest = jnp.finfo(e.dtype).max
    p = b.astype(e.dtype) * jnp.minimum(e, largest) * per_total
    dx = row.to_x(product(g, row.sign * p))
    # 0 times the e of an entry far above m is 0.
    above = (z == jnp.inf) & (m < jnp.inf) | jnp.isinf(e)
    e = jnp.where(above, largest, e)
    db = product(g, e * per_total) * jnp.where(above, largest, 1)
    db = jnp.where(jnp.isneginf(m), 0, db)
    dtemperature = None
    if logits.temperature is not None:
        db = product(db, logits.temperature)
        d = shifted(z, m, row.t)
        p_d = p * zero_if_infinite(d)
        finite_log = jnp.where(total == 0, 0, log_total)
        dtemperature = product(g, finite_log - row.sum(p_d))
    return dx, dtemperature, db.astype(b.dtype)


_weighted = row_rule(_weighted_value, _weighted_pullback)


def _counting(logits, b):
    """An entry that is NaN does not count where its weight is 0."""
    counts = (b != 0) | ~jnp.isnan(logits.x)
    if logits.where is not None:
        counts = counts & logits.where
    return logits._replace(where=counts)


def _log_of_sum(weight, rest):
    """log|weight + rest|, with the digits of a sum near 1."""
    total = weight + rest
    near_1 = jnp.abs(total - 1) < 0.5
    log_near_1 = jnp.log1p(jnp.where(near_1, (weight - 1) + rest, 0))
    empty = total == 0
    log_abs = jnp.log(jnp.where(near_1 | empty, 1, jnp.abs(total)))
    return jnp.where(empty, -jnp.inf, jnp.where(near_1, log_near_1, log_abs))


@functools.partial(jax.jit, static_argnames=("axes", "keepdims"))
def _logmeanexp_jit(x, where, temperature, axes, keepdims):
    m = _logmeanexp(axes, logits_of(x, where, temperature, axes))
    return m if keepdims else jnp.squeeze(m, axes.dims)


# The mean divides S by the number n of entries that count, which M and dM/dtau see:
#     M = sigma (m + t log(S/n))        dM/dx_i = p_i
#     dM/dtau = log(S/n) - sum_i p_i d_i
def _mean_value(axes, logits):
    row, _ = summarized(axes, logits)
    excess, _ = _log_mean(row)
    return _results(row, excess, row.s)[0], (row.m, row.s)


def _mean_pullback(axes, logits, kept, g):
    row = Row(axes, logits, *kept)
    g = widened(g, row.s.dtype)
    dx = to_classes(axes, logits, row.m, product(g, row.sign / (1 + row.s)))
    if logits.temperature is None:
        return dx, None
    d = shifted(row.z, row.m, row.t)
    slope = -_mean(row, _exp_times_log(d - _log_mean(row)[1]))
    return dx, product(g, slope)


_logmeanexp = row_rule(_mean_value, _mean_pullback)


# Where the entries are near each other, S/n is nearly 1. With q = S/n - 1,
#     q = mean_i (exp(d_i) - 1)        t log(S/n) = t log1p(q)
# and at large temperatures, up to infinity, where exp(d) - 1 is d and log1p(q) is q,
# t stands in both and goes.
def _log_mean(row):
    """t log(S/n), and log(S/n)."""
    z, m = row.z, row.m
    d, gap = shifted(z, m, row.t), shifted(z, m, None)
    linear = float(jnp.finfo(z.dtype).eps) / 4
    t = jnp.ones((), z.dtype) if row.t is None else row.t
    hard = is_hard(t)
    t = jnp.where(hard, 0, t)
    t_q = _mean(row, jnp.where(jnp.abs(d) < linear, gap, t * jnp.expm1(d)))
    q = jnp.where(jnp.isinf(t), 0, t_q / jnp.where(hard, 1, t))
    near_1 = (q > -0.5) & ~hard
    log_near_1 = jnp.log1p(jnp.where(near_1, q, 0))
    log_mean = jnp.log1p(row.s) - jnp.log(jnp.maximum(_count(row), 1))
    log_mean = jnp.where(near_1, log_near_1, log_mean)
    return jnp.where(near_1 & (jnp.abs(q) < linear), t_q, t * log_mean), log_mean


def _exp_times_log(v):
    """exp(v) (v - 1) + 1 >= 0, by its Taylor series near 0."""
    is_small = jnp.abs(v) < 0.5
    small = jnp.where(is_small, v, 0)
    terms = 16 if v.dtype == jnp.float64 else 9
    series = jnp.zeros_like(v)
    for k in range(terms, 1, -1):
        series = series * small + (k - 1) / math.factorial(k)
    direct = jnp.exp(v) * (zero_if_infinite(v) - 1) + 1
    return jnp.where(is_small, small**2 * series, direct)


def _mean(row, v):
    where = row.logits.where
    v = v if where is None else jnp.where(broadcast_like(where, v), v, 0)
    return row.sum(v) / jnp.maximum(_count(row), 1)


def _count(row):
    where, z = row.logits.where, row.z
    included = jnp.ones_like(z) if where is None else broadcast_like(where, z)
    return row_sum(jnp.broadcast_to(included, z.shape), row.axes, z.dtype)


def _broadcast_together(a: Array, b: Array) -> tuple[Array, Array]:
    try:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            "logsumexp: a and b must broadcast together; "
            f"got shapes {a.shape} and {b.shape}"
        ) from None
    # As JAX promotes: that of the other for integers, and for a Python number.
    floating = [v.dtype for v in (a, b) if is_of(v.dtype, jnp.inexact)]
    dtype = floating[0] if len(floating) == 1 else jnp.result_type(a, b)

    def spread(v: Array) -> Array:
        v = jax.lax.expand_dims(v.astype(dtype), range(len(shape) - v.ndim))
        return jnp.broadcast_to(v, shape)

    return spread(a), spread(b)
