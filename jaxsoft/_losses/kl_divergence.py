"""Divergences of two softmax distributions, given by their logits.

    KL(p || q) = sum_i p_i log(p_i / q_i)    p = softmax(x / tau), q = softmax(y / tau)
    JS = beta KL(p || M) + (1 - beta) KL(q || M)    M = beta p + (1 - beta) q

The rule keeps the digits of a small divergence, where the formulas subtract nearly
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
    as_beta,
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
from jaxsoft._passes.compared import Rows
from jaxsoft._passes.divergence import divergence, divergence_pull
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
    return _divergence(
        "kl_divergence",
        logits,
        target_logits,
        axis=axis,
        where=where,
        temperature=temperature,
        sample_weight=sample_weight,
        reduction=reduction,
        axis_name=axis_name,
    )


@with_hints
def jensen_shannon(
    logits: ArrayLike,
    target_logits: ArrayLike,
    *,
    axis: Axis = -1,
    beta: float = 0.5,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    axis_name: AxisName = None,
) -> Array:
    """Generalised Jensen-Shannon divergence of two softmax distributions.

    ``JS = beta * KL(p || m) + (1 - beta) * KL(q || m)`` in nats, with ``p =
    softmax(target_logits / temperature)``, ``q = softmax(logits / temperature)`` and
    their mixture ``m = beta * p + (1 - beta) * q``. At ``beta`` 0 and 1, where this is
    0, it is by definition ``KL(p || q)``, that of `kl_divergence`, and ``KL(q || p)``.

    Args:
        logits: of shape (..., classes), or with the classes along ``axis``: the
            student of a distillation.
        target_logits: of the same shape: its teacher. Differentiable; use
            `jax.lax.stop_gradient` for a fixed one.
        axis: axis or axes of the classes; None takes all.
        beta: a Python number from 0 to 1, the target's part in the mixture.
        where: boolean, broadcastable to the logits; True includes a class in both
            distributions.
        temperature: as in `kl_divergence`. At 0 the distributions are uniform on the
            tied maxima.
        sample_weight, reduction, axis_name: as in `kl_divergence`.

    Returns:
        One divergence per row, of the logits' shape without ``axis``, or a scalar.
        float32 for half-precision logits, else the logits' dtype. Never negative, and
        for 0 < ``beta`` < 1 at most ``-beta log(beta) - (1 - beta) log(1 - beta)``.

    Raises:
        TypeError: ``beta`` is no Python number; and as `kl_divergence`.
        ValueError: ``beta`` outside [0, 1]; and as `kl_divergence`.

    Gradient:
        dJS/dlogits = (1 - beta) q (log(q / m) - KL(q || m)) / temperature.
        dJS/dtarget_logits = beta p (log(p / m) - KL(p || m)) / temperature.
        Both keep their digits where the distributions nearly agree. Residuals: the
        arguments and seven numbers per row.

    Edge cases:
        For 0 < ``beta`` < 1 it is finite whatever the logits: a class that one of the
        two excludes adds ``-beta log(beta) p`` or ``-(1 - beta) log(1 - beta) q``, but
        for what the mixture shares. Nothing included, or one of the two rows all -inf:
        0 with gradient 0. NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> teacher = jnp.log(jnp.array([0.2, 0.8]))
        >>> student = jnp.array([1.0, 2.0])
        >>> print(f"{jaxsoft.jensen_shannon(student, teacher):.6f}")
        0.003319
        >>> print(f"{jaxsoft.jensen_shannon(student, teacher, beta=1):.6f}")
        0.013772

    References:
        J. Lin, "Divergence measures based on the Shannon entropy", 1991. Distillation,
        with ``beta`` as here: R. Agarwal et al., "On-policy distillation of language
        models: learning from self-generated mistakes", ICLR 2024.
    """
    return _divergence(
        "jensen_shannon",
        logits,
        target_logits,
        axis=axis,
        where=where,
        temperature=temperature,
        sample_weight=sample_weight,
        reduction=reduction,
        axis_name=axis_name,
        beta=as_beta("jensen_shannon", beta),
    )


def _divergence(
    name,
    logits,
    target_logits,
    *,
    axis,
    where,
    temperature,
    sample_weight,
    reduction,
    axis_name,
    beta=0.0,
):
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
    x, y = target_logits, logits
    if beta == 1:
        x, y, beta = logits, target_logits, 0.0
    return _divergence_jit(
        x,
        y,
        as_mask(name, "where", where, logits.shape),
        tau,
        as_sample_weight(name, sample_weight, rows, dtype),
        axes=axes,
        reduction=as_reduction(name, reduction),
        beta=beta,
    )


@functools.partial(jax.jit, static_argnames=("axes", "reduction", "beta"))
def _divergence_jit(x, y, where, temperature, sample_weight, *, axes, reduction, beta):
    if accumulation_dtype(x.dtype) != accumulation_dtype(y.dtype):
        x, y = (v.astype(jnp.promote_types(x.dtype, y.dtype)) for v in (x, y))
    y, x = reshard_together(y, x)
    (x, y), temperature = match_varying(axes, (x, y), temperature)
    target = logits_of(x, where, temperature, axes)
    of_rows = jnp.squeeze(_rule(beta)(axes, target, y), axes.dims)
    counted = None if where is None else included_classes(where, x.shape, axes) > 0
    options = row_options(None, of_rows.shape, sample_weight=sample_weight)
    return reduced_loss(RowTerms(of_rows), counted, options, reduction)


# A rule, for the digits of a small divergence and for the limits at infinite logits,
# where autodiff is NaN; the formulas are those of `_passes.compared`.
@functools.cache
def _rule(beta):
    return row_rule(functools.partial(_value, beta), functools.partial(_pullback, beta))


def _value(beta, axes, target, y):
    of = divergence(axes, Rows(target, y, beta))
    return of.mixed(beta), of


def _pullback(beta, axes, target, y, of, g):
    target, y = computed_anew((target, y))
    rows = Rows(target, y, beta)
    dz_x, dz_y, dtemperature = divergence_pull(axes, rows, of, g)
    of_x = Row(axes, target, of.m, of.s)
    of_y = Row(axes, target._replace(x=y), of.n, of.r)
    return of_x.to_x(dz_x), dtemperature, of_y.to_x(dz_y)
