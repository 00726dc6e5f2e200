"""softmax, log_softmax and entropy: the distribution p of a row of logits.

Their rules save the arguments and O(rows) numbers, and subtract nothing that is nearly
equal: where one class has almost all the probability, the derivatives are made of the
probabilities of the others, and keep their digits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    AxisName,
    as_axes,
    as_inexact,
    as_mask,
    as_real,
    as_temperature,
    check_split,
    is_of,
    reject_options,
)
from jaxsoft._core.dtypes import accumulation_dtype, cast, widened
from jaxsoft._core.logits import masked_logits, shifted, size_of, zero_if_infinite
from jaxsoft._core.mesh import row_sum
from jaxsoft._hints import with_hints
from jaxsoft._passes import classes as passes
from jaxsoft._passes import entropy as entropies
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import Riders, summarize
from jaxsoft._row import Row, computed_anew, logits_of, row_rule


@with_hints
def softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    """Probabilities proportional to exp(x / temperature): the soft one-hot of argmax.

    ``p_i = exp(x_i / temperature) / sum_j exp(x_j / temperature)``. A drop-in for
    `jax.nn.softmax`; ``temperature`` is new.

    Args:
        x: logits of any shape.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to ``x``; True includes a class. An excluded
            class has probability 0.
        temperature: in the units of ``x``; larger is softer. Broadcastable to ``x``
            reduced over ``axis`` (kept with size 1); may be traced and differentiated.
            At 0 the tied maxima share equally; below 0 the minimum is favoured.
        axis_name: mesh axis (or tuple of them) over which ``axis`` is split, inside
            `jax.shard_map`: ``x`` and ``where`` hold the classes of this device, and
            the result is its slice of the whole.

    Returns:
        Probabilities of the shape and dtype of ``x``; integers give floats. Half
        precision is computed in float32.

    Raises:
        TypeError: ``x`` is not an array of numbers, ``where`` is not boolean, ``axis``
            is not an int, ``temperature`` is complex or used with complex ``x``.
        ValueError: ``axis`` is out of range or repeated; ``where`` or ``temperature``
            would enlarge ``x``.

    Gradient:
        dp_i/dx_j = p_i (delta_ij - p_j) / temperature.
        dp_i/dtemperature = -p_i (x_i - sum_j p_j x_j) / temperature^2.
        Both are 0 at temperature 0. Residuals: the arguments, and with a temperature
        one number per row.

    Edge cases:
        Nothing included, or all -inf: all 0 with gradient 0. Entries +inf share the
        probability equally. NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.softmax(jnp.array([1.0, 3.0, 6.0])).round(4)
        Array([0.0064, 0.0471, 0.9465], dtype=float32)
        >>> jaxsoft.softmax(jnp.array([5.0, 7.0, 7.0]), temperature=0.0)
        Array([0. , 0.5, 0.5], dtype=float32)
    """
    x = as_inexact("softmax", "x", x)
    axes = as_axes("softmax", axis, x.ndim, axis_name)
    where = as_mask("softmax", "where", where, x.shape)
    if is_of(x.dtype, jnp.complexfloating):
        reject_options("softmax", x, temperature, axis_name)
        return jax.nn.softmax(x, axes.dims, where)
    check_split("softmax", axes, {"x": x}, {})
    tau = as_temperature("softmax", temperature, x, axes)
    return _softmax_jit(x, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _softmax_jit(x, where, temperature, axes):
    return _softmax(axes, logits_of(x, where, temperature, axes))


# A rule, since autodiff keeps p beside x, and has 1 - p at the maximum, which is 0 when
# the model is sure. With h_i = sum_j g_j dp_j/dd_i and dd_i = (dz_i - d_i dt)/t,
#     dx_i = sigma h_i / t        (`softmax_pull`; sigma is the sign of tau)
#     dtau = -sigma sum_i h_i d_i / t = -sum_i dx_i d_i
def _softmax_value(axes, logits):
    m = None if logits.temperature is None else summarize(axes, logits).m
    return passes.softmax(axes, logits), m


def _softmax_pullback(axes, logits, m, g):
    if logits.temperature is None:
        return passes.softmax_pull(axes, logits, g), None
    wide, to_x = _in_dtype_of_sums(logits)
    dx = passes.softmax_pull(axes, wide, widened(g, wide.x.dtype))
    d = shifted(masked_logits(wide), m, size_of(logits.temperature))
    dtemperature = -row_sum(product(dx, zero_if_infinite(d)), axes)
    return to_x(dx)[0], dtemperature


def _in_dtype_of_sums(logits):
    x, to_x = jax.vjp(lambda x: cast(x, accumulation_dtype(x.dtype)), logits.x)
    return logits._replace(x=x), to_x


_softmax = row_rule(_softmax_value, _softmax_pullback)


@with_hints
def log_softmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    """Logarithms of the softmax probabilities, in nats.

    ``log p_i = (x_i - L) / temperature`` with ``L = logsumexp(x; temperature)``. A
    drop-in for `jax.nn.log_softmax`; ``temperature`` is new.

    Args:
        x: logits of any shape.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to ``x``; True includes a class. An excluded
            class has log-probability -inf.
        temperature: in the units of ``x``, as in `softmax`. At 0 the k tied maxima have
            -log(k) and all others -inf.
        axis_name: as in `softmax`.

    Returns:
        Log-probabilities of the shape and dtype of ``x``; integers give floats. Half
        precision is computed in float32.

    Raises:
        TypeError, ValueError: as `softmax`.

    Gradient:
        d(log p_i)/dx_j = (delta_ij - p_j) / temperature, computed at the most probable
        class as the sum of the other probabilities, not as 1 - p.
        d(log p_i)/dtemperature = -(log p_i + entropy) / temperature.
        Both are 0 at temperature 0. Residuals: the arguments, and with a
        temperature two numbers per row.

    Edge cases:
        Nothing included, or all -inf: all -inf with gradient 0. A logit -inf: -inf, and
        its gradient is that of the formula. Entries +inf: -log(k) on the k of them.
        NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.log_softmax(jnp.array([20.0, 0.0])))
        [-2.0611537e-09 -2.0000000e+01]
    """
    x = as_inexact("log_softmax", "x", x)
    axes = as_axes("log_softmax", axis, x.ndim, axis_name)
    where = as_mask("log_softmax", "where", where, x.shape)
    if is_of(x.dtype, jnp.complexfloating):
        reject_options("log_softmax", x, temperature, axis_name)
        return jax.nn.log_softmax(x, axes.dims, where)
    check_split("log_softmax", axes, {"x": x}, {})
    tau = as_temperature("log_softmax", temperature, x, axes)
    return _log_softmax_jit(x, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _log_softmax_jit(x, where, temperature, axes):
    return _log_softmax(axes, logits_of(x, where, temperature, axes))


# A rule, since autodiff keeps p beside x, and has 1 - p at the maximum, which is 0 when
# the model is sure. With U = -sum_i p_i d_i,
#     t dz_i = g_i - p_i sum_j g_j        (`log_softmax_pull`)
#     t dt   = -sum_i g_i (d_i + U)       over the classes above -inf
def _log_softmax_value(axes, logits):
    kept = None
    if logits.temperature is not None:
        summary = summarize(axes, logits, Riders(with_e_d=True))
        kept = summary.m, -summary.e_d / (1 + summary.s)
    return passes.log_softmax(axes, logits), kept


def _log_softmax_pullback(axes, logits, kept, g):
    if logits.temperature is None:
        return passes.log_softmax_pull(axes, logits, g), None
    m, u = kept
    wide, to_x = _in_dtype_of_sums(logits)
    g = widened(g, wide.x.dtype)
    dx = passes.log_softmax_pull(axes, wide, g)
    row = Row(axes, wide, m, jnp.ones_like(m))
    d = row.d
    slope = row.sum(product(g, jnp.where(jnp.isinf(d), 0, d + u)))
    return to_x(dx)[0], -row.sign * row.over_t(slope)


_log_softmax = row_rule(_log_softmax_value, _log_softmax_pullback)


@with_hints
def entropy(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    """Entropy of the softmax distribution, in nats.

    ``H = -sum_i p_i log(p_i)`` with ``p = softmax(logits / temperature)``.

    Args:
        logits: of any shape.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to ``logits``; True includes a class.
        temperature: in the units of the logits, as in `softmax`. At 0 the entropy is
            log(k) for k tied maxima.
        axis_name: as in `softmax`; every device gets the entropy of the whole.

    Returns:
        The logits' shape without ``axis``; float32 for half precision, else the logits'
        dtype. Between 0 and log(n).

    Raises:
        TypeError, ValueError: as `softmax`; also for complex logits.

    Gradient:
        dH/dx_i = -p_i (log p_i + H) / temperature.
        dH/dtemperature = variance of log p under p, divided by the temperature.
        Both are 0 at temperature 0. Residuals: the arguments and three numbers per row.

    Edge cases:
        A class at -inf adds 0 to value and gradient. Nothing included, or all -inf: 0
        with gradient 0. NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.entropy(jnp.array([1.0, 2.0, 3.0]))
        Array(0.83239555, dtype=float32)
    """
    logits = as_real("entropy", "logits", logits)
    axes = as_axes("entropy", axis, logits.ndim, axis_name)
    where = as_mask("entropy", "where", where, logits.shape)
    check_split("entropy", axes, {"logits": logits}, {})
    tau = as_temperature("entropy", temperature, logits, axes)
    return _entropy_jit(logits, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _entropy_jit(x, where, temperature, axes):
    h = _entropy(axes, logits_of(x, where, temperature, axes))
    return jnp.squeeze(h, axes.dims)


# A rule, since autodiff keeps p and log p, and has 0 times infinity at a class of
# probability 0; the formulas are those of `_passes.entropy`.
def _entropy_value(axes, logits):
    of = entropies.entropy(axes, logits)
    return of.h, of._replace(h=None)


def _entropy_pullback(axes, logits, of, g):
    logits = computed_anew(logits)
    dz, dtemperature = entropies.entropy_pull(axes, logits, of, g)
    return Row(axes, logits, of.m, of.s).to_x(dz), dtemperature


_entropy = row_rule(_entropy_value, _entropy_pullback)
