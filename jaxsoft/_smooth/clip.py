"""The smooth form of clip.

    C = lower + softplus(x - lower) - softplus(x - upper)

As it stands, two large numbers meet in the formula for x far above upper. With
e_l = exp(-|x - lower|/t) and e_u = exp(-|x - upper|/t) it is

    C = clip(x, lower, upper) + t (log1p(e_l) - log1p(e_u)),

where nothing is large: each softplus is a relu, which the clip collects, and the log1p.
At soft temperatures the two logarithms are nearly equal, and their difference is taken
inside: for x nearer to lower, by the distance g = |x - upper| - |x - lower|,

    log1p(e_l) - log1p(e_u) = log1p(e_l (1 - exp(-g/t)) / (1 + e_u)).

It leads from clip(x) towards the middle of the bounds and never past it, so that C lies
between the bounds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import as_broadcastable, as_real
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import is_hard, is_negative
from jaxsoft._elementwise import (
    as_elementwise_temperature,
    elementwise,
    rule_from_partials,
)
from jaxsoft._hints import with_hints
from jaxsoft._smooth import pair as _pair


@with_hints
def smooth_clip(
    x: ArrayLike, lower: ArrayLike, upper: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """Smooth clip of x to [lower, upper], elementwise, with two smooth corners.

    ``smooth_clip(x) = lower + softplus(x - lower) - softplus(x - upper)``. It rises
    from ``lower`` to ``upper`` and stays between them, in floating point too.

    Args:
        x: real array of any shape.
        lower, upper: bounds in the units of ``x``, broadcastable to ``x``; may be
            infinite, traced and differentiated. If they are equal, so is the result.
        temperature: in the units of ``x``; larger is softer. Broadcastable to ``x``;
            may be traced and differentiated. At 0 the result is
            ``clip(x, lower, upper)``; the sign does not matter.

    Returns:
        Array of the shape and dtype of ``x``, in its units; integers give floats. Half
        precision is computed in float32.

    Raises:
        TypeError: an argument is not an array of real numbers.
        ValueError: ``lower``, ``upper`` or ``temperature`` would enlarge ``x``; the
            bounds are Python numbers with ``lower > upper``.

    Gradient:
        With a = ``smooth_step(x - lower)`` and b = ``smooth_step(upper - x)``,
        d/dx = a b (1 - exp((lower - upper) / temperature)), which is a + b - 1,
        d/dlower = 1 - a and d/dupper = 1 - b, all without a subtraction that cancels.
        d/dtemperature is the entropy of (a, 1 - a) minus that of (b, 1 - b) in nats,
        right to the rounding of these. At temperature 0, d/dx is 1/2 at a bound.
        Residuals: the derivatives asked for.

    Edge cases:
        x = 1e8 or +inf gives ``upper``; an infinite bound leaves its side open. Where
        arrays have ``lower > upper`` the result is ``upper``, as in `jnp.clip`. NaN
        only where ``x`` or a bound is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x = jnp.array([-jnp.inf, 0.0, 0.5, 1e8])
        >>> print(jaxsoft.smooth_clip(x, 0.0, 1.0, temperature=0.1))
        [0.         0.06931018 0.5        1.        ]
    """
    name = "smooth_clip"
    x = as_real(name, "x", x)
    if (
        isinstance(lower, int | float)
        and isinstance(upper, int | float)
        and lower > upper
    ):
        raise ValueError(
            f"{name}: lower must not exceed upper; got {lower} and {upper}"
        )
    lower, upper = (
        as_broadcastable(
            name, which, as_real(name, which, v), x.shape, "the shape of x,"
        )
        for which, v in (("lower", lower), ("upper", upper))
    )
    wide = accumulation_dtype(x.dtype)
    lower, upper = lower.astype(wide), upper.astype(wide)
    lower = jnp.where(lower > upper, upper, lower)
    tau = as_elementwise_temperature(name, temperature, x)
    return elementwise(_smooth_clip, (x, lower, upper), tau)


@jax.custom_jvp
def _smooth_clip(x, lower, upper, temperature):
    t = _size(temperature)
    # g/2, signed: positive where x is nearer to lower. Outside [lower, upper] the
    # distance is the width of the interval.
    half_width = 0.5 * upper - 0.5 * lower
    half_gap = jnp.clip((0.5 * lower + 0.5 * upper) - x, -half_width, half_width)
    e_lower = _pair.exp_gap(x, lower, t)
    # From an infinite x, too, an infinite upper bound is far away.
    e_upper = jnp.where(jnp.isinf(upper), 0, _pair.exp_gap(x, upper, t))
    near, far = jnp.maximum(e_lower, e_upper), jnp.minimum(e_lower, e_upper)
    distance = 2 * jnp.abs(half_gap)
    distance_over_t = _pair.gap(distance, jnp.zeros((), x.dtype), t)
    missing = -jnp.expm1(-distance_over_t)
    inside = near * missing / (1 + far)
    excess = jnp.log1p(inside)
    if t is not None:
        # At large temperatures expm1 and log1p change nothing, and t goes.
        linear = float(jnp.finfo(x.dtype).eps) / 4
        t = jnp.where(is_hard(t), 0, t)
        without_t = jnp.where(distance_over_t < linear, distance, t * missing)
        excess = jnp.where(inside < linear, near * without_t / (1 + far), t * excess)
        excess = jnp.where(t == 0, 0, excess)
    # Where near is 0 the other factors may be infinite or NaN.
    none = (near == 0) | (lower == upper)
    excess = jnp.where(none, 0, jnp.sign(half_gap) * excess)
    return jnp.clip(x, lower, upper) + excess


def _size(temperature):
    return None if temperature is None else jnp.abs(temperature)


def _in_x(x, lower, upper, temperature):
    t = _size(temperature)
    # w(x, lower) - w(x, upper), where both may be nearly 1:
    #     w(x, lower) w(upper, x) (1 - exp(-(upper - lower)/t))
    above_lower = jnp.where(jnp.isneginf(lower), 1, _pair.weight(x, lower, t))
    below_upper = jnp.where(jnp.isposinf(upper), 1, _pair.weight(upper, x, t))
    return above_lower * below_upper * -jnp.expm1(-_pair.gap(upper, lower, t))


def _in_lower(x, lower, upper, temperature):
    return jnp.where(jnp.isinf(lower), 0, _pair.weight(lower, x, _size(temperature)))


def _in_upper(x, lower, upper, temperature):
    return jnp.where(jnp.isinf(upper), 0, _pair.weight(x, upper, _size(temperature)))


def _in_temperature(x, lower, upper, temperature):
    t = _size(temperature)
    of_lower = jnp.where(jnp.isinf(lower), 0, _pair.entropy(x, lower, t))
    of_upper = jnp.where(jnp.isinf(upper), 0, _pair.entropy(x, upper, t))
    return jnp.where(is_negative(temperature), of_upper - of_lower, of_lower - of_upper)


rule_from_partials(_smooth_clip, _in_x, _in_lower, _in_upper, _in_temperature)
