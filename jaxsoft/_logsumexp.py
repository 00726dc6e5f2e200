"""logsumexp, the smooth maximum, and logmeanexp.

    L(x; tau) = tau log sum_i b_i exp(x_i / tau)

The rule saves x and two numbers a row where autodiff would save every exp(x_i), and has
the right derivative where autodiff gives NaN: at +inf, in an empty sum, at tau = 0.
"""

import functools
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._autodiff import with_jvp
from jaxsoft._checks import (
    Axis,
    AxisName,
    as_array,
    as_axes,
    as_flag,
    as_inexact,
    as_mask,
    as_temperature,
    is_of,
    reject_options,
)
from jaxsoft._core.mesh import row_sum, split_together, spread_alike, vary_alike
from jaxsoft._core.numerics import (
    counted_logits,
    exp_shifted,
    is_hard,
    per_row,
    shifted,
    weighted_exp,
)
from jaxsoft._passes.max_and_tail import max_and_tail
from jaxsoft._passes.one_pass import sample_and_tail


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

    Awkward values:
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
    a = as_inexact(name, "a", a.astype(jnp.int8) if a.dtype == bool else a)
    as_flag(name, "keepdims", keepdims)
    as_flag(name, "return_sign", return_sign)
    if b is not None:
        a, b = _broadcast_together(a, as_array(name, "b", b))
    axes = as_axes(name, axis, a.ndim, axis_name)
    where = as_mask(name, "where", where, a.shape)
    if is_of(a.dtype, jnp.complexfloating):
        reject_options(name, a, temperature, axis_name)
        return jax.nn.logsumexp(a, axes, b, keepdims, return_sign, where)
    tau = as_temperature(name, temperature, a, axes)
    log_sum, sign = _reduced(a, b, where, tau, axes, keepdims, mean=False)
    if return_sign:
        return log_sum, sign
    return log_sum if b is None else jnp.where(sign < 0, jnp.nan, log_sum)


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

    Awkward values:
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
        return jax.nn.logmeanexp(x, axes, where, keepdims)
    tau = as_temperature(name, temperature, x, axes)
    return _reduced(x, None, where, tau, axes, keepdims, mean=True)[0]


@functools.partial(jax.jit, static_argnames=("axes", "keepdims", "mean"))
def _reduced(x, b, where, temperature, axes, keepdims, mean):
    if b is not None:
        b, x = split_together(b, x)
    temperature = per_row(temperature, x, axes)
    (x, b), temperature = vary_alike(axes, (x, b), temperature)
    results = _logsumexp(x, b, where, temperature, axes, mean)
    return results if keepdims else tuple(jnp.squeeze(r, axes) for r in results)


# With the letters of _numerics (z, m, d, e, s; t = |tau| and sigma its sign), the sum
# S = sum_j b_j e_j = 1 + s, and p_i = b_i e_i / S,
#     L = sigma (m + t log|S|)
#     dL/dx_i = p_i             sigma cancels: once from L, once from z
#     dL/db_i = tau e_i / S     also where b_i = 0, where m does not see x_i
#     dL/dtau = log|S| - sum_i p_i d_i        for b = 1 the entropy of p
# The mean divides S by n, which L and dL/dtau see.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _logsumexp(x, b, where, temperature, axes, mean):
    return _plain(x, b, where, temperature, axes, mean)[0]


def _plain(x, b, where, temperature, axes, mean):
    z = _weighted_logits(x, b, where, temperature)
    m, s, total = _split(x, z, b, where, temperature, axes, mean)
    if mean:
        excess, _ = _log_mean(z, m, total, where, temperature, axes)
    else:
        excess = _log_abs_sum(s, total)
        if temperature is not None:
            # An infinite temperature may meet an excess of 0.
            t = jnp.abs(temperature)
            excess = jnp.where(excess == 0, 0, t * excess)
    log_sum = jnp.where(jnp.isinf(m), m, m + excess)
    if temperature is not None:
        log_sum = jnp.where(temperature < 0, -log_sum, log_sum)
    sign = jnp.where(jnp.isneginf(m), 0, jnp.sign(total))
    return (log_sum.astype(x.dtype), sign.astype(x.dtype)), (m, s, total)


def _fwd(x, b, where, temperature, axes, mean):
    out, split = _plain(x, b, where, temperature, axes, mean)
    return out, (x, b, where, temperature, split)


def _bwd(axes, mean, residuals, cotangents):
    x, b, where, temperature, (m, s, total) = residuals
    z, to_input = jax.vjp(lambda x: _weighted_logits(x, b, where, temperature), x)
    g = cotangents[0].astype(z.dtype)
    empty_sum = total == 0
    total_or_1 = jnp.where(empty_sum, 1, total)
    total = jnp.where(empty_sum, jnp.inf, total)
    weights = None if b is None else b.astype(z.dtype)
    p = weighted_exp(z, m, weights, temperature) / total
    if temperature is None:
        dz, dtemperature = g * p, None
    else:
        dz = g * jnp.where(temperature < 0, -p, p)
        d = shifted(z, m, temperature)
        if mean:
            _, log_mean = _log_mean(z, m, total, where, temperature, axes)
            slope = -_mean(_exp_times_log(d - log_mean), where, axes)
        else:
            p_d = p * jnp.where(jnp.isinf(d), 0, d)
            log_sum = _log_abs_sum(s, total_or_1)
            slope = log_sum - row_sum(p_d, axes)
        dtemperature = g * slope
    db = None
    if b is not None:
        db = _weights_cotangent(z, m, temperature, g / total).astype(b.dtype)
    return to_input(dz)[0], db, None, dtemperature


_logsumexp.defvjp(_fwd, _bwd)


def _weighted_logits(x, b, where, temperature):
    """z; NaN where the weight is 0 does not count."""
    return counted_logits(x, _counting(x, b, where), temperature)


def _counting(x, b, where):
    if b is None:
        return where
    counts = (b != 0) | ~jnp.isnan(x)
    return counts if where is None else where & counts


def _split(x, z, b, where, temperature, axes, mean):
    """(m, s, S). Weights may make S so small that s = S - 1 has lost its digits."""
    if b is None and temperature is None and not mean:
        m, s = sample_and_tail(x, where, axes, to_add=True)
        return m, s, 1 + s
    if b is None:
        m, s = max_and_tail(x, where, temperature, axes)
        return m, s, 1 + s
    weights = b.astype(z.dtype)
    m, s = max_and_tail(x, _counting(x, b, where), temperature, axes, weights=weights)
    terms = jnp.where(jnp.isneginf(m), 0, weighted_exp(z, m, weights, temperature))
    return m, s, jnp.where(jnp.abs(s) < 0.5, 1 + s, row_sum(terms, axes))


def _log_abs_sum(s, total):
    # log1p keeps a small tail.
    near_1 = jnp.abs(s) < 0.5
    log_abs = jnp.log(jnp.where(near_1 | (total == 0), 1, jnp.abs(total)))
    log_abs = jnp.where(near_1, jnp.log1p(jnp.where(near_1, s, 0)), log_abs)
    return jnp.where(total == 0, -jnp.inf, log_abs)


# Where the entries are near each other, S/n is nearly 1. With q = S/n - 1,
#     q = mean_i (exp(d_i) - 1)        t log(S/n) = t log1p(q)
# and at large temperatures, up to infinity, where exp(d) - 1 is d and log1p(q) is q,
# t stands in both and goes.
def _log_mean(z, m, total, where, temperature, axes):
    """t log(S/n), and log(S/n)."""
    d = shifted(z, m, temperature)
    linear = float(jnp.finfo(z.dtype).eps) / 4
    t = jnp.ones((), z.dtype) if temperature is None else jnp.abs(temperature)
    hard = is_hard(t)
    t = jnp.where(hard, 0, t)
    gap = shifted(z, m, None)
    t_q = _mean(jnp.where(jnp.abs(d) < linear, gap, t * jnp.expm1(d)), where, axes)
    q = jnp.where(jnp.isinf(t), 0, t_q / jnp.where(hard, 1, t))
    near_1 = (q > -0.5) & ~hard
    log_near_1 = jnp.log1p(jnp.where(near_1, q, 0))
    log_mean = jnp.log(total) - jnp.log(jnp.maximum(_count(z, where, axes), 1))
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
    direct = jnp.exp(v) * (jnp.where(jnp.isinf(v), 0, v) - 1) + 1
    return jnp.where(is_small, small**2 * series, direct)


def _mean(v, where, axes):
    count = jnp.maximum(_count(v, where, axes), 1)
    v = v if where is None else jnp.where(spread_alike(where, v), v, 0)
    return row_sum(v, axes) / count


def _count(v, where, axes):
    included = jnp.ones_like(v) if where is None else spread_alike(where, v)
    return row_sum(jnp.broadcast_to(included, v.shape), axes, v.dtype)


def _weights_cotangent(z, m, temperature, g):
    e = exp_shifted(z, m, temperature)
    # An entry that b = 0 excludes may lie so far above m that e overflows; the limit
    # and the factor keep 0 e = 0 for a zero cotangent.
    above = (z == jnp.inf) & (m < jnp.inf) | jnp.isinf(e)
    huge = jnp.finfo(e.dtype).max
    db = g * jnp.where(above, huge, e) * jnp.where(above, huge, 1)
    if temperature is not None:
        db = db * temperature
    return jnp.where(jnp.isneginf(m), 0, db)


def _broadcast_together(a: Array, b: Array) -> tuple[Array, Array]:
    try:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            "logsumexp: a and b must broadcast together; "
            f"got shapes {a.shape} and {b.shape}"
        ) from None
    dtype = jnp.result_type(a, b)  # of a, for a weight that is a Python number

    def spread(v: Array) -> Array:
        v = jax.lax.expand_dims(v.astype(dtype), range(len(shape) - v.ndim))
        return jnp.broadcast_to(v, shape)

    return spread(a), spread(b)
