"""Losses made of softplus: binary, multi-label and circle loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    Reduction,
    as_array,
    as_axes,
    as_broadcastable,
    as_flag,
    as_focal_gamma,
    as_label_smoothing,
    as_mask,
    as_real,
    as_reduction,
    as_sample_weight,
    as_scalar,
    is_of,
)
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits, masked_logits, nan_where, zero_if_infinite
from jaxsoft._elementwise import log1p_exp, rule_from_partials
from jaxsoft._hints import with_hints
from jaxsoft._logsumexp import logsumexp
from jaxsoft._losses.per_row import (
    RowOptions,
    RowTerms,
    focal,
    included_classes,
    reduced_loss,
    row_options,
    times_loss,
)
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.product import product
from jaxsoft._row import logits_of, row_rule, summarized


@with_hints
def binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    focal_gamma: ArrayLike = 0.0,
    reduction: Reduction = "none",
    check_labels: bool = False,
) -> Array:
    """Cross-entropy of independent yes/no labels, in nats.

    ``v * (pos_weight * y * softplus(-x) + (1 - y) * softplus(x))`` for a logit x, whose
    probability of yes is ``p = 1 / (1 + exp(-x))``, a label y and a sample weight v.
    Smoothing eps replaces y by ``(1 - eps) * y + eps / 2``. With a focal gamma, the
    term of yes has the factor ``(1 - p)**gamma``, and that of no ``p**gamma``.

    Args:
        logits: of any shape.
        labels: of the same shape, in [0, 1]: booleans, integers 0 and 1, or
            probabilities, which are differentiable.
        where: boolean, broadcastable to the logits; False leaves a logit out: its loss
            is 0 with gradient exactly 0, and it has no weight in a mean.
        pos_weight: weight of the yes labels, broadcastable to the logits.
        sample_weight: broadcastable to the logits; booleans are 0 and 1. A logit of
            weight 0 has loss 0 and gradient exactly 0, whatever its label.
        label_smoothing: eps in [0, 1].
        focal_gamma: gamma >= 0, which may be traced and differentiated.
        reduction: "none", "sum" or "mean", which divides by the sum of
            ``sample_weight`` (never by ``pos_weight``) and is 0 without any weight.
        check_labels: makes a label outside [0, 1] an error under
            `jax.experimental.checkify`.

    Returns:
        One loss per logit, or a scalar. float32 for half-precision logits, else the
        logits' dtype. Never negative.

    Raises:
        TypeError: logits or labels are not real, ``where`` is not boolean,
            ``check_labels`` is not a bool.
        ValueError: labels, weights or ``where`` of the wrong shape; ``label_smoothing``
            outside [0, 1]; a negative ``focal_gamma``; an unknown ``reduction``.

    Gradient:
        dloss/dx = v ((1 - y) sigmoid(x) - pos_weight y sigmoid(-x)), with all digits
        where one of the two vanishes. All float arguments are differentiable.
        Residuals: O(1) arrays of the logits' shape.

    Edge cases:
        Infinite logits give their limits: 0 for a right label, +inf for a wrong one.
        Large logits do not overflow: the loss of (50, 0.5) is 25. A label outside
        [0, 1] gives NaN in its loss and in its gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> logits = jnp.array([-jnp.inf, 0.0, 50.0])
        >>> print(jaxsoft.binary_cross_entropy(logits, jnp.array([0.0, 1.0, 0.5])))
        [ 0.         0.6931472 25.       ]

    References:
        The weights are those of
        `torch.nn.functional.binary_cross_entropy_with_logits`. T.-Y. Lin et al.,
        "Focal loss for dense object detection", ICCV 2017.
    """
    name = "binary_cross_entropy"
    logits = as_real(name, "logits", logits)
    dtype = accumulation_dtype(logits.dtype)
    weight = None
    if pos_weight is not None:
        weight = as_real(name, "pos_weight", pos_weight).astype(dtype)
        weight = as_broadcastable(
            name, "pos_weight", weight, logits.shape, "the logits' shape"
        )
    return _binary_jit(
        logits,
        _binary_labels(name, labels, logits),
        as_mask(name, "where", where, logits.shape),
        weight,
        {
            "sample_weight": as_sample_weight(name, sample_weight, logits.shape, dtype),
            "label_smoothing": as_label_smoothing(name, label_smoothing, dtype),
            "focal_gamma": as_focal_gamma(name, focal_gamma, dtype),
        },
        reduction=as_reduction(name, reduction),
        check_labels=as_flag(name, "check_labels", check_labels),
    )


def _binary_labels(name: str, labels: ArrayLike, logits: Array) -> Array:
    labels = as_array(name, "labels", labels)
    if is_of(labels.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: labels must be real; got dtype {labels.dtype}")
    if labels.shape != logits.shape:
        raise ValueError(
            f"{name}: labels must have the logits' shape {logits.shape}; got "
            f"{labels.shape}"
        )
    return labels.astype(accumulation_dtype(logits.dtype))


@functools.partial(jax.jit, static_argnames=("reduction", "check_labels"))
def _binary_jit(logits, labels, where, pos_weight, options, *, reduction, check_labels):
    z, y = masked_logits(Logits(logits)), labels
    counted = None if where is None else jnp.broadcast_to(where, z.shape)
    valid = (y >= 0) & (y <= 1) if counted is None else ~counted | (y >= 0) & (y <= 1)
    if check_labels and y.size:
        checkify.debug_check(
            jnp.all(valid),
            "binary_cross_entropy: labels must lie in [0, 1]; got label {label}",
            label=jnp.ravel(y)[jnp.argmin(jnp.ravel(valid))],
        )
    smoothing, gamma = options["label_smoothing"], options["focal_gamma"]
    if smoothing is not None:
        y = (1 - smoothing) * y + smoothing / 2
    yes, no = log1p_exp(-z), log1p_exp(z)
    if gamma is not None:
        yes, no = (focal(v, jnp.broadcast_to(gamma, z.shape)) for v in (yes, no))
    if pos_weight is not None:
        yes = times_loss(jnp.broadcast_to(pos_weight, z.shape), yes)
    # In the label, and not in the loss, so that it reaches the gradient.
    y = y + nan_where(~valid, y.dtype)
    loss = times_loss(y, yes) + times_loss(1 - y, no)
    sample_weight = row_options(None, z.shape, sample_weight=options["sample_weight"])
    return reduced_loss(RowTerms(loss), counted, sample_weight, reduction)


@with_hints
def multilabel_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    reduction: Reduction = "none",
) -> Array:
    """Multi-label loss that ranks every yes class above every no class (ZLPR).

    ``log(1 + sum_no exp(s)) + log(1 + sum_yes exp(-s))`` in nats: a softmax
    cross-entropy with any number of right classes, separated by the threshold 0. It
    needs no balancing between few yes and many no classes.

    Args:
        logits: scores s of shape (..., classes), or with the classes along ``axis``.
        labels: of the same shape, 0 or 1: booleans or numbers. Numbers above 1/2 are
            yes.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to the logits; True includes a class.
        reduction: "none", "sum" or "mean".

    Returns:
        One loss per row, or a scalar. float32 for half-precision logits, else the
        logits' dtype. Never negative.

    Raises:
        TypeError: logits or labels are not real, ``where`` not boolean, ``axis`` not an
            int.
        ValueError: labels or ``where`` of the wrong shape; an unknown ``reduction``.

    Gradient:
        exp(s_i) / (1 + sum_no exp(s)) at a no class, -exp(-s_i) / (1 + sum_yes exp(-s))
        at a yes class. Labels have derivative 0. Residuals: the arguments and four
        numbers per row.

    Edge cases:
        No class of a kind, or all of them masked: that term is 0. A wrong class at
        infinity: +inf; a right one adds 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> scores, labels = jnp.array([2.0, -3.0, -1.0]), jnp.array([1, 0, 0])
        >>> jaxsoft.multilabel_cross_entropy(scores, labels)
        Array(0.47594026, dtype=float32)

    References:
        Su Jianlin et al., "ZLPR: a novel loss for multi-label classification", 2022.
    """
    name = "multilabel_cross_entropy"
    logits = as_real(name, "logits", logits)
    return _multilabel_jit(
        logits,
        _binary_labels(name, labels, logits) > 0.5,
        as_mask(name, "where", where, logits.shape),
        axes=as_axes(name, axis, logits.ndim),
        reduction=as_reduction(name, reduction),
    )


@functools.partial(jax.jit, static_argnames=("axes", "reduction"))
def _multilabel_jit(logits, is_yes, where, *, axes, reduction):
    given = logits_of(logits, where, None, axes)
    loss = _log1p_sum_of_no(axes, given, is_yes) + _log1p_sum_of_yes(
        axes, given, is_yes
    )
    loss = jnp.squeeze(loss, axes.dims)
    counted = None if where is None else included_classes(where, logits.shape, axes) > 0
    return reduced_loss(RowTerms(loss), counted, RowOptions(), reduction)


# N = log(1 + sum_i exp(z_i)), the logsumexp of z and a class of logit 0. With m, e, s
# of the z alone, and M = max(m, 0), the tail of the whole is
#     T = s + exp(-m)           where m > 0
#       = exp(m) (1 + s)        elsewhere, where the 1 that is kept apart is exp(0)
#     N = M + log(1 + T)        dN/dz_i = e_i exp(m - M) / (1 + T)
# A rule, since autodiff would save every e_i.
def _log1p_sum_value(of_yes, axes, logits, is_yes):
    row, _ = summarized(axes, _one_kind(logits, is_yes, of_yes))
    return jnp.maximum(row.m, 0) + jnp.log1p(_tail_with_zero(row.m, row.s)), row[2:]


def _log1p_sum_pullback(of_yes, axes, logits, is_yes, kept, g):
    m, s = kept
    scale = jnp.exp(jnp.minimum(m, 0)) / (1 + _tail_with_zero(m, s))
    kind = _one_kind(logits, is_yes, of_yes)
    return to_classes(axes, kind, m, product(g, scale)), None, None


def _one_kind(logits, is_yes, of_yes):
    """z = x over the no classes; over the yes classes -x, as at temperature -1."""
    mask = is_yes if of_yes else ~is_yes
    if logits.where is not None:
        mask = mask & logits.where
    temperature = None
    if of_yes:
        dtype = accumulation_dtype(logits.x.dtype)
        temperature = jnp.full((1,) * mask.ndim, -1, dtype)
    return logits._replace(where=mask, temperature=temperature)


_log1p_sum_of_no, _log1p_sum_of_yes = (
    row_rule(
        functools.partial(_log1p_sum_value, of_yes),
        functools.partial(_log1p_sum_pullback, of_yes),
    )
    for of_yes in (False, True)
)


def _tail_with_zero(m, s):
    above = m > 0
    return jnp.where(
        above,
        s + jnp.exp(-jnp.where(above, m, 0)),
        jnp.exp(jnp.where(above, 0, m)) * (1 + s),
    )


@with_hints
def circle_loss(
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    margin: ArrayLike = 0.25,
    scale: ArrayLike = 256.0,
    where_positive: ArrayLike | None = None,
    where_negative: ArrayLike | None = None,
    detach_weights: bool = True,
    reduction: Reduction = "none",
) -> Array:
    """Circle loss of the similarities of one anchor to its positives and negatives.

    ``softplus(LSE_n[scale a_n (s_n - margin)] + LSE_p[-scale a_p (s_p - 1 + margin)])``
    in nats, with the weights ``a_p = max(1 + margin - s_p, 0)`` and
    ``a_n = max(s_n + margin, 0)``; LSE is `logsumexp`.

    Args:
        positives: similarities s_p of shape (..., P), most often cosines in [-1, 1].
        negatives: similarities s_n of shape (..., N), with the same leading shape.
        margin: scalar; may be traced and differentiated.
        scale: scalar; may be traced and differentiated.
        where_positive: boolean, broadcastable to ``positives``; True includes one.
        where_negative: boolean, broadcastable to ``negatives``.
        detach_weights: no gradient through a_p and a_n, as in the paper.
        reduction: "none", "sum" or "mean".

    Returns:
        One loss per anchor, of the leading shape, or a scalar. float32 for half
        precision, else the similarities' dtype. Never negative.

    Raises:
        TypeError: similarities, margin or scale not real, a mask not boolean,
            ``detach_weights`` not a bool.
        ValueError: leading shapes differ, similarities without an axis, a mask of the
            wrong shape, an unknown ``reduction``.

    Gradient:
        sigmoid of the softplus' argument, times the softmax over each set, times
        scale a_n and -scale a_p. Residuals: O(1) arrays of the similarities' shapes.

    Edge cases:
        No positives or no negatives: 0 with gradient 0. The derivative at an infinite
        similarity is 0. The naive form
        log(1 + sum exp(...) sum exp(...)) overflows at scale 256; this one does not.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> positives, negatives = jnp.array([0.7, 0.9]), jnp.array([0.2, 0.3, -0.1])
        >>> jaxsoft.circle_loss(positives, negatives, scale=32.0)
        Array(2.1983418, dtype=float32)

    References:
        Y. Sun et al., "Circle loss: a unified perspective of pair similarity
        optimization", CVPR 2020.
    """
    name = "circle_loss"
    positives = as_real(name, "positives", positives)
    negatives = as_real(name, "negatives", negatives)
    if not positives.ndim or not negatives.ndim:
        raise ValueError(
            f"{name}: positives and negatives must have a last axis; got shapes "
            f"{positives.shape} and {negatives.shape}"
        )
    if positives.shape[:-1] != negatives.shape[:-1]:
        raise ValueError(
            f"{name}: positives and negatives must have the same leading shape; got "
            f"{positives.shape} and {negatives.shape}"
        )
    dtype = jnp.promote_types(
        accumulation_dtype(positives.dtype), accumulation_dtype(negatives.dtype)
    )
    return _circle_jit(
        positives.astype(dtype),
        negatives.astype(dtype),
        as_scalar(name, "margin", margin, dtype),
        as_scalar(name, "scale", scale, dtype),
        as_mask(name, "where_positive", where_positive, positives.shape),
        as_mask(name, "where_negative", where_negative, negatives.shape),
        detach_weights=as_flag(name, "detach_weights", detach_weights),
        reduction=as_reduction(name, reduction),
    )


@functools.partial(jax.jit, static_argnames=("detach_weights", "reduction"))
def _circle_jit(s_p, s_n, margin, scale, mask_p, mask_n, *, detach_weights, reduction):
    # Similarities that do not count, masked or without a counterpart, may be NaN or
    # infinite, and would leak that through a zero cotangent.
    counts_p, counts_n = (
        jnp.broadcast_to(True if mask is None else mask, s.shape)
        for s, mask in ((s_p, mask_p), (s_n, mask_n))
    )
    s_p = jnp.where(counts_p & jnp.any(counts_n, -1, keepdims=True), s_p, 0)
    s_n = jnp.where(counts_n & jnp.any(counts_p, -1, keepdims=True), s_n, 0)
    a_p, a_n = jax.nn.relu(1 + margin - s_p), jax.nn.relu(s_n + margin)
    if detach_weights:
        a_p, a_n = jax.lax.stop_gradient((a_p, a_n))
    lse_p = logsumexp(-_scaled_gap(scale, a_p, s_p - 1 + margin), -1, where=mask_p)
    lse_n = logsumexp(_scaled_gap(scale, a_n, s_n - margin), -1, where=mask_n)
    nothing = jnp.isneginf(lse_p) | jnp.isneginf(lse_n)
    exponent = jnp.where(nothing, 0, lse_p) + jnp.where(nothing, 0, lse_n)
    loss = jnp.where(nothing, 0, log1p_exp(exponent))
    counted = jnp.any(counts_p, -1) | jnp.any(counts_n, -1)
    return reduced_loss(RowTerms(loss), counted, RowOptions(), reduction)


@jax.custom_jvp
def _scaled_gap(scale, weight, gap):
    """scale weight gap with 0 * inf = 0: an infinitely good pair has weight 0."""
    return scale * _weighted_gap(weight, gap)


def _weighted_gap(weight, gap):
    return weight * jnp.where(weight == 0, jnp.clip(gap, -1, 1), gap)


# At an infinite similarity 0: of two such pairs forward mode would add infinities of
# either sign.
rule_from_partials(
    _scaled_gap,
    lambda scale, weight, gap: zero_if_infinite(_weighted_gap(weight, gap)),
    lambda scale, weight, gap: scale * zero_if_infinite(gap),
    lambda scale, weight, gap: scale * zero_if_infinite(weight),
)
