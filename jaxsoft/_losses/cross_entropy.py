"""cross_entropy: the softmax loss of given logits."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    IGNORE_ROWS,
    Axis,
    AxisName,
    Reduction,
    as_axes,
    as_class_weight,
    as_flag,
    as_focal_gamma,
    as_ignore_index,
    as_label_smoothing,
    as_labels,
    as_mask,
    as_real,
    as_reduction,
    as_sample_weight,
    as_scalar,
    as_softcap,
    as_temperature,
    check_split,
    is_of,
    reduced_shape,
)
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.mesh import (
    Axes,
    class_count,
    match_varying,
    reshard_like,
    reshard_together,
)
from jaxsoft._hints import with_hints
from jaxsoft._losses.nll import (
    METRICS,
    Asked,
    WeightedProbabilities,
    label_terms,
    probability_terms,
)
from jaxsoft._losses.per_row import (
    LossMetrics,
    included_classes,
    local_weight,
    loss_metrics,
    reduced_loss,
    row_labels,
    row_options,
    uniform_unit,
    with_empty_rows_ignored,
)
from jaxsoft._row import logits_of


# The overloads name only what decides on the result.
@overload
def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, with_metrics: Literal[True], **options: Any
) -> tuple[Array, LossMetrics]: ...


@overload
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    with_metrics: Literal[False] = False,
    **options: Any,
) -> Array: ...


@with_hints
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    focal_gamma: ArrayLike = 0.0,
    temperature: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    reduction: Reduction = "none",
    check_labels: bool = False,
    with_metrics: bool = False,
    axis_name: AxisName = None,
) -> Any:
    """Cross-entropy between labels and the softmax of logits, in nats.

    ``-log p_y`` with ``p = softmax(logits / temperature)`` for class indices y, or
    ``-sum_c q_c log(p_c)`` for label probabilities q. With all options, for class
    weights w, smoothing eps over C included classes and sample weight v,

        loss = v * ((1 - eps) * w_y * (1 - p_y)**gamma * (-log p_y)
                    + eps / C * sum_c w_c * (-log p_c)
                    + z_loss * logsumexp(logits / temperature)**2)

    where label probabilities replace ``w_y * (-log p_y)`` by
    ``sum_c q_c * w_c * (-log p_c)``; gamma is ``focal_gamma``. At temperature t this is
    the loss of ``logits / t``; no factor t or t^2 is added.

    Args:
        logits: of shape (..., classes), or with the classes along ``axis``.
        labels: integers: class indices, of the logits' shape without ``axis``; for a
            tuple ``axis`` the flat index in the order given. Floats: probabilities, of
            the logits' shape; they are not normalised, 0 log 0 = 0, and they are
            differentiable.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to the logits; True includes a class. A row in
            which nothing is included counts as ignored. To leave out some tokens of a
            batch use ``sample_weight`` or ``ignore_index``.
        class_weight: shape (classes,), non-negative.
        sample_weight: broadcastable to the losses; booleans are 0 and 1. A row of
            weight 0 counts as ignored, whatever its label and its logits, but the
            derivative in the weight is its loss.
        ignore_index: an integer label whose row has loss 0 and gradient exactly 0,
            whatever its logits. None switches it off.
        label_smoothing: eps in [0, 1].
        focal_gamma: gamma >= 0, for class indices; may be traced and differentiated.
        temperature: in the units of the logits. Broadcastable to the logits reduced
            over ``axis`` (kept with size 1). At 0 the k tied maxima have probability
            1/k.
        softcap: c > 0 replaces the logits by ``c * tanh(logits / c)`` before all else.
        z_loss: coefficient of the squared logsumexp.
        reduction: "none", "sum" or "mean". The mean divides by the sum of
            ``class_weight[label] * sample_weight`` over the rows that are not ignored
            (see `loss_weight`); for label probabilities, and for the term of
            ``z_loss``, by the sum of ``sample_weight``. A mean without any weight is 0.
        check_labels: makes an invalid label an error under
            `jax.experimental.checkify`.
        with_metrics: returns (loss, `LossMetrics`), for `jax.value_and_grad` with
            ``has_aux=True``.
        axis_name: mesh axis (or tuple of them) over which the classes are split (never
            that of the batch, whose mean is a quotient of two sums, see `loss_weight`),
            inside `jax.shard_map`: logits, ``where`` and label probabilities hold the
            classes of this device, ``class_weight`` those or all; labels are global
            indices, and every device gets the loss of the whole.

    Returns:
        One loss per row, of the logits' shape without ``axis``, or a scalar. float32
        for half-precision logits, else the logits' dtype. Never negative (without
        z_loss). With metrics a pair: this, and per row nll (of label probabilities with
        the class weights, else without), logsumexp, z_loss, entropy and top_label,
        which have no gradient and come from the same pass over the logits.

    Raises:
        TypeError: boolean or complex labels, complex logits, ``where`` not boolean,
            ``axis`` or ``ignore_index`` not an int, ``check_labels`` or
            ``with_metrics`` not a bool.
        ValueError: labels, weights, ``where`` or ``temperature`` of the wrong shape;
            ``axis`` out of range; ``label_smoothing`` outside [0, 1]; ``softcap`` not
            positive; ``focal_gamma`` negative, or with label probabilities; an unknown
            ``reduction``.

    Gradient:
        dloss/dlogits = (p - one_hot(y)) / temperature for the plain loss, in the
        logits' dtype. The label's entry is computed as minus the sum of the other
        probabilities. All float arguments are differentiable and may be traced.
        Residuals: the arguments and two numbers per row, three for index labels.

    Edge cases:
        A label outside [0, classes) that is not ``ignore_index`` (-1 too: nothing
        wraps) gives NaN in its row's loss and gradient; with ``check_labels``, under
        `jax.experimental.checkify`, an error that names the label. A row whose
        cotangent is exactly 0 has a gradient of exactly 0, whatever its label and its
        logits: ``jnp.where(mask, loss, 0)`` is safe. A label on a
        masked class or on a logit -inf: +inf. A row of -inf logits: +inf, gradient 0.
        With logits +inf, 0 at a label that is the only one and +inf at finite ones. A
        weight 0 times a loss +inf is 0. An option at its neutral value changes no bit;
        label_smoothing 0 and temperature 1, if given as arrays, may change the last
        bits.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> jaxsoft.cross_entropy(jnp.array([2.0, 3.0, 4.0]), jnp.array(1))
        Array(1.4076059, dtype=float32)
        >>> sure = jnp.array([20.0, 0.0])
        >>> jaxsoft.cross_entropy(sure, 0)
        Array(2.0611537e-09, dtype=float32)
        >>> print(jax.grad(jaxsoft.cross_entropy)(sure, 0))
        [-2.0611537e-09  2.0611537e-09]

    References:
        Class weights, smoothing and means are those of
        `torch.nn.functional.cross_entropy`. Smoothing: C. Szegedy et al., "Rethinking
        the Inception architecture", CVPR 2016. z_loss: A. Chowdhery et al., "PaLM",
        2022. softcap: Gemma Team, "Gemma 2", 2024. focal_gamma: T.-Y. Lin et al.,
        "Focal loss for dense object detection", ICCV 2017.
    """
    name = "cross_entropy"
    logits = as_real(name, "logits", logits)
    dtype = accumulation_dtype(logits.dtype)
    axes = as_axes(name, axis, logits.ndim, axis_name)
    labels, are_indices = as_labels(name, labels, logits, axes)
    check_split(
        name, axes, {"logits": logits}, {"labels": labels} if are_indices else {}
    )
    rows = reduced_shape(logits.shape, axes)
    options = {
        "class_weight": as_class_weight(name, class_weight, logits.shape, axes, dtype),
        "sample_weight": as_sample_weight(name, sample_weight, rows, dtype),
        "label_smoothing": as_label_smoothing(name, label_smoothing, dtype),
        "z_loss": as_scalar(name, "z_loss", z_loss, dtype, neutral=0),
        "focal_gamma": as_focal_gamma(name, focal_gamma, dtype),
    }
    if options["focal_gamma"] is not None and not are_indices:
        raise ValueError(
            f"{name}: focal_gamma needs integer labels (class indices); got labels of "
            f"dtype {labels.dtype}"
        )
    ignore_index = as_ignore_index(name, ignore_index)
    return _cross_entropy(
        logits,
        labels,
        as_mask(name, "where", where, logits.shape, IGNORE_ROWS),
        options,
        as_temperature(name, temperature, logits, axes),
        as_softcap(name, softcap, dtype),
        axes=axes,
        ignore_index=ignore_index if are_indices else None,
        check_labels=as_flag(name, "check_labels", check_labels),
        reduction=as_reduction(name, reduction),
        asked=METRICS if as_flag(name, "with_metrics", with_metrics) else Asked(),
    )


@functools.partial(
    jax.jit,
    static_argnames=("axes", "ignore_index", "check_labels", "reduction", "asked"),
)
def _cross_entropy(
    logits,
    labels,
    where,
    options,
    temperature,
    softcap,
    *,
    axes,
    ignore_index,
    check_labels,
    reduction,
    asked,
):
    are_indices = is_of(labels.dtype, jnp.integer)
    if not are_indices:
        labels, logits = reshard_together(labels, logits)
    options["class_weight"] = local_weight(options["class_weight"], logits.shape, axes)
    w = _class_weights(options, logits, axes)
    classes = class_count(logits.shape, axes)
    included = included_classes(where, logits.shape, axes)
    index, counted = None, None if where is None else included > 0
    if are_indices:
        labels = reshard_like(jnp.expand_dims(labels, axes.dims), logits)
        labels = row_labels(
            "cross_entropy", labels, classes, ignore_index, check_labels
        )
        if where is not None:
            kept = reshard_like(jnp.expand_dims(included, axes.dims), labels.counted)
            labels = with_empty_rows_ignored(labels, kept)
        index = jax.tree.map(lambda v: jnp.squeeze(v, axes.dims), labels)
        counted = index.counted
        (logits, w, softcap), (labels, temperature) = match_varying(
            axes, (logits, w, softcap), (labels, temperature)
        )
        terms_of = label_terms
    else:
        (logits, labels, w, softcap), temperature = match_varying(
            axes, (logits, labels, w, softcap), temperature
        )
        labels = labels.astype(accumulation_dtype(logits.dtype))
        weights = None if options["class_weight"] is None else w
        labels = WeightedProbabilities(labels, weights)
        terms_of = probability_terms
    given = logits_of(logits, where, temperature, axes)
    uniform = None if options["label_smoothing"] is None else w * uniform_unit(classes)
    terms = terms_of(axes, given, labels, uniform, softcap, asked)
    terms = jax.tree.map(lambda term: jnp.squeeze(term, axes.dims), terms)
    options = row_options(index, terms.nll.shape, axes, included, classes, **options)
    loss = reduced_loss(terms, counted, options, reduction)
    if asked != METRICS:
        return loss
    return loss, loss_metrics(terms, counted, options.z_loss)


def _class_weights(options, logits, axes):
    """The class weights, or 1 for label smoothing, along the class axes."""
    class_weight, label_smoothing = options["class_weight"], options["label_smoothing"]
    if class_weight is not None:
        return reshard_like(_along_axes(class_weight, logits.shape, axes), logits)
    if label_smoothing is not None:
        return jnp.ones((1,) * logits.ndim, label_smoothing.dtype)
    return None


def _along_axes(class_weight: Array, shape: tuple[int, ...], axes: Axes) -> Array:
    """Weights of flat class indices, laid along the class axes of the logits."""
    weights = class_weight.reshape([shape[a] for a in axes.dims])
    order = sorted(range(len(axes.dims)), key=axes.dims.__getitem__)
    weights = jnp.transpose(weights, order)
    return jnp.expand_dims(
        weights, [i for i in range(len(shape)) if i not in axes.dims]
    )
