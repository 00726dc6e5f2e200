"""Logits as they are given, and the letters in which the rules are written.

For logits x, a temperature tau and the classes that count,

    z = x, or -x where tau < 0 (a negative temperature turns max into min)
    t = |tau|        m = max z        d_i = (z_i - m) / t <= 0        e_i = exp(d_i)

Derivatives hold m fixed. Every result of the library is the same for any shift m, so
its derivatives are too, to all orders. The rules below say no more than that, and what
the derivative is at the points where a division by t or an infinity would make NaN.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxsoft._core.dtypes import accumulation_dtype, cast, within_range
from jaxsoft._core.mesh import broadcast_like

# A class with more than this of the maximum's probability may be the maximum.
NEAR = 0.6


class Logits(NamedTuple):
    """Logits as a function is given them. The mask has the rank of x, and so has the
    temperature, which is of either sign and has one entry per row."""

    x: Array
    where: Array | None = None
    temperature: Array | None = None


def masked_logits(logits: Logits) -> Array:
    """z: x in the accumulation dtype, signed; a masked class is -inf.

    A rule calls this in its forward and in its backward pass, so that both see the
    same logits and only x itself is saved. Its transpose takes dz back to dx.
    """
    z = cast(logits.x, accumulation_dtype(logits.x.dtype))
    if logits.temperature is not None:
        z = jnp.where(is_negative(logits.temperature), -z, z)
    if logits.where is not None:
        z = jnp.where(broadcast_like(logits.where, z), z, -jnp.inf)
    return z


def size_of(temperature: Array | None) -> Array | None:
    """t = |tau|."""
    return None if temperature is None else jnp.abs(temperature)


def is_negative(temperature: Array) -> Array:
    """Whether tau is below 0, which -0.0 is not.

    By its bits: in a comparison processors take a subnormal number for 0, but its
    functions are the limits from below.
    """
    bits = jnp.int64 if temperature.dtype == jnp.float64 else jnp.int32
    temperature = jax.lax.stop_gradient(temperature)
    bits = jax.lax.bitcast_convert_type(temperature, bits)
    return (bits < 0) & (bits != jnp.iinfo(bits.dtype).min)


def sign_of(temperature: Array) -> Array:
    """-1 for tau < 0, else 1."""
    one = jnp.ones_like(temperature)
    return jnp.where(is_negative(temperature), -one, one)


def is_hard(temperature: Array) -> Array:
    """Whether tau is 0. Subnormal numbers count as 0: processors flush them to it."""
    return jnp.abs(temperature) < jnp.finfo(temperature.dtype).tiny


def inverse_temperature(temperature: Array | None) -> Array | float:
    """1/t, and 0 at tau = 0: the hard functions are constant almost everywhere."""
    if temperature is None:
        return 1.0
    hard = is_hard(temperature)
    return jnp.where(hard, 0, _inverse(jnp.where(hard, 1, jnp.abs(temperature))))


@jax.custom_jvp
def _inverse(size: Array) -> Array:
    return 1 / size


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    # Finite where the square of the temperature is 0: what it meets there is often 0,
    # an exponential.
    (size,), (size_dot,) = primals, tangents
    inverse = _inverse(size)
    return inverse, -within_range(inverse * inverse, size.dtype) * size_dot


@jax.custom_jvp
def shifted(z: Array, m: Array, temperature: Array | None) -> Array:
    """d = (z - m)/t; 0 where z is +inf, -inf where z is -inf.

    Shifted first and divided later: z/t - m/t would lose the digits of z - m. At t = 0
    the maxima have d = 0 and all others -inf.
    """
    gap = jnp.where(z == jnp.inf, 0, z - jnp.where(jnp.isneginf(m), 0, m))
    if temperature is None:
        return gap
    hard = is_hard(temperature)
    # Of 0 in place of -inf: where JAX drops the rule below, as it does in a scan that
    # is differentiated twice in reverse, the derivative of the quotient is finite too.
    divisor = jnp.where(hard, 1, jnp.abs(temperature))
    infinite = jnp.isneginf(gap)
    d = jnp.where(infinite, gap, jnp.where(infinite, 0, gap) / divisor)
    return jnp.where(hard & (gap < 0), -jnp.inf, d)


@shifted.defjvp
def _shifted_jvp(primals, tangents):
    # d' = (z' - m' - d t')/t. A rule, since the quotient's own derivative squares t,
    # and multiplies a zero tangent by infinity at an infinite d.
    z, m, temperature = primals
    z_dot, m_dot, temperature_dot = tangents
    d = shifted(z, m, temperature)
    d_dot = z_dot - m_dot
    if temperature is not None:
        size_dot = jnp.sign(temperature) * temperature_dot
        d_dot = d_dot - zero_if_infinite(d) * size_dot
        d_dot = d_dot * inverse_temperature(temperature)
    return d, jnp.where(jnp.isinf(z), 0, d_dot)


@jax.custom_jvp
def exp_shifted(z: Array, m: Array, temperature: Array | None) -> Array:
    """e = exp(d)."""
    return jnp.exp(shifted(z, m, temperature))


@jax.custom_jvp
def exact_exp_shifted(z: Array, m: Array, temperature: Array | None) -> Array:
    """e, without the roundings of the subtraction and the division in d.

    At d = -70 one such rounding alone is a relative error of 4e-6 in exp(d). For
    functions that are not passes: there it would cost XLA a pass over the logits.
    """
    d = shifted(z, m, temperature)
    rounding = _rounding_of_shifted(z, m, d, temperature)
    return jnp.exp(d) * (1 + jnp.where(jnp.abs(rounding) < 1, rounding, 0))


def _rounding_of_shifted(z, m, d, temperature):
    m = jnp.where(jnp.isneginf(m), 0, m)
    finite = jnp.isfinite(z - m)
    z, m = (jnp.where(finite, v, 0) for v in (z, m))
    rounding = rounding_of_difference(z, m, z - m)
    if temperature is not None:
        rounding = rounding + _remainder(z - m, d, jnp.abs(temperature))
        rounding = rounding * inverse_temperature(temperature)
    return jax.lax.stop_gradient(rounding)


def _exp_jvp(exp, primals, tangents):
    # e' = e d', and 0 where e is 0, whatever d' is there.
    e = exp(*primals)
    _, d_dot = jax.jvp(shifted, primals, tangents)
    return e, jnp.where(e == 0, 0, e * d_dot)


exp_shifted.defjvp(functools.partial(_exp_jvp, exp_shifted))
exact_exp_shifted.defjvp(functools.partial(_exp_jvp, exact_exp_shifted))


def rounding_of_difference(a: Array, b: Array, difference: Array) -> Array:
    """What a - b lacks, exactly: Knuth's TwoSum. Of finite numbers."""
    back = difference - a
    return (a - (difference - back)) - (b + back)


def _remainder(gap: Array, d: Array, t: Array) -> Array:
    """gap - d t, exactly: in halves of the digits, whose products do not round. 0 where
    they are infinite."""
    finite = jnp.isfinite(gap) & jnp.isfinite(d)
    gap, d = (jnp.where(finite, v, 0) for v in (gap, d))
    finfo = jnp.finfo(gap.dtype)
    d_high, t_high = (
        jax.lax.reduce_precision(v, finfo.nexp, finfo.nmant // 2) for v in (d, t)
    )
    d_low, t_low = d - d_high, t - t_high
    return ((gap - d_high * t_high) - d_high * t_low - d_low * t_high) - d_low * t_low


def is_maximum(d: Array, s: Array) -> Array:
    """Whether d is that of the maximum, which XLA may have computed anew, and not to
    the same bits.

    It fuses what makes the logits into every kernel that reads them, and rounds a
    product and a sum together there, or apart. The loss of a sure model would be such a
    rounding, of either sign. A class with more than 0.6 of the maximum's probability,
    in a row whose tail s is less than 0.5, is the maximum.
    """
    return d > jnp.where(s < 0.5, math.log(NEAR), 0)


def exact_at_maximum(d: Array, s: Array) -> Array:
    """d, with 0 at the maximum."""
    return override_primal(0, is_maximum(d, s), d)


def override_primal(value: Array | float, where: Array | bool, v: Array) -> Array:
    """v; where that is true the value, with the derivative of v."""
    finite = jnp.where(where, v, 0)
    return jnp.where(where, value + (finite - jax.lax.stop_gradient(finite)), v)


def zero_if_infinite(v: Array) -> Array:
    """v, with 0 in place of an infinity: one such row would fill with it the derivative
    of what many rows share."""
    return jnp.where(jnp.isinf(v), 0, v)


def nan_where(where: Array, dtype: DTypeLike) -> Array:
    """NaN there, 0 elsewhere: made of infinities, so that jax_debug_nans sees one only
    where there is one."""
    infinite = jnp.where(where, jnp.inf, 0).astype(dtype)
    return infinite - infinite


def times_log(p: Array, d: Array) -> Array:
    """p d with 0 (-inf) = 0."""
    return p * jnp.where(p == 0, 0, d)


def times(a: Array, b: Array | float) -> Array:
    """a b, and 0 where a is 0, whatever b is."""
    return a * jnp.where(a == 0, 0, b)


def over_temperature(v: Array, temperature: Array | None) -> Array:
    """v/t for v <= 0; at t = 0, -inf below 0."""
    return shifted(v, jnp.zeros_like(v), temperature)


def log_softmax_cotangent(
    g: Array,
    d: Array,
    s: Array,
    value: Array,
    others: Array,
    multiply: Callable[[Array, Array], Array] = jnp.multiply,
) -> Array:
    """t dz for a cotangent g of log p, with its value at the maximum and its sum over
    the other classes. With G = sum_j g_j,

        t dz_i = g_i - p_i G = g_i (1 - p_i) - p_i (G - g_i)
               = (g_i (s + (1 - e_i)) - e_i (G - g_i)) / (1 + s)

    At the maximum 1 - e_i is exactly 0, so 1 - p_i is s/(1 + s) with all the digits of
    s. There, if it has most of the probability, G - g_i is the sum over the others.
    """
    at_maximum = is_maximum(d, s) & (s < 0.5)
    e = override_primal(1, at_maximum, jnp.exp(d))
    others = jnp.where(at_maximum, others, others + (value - g))
    dz = multiply(g, s + (1 - e)) - multiply(others, e)
    return multiply(dz, 1 / (1 + s))
