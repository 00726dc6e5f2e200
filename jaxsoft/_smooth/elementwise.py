"""Smooth forms of relu, abs, sign, step, maximum and minimum: functions of one or two
numbers, elementwise.

All of them are the softmax of two numbers, whose values and rules stand in `pair`:

    softplus(x)  = maximum of (x, 0)        smooth_step(x) = weight of x in (x, 0)
    smooth_abs(x) = maximum of (x, -x)      smooth_sign(x) = difference of the weights

`smooth_abs` and `smooth_sign` have rules of their own, for the digits of that
difference: it is tanh(x / temperature).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import as_array, as_real
from jaxsoft._core.logits import times_log
from jaxsoft._elementwise import (
    as_elementwise_temperature,
    elementwise,
    rule_from_partials,
)
from jaxsoft._hints import with_hints
from jaxsoft._smooth import pair as _pair


@with_hints
def softplus(x: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """Smooth relu: the smooth maximum of x and 0, elementwise.

    ``softplus(x) = temperature * log(1 + exp(x / temperature))``, and
    ``relu(x) <= softplus(x) <= relu(x) + temperature * log(2)``.

    Args:
        x: real array of any shape.
        temperature: in the units of ``x``; larger is softer. Broadcastable to ``x``;
            may be traced and differentiated. At 0 the result is ``relu(x)``; below 0
            the smooth form of ``min(x, 0)``: ``softplus(x; -t) = -softplus(-x; t)``.

    Returns:
        Array of the shape and dtype of ``x``, in its units; integers give floats. Half
        precision is computed in float32.

    Raises:
        TypeError: ``x`` is not an array of real numbers; ``temperature`` is complex.
        ValueError: ``temperature`` would enlarge ``x``.

    Gradient:
        d/dx = `smooth_step`. d/dtemperature = the entropy of (p, 1 - p) in nats with
        p = ``smooth_step(x)``. At temperature 0 these are the step, 1/2 at 0, and
        log(2) at x = 0, 0 elsewhere. Residuals: the derivatives asked for.

    Edge cases:
        -inf gives 0 and +inf gives +inf. Far below 0 the result is
        ``temperature * exp(x / temperature)`` with all its digits. NaN only where ``x``
        is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.softplus(jnp.array([-20.0, 0.0, 20.0])))
        [2.0611537e-09 6.9314718e-01 2.0000000e+01]
        >>> print(jaxsoft.softplus(jnp.array([-20.0, 0.0, 20.0]), temperature=0.0))
        [ 0.  0. 20.]
    """
    return _of_one("softplus", _softplus, x, temperature)


@with_hints
def smooth_abs(x: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """Smooth absolute value: the smooth maximum of x and -x, elementwise.

    ``smooth_abs(x) = temperature * log(exp(x / temperature) + exp(-x / temperature))``,
    and ``|x| <= smooth_abs(x) <= |x| + temperature * log(2)``.

    Args:
        x: real array of any shape.
        temperature: in the units of ``x``, as in `softplus`. At 0 the result is
            ``|x|``; below 0 ``smooth_abs(x; -t) = -smooth_abs(x; t)``.

    Returns:
        Array of the shape and dtype of ``x``, in its units; integers give floats. Half
        precision is computed in float32.

    Raises:
        TypeError, ValueError: as `softplus`.

    Gradient:
        d/dx = `smooth_sign`. d/dtemperature = the entropy of (p, 1 - p) in nats with
        p = ``smooth_step(2 * x)``. At temperature 0 these are the sign, and log(2) at
        x = 0, 0 elsewhere. Residuals: the derivatives asked for.

    Edge cases:
        The value at 0 is ``temperature * log(2)``. Infinities give +inf. NaN only where
        ``x`` is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.smooth_abs(jnp.array([-2.0, 0.0, 2.0])))
        [2.0181499 0.6931472 2.0181499]
    """
    return _of_one("smooth_abs", _smooth_abs, x, temperature)


@with_hints
def smooth_sign(x: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """Smooth sign, elementwise: ``tanh(x / temperature)``.

    The derivative of `smooth_abs`, and ``2 * smooth_step(2 * x) - 1``.

    Args:
        x: real array of any shape.
        temperature: in the units of ``x``, as in `softplus`. At 0 the result is
            ``sign(x)``, with 0 at 0; the function is odd in the temperature too.

    Returns:
        Array of the shape and dtype of ``x``, between -1 and 1; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `softplus`.

    Gradient:
        With u = x / temperature, d/dx = sech(u)^2 / temperature and
        d/dtemperature = -u sech(u)^2 / temperature. Both are 0 at temperature 0, where
        the first diverges at x = 0. Derivatives too large for the dtype of ``x`` or of
        the temperature stop at its largest finite number. Residuals: the derivatives
        asked for.

    Edge cases:
        Infinities give -1 and 1. NaN only where ``x`` is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.smooth_sign(jnp.array([-3.0, 0.0, 1.0]), temperature=0.0))
        [-1.  0.  1.]
    """
    return _of_one("smooth_sign", _smooth_sign, x, temperature)


@with_hints
def smooth_step(x: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """Smooth step (Heaviside) function, elementwise: ``sigmoid(x / temperature)``.

    The derivative of `softplus`, and the probability of x in the softmax of (x, 0).

    Args:
        x: real array of any shape.
        temperature: in the units of ``x``, as in `softplus`. At 0 the result is 0 below
            0, 1/2 at 0 and 1 above; below 0 the step goes down:
            ``smooth_step(x; -t) = smooth_step(-x; t)``.

    Returns:
        Array of the shape and dtype of ``x``, between 0 and 1; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `softplus`.

    Gradient:
        With p the result and u = x / temperature, d/dx = p (1 - p) / temperature and
        d/dtemperature = -u p (1 - p) / temperature, without the subtraction. Both are 0
        at temperature 0, where the first diverges at x = 0. Derivatives too large for
        the dtype of ``x`` or of the temperature stop at its largest finite number.
        Residuals: the derivatives asked for.

    Edge cases:
        Infinities give 0 and 1. NaN only where ``x`` is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.smooth_step(jnp.array([-3.0, 0.0, 1.0]), temperature=0.0))
        [0.  0.5 1. ]
    """
    return _of_one("smooth_step", _smooth_step, x, temperature)


@with_hints
def smooth_maximum(
    x: ArrayLike, y: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """Smooth maximum of two arrays, elementwise.

    ``temperature * log(exp(x / temperature) + exp(y / temperature))``: `smooth_max` of
    the pair, between ``maximum(x, y)`` and ``maximum(x, y) + temperature * log(2)``. At
    temperature 1, `jnp.logaddexp`.

    Args:
        x, y: real arrays that broadcast together. Dtypes promote as in `jnp.maximum`.
        temperature: in the units of ``x``; larger is softer. Broadcastable to the
            result; may be traced and differentiated. At 0 the result is
            ``maximum(x, y)``; below 0 the smooth minimum,
            ``smooth_maximum(x, y; -t) = -smooth_maximum(-x, -y; t)``.

    Returns:
        Array of the shape of ``x + y``, in the units of ``x``; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError: ``x`` or ``y`` is not an array of real numbers; ``temperature`` is
            complex.
        ValueError: ``x`` and ``y`` do not broadcast; ``temperature`` would enlarge the
            result.

    Gradient:
        d/dx = p = ``smooth_step(x - y)`` and d/dy = 1 - p, computed without that
        subtraction. d/dtemperature = the entropy of (p, 1 - p) in nats. At temperature
        0 ties share equally, and have log(2) in the temperature. Residuals: the
        derivatives asked for.

    Edge cases:
        Two numbers -inf give -inf with gradient 0. Two +inf give +inf and share the
        gradient. NaN only where ``x`` or ``y`` is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.smooth_maximum(jnp.array([1000.0, 3.0]), 1000.0))
        [1000.6932 1000.    ]
    """
    return _of_two("smooth_maximum", _pair.maximum, x, y, temperature)


@with_hints
def smooth_minimum(
    x: ArrayLike, y: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """Smooth minimum of two arrays, elementwise.

    ``smooth_minimum(x, y) = -smooth_maximum(-x, -y)``, between
    ``minimum(x, y) - temperature * log(2)`` and ``minimum(x, y)``.

    Args:
        x, y: real arrays that broadcast together. Dtypes promote as in `jnp.minimum`.
        temperature: in the units of ``x``, as in `smooth_maximum`. At 0 the result is
            ``minimum(x, y)``; below 0 the smooth maximum.

    Returns:
        Array of the shape of ``x + y``, in the units of ``x``; integers give floats.
        Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `smooth_maximum`.

    Gradient:
        d/dx = p = ``smooth_step(y - x)`` and d/dy = 1 - p, computed without that
        subtraction. d/dtemperature = minus the entropy of (p, 1 - p) in nats.
        Residuals: the derivatives asked for.

    Edge cases:
        Two numbers +inf give +inf with gradient 0. Two -inf give -inf and share the
        gradient. NaN only where ``x`` or ``y`` is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> print(jaxsoft.smooth_minimum(jnp.array([1000.0, 3.0]), 1000.0))
        [999.3068   3.    ]
    """
    return _of_two("smooth_minimum", _minimum, x, y, temperature)


def _of_one(function: str, core: Any, x: ArrayLike, temperature: ArrayLike) -> Array:
    x = as_real(function, "x", x)
    return elementwise(core, (x,), as_elementwise_temperature(function, temperature, x))


def _of_two(
    function: str, core: Any, x: ArrayLike, y: ArrayLike, temperature: ArrayLike
) -> Array:
    x, y = as_array(function, "x", x), as_array(function, "y", y)
    for name, v in (("x", x), ("y", y)):
        as_real(function, name, v)
    dtype = jnp.result_type(x, y)
    x = as_real(function, "x", x.astype(dtype))
    y = as_real(function, "y", y.astype(dtype))
    try:
        shape = jnp.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        raise ValueError(
            f"{function}: x and y must broadcast together; "
            f"got shapes {x.shape} and {y.shape}"
        ) from None
    x, y = jnp.broadcast_to(x, shape), jnp.broadcast_to(y, shape)
    return elementwise(
        core, (x, y), as_elementwise_temperature(function, temperature, x)
    )


def _softplus(x, temperature):
    return _pair.maximum(x, jnp.zeros((), x.dtype), temperature)


def _smooth_step(x, temperature):
    return _pair.weight(x, jnp.zeros((), x.dtype), temperature)


def _minimum(x, y, temperature):
    return -_pair.maximum(-x, -y, temperature)


@jax.custom_jvp
def _smooth_abs(x, temperature):
    return _pair.maximum(x, -x, temperature)


@jax.custom_jvp
def _smooth_sign(x, temperature):
    return jnp.tanh(_pair.gap(x, jnp.zeros((), x.dtype), temperature))


# With u = x/tau, d tanh(u)/du = sech(u)^2 = 4 v for the slope v of the pair (x, -x).
def _sech2(x, temperature):
    return 4 * _pair.slope(x, -x, temperature)


rule_from_partials(
    _smooth_abs,
    lambda x, tau: _smooth_sign(x, tau),
    lambda x, tau: _pair.entropy(x, -x, tau),
)
rule_from_partials(
    _smooth_sign,
    lambda x, tau: _sech2(x, tau) * _pair.reciprocal(tau),
    lambda x, tau: (
        -times_log(_sech2(x, tau), _pair.gap(x, jnp.zeros((), x.dtype), tau))
        * _pair.reciprocal(tau)
    ),
)
