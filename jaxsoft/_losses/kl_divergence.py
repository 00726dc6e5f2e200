"""kl_divergence between two softmax distributions, given by their logits.

    KL = sum_i p_i log(p_i / q_i)    p = softmax(x / tau), q = softmax(y / tau)

The rule keeps the digits of a small divergence, where the formula subtracts nearly
equal logarithms, and has the limits at infinite logits, where autodiff gives NaN.
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
from jaxsoft._core.mesh import match_varying, reshard_together
from jaxsoft._hints import with_hints
from jaxsoft._losses.per_row import (
    RowTerms,
    included_classes,
    reduced_loss,
    row_options,
)
from jaxsoft._passes.divergence import Rows, divergence, divergence_pull
from jaxsoft._row import Row, computed_anew, logits_of, row_rule


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


# A rule, for the digits of a small divergence and for the limits at infinite logits,
# where autodiff is NaN; the formulas are those of `_passes.divergence`.
def _kl_value(axes, target, y):
    of = divergence(axes, Rows(target, y))
    return of.kl, of


def _kl_pullback(axes, target, y, of, g):
    target, y = computed_anew((target, y))
    dz_x, dz_y, dtemperature = divergence_pull(axes, Rows(target, y), of, g)
    of_x = Row(axes, target, of.m, of.s)
    of_y = Row(axes, target._replace(x=y), of.n, of.r)
    return of_x.to_x(dz_x), dtemperature, of_y.to_x(dz_y)


_kl_divergence = row_rule(_kl_value, _kl_pullback)
