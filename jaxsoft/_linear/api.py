"""Losses of a linear head without its logits: linear_cross_entropy, linear_log_probs.

The logits of N tokens over V classes are the largest array of language-model training,
and their gradient is as large. Here neither exists: `recompute` streams the
vocabulary past the tokens, and everything after that is the code of `cross_entropy`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import Array, export
from jax.typing import ArrayLike

from jaxsoft._checks import (
    IGNORE_ROWS,
    AxisName,
    Reduction,
    as_axes,
    as_class_weight,
    as_flag,
    as_focal_gamma,
    as_ignore_index,
    as_label_smoothing,
    as_mask,
    as_reduction,
    as_sample_weight,
    as_scalar,
    as_softcap,
    as_temperature,
    check_split,
)
from jaxsoft._core.mesh import Axes, class_count, match_varying, with_automatic_axes
from jaxsoft._hints import with_hints
from jaxsoft._linear.accumulate import TokenInputs, summed_loss
from jaxsoft._linear.chunks import Head, VocabularyPlan
from jaxsoft._linear.inputs import (
    FEWEST_TO_SKIP,
    checked_inputs,
    dtype_of_sums,
    flat_rows,
    flat_tokens,
    token_chunks,
)
from jaxsoft._linear.recompute import linear_terms
from jaxsoft._losses.nll import METRICS, Asked
from jaxsoft._losses.per_row import (
    LossMetrics,
    included_classes,
    local_weight,
    loss_metrics,
    mean_loss,
    options_of_mean,
    reduced_loss,
    row_labels,
    row_options,
    uniform_unit,
    with_empty_rows_ignored,
)


class LogProbs(NamedTuple):
    """What `linear_log_probs` returns, one entry per token. A token that is ignored has
    0, and top_label -1."""

    log_prob: Array
    """Log-probability of the label, in nats; of the labels' shape."""
    logsumexp: Array
    """Logsumexp of the logits over the temperature."""
    entropy: Array
    """Entropy of the distribution, in nats."""
    top_label: Array
    """The most probable class, int32."""


export.register_namedtuple_serialization(LogProbs, serialized_name="jaxsoft.LogProbs")


# The overloads name only what decides on the result.
@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    *,
    with_metrics: Literal[True],
    **options: Any,
) -> tuple[Array, LossMetrics]: ...


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    *,
    with_metrics: Literal[False] = False,
    **options: Any,
) -> Array: ...


@with_hints
def linear_cross_entropy(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    *,
    vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
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
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> Any:
    """`cross_entropy` of a linear head's logits, without ever holding the logits.

    The value, options, errors and gradients are those of ``cross_entropy(hidden @
    vocab_weight.T + vocab_bias, labels, ...)`` for class indices; the N x V logits and
    their gradient are never stored. See `cross_entropy` for the formula.

    Args:
        hidden: hidden states of shape (*batch, features).
        vocab_weight: (classes, features), or (features, classes) with ``vocab_axis=1``.
        labels: integer class indices of shape (*batch).
        vocab_bias: (classes,).
        vocab_axis: which axis of ``vocab_weight`` holds the classes, 0 or 1.
        where: boolean, broadcastable to (*batch, classes); True includes a class.
        class_weight, sample_weight, ignore_index, label_smoothing: as in
            `cross_entropy`.
        focal_gamma, softcap, z_loss, reduction, check_labels, with_metrics: as there.
        temperature: as in `cross_entropy`, broadcastable to (*batch, 1).
        chunk_bytes: largest size of a chunk of float32 logits; by default that of 4096
            classes, and at least 16 and at most 128 MiB, on a GPU 512 MiB. A chunk is a
            multiple of 128 classes where it has so many. Given a number, the logits
            are always recomputed (see Gradient).
        axis_name: mesh axis (or tuple of them) over which the vocabulary is split,
            inside `jax.shard_map`: ``vocab_weight``, ``vocab_bias`` and ``where`` hold
            the classes of this device, ``class_weight`` those or all; labels are global
            indices, and every device gets the loss of the whole. `shard_vocab` does
            this for callers that use `jax.jit`.

    Returns:
        One loss per token, of shape (*batch), or a scalar; float32 for half-precision
        inputs. Logits and sums are float32 there, whatever the inputs. On a mesh with
        explicit axes, split as the batch axes of ``hidden``. With metrics a pair: this,
        and a `LossMetrics` of shape (*batch) from the same pass.

    Raises:
        TypeError: labels not integers, other arguments not real.
        ValueError: shapes that do not fit together; ``vocab_axis`` not 0 or 1;
            ``chunk_bytes`` not positive; and as `cross_entropy`.

    Gradient:
        With respect to every float argument, in its dtype; sums over tokens and classes
        in float32. For N tokens, D features and V classes a matrix product is 2 N D V
        flops. Which way runs is decided from static facts, and all agree to rounding:

        - The logits of a chunk of C classes are recomputed: 4 products for value and
          gradients, temporaries of about 4 N C + 4 N D bytes. Residuals: the arguments
          and O(N) numbers. For reduction "none", and wherever the next does not fit.
        - The gradient is taken in the forward pass: 3 products, and 2 when
          ``vocab_weight`` is not differentiated. For a reduction "sum" or "mean" where
          4 D V bytes and the logits of 128 tokens fit into 256 MiB. Residuals: the
          gradients. Not for float16, which would not hold what is scaled later.

        From 512 tokens on, tokens with an ignored label are skipped: the passes run
        over a quarter of the tokens, a half or all, the least that hold those that
        count; under `jax.vmap` those of every element. `jax.checkpoint` around the call
        repeats the forward pass.

    Edge cases:
        As `cross_entropy`: invalid labels, masked labels, infinite logits. A token with
        an ignored label has gradient exactly 0, and so has one whose cotangent or
        sample_weight is exactly 0, whatever its label and hidden state, NaN too. A
        class that ``where`` excludes may have weights that are NaN or infinite, as rows
        of padding do. Of any other token a hidden state that is not finite makes the
        gradient NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden = jnp.array([[1.0, 2.0], [0.5, -1.0]])
        >>> vocab_weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> labels = jnp.array([2, -100])
        >>> print(jaxsoft.linear_cross_entropy(hidden, vocab_weight, labels))
        [0.40760595 0.        ]

    References:
        E. Wijmans et al., "Cut your losses in large-vocabulary language models", 2024.
    """
    name = "linear_cross_entropy"
    inputs = checked_inputs(
        name, hidden, vocab_weight, labels, vocab_bias, vocab_axis, chunk_bytes
    )
    batch, classes, dtype = inputs.labels.shape, inputs.classes, inputs.dtype
    logits = jax.ShapeDtypeStruct((*batch, classes), dtype)
    axes = as_axes(name, -1, logits.ndim, axis_name)
    check_split(
        name, axes, {"vocab_weight": inputs.vocab_weight}, {"labels": inputs.labels}
    )
    options = {
        "class_weight": as_class_weight(name, class_weight, logits.shape, axes, dtype),
        "sample_weight": as_sample_weight(name, sample_weight, batch, dtype),
        "label_smoothing": as_label_smoothing(name, label_smoothing, dtype),
        "z_loss": as_scalar(name, "z_loss", z_loss, dtype, neutral=0),
        "focal_gamma": as_focal_gamma(name, focal_gamma, dtype),
    }
    ignore_index = as_ignore_index(name, ignore_index)
    with_metrics = as_flag(name, "with_metrics", with_metrics)
    plan = VocabularyPlan(
        vocab_axis,
        *inputs.chunks,
        may_skip=ignore_index is not None and math.prod(batch) >= FEWEST_TO_SKIP,
        asked=METRICS if with_metrics else Asked(),
        mesh_names=axes.mesh_names,
    )
    return _linear_cross_entropy(
        inputs.hidden,
        Head(
            inputs.vocab_weight,
            inputs.vocab_bias,
            None,
            as_softcap(name, softcap, dtype),
        ),
        inputs.labels,
        as_mask(name, "where", where, logits.shape, IGNORE_ROWS),
        options,
        as_temperature(name, temperature, logits, axes),
        plan=plan,
        ignore_index=ignore_index,
        check_labels=as_flag(name, "check_labels", check_labels),
        reduction=as_reduction(name, reduction),
        may_hold_gradient=chunk_bytes is None,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "plan",
        "ignore_index",
        "check_labels",
        "reduction",
        "may_hold_gradient",
    ),
)
def _linear_cross_entropy(hidden, head, labels, where, options, temperature, **static):
    loss = functools.partial(_loss, **static)
    arguments = hidden, head, labels, where, options, temperature
    ndim = labels.ndim if static["reduction"] == "none" else 0
    if static["plan"].asked == METRICS:
        ndim = ndim, labels.ndim
    return with_automatic_axes(loss, arguments, hidden, ndim)


def _loss(
    hidden,
    head,
    labels,
    where,
    options,
    temperature,
    *,
    plan,
    ignore_index,
    check_labels,
    reduction,
    may_hold_gradient,
):
    classes = head.weight.shape[plan.vocab_axis]
    shape = (*labels.shape, classes)
    axes = Axes((labels.ndim,), plan.mesh_names)
    count = class_count(shape, axes)
    rows = row_labels("linear_cross_entropy", labels, count, ignore_index, check_labels)
    included = jnp.broadcast_to(included_classes(where, shape, axes), labels.shape)
    if where is not None:
        rows = with_empty_rows_ignored(rows, included)
    options["class_weight"] = local_weight(options["class_weight"], shape, axes)
    label_smoothing = options["label_smoothing"]
    if label_smoothing is not None:
        uniform_weight = options["class_weight"]
        if uniform_weight is None:
            uniform_weight = jnp.ones(classes, label_smoothing.dtype)
        head = head._replace(uniform_weight=uniform_weight * uniform_unit(count))
    tokens = flat_tokens(hidden, rows, temperature, where, classes)
    hidden = flat_rows(hidden)
    options = row_options(rows, labels.shape, axes, included, count, **options)
    options = jax.tree.map(lambda v: v.reshape(-1), options)
    head, (hidden, tokens, options) = match_varying(
        axes, head, (hidden, tokens, options)
    )
    chunks = None
    if reduction != "none" and may_hold_gradient and not plan.mesh_names:
        chunks = token_chunks(hidden, head, plan)
    counted = tokens.labels.counted
    if chunks is None:
        terms = linear_terms(hidden, head, tokens, plan)
        loss = reduced_loss(terms, counted, options, reduction)
        loss = loss.reshape(labels.shape) if reduction == "none" else loss
    else:
        loss, terms = _summed(hidden, head, tokens, options, reduction, chunks)
    if plan.asked != METRICS:
        return loss
    metrics = loss_metrics(terms, counted, options.z_loss)
    return loss, jax.tree.map(lambda v: v.reshape(labels.shape), metrics)


def _summed(hidden, head, tokens, options, reduction, chunks):
    divisor = None
    if reduction == "mean":
        zeros = jnp.zeros(len(hidden), dtype_of_sums(hidden, head.weight))
        options, divisor = options_of_mean(options, tokens.labels.counted, zeros)
    inputs = TokenInputs(tokens, options)
    total, terms = summed_loss(hidden, head, inputs, chunks)
    return (total if divisor is None else mean_loss(total, divisor)), terms


@with_hints
def linear_log_probs(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    *,
    vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    temperature: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> LogProbs:
    """Log-probability, logsumexp, entropy and argmax of a linear head, in one pass.

    For each token, with ``x = hidden @ vocab_weight.T + vocab_bias`` and
    ``p = softmax(x / temperature)``: ``log p_label``, ``logsumexp(x / temperature)``,
    ``-sum_c p_c log p_c`` and ``argmax(x)``. What evaluation, distillation and policy
    gradients (DPO, GRPO) need of the logits, which are never stored.

    Args:
        hidden, vocab_weight, vocab_bias, vocab_axis, where, chunk_bytes: as in
            `linear_cross_entropy`.
        labels: integer class indices of shape (*batch), or (*batch, K) for the
            log-probabilities of K classes per token: candidates, or a teacher's top K.
        ignore_index: a label with log_prob 0 and gradient exactly 0. A token whose
            labels are all ignored is skipped; it has logsumexp and entropy 0, and
            top_label -1. None switches it off.
        temperature: in the units of the logits, broadcastable to (*batch, 1). Below 0
            the least likely class becomes the top label.
        softcap: c > 0 replaces the logits by ``c * tanh(logits / c)`` first.
        axis_name: as in `linear_cross_entropy`.

    Returns:
        A `LogProbs`, whose log_prob has the labels' shape, and the others the shape
        (*batch); float32 for half-precision inputs,
        top_label int32 (the first of tied classes). On a mesh with explicit axes, split
        as the batch axes of ``hidden``.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.

    Gradient:
        The first three are differentiable, with any cotangent, with respect to every
        float argument. Residuals: the arguments and O(N) numbers.

    Edge cases:
        A label outside [0, classes) has log_prob NaN, and NaN gradient in its token. A
        token with cotangents that are exactly 0 has gradient 0, as in
        `linear_cross_entropy`. A label that ``where`` excludes has log_prob -inf.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden, vocab_weight = jnp.array([[1.0, 2.0]]), jnp.eye(2)
        >>> result = jaxsoft.linear_log_probs(hidden, vocab_weight, jnp.array([1]))
        >>> print(result.log_prob, result.top_label)
        [-0.3132617] [1]
        >>> both = jnp.array([[0, 1]])
        >>> print(jaxsoft.linear_log_probs(hidden, vocab_weight, both).log_prob)
        [[-1.3132617 -0.3132617]]
    """
    name = "linear_log_probs"
    inputs = checked_inputs(
        name,
        hidden,
        vocab_weight,
        labels,
        vocab_bias,
        vocab_axis,
        chunk_bytes,
        several_labels=True,
    )
    batch, dtype = inputs.hidden.shape[:-1], inputs.dtype
    logits = jax.ShapeDtypeStruct((*batch, inputs.classes), dtype)
    axes = as_axes(name, -1, logits.ndim, axis_name)
    ignore_index = as_ignore_index(name, ignore_index)
    plan = VocabularyPlan(
        vocab_axis,
        *inputs.chunks,
        may_skip=ignore_index is not None and math.prod(batch) >= FEWEST_TO_SKIP,
        asked=METRICS,
        entropy_moves=True,
        mesh_names=axes.mesh_names,
    )
    check_split(
        name, axes, {"vocab_weight": inputs.vocab_weight}, {"labels": inputs.labels}
    )
    softcap = as_softcap(name, softcap, dtype)
    return _linear_log_probs(
        inputs.hidden,
        Head(inputs.vocab_weight, inputs.vocab_bias, None, softcap),
        inputs.labels,
        as_mask(name, "where", where, logits.shape, IGNORE_ROWS),
        as_temperature(name, temperature, logits, axes),
        plan=plan,
        ignore_index=ignore_index,
    )


@functools.partial(jax.jit, static_argnames=("plan", "ignore_index"))
def _linear_log_probs(hidden, head, labels, where, temperature, **static):
    log_probs = functools.partial(_log_probs, **static)
    arguments = hidden, head, labels, where, temperature
    ndim = hidden.ndim - 1
    ndims = LogProbs(labels.ndim, ndim, ndim, ndim)
    return with_automatic_axes(log_probs, arguments, hidden, ndims)


def _log_probs(hidden, head, labels, where, temperature, *, plan, ignore_index):
    batch, classes = hidden.shape[:-1], head.weight.shape[plan.vocab_axis]
    axes = Axes((len(batch),), plan.mesh_names)
    count = class_count((*batch, classes), axes)
    rows = row_labels("linear_log_probs", labels, count, ignore_index)
    if where is not None:
        included = included_classes(where, (*batch, classes), axes)
        included = jnp.broadcast_to(included, batch)
        included = included.reshape(*batch, *[1] * (labels.ndim - len(batch)))
        rows = with_empty_rows_ignored(rows, included)
    tokens = flat_tokens(hidden, rows, temperature, where, classes)
    head, (hidden, tokens) = match_varying(axes, head, (flat_rows(hidden), tokens))
    terms = linear_terms(hidden, head, tokens, plan)
    of_tokens = terms.logsumexp, terms.entropy, terms.top_label
    of_tokens = (v.reshape(batch) for v in of_tokens)
    # Of an ignored label 0, not -0.
    return LogProbs(0 - terms.nll.reshape(labels.shape), *of_tokens)
