"""kl_divergence between two softmax distributions, given by their logits.

    KL = sum_i p_i log(p_i / q_i)    p = softmax(x / tau), q = softmax(y / tau)

The rule keeps the digits of a small divergence, where the formula subtracts nearly
equal logarithms, and has the limits at infinite logits, where autodiff gives NaN.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._autodiff import with_jvp
from jaxsoft._checks import (
    Axis,
    AxisName,
    as_axes,
    as_mask,
    as_real,
    as_reduction,
    as_sample_weight,
    as_temperature,
    reduced_shape,
)
from jaxsoft._core.mesh import split_together, vary_alike
from jaxsoft._core.numerics import (
    accumulation_dtype,
    counted_logits,
    exact_at_maximum,
    inverse_temperature,
    is_maximum,
    per_row,
    probabilities,
    rounding_of_shifted,
    shifted,
)
from jaxsoft._losses.per_row import RowTerms, combined_terms, reduced_loss, row_options
from jaxsoft._passes.cpu_sums import sum_of_choices
from jaxsoft._passes.max_and_tail import max_and_tail


def kl_divergence(
    target_logits: ArrayLike,
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: str = "none",
    axis_name: AxisName = None,
) -> Array:
    """Kullback-Leibler divergence of softmax(logits) from softmax(target_logits).

    ``KL = sum_i p_i * log(p_i / q_i)`` in nats, with ``p = softmax(target_logits /
    temperature)`` and ``q = softmax(logits / temperature)``: the distillation loss of a
    student with ``logits`` from a teacher with ``target_logits``. No factor of the
    squared temperature is added.

    Args:
        target_logits: of shape (..., classes), or with the classes along ``axis``.
            Differentiable; use `jax.lax.stop_gradient` for a fixed teacher.
        logits: of the same shape.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to the logits; True includes a class in both
            distributions.
        temperature: in the units of the logits, the same for both. Broadcastable to the
            logits reduced over ``axis`` (kept with size 1); may be traced and
            differentiated. At 0 the distributions are uniform on the tied maxima.
        sample_weight: broadcastable to the divergences.
        reduction: "none", "sum" or "mean", which divides by the sum of
            ``sample_weight`` and is 0 without any weight.
        axis_name: mesh axis (or tuple of them) over which the classes are split, inside
            `jax.shard_map`: both logits and ``where`` hold the classes of this device,
            and every device gets the divergence of the whole.

    Returns:
        One divergence per row, of the logits' shape without ``axis``, or a scalar.
        float32 for half-precision logits, else the logits' dtype. Never negative.

    Raises:
        TypeError: logits not real, ``where`` not boolean, ``axis`` not an int.
        ValueError: the two shapes differ; ``where``, ``temperature`` or
            ``sample_weight`` of the wrong shape; an unknown ``reduction``.

    Gradient:
        dKL/dlogits = (q - p) / temperature.
        dKL/dtarget_logits = p (log(p / q) - KL) / temperature.
        Both keep their digits where the distributions nearly agree. Residuals: the
        arguments and seven numbers per row.

    Awkward values:
        A class at -inf in the target adds 0. A class at -inf in ``logits`` alone: +inf,
        with dKL/dtarget_logits = 0. Nothing included, or a target row of -inf: 0 with
        gradient 0. NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> teacher = jnp.log(jnp.array([0.2, 0.8]))
        >>> jaxsoft.kl_divergence(teacher, jnp.array([1.0, 2.0]))
        Array(0.01285927, dtype=float32)

    References:
        S. Kullback, R. A. Leibler, "On information and sufficiency", 1951. Distillation
        at a temperature: G. Hinton et al., "Distilling the knowledge in a neural
        network", 2015, which multiplies by the squared temperature.
    """
    name = "kl_divergence"
    target_logits = as_real(name, "target_logits", target_logits)
    logits = as_real(name, "logits", logits)
    if target_logits.shape != logits.shape:
        raise ValueError(
            f"{name}: target_logits and logits must have the same shape; got "
            f"{target_logits.shape} and {logits.shape}"
        )
    dtype = jnp.promote_types(
        accumulation_dtype(target_logits.dtype), accumulation_dtype(logits.dtype)
    )
    axes = as_axes(name, axis, logits.ndim, axis_name)
    rows = reduced_shape(logits.shape, axes)
    tau = as_temperature(name, temperature, logits.astype(dtype), axes)
    return _kl_divergence_jit(
        target_logits,
        logits,
        as_mask(name, "where", where, logits.shape),
        tau,
        as_sample_weight(name, sample_weight, rows, dtype),
        axes=axes,
        reduction=as_reduction(name, reduction),
    )


@functools.partial(jax.jit, static_argnames=("axes", "reduction"))
def _kl_divergence_jit(x, y, where, temperature, sample_weight, *, axes, reduction):
    if accumulation_dtype(x.dtype) != accumulation_dtype(y.dtype):
        x, y = (v.astype(jnp.promote_types(x.dtype, y.dtype)) for v in (x, y))
    y, x = split_together(y, x)
    temperature = per_row(temperature, x, axes)
    (x, y), temperature = vary_alike(axes, (x, y), temperature)
    kl = jnp.squeeze(_kl_divergence(x, y, where, temperature, axes), axes)
    terms = RowTerms(kl, None, None)
    options = row_options(None, kl.shape, sample_weight=sample_weight)
    return reduced_loss(
        *combined_terms(terms, None, jnp.ones((), jnp.int32), options), reduction
    )


# With d, e, s of x and b, f, r the same of y (letters of _numerics; b for the shifted
# y, f = exp(b), r its tail), and
#     delta_i = b_i - d_i            mean = sum_i p_i delta_i
#     v_i     = delta_i - mean       c_i  = p_i (exp(v_i) - 1 - v_i) >= 0
# (with delta measured from that of a class with p > 1/2, where v = -mean then keeps the
# digits of the other classes)
# the divergence is log1p(sum_i c_i): a sum of positive terms, of second order in the
# difference of the distributions, as the divergence itself is. Then
#     log(q_i / p_i) = v_i - KL
#     t KL_y = q_i - p_i = p_i (exp(v_i - KL) - 1)
#     t KL_x = p_i (log(p_i / q_i) - KL) = -p_i v_i
#     t KL_t = -sum_i (t KL_x d_i + t KL_y b_i)
# Where the sum of c_i overflows the divergence is above 80, and its plain formula,
# log1p(r) - log1p(s) - mean, has nothing to lose.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _kl_divergence(x, y, where, temperature, axes):
    return _plain(x, y, where, temperature, axes)[0]


def _plain(x, y, where, temperature, axes):
    z = counted_logits(x, where, temperature)
    w = counted_logits(y, where, temperature)
    m, s = max_and_tail(x, where, temperature, axes)
    n, r = max_and_tail(y, where, temperature, axes)
    p = probabilities(z, m, s, temperature)
    delta = _log_ratio(p, (z, m, s), (w, n, r), temperature)
    likely = sum_of_choices(jnp.where(p > 0.5, delta, 0), axes)
    likely = jnp.where(jnp.isinf(likely), 0, likely)
    mean = sum_of_choices(p * (delta - likely), axes)
    v = _deviation(p, delta, likely, mean)
    # p exp(v), written with y so that a class with p = 0 keeps its q.
    b = shifted(w, n, temperature)
    shift = likely + jnp.where(jnp.isinf(mean), 0, mean)
    f_over_sum = jnp.exp(b - shift) / (1 + s)
    near = jnp.abs(v) < 0.5
    c = jnp.where(near & (p > 0), p * _exp_minus_line(v), f_over_sum - p * (1 + v))
    total = sum_of_choices(c, axes)
    plain = jnp.log1p(r) - jnp.log1p(s) - (mean + likely)
    large = ~(total < jnp.finfo(total.dtype).max) | jnp.isinf(mean)
    kl = jnp.where(large, plain, jnp.log1p(jnp.where(large, 0, total)))
    return jnp.where(jnp.isneginf(m), 0, kl), (m, s, n, r, likely, mean, kl)


def _fwd(x, y, where, temperature, axes):
    kl, row_numbers = _plain(x, y, where, temperature, axes)
    return kl, (x, y, where, temperature, row_numbers)


def _bwd(axes, residuals, g):
    x, y, where, temperature, (m, s, n, r, likely, mean, kl) = residuals
    z, to_x = jax.vjp(lambda x: counted_logits(x, where, temperature), x)
    w, to_y = jax.vjp(lambda y: counted_logits(y, where, temperature), y)
    p = probabilities(z, m, s, temperature)
    q = probabilities(w, n, r, temperature)
    g = jnp.where(jnp.isneginf(m), 0, g) * inverse_temperature(temperature)
    infinite = jnp.isinf(kl)
    delta = _log_ratio(p, (z, m, s), (w, n, r), temperature)
    v = jnp.where(infinite, 0, _deviation(p, delta, likely, mean))
    log_ratio = v - jnp.where(infinite, 0, kl)
    # Of a large divergence the log ratio has lost more digits than q - p.
    near = (jnp.abs(log_ratio) < 0.5) & (p > 0) & (kl < 1)
    in_w = jnp.where(near, p * jnp.expm1(jnp.where(near, log_ratio, 0)), q - p)
    in_z = -p * v
    dtemperature = None
    if temperature is not None:
        d, b = shifted(z, m, temperature), shifted(w, n, temperature)
        d, b = (jnp.where(jnp.isinf(u), 0, u) for u in (d, b))
        # Times 1/temperature last, or infinities of both signs would meet.
        both = sum_of_choices(in_z * d + in_w * b, axes)
        dtemperature = -jnp.sign(temperature) * g * both
    return to_x(g * in_z)[0], to_y(g * in_w)[0], None, dtemperature


_kl_divergence.defvjp(_fwd, _bwd)


def _log_ratio(p, of_target, of_logits, temperature):
    """delta, and 0 where p is 0."""
    d, rounding_of_d = _shifted_and_rounding(of_target, temperature)
    b, rounding_of_b = _shifted_and_rounding(of_logits, temperature)
    delta = (b - jnp.where(p == 0, 0, d)) + (rounding_of_b - rounding_of_d)
    return jnp.where(p == 0, 0, delta)


def _shifted_and_rounding(split, temperature):
    """d, and what it lacks: delta may be far smaller than d and b."""
    z, m, s = split
    d = shifted(z, m, temperature)
    rounding = rounding_of_shifted(z, m, d, temperature)
    return exact_at_maximum(d, s), jnp.where(is_maximum(d, s), 0, rounding)


def _deviation(p, delta, likely, mean):
    """v, and 0 where p is 0 or the mean is infinite."""
    skip = (p == 0) | jnp.isinf(mean)
    return jnp.where(skip, 0, delta - likely) - jnp.where(skip, 0, mean)


def _exp_minus_line(v):
    """exp(v) - 1 - v by its Taylor series, for |v| < 1/2."""
    v = jnp.where(jnp.abs(v) < 0.5, v, 0)
    terms = 14 if v.dtype == jnp.float64 else 8
    polynomial = jnp.full_like(v, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        polynomial = polynomial * v + 1 / math.factorial(k)
    return polynomial * v**2
