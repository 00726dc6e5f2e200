"""The (max, tail) split, on which every function of the library stands.

For logits x, a temperature tau and the classes that count,

    z = x, or -x where tau < 0 (a negative temperature turns max into min)
    m = max z        d_i = (z_i - m) / |tau| <= 0        e_i = exp(d_i)
    s = sum_i e_i - 1 >= 0, summed without ever adding the 1.

The 1 is the term of the maximum. Kept apart, it rounds nothing away: log(1 + s) is
log1p(s), the probability p_i is e_i / (1 + s), and a model that is sure of its answer
has a tail s of 1e-9 with all its digits, where sum_i e_i would be exactly 1.

Derivatives hold m fixed. Every result of the library is the same for any shift m, so
its derivatives are too, to all orders. The rules below say no more than that, and what
the derivative is at the points where a division by tau or an infinity would make NaN.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxsoft._core.dtypes import converted, within_range
from jaxsoft._core.exp import (
    HIGHEST,
    exp_of_difference_on_cpu,
    exp_of_sum,
    exp_of_sum_on_cpu,
)
from jaxsoft._core.lanes import apart
from jaxsoft._core.mesh import Axes, row_sum, split_alike, spread_alike

# Of the maximum's probability: a class that has more may be the maximum.
NEAR = 0.6
# With 65536 rows of 10 classes a gradient's last kernel takes 1.2 ms with the
# exponential of `exp`, and 0.8 ms with XLA's; with 16 classes 0.7 and 0.8.
FEW_NEIGHBOURS = 16


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for half precision and narrower, else the dtype itself."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def counted_logits(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    softcap: Array | None = None,
    narrow: bool = False,
    bottom: Array | float = -math.inf,
) -> Array:
    """z: x in the accumulation dtype, capped, signed, masked; a masked entry is -inf.

    A rule calls this in its forward and in its backward pass, so that both see the
    same logits and only x itself is saved. Its transpose takes dz back to dx. Narrow
    logits stay in the dtype of x, exactly, without a mask and a softcap.
    """
    z = x
    if where is not None or softcap is not None or not narrow:
        z = converted(x, accumulation_dtype(x.dtype))
    if where is not None:
        where = spread_alike(where, z)
    if softcap is not None:
        # A masked NaN must not meet the derivative of the cap.
        z = capped(z if where is None else jnp.where(where, z, 0), softcap)
    if temperature is not None:
        # A product, and no choice, which XLA's CPU sums would not take in.
        z = z * jnp.where(temperature < 0, -1, 1).astype(z.dtype)
    return z if where is None else jnp.where(where, z, bottom)


def per_row(temperature: Array | None, x: Array, axes: Axes) -> Array | None:
    """The temperature of every row. A shared one is spread before a rule sees it: the
    sum over rows in its derivative is then JAX's own."""
    if temperature is None:
        return None
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return split_alike(jnp.broadcast_to(temperature, kept), x)


def is_hard(temperature: Array) -> Array:
    """Whether tau is 0. Subnormal numbers count as 0: processors flush them to it."""
    return jnp.abs(temperature) < jnp.finfo(temperature.dtype).tiny


def inverse_temperature(temperature: Array | None) -> Array | float:
    """1/|tau|, and 0 at tau = 0: the hard functions are constant almost everywhere."""
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
    """d = (z - m)/|tau|; 0 where z is +inf, -inf where z is -inf.

    Shifted first and divided later: z/tau - m/tau would lose the digits of z - m. At
    tau = 0 the maxima have d = 0 and all others -inf.
    """
    gap = jnp.where(z == jnp.inf, 0, z - _subtractable(m))
    if temperature is None:
        return gap
    hard = is_hard(temperature)
    # Of 0 in place of -inf: where JAX drops the rule below, as it does in a scan that
    # is differentiated twice in reverse, the derivative of the quotient is finite too.
    divisor = jnp.where(hard, 1, jnp.abs(temperature))
    d = jnp.where(
        jnp.isneginf(gap), gap, jnp.where(jnp.isneginf(gap), 0, gap) / divisor
    )
    return jnp.where(hard & (gap < 0), -jnp.inf, d)


def _subtractable(m: Array) -> Array:
    """0 in place of a maximum of -inf: then z - m is -inf, as all z are, and no NaN."""
    return jnp.where(jnp.isneginf(m), 0, m)


@shifted.defjvp
def _shifted_jvp(primals, tangents):
    # d' = (z' - m' - d |tau|')/|tau|. A rule, since the quotient's own derivative
    # squares tau, and multiplies a zero tangent by infinity at an infinite d.
    z, m, temperature = primals
    z_dot, m_dot, temperature_dot = tangents
    d = shifted(z, m, temperature)
    d_dot = z_dot - m_dot
    if temperature is not None:
        size_dot = jnp.sign(temperature) * temperature_dot
        d_dot = d_dot - jnp.where(jnp.isinf(d), 0, d) * size_dot
        d_dot = d_dot * inverse_temperature(temperature)
    return d, jnp.where(jnp.isinf(z), 0, d_dot)


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
    return with_value(0, is_maximum(d, s), d)


def with_value(value: Array | float, where: Array, v: Array) -> Array:
    """v; where that is true the value, with the derivative of v."""
    return jnp.where(where, value + (v - jax.lax.stop_gradient(v)), v)


@jax.custom_jvp
def exp_shifted(z: Array, m: Array, temperature: Array | None) -> Array:
    """e = exp(d), without the roundings of the subtraction and the division in d.

    At d = -70 one such rounding alone is a relative error of 4e-6 in exp(d).
    """
    d = shifted(z, m, temperature)
    return exp_of_sum(d, _rounding_of_shifted(z, m, d, temperature))


def _has_cpu_exponential(z: Array) -> bool:
    """Whether it is worth a program of its own: XLA vectorizes a loop over fewer
    neighbours no better than it vectorizes its own exp."""
    return z.dtype == jnp.float32 and z.ndim > 0 and z.shape[-1] >= FEW_NEIGHBOURS


@jax.custom_jvp
def exp_below(z: Array, m: Array, temperature: Array | None) -> Array:
    """exp_shifted for no z above m, where it is written to memory: XLA's sums on a CPU
    take in its own exp alone."""
    if not _has_cpu_exponential(z):
        return exp_shifted(z, m, temperature)
    return jax.lax.platform_dependent(
        z, m, temperature, cpu=exp_below_on_cpu, default=exp_shifted
    )


@jax.custom_jvp
def exp_about(z: Array, m: Array) -> Array:
    """exp_below for an m that need not be the maximum, without a temperature. On a CPU
    it may end at exp(HIGHEST)."""
    if not _has_cpu_exponential(z):
        return exp_shifted(z, m, None)
    return jax.lax.platform_dependent(
        z,
        m,
        cpu=functools.partial(exp_of_difference_on_cpu, highest=HIGHEST),
        default=lambda z, m: exp_shifted(z, m, None),
    )


def exp_below_on_cpu(z: Array, m: Array, temperature: Array | None) -> Array:
    if temperature is None:
        return exp_of_difference_on_cpu(z, m)
    d = shifted(z, m, temperature)
    return exp_of_sum_on_cpu(d, _rounding_of_shifted(z, m, d, temperature))


def rounding_of_shifted(z: Array, m: Array, d: Array, temperature: Array | None):
    """What d lacks of (z - m)/|tau|, which is a float itself; 0 at infinities."""
    rounding = _rounding_of_shifted(z, m, d, temperature)
    return jnp.where(jnp.isfinite(rounding), rounding, 0)


def _rounding_of_shifted(z, m, d, temperature):
    m = _subtractable(m)
    gap = z - m
    back = gap - z
    rounding = (z - (gap - back)) - (m + back)  # Knuth's TwoSum
    if temperature is None:
        rounding = jnp.where(z == jnp.inf, 0, rounding)
    else:
        rounding = rounding + _remainder(gap, d, jnp.abs(temperature))
        rounding = rounding * inverse_temperature(temperature)
        # No rounding at all at infinities, of which a temperature may be one.
        rounding = jnp.where(jnp.abs(rounding) < 1, rounding, 0)
    return jax.lax.stop_gradient(rounding)


def _remainder(gap: Array, d: Array, t: Array) -> Array:
    """gap - d t, exactly: in halves of the digits, whose products do not round."""
    finfo = jnp.finfo(gap.dtype)
    d_high, t_high = (
        jax.lax.reduce_precision(v, finfo.nexp, finfo.nmant // 2) for v in (d, t)
    )
    d_low, t_low = d - d_high, t - t_high
    return ((gap - d_high * t_high) - d_high * t_low - d_low * t_high) - d_low * t_low


def _exp_jvp(exp, primals, tangents):
    # e' = e d', and 0 where e is 0, whatever d' is there.
    e = exp(*primals)
    _, d_dot = jax.jvp(shifted, primals, tangents)
    return e, jnp.where(e == 0, 0, e * d_dot)


exp_shifted.defjvp(functools.partial(_exp_jvp, exp_shifted))
exp_below.defjvp(functools.partial(_exp_jvp, exp_below))


@exp_about.defjvp
def _exp_about_jvp(primals, tangents):
    def exp(z, m, _):
        return exp_about(z, m)

    return _exp_jvp(exp, (*primals, None), (*tangents, None))


def weighted_exp(
    z: Array, m: Array, weights: Array | None, temperature: Array | None
) -> Array:
    """b e. Where b is 0, z may lie far above m, and e is limited to finite numbers."""
    if weights is None and temperature is None:
        return exp_about(z, m)
    if weights is None:
        return exp_below(z, m, temperature)
    e = exp_shifted(z, m, temperature)
    return weights * jnp.minimum(e, jnp.finfo(e.dtype).max)


def probabilities(z: Array, m: Array, s: Array, temperature: Array | None) -> Array:
    """p = e/(1 + s): 0 at a masked entry, and 0 throughout where nothing counts."""
    return exp_shifted(z, m, temperature) * (1 / (1 + s))


def times_log(p: Array, d: Array) -> Array:
    """p d with 0 (-inf) = 0."""
    return p * jnp.where(p == 0, 0, d)


def sum_over_others(q: Array, z: Array, m: Array, s: Array, axes: Axes) -> Array:
    """For each class, the sum of q over all the other classes."""
    others = apart(row_sum(q * below_maximum(z, m), axes), m)
    total = apart(row_sum(q, axes), m)
    # A class alone at the top, with more than half of p: summed, not subtracted.
    return jnp.where((z == m) & (s < 1), others, total - q)


def below_maximum(z: Array, m: Array) -> Array:
    """1 below the maximum and 0 at it, without a comparison: XLA's sums on a CPU take
    in arithmetic alone. +inf counts as the largest finite number."""
    return jnp.sign(bounded_maximum(m) - jnp.minimum(z, jnp.finfo(z.dtype).max))


def bounded_maximum(m: Array) -> Array:
    """A maximum that may be subtracted: 0 in place of -inf, the largest for +inf."""
    return jnp.where(jnp.isneginf(m), 0, jnp.minimum(m, jnp.finfo(m.dtype).max))


@jax.custom_jvp
def capped(z: Array, softcap: Array) -> Array:
    """c tanh(z/c), which is z where z/c is small: up to an infinite cap."""
    linear = float(jnp.finfo(z.dtype).eps) ** 0.5 / 4
    curved = softcap * jnp.tanh(z / softcap)
    return jnp.where(jnp.abs(z) <= softcap * linear, z, curved)


@capped.defjvp
def _capped_jvp(primals, tangents):
    # With u = z/c: dz has the factor sech(u)^2, and dc has tanh(u) - u sech(u)^2. The
    # forms 1 - tanh(u)^2 and u (1 - tanh(u)^2) lose their digits at large u, and are
    # NaN at infinity; the difference loses its digits at small u, where its Taylor
    # series has converged.
    z, c = primals
    z_dot, c_dot = tangents
    u = jnp.where(jnp.isinf(c), 0, z / c)
    sech2 = 1 / jnp.cosh(u) ** 2
    is_small = jnp.abs(u) < (0.05 if u.dtype == jnp.float64 else 0.25)
    small = jnp.where(is_small, u, 0)
    series = jnp.zeros_like(u)
    for coefficient in _SLOPE_SERIES:
        series = coefficient + small**2 * series
    direct = jnp.tanh(u) - jnp.where(sech2 == 0, 0, u) * sech2
    slope = jnp.where(is_small, small**3 * series, direct)
    return capped(z, c), sech2 * z_dot + slope * c_dot


# tanh(u) - u sech(u)^2 over u^3, in powers of u^2 from the highest.
_SLOPE_SERIES = (
    -12 * 21844 / 6081075,
    10 * 1382 / 155925,
    -8 * 62 / 2835,
    6 * 17 / 315,
    -4 * 2 / 15,
    2 / 3,
)


@jax.custom_jvp
def log1p_exp(z: Array) -> Array:
    """log(1 + exp(z)), with the digits of exp(z) where z is very negative.

    The smooth maximum of z and 0 at temperature 1, several times faster than the pair
    of any numbers at any temperature in `_smooth.pair`.
    """
    return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))


@log1p_exp.defjvp
def _log1p_exp_jvp(primals, tangents):
    # The derivative, the sigmoid, is finite where z is infinite.
    (z,), (z_dot,) = primals, tangents
    return log1p_exp(z), _sigmoid(z) * z_dot


@jax.custom_jvp
def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    # JAX's own derivative has the factor 1 - sigmoid(z), without digits at large z.
    (z,), (z_dot,) = primals, tangents
    return _sigmoid(z), _sigmoid(z) * _sigmoid(-z) * z_dot
