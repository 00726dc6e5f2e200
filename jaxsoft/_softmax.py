"""softmax, log_softmax and entropy: the distribution p of a row of logits.

Their rules save the arguments and O(rows) numbers, and subtract nothing that is nearly
equal: where one class has almost all the probability, the derivatives are made of the
probabilities of the others, and keep their digits.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._autodiff import with_jvp
from jaxsoft._checks import (
    Axis,
    AxisName,
    as_axes,
    as_inexact,
    as_mask,
    as_real,
    as_temperature,
    is_of,
    reject_options,
)
from jaxsoft._core.dtypes import widened
from jaxsoft._core.lanes import apart
from jaxsoft._core.mesh import row_max, row_sum, split_by_type, spread_alike, vary_alike
from jaxsoft._core.numerics import (
    accumulation_dtype,
    counted_logits,
    exact_at_maximum,
    exp_about,
    exp_below,
    exp_shifted,
    inverse_temperature,
    is_maximum,
    per_row,
    probabilities,
    shifted,
    sum_over_others,
    times_log,
    with_value,
)
from jaxsoft._passes.cpu_sums import sum_of_choices
from jaxsoft._passes.max_and_tail import max_and_tail
from jaxsoft._passes.one_pass import sample_and_tail

# A row of more outgrows the cache. Measured on two cores, in ms, one kernel beside the
# two of a split: 79 and 86 for 4096 rows of 8192 classes, 94 and 88 for 256 of 131072.
MOST_CLASSES_IN_ONE_KERNEL = 8192


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
        Both are 0 at temperature 0. Residuals: the result, or for half precision and
        with a temperature the arguments and two numbers per row.

    Awkward values:
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
        return jax.nn.softmax(x, axes, where)
    tau = as_temperature("softmax", temperature, x, axes)
    return _softmax_jit(x, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _softmax_jit(x, where, temperature, axes):
    temperature = per_row(temperature, x, axes)
    x, temperature = vary_alike(axes, x, temperature)
    return _softmax(x, where, temperature, axes)


# For a cotangent g, and any number c, since sum_j p_j = 1:
#     dz_i   = p_i (g_i - sum_j p_j g_j) / t
#            = p_i (h_i - sum_j p_j h_j) / t    with h = g - c
#     dtau   = -sigma sum_i dz_i d_i
# For c the entry of g at a class with p > 1/2, h is 0 there and the sum runs over the
# others: nothing cancels when the model is sure.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(x, where, temperature, axes):
    return _softmax_plain(x, where, temperature, axes)[0]


def _softmax_plain(x, where, temperature, axes):
    z = counted_logits(x, where, temperature)
    if temperature is None and axes.count_here(x.shape) <= MOST_CLASSES_IN_ONE_KERNEL:
        p, m, s = _without_comparison(z, axes)
    elif temperature is None:
        m, s = sample_and_tail(x, where, axes, to_add=False)
        # Never above 1 by a rounding, where m is below the maximum.
        p = jnp.minimum(exp_about(z, m) * (1 / (1 + s)), 1)
    else:
        m, s = max_and_tail(x, where, temperature, axes)
        p = exp_below(z, m, temperature) * (1 / (1 + s))
    return p.astype(x.dtype), (m, s)


def _without_comparison(z, axes):
    """p, m and s, of which p needs no tail: S = 1 + s has the digits that p shows.

    There is no choice in it, and never both a least and a largest value, which XLA
    would take for a choice: its CPU backend then runs all of it as one kernel, which
    reads a row once. An infinite maximum is the largest number, of either sign.
    """
    largest = float(jnp.finfo(z.dtype).max)
    z = jnp.minimum(z, largest)
    m = row_max(jax.lax.stop_gradient(z), axes, at_least=-largest)
    e = jnp.exp(z - m)
    total = jnp.maximum(row_sum(e, axes), 1)  # of a row in which nothing counts 0
    return e / total, m, total - 1


def _softmax_fwd(x, where, temperature, axes):
    p, (m, s) = _softmax_plain(x, where, temperature, axes)
    if temperature is None and p.dtype == accumulation_dtype(p.dtype):
        return p, (p, None, None, None)
    return p, (x, where, temperature, (m, s))


def _softmax_bwd(axes, residuals, g):
    x, where, temperature, split = residuals
    if split is None:
        return _softmax_pullback(x, g, axes), None, None
    z, to_input = jax.vjp(lambda x: counted_logits(x, where, temperature), x)
    m, s = split
    p = probabilities(z, m, s, temperature)
    dz = _softmax_pullback(p, widened(g, p.dtype), axes)
    if temperature is None:
        return to_input(dz)[0], None, None
    dz = dz * inverse_temperature(temperature)
    d = shifted(z, m, temperature)
    dsize = -row_sum(dz * jnp.where(p == 0, 0, d), axes)
    return to_input(dz)[0], None, jnp.sign(temperature) * dsize


def _softmax_pullback(p, g, axes):
    if p.size == 0:  # a row without classes has no first one
        return p * g
    p = apart(p, p)
    first = _first_of_row(p, axes)
    c = row_sum(jnp.round(p) * g, axes)  # 1 where p > 1/2, else 0
    h = g - apart(c, first)
    return p * (h - apart(row_sum(p * h, axes), first))


def _first_of_row(p, axes):
    if split_by_type(p, axes):
        return jnp.max(p, axes, keepdims=True)
    return functools.reduce(lambda p, a: jax.lax.slice_in_dim(p, 0, 1, axis=a), axes, p)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


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
        Both are 0 at temperature 0. Residuals: the arguments and two numbers per row.

    Awkward values:
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
        return jax.nn.log_softmax(x, axes, where)
    tau = as_temperature("log_softmax", temperature, x, axes)
    return _log_softmax_jit(x, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _log_softmax_jit(x, where, temperature, axes):
    temperature = per_row(temperature, x, axes)
    x, temperature = vary_alike(axes, x, temperature)
    return _log_softmax(x, where, temperature, axes)


# log p_i = d_i - log1p(s). For a cotangent g with sum G, over the included classes,
#     t dz_i = g_i - p_i G = (g_i (1 - p_i) - p_i (G - g_i))
#            = (g_i (s + (1 - e_i)) - e_i (G - g_i)) / (1 + s)
#     t dt   = -sum_i g_i (d_i + U)     with U = -sum_i p_i d_i
# At the maximum 1 - e_i is exactly 0, so 1 - p_i is s/(1 + s) with all the digits of s.
# Where the maximum has more than half of the probability, s < 1, its G - g_i is summed
# over the others directly.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_softmax(x, where, temperature, axes):
    return _log_softmax_plain(x, where, temperature, axes)[0]


def _log_softmax_plain(x, where, temperature, axes):
    z = counted_logits(x, where, temperature)
    m, s = max_and_tail(x, where, temperature, axes)
    log_p = exact_at_maximum(shifted(z, m, temperature), s) - jnp.log1p(s)
    return log_p.astype(x.dtype), (m, s)


def _log_softmax_fwd(x, where, temperature, axes):
    log_p, (m, s) = _log_softmax_plain(x, where, temperature, axes)
    return log_p, (x, where, temperature, m, s)


def _log_softmax_bwd(axes, residuals, g):
    x, where, temperature, m, s = residuals
    z, to_input = jax.vjp(lambda x: counted_logits(x, where, temperature), x)
    g = jnp.where(jnp.isneginf(m), 0, widened(g, z.dtype))
    g = g if where is None else jnp.where(spread_alike(where, g), g, 0)
    d, e = shifted(z, m, temperature), exp_below(z, m, temperature)
    e, d = with_value(1, is_maximum(d, s), e), exact_at_maximum(d, s)
    dz = g * (s + (1 - e)) - e * sum_over_others(g, z, m, s, axes)
    dz = dz * (inverse_temperature(temperature) / (1 + s))
    if temperature is None:
        return to_input(dz)[0], None, None
    u = -sum_of_choices(times_log(e, d), axes) / (1 + s)
    g_d = row_sum(g * jnp.where(jnp.isinf(d), 0, d + u), axes)
    dtemperature = -jnp.sign(temperature) * inverse_temperature(temperature) * g_d
    return to_input(dz)[0], None, dtemperature


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


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

    Awkward values:
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
    tau = as_temperature("entropy", temperature, logits, axes)
    return _entropy_jit(logits, where, tau, axes)


@functools.partial(jax.jit, static_argnames="axes")
def _entropy_jit(x, where, temperature, axes):
    temperature = per_row(temperature, x, axes)
    x, temperature = vary_alike(axes, x, temperature)
    return jnp.squeeze(_entropy(x, where, temperature, axes), axes)


# H = log1p(s) + U with U = -sum_i p_i d_i: both terms are >= 0, so neither cancels.
#     t dz_i = -g p_i (d_i + U)
#     t dt   = g sum_i p_i (d_i + U)^2
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _entropy(x, where, temperature, axes):
    return _entropy_plain(x, where, temperature, axes)[0]


def _entropy_plain(x, where, temperature, axes):
    z = counted_logits(x, where, temperature)
    m, s = max_and_tail(x, where, temperature, axes)
    d = exact_at_maximum(shifted(z, m, temperature), s)
    e = exp_shifted(z, m, temperature)
    u = -sum_of_choices(times_log(e, d), axes) / (1 + s)
    return jnp.log1p(s) + u, (m, s, u)


def _entropy_fwd(x, where, temperature, axes):
    h, split = _entropy_plain(x, where, temperature, axes)
    return h, (x, where, temperature, split)


def _entropy_bwd(axes, residuals, g):
    x, where, temperature, (m, s, u) = residuals
    z, to_input = jax.vjp(lambda x: counted_logits(x, where, temperature), x)
    p = probabilities(z, m, s, temperature)
    d = exact_at_maximum(shifted(z, m, temperature), s)
    surprise = jnp.where(p == 0, 0, d + u)
    scale = g * inverse_temperature(temperature)
    dx = to_input(-scale * p * surprise)[0]
    if temperature is None:
        return dx, None, None
    variance = sum_of_choices(p * surprise**2, axes)
    return dx, None, jnp.sign(temperature) * scale * variance


_entropy.defvjp(_entropy_fwd, _entropy_bwd)
