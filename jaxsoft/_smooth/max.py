"""Smooth forms of max and min over the entries of a row.

    smooth_max    L = tau log sum_i exp(x_i / tau)      logsumexp, and nothing else
    boltzmann_max B = sum_i p_i x_i                     p = softmax(x / tau)

The rule of B saves the arguments and two numbers a row, where autodiff would save p,
and writes the derivatives in distances from the maximum: with x itself they would lose
their digits, and be NaN at infinities and at temperature 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    as_axes,
    as_flag,
    as_mask,
    as_real,
    as_temperature,
)
from jaxsoft._core.dtypes import widened
from jaxsoft._core.logits import shifted, times_log
from jaxsoft._hints import with_hints
from jaxsoft._logsumexp import logsumexp
from jaxsoft._passes.product import product
from jaxsoft._row import Row, computed_anew, logits_of, row_rule, summarized


@with_hints
def smooth_max(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    keepdims: bool = False,
) -> Array:
    """Smooth maximum: `logsumexp` under the name of what it approximates.

    ``L = temperature * log(sum(exp(x / temperature)))``, and
    ``max(x) <= L <= max(x) + temperature * log(n)``.

    Args:
        x: real array of any shape.
        axis: axis or axes to reduce; None reduces all.
        where: boolean, broadcastable to ``x``; True includes an entry.
        temperature: in the units of ``x``; larger is softer. Broadcastable to the
            result with the reduced axes kept; may be traced and differentiated. At 0
            the result is the maximum; below 0 it is the smooth minimum.
        keepdims: keep the reduced axes with size 1.

    Returns:
        The reduced array in the units and the dtype of ``x``; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError: ``x`` is not an array of real numbers, ``where`` is not boolean,
            ``axis`` is not an int, ``temperature`` is complex.
        ValueError: ``axis`` is out of range or repeated; ``where`` or ``temperature``
            would enlarge the result.

    Gradient:
        dL/dx = softmax(x / temperature); dL/dtemperature = its entropy in nats. At
        temperature 0 tied maxima share equally. Residuals: the arguments and two
        numbers per reduced row.

    Edge cases:
        Nothing included, or all -inf: -inf with gradient 0. Entries +inf: +inf; they
        share the gradient equally. NaN only if an included entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x = jnp.array([1.0, 3.0, 6.0])
        >>> jaxsoft.smooth_max(x)
        Array(6.054985, dtype=float32)
        >>> jaxsoft.smooth_max(x, temperature=0.0)
        Array(6., dtype=float32)
    """
    name = "smooth_max"
    x, axes, where, tau = _checked(name, x, axis, where, temperature, keepdims)
    return _logsumexp(x, axes, where, tau, keepdims)


@with_hints
def smooth_min(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    keepdims: bool = False,
) -> Array:
    """Smooth minimum: ``smooth_min(x) = -smooth_max(-x)``.

    ``L = -temperature * log(sum(exp(-x / temperature)))``, and
    ``min(x) - temperature * log(n) <= L <= min(x)``. It is
    ``logsumexp(x, temperature=-temperature)``.

    Args:
        x: real array of any shape.
        axis, where, keepdims: as in `smooth_max`.
        temperature: in the units of ``x``, as in `smooth_max`. At 0 the result is the
            minimum; below 0 it is the smooth maximum.

    Returns:
        The reduced array in the units and the dtype of ``x``; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `smooth_max`.

    Gradient:
        dL/dx = softmax(-x / temperature); dL/dtemperature = minus its entropy in nats.
        At temperature 0 tied minima share equally. Residuals: the arguments and two
        numbers per reduced row.

    Edge cases:
        Nothing included, or all +inf: +inf with gradient 0. Entries -inf: -inf; they
        share the gradient equally. NaN only if an included entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.smooth_min(jnp.array([1.0, 3.0, 6.0]))
        Array(0.8671548, dtype=float32)
    """
    name = "smooth_min"
    x, axes, where, tau = _checked(name, x, axis, where, temperature, keepdims)
    # Not -temperature, which at 0 would still mean the maximum.
    return -_logsumexp(-x, axes, where, tau, keepdims)


def _logsumexp(x, axes, where, temperature, keepdims):
    temperature = 1.0 if temperature is None else temperature
    return logsumexp(
        x, axes.dims, keepdims=keepdims, where=where, temperature=temperature
    )


@with_hints
def boltzmann_max(
    x: ArrayLike,
    axis: Axis = None,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    keepdims: bool = False,
) -> Array:
    """Boltzmann maximum: the mean of x under its own softmax.

    ``B = sum(p * x)`` with ``p = softmax(x / temperature)``. It lies between the mean
    (large temperature) and the maximum (small), where `smooth_max` lies above. It is
    not monotone: raising a small entry may lower it.

    Args:
        x: real array of any shape.
        axis, where, keepdims: as in `smooth_max`.
        temperature: in the units of ``x``, as in `smooth_max`. At 0 the result is the
            maximum; below 0 the mean is weighted towards the minimum.

    Returns:
        The reduced array in the units and the dtype of ``x``; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `smooth_max`.

    Gradient:
        dB/dx_i = p_i (1 + (x_i - B) / temperature).
        dB/dtemperature = -variance of x under p, divided by temperature^2.
        At temperature 0 tied maxima share equally, and the second is 0. Residuals: the
        arguments and two numbers per reduced row.

    Edge cases:
        Nothing included, or all -inf: -inf with gradient 0. A single -inf adds nothing.
        Entries +inf: +inf; they share the gradient equally. NaN only if an included
        entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.boltzmann_max(jnp.array([1.0, 3.0, 6.0]))
        Array(5.8267426, dtype=float32)

    References:
        K. Asadi, M. L. Littman, "An alternative softmax operator for reinforcement
        learning", ICML 2017.
    """
    name = "boltzmann_max"
    x, axes, where, tau = _checked(name, x, axis, where, temperature, keepdims)
    return _boltzmann_max_jit(x, where, tau, axes, keepdims)


@functools.partial(jax.jit, static_argnames=("axes", "keepdims"))
def _boltzmann_max_jit(x, where, temperature, axes, keepdims):
    b = _boltzmann_max(axes, logits_of(x, where, temperature, axes))
    return b if keepdims else jnp.squeeze(b, axes.dims)


# With U = -sum_j p_j d_j and the sign sigma of tau,
#     B = sigma (m + sum_i p_i (z_i - m)) = sigma (m - t U)
#     dB/dx_i = p_i (1 + d_i + U)         (x_i - B)/tau = d_i + U, and sigma cancels
#     dB/dtau = -sum_i p_i (d_i + U)^2
def _boltzmann_value(axes, logits):
    row, _ = summarized(axes, logits)
    below = row.sum(times_log(row.exact_e, shifted(row.z, row.m, None)))
    b = row.sign * (row.m + below / (1 + row.s))
    return b.astype(logits.x.dtype), (row.m, row.s)


def _boltzmann_pullback(axes, logits, kept, g):
    row = Row(axes, computed_anew(logits), *kept)
    g, p = widened(g, row.s.dtype), row.exact_e / (1 + row.s)
    d = jnp.where(p == 0, 0, shifted(row.z, row.m, row.t))
    above_mean = d - row.sum(p * d)  # d_i + U
    dx = row.to_x(product(g, row.sign * p * (1 + above_mean)))
    if logits.temperature is None:
        return dx, None
    return dx, product(g, -row.sum(p * above_mean**2))


_boltzmann_max = row_rule(_boltzmann_value, _boltzmann_pullback)


def _checked(function, x, axis, where, temperature, keepdims):
    x = as_real(function, "x", x)
    as_flag(function, "keepdims", keepdims)
    axes = as_axes(function, axis, x.ndim)
    where = as_mask(function, "where", where, x.shape)
    return x, axes, where, as_temperature(function, temperature, x, axes)
