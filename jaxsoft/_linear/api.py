"""Losses of a linear head without its logits: linear_cross_entropy, linear_log_probs.

The logits of N tokens over V classes are the largest array of language-model training,
and their gradient is as large. Here neither exists: `recompute` streams the
vocabulary past the tokens, and everything after that is the code of `cross_entropy`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
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
    as_index_labels,
    as_integer,
    as_label_smoothing,
    as_mask,
    as_real,
    as_reduction,
    as_sample_weight,
    as_scalar,
    as_softcap,
    as_temperature,
    check_split,
)
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.mesh import Axes, class_count, match_varying, with_automatic_axes
from jaxsoft._hints import with_hints
from jaxsoft._linear.accumulate import TokenInputs, TokenPlan, summed_loss
from jaxsoft._linear.chunks import Head, Tokens, VocabularyPlan, has_narrow_range
from jaxsoft._linear.recompute import linear_terms
from jaxsoft._losses.per_row import (
    RowTerms,
    included_classes,
    local_weight,
    mean_loss,
    options_of_mean,
    reduced_loss,
    row_labels,
    row_options,
    uniform_unit,
    with_empty_rows_ignored,
)

# A chunk of 4096 classes is wide enough for matrix units, and a small one stays in a
# CPU's cache: at 1024 tokens, 512 features and 32768 classes on two cores, value and
# both gradients take 800 ms in chunks of 16 MiB, and 850 ms in chunks of 64.
DEFAULT_CHUNK_BYTES = 64 * 2**20
SMALL_CHUNK_BYTES = 16 * 2**20
WIDE_CHUNK = 4096
SUM_BYTES = 256 * 2**20
# Fewer tokens are not worth sorting.
FEWEST_TO_SKIP = 512


class LogProbs(NamedTuple):
    """What `linear_log_probs` returns, each of the labels' shape."""

    log_prob: Array
    """Log-probability of the label, in nats."""
    logsumexp: Array
    """Logsumexp of the logits over the temperature."""
    entropy: Array
    """Entropy of the distribution, in nats."""
    top_label: Array
    """The most probable class, int32."""


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
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> Array:
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
        class_weight, sample_weight, ignore_index, label_smoothing, focal_gamma,
            softcap, z_loss, reduction, check_labels: as in `cross_entropy`.
        temperature: as in `cross_entropy`, broadcastable to (*batch, 1).
        chunk_bytes: size of a chunk of float32 logits; by default that of 4096 classes,
            and at least 16 and at most 64 MiB. A chunk that divides the classes is
            sought near it. Given a number, the logits are always recomputed (see
            Gradient).
        axis_name: mesh axis (or tuple of them) over which the vocabulary is split,
            inside `jax.shard_map`: ``vocab_weight``, ``vocab_bias`` and ``where`` hold
            the classes of this device, ``class_weight`` those or all; labels are global
            indices, and every device gets the loss of the whole. `shard_vocab` does
            this for callers that use `jax.jit`.

    Returns:
        One loss per token, of shape (*batch), or a scalar; float32 for half-precision
        inputs. Logits and sums are float32 there, whatever the inputs. On a mesh with
        explicit axes, split as the batch axes of ``hidden``.

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
        an ignored label has gradient exactly 0.

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
    inputs = _checked_inputs(
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
    plan = VocabularyPlan(
        vocab_axis=vocab_axis,
        chunk=inputs.chunk,
        may_skip=ignore_index is not None and math.prod(batch) >= FEWEST_TO_SKIP,
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
    tokens = _flat_tokens(rows, temperature, where, classes)
    hidden = _flat_rows(hidden)
    if ignore_index is not None or where is not None:
        # 0 times a NaN of an ignored token would reach the head's gradient.
        hidden = jnp.where(tokens.labels.counted[:, None], hidden, 0)
    options = row_options(rows, labels.shape, axes, included, count, **options)
    options = jax.tree.map(lambda v: v.reshape(-1), options)
    head, (hidden, tokens, options) = match_varying(
        axes, head, (hidden, tokens, options)
    )
    chunks = None
    if reduction != "none" and may_hold_gradient and not plan.mesh_names:
        chunks = _token_chunks(hidden, head, plan)
    if chunks is None:
        terms = linear_terms(hidden, head, tokens, plan)
        terms = RowTerms(terms.nll, terms.logsumexp, terms.uniform_nll)
        loss = reduced_loss(terms, tokens.labels.counted, options, reduction)
        return loss.reshape(labels.shape) if reduction == "none" else loss
    if reduction == "sum":
        return summed_loss(hidden, head, TokenInputs(tokens, options), chunks)
    zeros = jnp.zeros(len(hidden), _dtype_of_sums(hidden, head.weight))
    options, divisor = options_of_mean(options, tokens.labels.counted, zeros)
    total = summed_loss(hidden, head, TokenInputs(tokens, options), chunks)
    return mean_loss(total, divisor)


@with_hints
def linear_log_probs(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    *,
    vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
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
        hidden, vocab_weight, labels, vocab_bias, vocab_axis, chunk_bytes: as in
            `linear_cross_entropy`.
        temperature: in the units of the logits, broadcastable to (*batch, 1). Below 0
            the least likely class becomes the top label.
        softcap: c > 0 replaces the logits by ``c * tanh(logits / c)`` first.
        axis_name: as in `linear_cross_entropy`.

    Returns:
        LogProbs(log_prob, logsumexp, entropy, top_label), each of shape (*batch):
        float32 for half-precision inputs, top_label int32 (the first of tied classes).
        On a mesh with explicit axes, split as the batch axes of ``hidden``.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`.

    Gradient:
        The first three are differentiable, with any cotangent, with respect to every
        float argument. Residuals: the arguments and O(N) numbers.

    Edge cases:
        A label outside [0, classes) has log_prob NaN, and NaN gradient in its token.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden, vocab_weight = jnp.array([[1.0, 2.0]]), jnp.eye(2)
        >>> result = jaxsoft.linear_log_probs(hidden, vocab_weight, jnp.array([1]))
        >>> print(result.log_prob, result.top_label)
        [-0.3132617] [1]
    """
    name = "linear_log_probs"
    inputs = _checked_inputs(
        name, hidden, vocab_weight, labels, vocab_bias, vocab_axis, chunk_bytes
    )
    logits = jax.ShapeDtypeStruct((*inputs.labels.shape, inputs.classes), inputs.dtype)
    axes = as_axes(name, -1, logits.ndim, axis_name)
    check_split(
        name, axes, {"vocab_weight": inputs.vocab_weight}, {"labels": inputs.labels}
    )
    return _linear_log_probs(
        inputs.hidden,
        Head(
            inputs.vocab_weight,
            inputs.vocab_bias,
            None,
            as_softcap(name, softcap, inputs.dtype),
        ),
        inputs.labels,
        as_temperature(name, temperature, logits, axes),
        plan=VocabularyPlan(
            vocab_axis,
            inputs.chunk,
            may_skip=False,
            with_entropy=True,
            with_top_label=True,
            mesh_names=axes.mesh_names,
        ),
    )


@functools.partial(jax.jit, static_argnames="plan")
def _linear_log_probs(hidden, head, labels, temperature, *, plan):
    log_probs = functools.partial(_log_probs, plan=plan)
    arguments = hidden, head, labels, temperature
    return with_automatic_axes(log_probs, arguments, hidden, labels.ndim)


def _log_probs(hidden, head, labels, temperature, *, plan):
    classes = head.weight.shape[plan.vocab_axis]
    axes = Axes((labels.ndim,), plan.mesh_names)
    count = class_count((*labels.shape, classes), axes)
    rows = row_labels("linear_log_probs", labels, count, None)
    tokens = _flat_tokens(rows, temperature, None, classes)
    head, (hidden, tokens) = match_varying(axes, head, (_flat_rows(hidden), tokens))
    terms = linear_terms(hidden, head, tokens, plan)
    terms = jax.tree.map(lambda term: term.reshape(labels.shape), terms)
    return LogProbs(-terms.nll, terms.logsumexp, terms.entropy, terms.top_label)


def _dtype_of_sums(hidden: Array, vocab_weight: Array) -> jnp.dtype:
    return accumulation_dtype(jnp.promote_types(hidden.dtype, vocab_weight.dtype))


class _Inputs(NamedTuple):
    hidden: Array
    vocab_weight: Array
    labels: Array
    vocab_bias: Array | None
    classes: int
    dtype: jnp.dtype
    chunk: int


def _checked_inputs(
    name: str,
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    vocab_bias: ArrayLike | None,
    vocab_axis: int,
    chunk_bytes: int | None,
) -> _Inputs:
    hidden = as_real(name, "hidden", hidden)
    vocab_weight = as_real(name, "vocab_weight", vocab_weight)
    if as_integer(vocab_axis) not in (0, 1):
        raise ValueError(f"{name}: vocab_axis must be 0 or 1; got {vocab_axis!r}")
    if hidden.ndim < 1 or vocab_weight.ndim != 2:
        raise ValueError(
            f"{name}: hidden must be (*batch, features) and vocab_weight a matrix; got "
            f"shapes {hidden.shape} and {vocab_weight.shape}"
        )
    classes, features = (
        vocab_weight.shape[vocab_axis],
        vocab_weight.shape[1 - vocab_axis],
    )
    if hidden.shape[-1] != features or classes == 0:
        layout = ("(classes, features)", "(features, classes)")[vocab_axis]
        hint = ""
        if hidden.shape[-1] == classes != 0:
            hint = f". Write vocab_axis={1 - vocab_axis}"
        raise ValueError(
            f"{name}: hidden must be (*batch, features) and vocab_weight {layout} with "
            f"the same features and at least one class; got shapes {hidden.shape} and "
            f"{vocab_weight.shape} with vocab_axis={vocab_axis}{hint}"
        )
    batch = hidden.shape[:-1]
    labels = as_index_labels(
        name, labels, batch, "the shape of hidden without features"
    )
    dtype = _dtype_of_sums(hidden, vocab_weight)
    if vocab_bias is not None:
        vocab_bias = as_real(name, "vocab_bias", vocab_bias)
        if vocab_bias.shape != (classes,):
            raise ValueError(
                f"{name}: vocab_bias must have one entry per class, shape "
                f"({classes},); got {vocab_bias.shape}"
            )
    if chunk_bytes is None:
        wide = 4 * WIDE_CHUNK * math.prod(batch)
        chunk_bytes = min(DEFAULT_CHUNK_BYTES, max(SMALL_CHUNK_BYTES, wide))
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"{name}: chunk_bytes must be an int; got {chunk_bytes!r}")
    if chunk_bytes <= 0:
        raise ValueError(f"{name}: chunk_bytes must be positive; got {chunk_bytes}")
    chunk = _chunk_classes(math.prod(batch), classes, chunk_bytes)
    return _Inputs(hidden, vocab_weight, labels, vocab_bias, classes, dtype, chunk)


def _chunk_classes(tokens: int, classes: int, chunk_bytes: int) -> int:
    """Classes in a chunk: about chunk_bytes of float32 logits, and if possible a
    divisor of the classes, since the chunks' gradients then need no copy to join."""
    most = min(classes, max(chunk_bytes // (4 * max(tokens, 1)), 1))
    if most == classes:
        return classes
    divisors = [c for c in range(most, most // 4, -1) if classes % c == 0]
    aligned = [c for c in divisors if c % 128 == 0]
    if aligned or divisors:
        return (aligned or divisors)[0]
    return most - most % 128 if most >= 128 else most


def _token_chunks(hidden: Array, head: Head, plan: VocabularyPlan) -> TokenPlan | None:
    """How to sum a loss with its gradient taken in the forward pass; None where the
    logits of a chunk and the float32 gradient of the weights exceed the budget, and
    where the inputs do not hold a gradient that is scaled later."""
    if has_narrow_range(hidden.dtype):
        return None
    tokens, features = hidden.shape
    classes = head.weight.shape[plan.vocab_axis]
    most = SUM_BYTES // 4 // classes - features
    chunk = min(tokens, most)
    if chunk < min(tokens, 128) or tokens == 0:
        return None
    return TokenPlan(plan.vocab_axis, chunk, plan.may_skip)


def _flat_rows(hidden: Array) -> Array:
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])


def _flat_tokens(rows, temperature, where, classes) -> Tokens:
    batch = rows.class_index.shape
    if temperature is not None:
        temperature = jnp.broadcast_to(temperature, (*batch, 1)).reshape(-1)
    if where is not None:
        shared = all(n == 1 for n in where.shape[:-1])
        of_tokens = (1,) * len(batch) if shared else batch
        where = jnp.broadcast_to(where, (*of_tokens, classes)).reshape(-1, classes)
    return Tokens(jax.tree.map(lambda v: v.reshape(-1), rows), temperature, where)
