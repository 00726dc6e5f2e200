"""kl_divergence between two softmax distributions, given by their logits.

    KL = sum_i p_i log(p_i / q_i)    p = softmax(x / tau), q = softmax(y / tau)

The rule keeps the digits of a small divergence, where the formula subtracts nearly
equal logarithms, and has the limits at infinite logits, where autodiff gives NaN.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    AxisName,
    Reduction,
    as_axes,
    as_mask,
    as_real,
    as_reduction,
    as_sample_weight,
    as_temperature,
    check_split,
    reduced_shape,
)
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import (
    is_hard,
    is_maximum,
    override_primal,
    rounding_of_difference,
    shifted,
)
from jaxsoft._core.mesh import match_varying, reshard_together
from jaxsoft._hints import with_hints
from jaxsoft._losses.per_row import (
    RowTerms,
    included_classes,
    reduced_loss,
    row_options,
)
from jaxsoft._passes.product import product
from jaxsoft._row import Row, computed_anew, logits_of, row_rule, summarized


@with_hints
def kl_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    axis_name: AxisName = None,
) -> Array:
    """Kullback-Leibler divergence of softmax(logits) from softmax(target_logits).

    ``KL = sum_i p_i * log(p_i / q_i)`` in nats, with ``p = softmax(target_logits /
    temperature)`` and ``q = softmax(logits / temperature)``: the distillation loss of a
    student with ``logits`` from a teacher with ``target_logits``. No factor of the
    squared temperature is added.

    Args:
        logits: of shape (..., classes), or with the classes along ``axis``. As in
            `cross_entropy` the prediction comes first.
        target_logits: of the same shape. Differentiable; use `jax.lax.stop_gradient`
            for a fixed teacher.
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
        arguments and six numbers per row.

    Edge cases:
        A class at -inf in the target adds 0. A class at -inf in ``logits`` alone: +inf,
        with dKL/dtarget_logits = 0. Nothing included, or a target row of -inf: 0 with
        gradient 0. NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> teacher = jnp.log(jnp.array([0.2, 0.8]))
        >>> jaxsoft.kl_divergence(jnp.array([1.0, 2.0]), teacher)
        Array(0.01285927, dtype=float32)

    References:
        S. Kullback, R. A. Leibler, "On information and sufficiency", 1951. Distillation
        at a temperature: G. Hinton et al., "Distilling the knowledge in a neural
        network", 2015, which multiplies by the squared temperature.
    """
    name = "kl_divergence"
    logits = as_real(name, "logits", logits)
    target_logits = as_real(name, "target_logits", target_logits)
    if logits.shape != target_logits.shape:
        raise ValueError(
            f"{name}: logits and target_logits must have the same shape; got "
            f"{logits.shape} and {target_logits.shape}"
        )
    dtype = jnp.promote_types(
        accumulation_dtype(target_logits.dtype), accumulation_dtype(logits.dtype)
    )
    axes = as_axes(name, axis, logits.ndim, axis_name)
    both = {"logits": logits, "target_logits": target_logits}
    check_split(name, axes, both, {})
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
    y, x = reshard_together(y, x)
    (x, y), temperature = match_varying(axes, (x, y), temperature)
    target = logits_of(x, where, temperature, axes)
    kl = jnp.squeeze(_kl_divergence(axes, target, y), axes.dims)
    counted = None if where is None else included_classes(where, x.shape, axes) > 0
    options = row_options(None, kl.shape, sample_weight=sample_weight)
    return reduced_loss(RowTerms(kl), counted, options, reduction)


# With p, m, s of the target x, and q, n, r of the logits y,
#     delta_i = log q_i - log p_i        phi(delta) = exp(delta) - 1 - delta >= 0
#     KL = sum_i p_i phi(delta_i)
# since sum_i p_i exp(delta_i) = sum_i q_i = 1: a sum of positive terms, of second order
# in the difference of the distributions, as the divergence itself is. What rounding
# has made of delta is delta + epsilon, the same in all classes, and known from
#     exp(epsilon) - 1 = A = sum_i p_i (exp(delta_i + epsilon) - 1)
#     KL = sum_i p_i phi(delta_i + epsilon) - (A - log(1 + A))
# The derivatives are
#     t KL_y = q_i - p_i = p_i (exp(delta_i) - 1)
#     t KL_x = p_i (log(p_i / q_i) - KL) = -p_i (delta_i + KL)
#     t KL_t = -sum_i (t KL_x d_i + t KL_y b_i)        d of x, b of y
# A rule, for the digits and for the limits at infinite logits, where autodiff is NaN.
def _kl_value(axes, target, y):
    of_x, _ = summarized(axes, target)
    of_y, _ = summarized(axes, target._replace(x=y))
    p, q, delta = of_x.p, of_y.p, _log_ratio(of_x, of_y)
    # As p exp(delta) = q, a class with p = 0 keeps its q. The last bits of the general
    # form may be below 0.
    near = (jnp.abs(delta) < 0.5) & (p > 0)
    small = jnp.where(near, delta, 0)
    general = jnp.maximum(q - p * (1 + delta), 0)
    terms = jnp.where(near, p * _exp_minus_line(small), general)
    excess = of_x.sum(jnp.where(near, p * jnp.expm1(small), q - p))
    excess = jnp.where(jnp.abs(excess) < 0.5, excess, 0)
    epsilon = jnp.log1p(excess)
    kl = jnp.maximum(of_x.sum(terms) - (excess - epsilon), 0)
    kl = jnp.where(jnp.isneginf(of_x.m), 0, kl)
    return kl, (of_x[2:], of_y[2:], epsilon, kl)


def _kl_pullback(axes, target, y, kept, g):
    of_target, of_logits, epsilon, kl = kept
    target, y = computed_anew((target, y))
    of_x = Row(axes, target, *of_target)
    of_y = Row(axes, target._replace(x=y), *of_logits)
    g = product(jnp.where(jnp.isneginf(of_x.m), 0, g), jnp.ones_like(g) * of_x.per_t)
    p, q, delta = of_x.p, of_y.p, _log_ratio(of_x, of_y) - epsilon
    infinite = jnp.isinf(kl)
    near = (jnp.abs(delta) < 0.5) & (p > 0)
    in_y = jnp.where(near, p * jnp.expm1(jnp.where(near, delta, 0)), q - p)
    in_x = jnp.where(infinite, 0, -p * (delta + jnp.where(infinite, 0, kl)))
    in_x = jnp.where(p == 0, 0, in_x)
    dtemperature = None
    if target.temperature is not None:
        d, b = (jnp.where(jnp.isinf(v.d), 0, v.d) for v in (of_x, of_y))
        both = of_x.sum(in_x * d + in_y * b)
        dtemperature = product(g, -of_x.sign * both)
    dx = of_x.to_x(product(g, in_x))
    return dx, dtemperature, of_y.to_x(product(g, in_y))


_kl_divergence = row_rule(_kl_value, _kl_pullback)


def _log_ratio(of_x, of_y):
    """delta, and 0 where p is 0."""
    (gap_x, rounding_x), (gap_y, rounding_y) = map(_gap, (of_x, of_y))
    gap_x = jnp.where(jnp.isinf(gap_x), 0, gap_x)
    delta = (gap_y - gap_x) + (rounding_y - rounding_x)
    if of_x.t is not None:
        by_d = jnp.isneginf(gap_y) | is_hard(of_x.t)
        d = jnp.where(jnp.isinf(of_x.d), 0, of_x.d)
        delta = jnp.where(by_d, of_y.d - d, jnp.where(by_d, 0, delta) * of_x.per_t)
    delta = delta - (jnp.log1p(of_y.s) - jnp.log1p(of_x.s))
    return jnp.where(of_x.e == 0, 0, delta)


def _gap(row):
    """z - m and what this difference lacks, since delta may be far smaller; 0 at the
    maximum."""
    z, m = row.z, jnp.where(jnp.isneginf(row.m), 0, row.m)
    gap = shifted(z, m, None)
    rounding = rounding_of_difference(z, m, gap)
    at_maximum = is_maximum(shifted(z, m, row.t), row.s)
    exact = at_maximum | ~jnp.isfinite(rounding)
    rounding = jax.lax.stop_gradient(jnp.where(exact, 0, rounding))
    return override_primal(0, at_maximum, gap), rounding


def _exp_minus_line(v):
    """exp(v) - 1 - v by its Taylor series, for |v| < 1/2."""
    v = jnp.where(jnp.abs(v) < 0.5, v, 0)
    terms = 14 if v.dtype == jnp.float64 else 8
    polynomial = jnp.full_like(v, 1 / math.factorial(terms))
    for k in range(terms - 1, 1, -1):
        polynomial = polynomial * v + 1 / math.factorial(k)
    return polynomial * v**2
