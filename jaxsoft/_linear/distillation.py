"""Divergences of two linear heads without their logits: linear_kl_divergence and
linear_jensen_shannon.

The loss of a distillation compares the distributions of a student and a teacher over
the whole vocabulary. `two_heads` streams both vocabularies past the tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    AxisName,
    Reduction,
    as_axes,
    as_beta,
    as_mask,
    as_reduction,
    as_sample_weight,
    as_softcap,
    as_temperature,
    check_split,
)
from jaxsoft._core.mesh import Axes, match_varying, with_automatic_axes
from jaxsoft._hints import with_hints
from jaxsoft._linear.chunks import Head
from jaxsoft._linear.inputs import (
    FEWEST_TO_SKIP,
    HeadInputs,
    checked_head,
    chunks_of,
    dtype_of_sums,
    flat_rows,
    flat_tokens,
)
from jaxsoft._linear.pairs import Model, Pair, PairPlan
from jaxsoft._linear.two_heads import weighted_divergence
from jaxsoft._losses.per_row import (
    included_classes,
    mean_divisor,
    mean_loss,
    row_options,
)


@with_hints
def linear_kl_divergence(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    target_hidden: ArrayLike,
    target_vocab_weight: ArrayLike,
    *,
    vocab_bias: ArrayLike | None = None,
    target_vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
    target_vocab_axis: int = 0,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    target_softcap: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> Array:
    """`kl_divergence` of two linear heads, without ever holding their logits.

    ``kl_divergence(hidden @ vocab_weight.T + vocab_bias, target_hidden @
    target_vocab_weight.T + target_vocab_bias, ...)``: the distillation loss of a
    student from a teacher of the same vocabulary. The N x V logits and their gradients
    are never stored. See `kl_divergence` for the formula.

    Args:
        hidden: hidden states of the student, of shape (*batch, features).
        vocab_weight: (classes, features), or (features, classes) with ``vocab_axis=1``.
        target_hidden: hidden states of the teacher, of shape (*batch, target_features).
            Differentiable; what is not differentiated costs nothing.
        target_vocab_weight: (classes, target_features), or with
            ``target_vocab_axis=1`` (target_features, classes).
        vocab_bias, target_vocab_bias: (classes,).
        vocab_axis, target_vocab_axis: which axis of the weights holds the classes.
        where: boolean, broadcastable to (*batch, classes); True includes a class in
            both distributions.
        temperature: in the units of the logits, the same for both, broadcastable to
            (*batch, 1).
        softcap, target_softcap: c > 0 replaces the logits by ``c * tanh(logits / c)``
            first.
        sample_weight: broadcastable to the divergences. A token of weight 0 is ignored.
        reduction: "none", "sum" or "mean", which divides by the sum of
            ``sample_weight`` and is 0 without any weight.
        chunk_bytes: largest size of a chunk's float32 logits, of both heads together;
            by default as in `linear_cross_entropy`.
        axis_name: mesh axis (or tuple of them) over which the vocabulary is split,
            inside `jax.shard_map`: the weights, biases and ``where`` hold the classes
            of this device, and every device gets the divergence of the whole.
            `shard_vocab` does this for callers that use `jax.jit`.

    Returns:
        One divergence per token, of shape (*batch), or a scalar. float32 for
        half-precision inputs, logits and sums too. Never negative. On a mesh with
        explicit axes, split as the batch axes of ``hidden``.

    Raises:
        TypeError: arguments not real, ``where`` not boolean.
        ValueError: shapes that do not fit together, among them two heads with different
            numbers of classes or of tokens; and as `linear_cross_entropy`.

    Gradient:
        With respect to every float argument, in its dtype; sums over tokens and classes
        in float32. For N tokens, D features and V classes a matrix product is 2 N D V
        flops. With a fixed teacher:

        - The logits of both are computed twice for the value and once more for the
          gradients, which are two products: 8 for value and gradients. Temporaries are
          the logits of a chunk and 4 N D bytes, residuals the arguments and O(N)
          numbers.
        - Of a reduction "sum" or "mean" the gradient is taken beside the value: 6
          products. Residuals: the gradients. Not where ``temperature`` or the teacher
          is differentiated, nor with ``axis_name``, nor for float16, which would not
          hold what is scaled later.

        A teacher that is differentiated costs two products more. From 512 tokens on,
        those of ``sample_weight`` 0 are skipped, unless the weights are differentiated:
        the passes run over a quarter of the tokens, a half or all. `jax.checkpoint`
        around the call repeats the forward pass.

    Edge cases:
        As `kl_divergence`. A token whose cotangent or ``sample_weight`` is exactly 0
        has gradient 0, whatever its hidden states, NaN too. A class that ``where``
        excludes may have weights that are NaN or infinite. Of any other token a hidden
        state that is not finite makes the gradient NaN. Of two heads that nearly agree,
        the divergence has the digits that float32 logits have of their difference:
        with weights that differ by 2^-12 some three where the logits are below 5, and
        one where they reach 40.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden = jnp.array([[1.0, 2.0], [0.5, -1.0]])
        >>> vocab_weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> teacher = jnp.array([[1.0], [0.0]]), jnp.array([[0.5], [1.5], [3.0]])
        >>> divergence = jaxsoft.linear_kl_divergence(hidden, vocab_weight, *teacher)
        >>> [f"{v:.4f}" for v in divergence]
        ['0.0243', '0.1991']

    References:
        As `kl_divergence`; the passes over the vocabulary: E. Wijmans et al., "Cut your
        losses in large-vocabulary language models", 2024.
    """
    return _divergence(
        "linear_kl_divergence",
        (hidden, vocab_weight, vocab_bias, vocab_axis, softcap),
        (
            target_hidden,
            target_vocab_weight,
            target_vocab_bias,
            target_vocab_axis,
            target_softcap,
        ),
        where=where,
        temperature=temperature,
        sample_weight=sample_weight,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        axis_name=axis_name,
    )


@with_hints
def linear_jensen_shannon(
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    target_hidden: ArrayLike,
    target_vocab_weight: ArrayLike,
    *,
    beta: float = 0.5,
    vocab_bias: ArrayLike | None = None,
    target_vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
    target_vocab_axis: int = 0,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    target_softcap: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: Reduction = "none",
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> Array:
    """`jensen_shannon` of two linear heads, without ever holding their logits.

    ``jensen_shannon(hidden @ vocab_weight.T + vocab_bias, target_hidden @
    target_vocab_weight.T + target_vocab_bias, beta=beta, ...)``: with ``beta`` 0 the
    divergence of `linear_kl_divergence`, with 1 the reverse. The N x V logits and their
    gradients are never stored. See `jensen_shannon` for the formula.

    Args:
        hidden, vocab_weight: the student, as in `linear_kl_divergence`.
        target_hidden, target_vocab_weight: the teacher, as there.
        beta: a Python number from 0 to 1, the teacher's part in the mixture.
        vocab_bias, target_vocab_bias, vocab_axis, target_vocab_axis: as there.
        where, temperature, softcap, target_softcap, sample_weight: as there.
        reduction, chunk_bytes, axis_name: as there.

    Returns:
        One divergence per token, of shape (*batch), or a scalar; float32 for
        half-precision inputs. Never negative.

    Raises:
        TypeError: ``beta`` is no Python number; and as `linear_kl_divergence`.
        ValueError: ``beta`` outside [0, 1]; and as `linear_kl_divergence`.

    Gradient:
        As `linear_kl_divergence`, but of every reduction 8 products with a fixed
        teacher, unless ``beta`` is 0: the gradient needs the divergence of the whole
        row.

    Edge cases:
        As `jensen_shannon`, and as `linear_kl_divergence`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden = jnp.array([[1.0, 2.0], [0.5, -1.0]])
        >>> vocab_weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> teacher = jnp.array([[1.0], [0.0]]), jnp.array([[0.5], [1.5], [3.0]])
        >>> divergence = jaxsoft.linear_jensen_shannon(hidden, vocab_weight, *teacher)
        >>> [f"{v:.4f}" for v in divergence]
        ['0.0063', '0.0479']

    References:
        As `jensen_shannon`.
    """
    return _divergence(
        "linear_jensen_shannon",
        (hidden, vocab_weight, vocab_bias, vocab_axis, softcap),
        (
            target_hidden,
            target_vocab_weight,
            target_vocab_bias,
            target_vocab_axis,
            target_softcap,
        ),
        where=where,
        temperature=temperature,
        sample_weight=sample_weight,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        axis_name=axis_name,
        beta=as_beta("linear_jensen_shannon", beta),
    )


def _divergence(
    name: str,
    student: tuple[Any, ...],
    teacher: tuple[Any, ...],
    *,
    where: Any,
    temperature: Any,
    sample_weight: Any,
    reduction: Reduction,
    chunk_bytes: int | None,
    axis_name: AxisName,
    beta: float = 0.0,
) -> Array:
    *of_student, softcap = student
    *of_teacher, target_softcap = teacher
    one = checked_head(name, *of_student)
    other = checked_head(name, *of_teacher, of="target_")
    _check_together(name, one, other)
    dtypes = [dtype_of_sums(v.hidden, v.vocab_weight) for v in (one, other)]
    dtype = jnp.promote_types(*dtypes)
    batch = one.hidden.shape[:-1]
    logits = jax.ShapeDtypeStruct((*batch, one.classes), dtype)
    axes = as_axes(name, -1, logits.ndim, axis_name)
    weights = one.vocab_weight, other.vocab_weight
    which = ("vocab_weight", "target_vocab_weight")
    check_split(name, axes, dict(zip(which, weights)), {})
    models = Pair(
        _model(other, as_softcap(name, target_softcap, dtype), dtypes[1], dtype),
        _model(one, as_softcap(name, softcap, dtype), dtypes[0], dtype),
    )
    vocab_axes = Pair(of_teacher[-1], of_student[-1])
    reverse, reduction = beta == 1, as_reduction(name, reduction)
    plan = PairPlan(
        Pair(*reversed(vocab_axes)) if reverse else vocab_axes,
        *chunks_of(name, [one, other], chunk_bytes),
        may_skip=sample_weight is not None and math.prod(batch) >= FEWEST_TO_SKIP,
        beta=0.0 if reverse else beta,
        is_summed=reduction != "none" and not axes.mesh_names,
        mesh_names=axes.mesh_names,
    )
    return _divergence_jit(
        Pair(*reversed(models)) if reverse else models,
        as_mask(name, "where", where, logits.shape),
        as_temperature(name, temperature, logits, axes),
        as_sample_weight(name, sample_weight, batch, dtype),
        plan=plan,
        reduction=reduction,
    )


def _check_together(name: str, one: HeadInputs, other: HeadInputs) -> None:
    if one.hidden.shape[:-1] != other.hidden.shape[:-1]:
        raise ValueError(
            f"{name}: hidden and target_hidden must have the same batch shape; got "
            f"{one.hidden.shape} and {other.hidden.shape}"
        )
    if one.classes != other.classes:
        raise ValueError(
            f"{name}: vocab_weight and target_vocab_weight must have the same number "
            f"of classes; got {one.classes} and {other.classes}"
        )


def _model(inputs: HeadInputs, softcap: Any, own_dtype: Any, dtype: Any) -> Model:
    """Logits of the two in different dtypes of sums become those of the wider one."""
    hidden = inputs.hidden if own_dtype == dtype else inputs.hidden.astype(dtype)
    return Model(hidden, Head(inputs.vocab_weight, inputs.vocab_bias, None, softcap))


@functools.partial(jax.jit, static_argnames=("plan", "reduction"))
def _divergence_jit(models, where, temperature, sample_weight, **static):
    loss = functools.partial(_loss, **static)
    hidden = models.y.hidden
    ndim = hidden.ndim - 1 if static["reduction"] == "none" else 0
    arguments = models, where, temperature, sample_weight
    return with_automatic_axes(loss, arguments, hidden, ndim)


def _loss(models, where, temperature, sample_weight, *, plan, reduction):
    *batch, _ = models.y.hidden.shape
    classes = models.y.head.weight.shape[plan.vocab_axes.y]
    tokens = flat_tokens(models.y.hidden, None, temperature, where, classes)
    weight = sample_weight
    if weight is not None:
        weight = jnp.broadcast_to(weight, batch).reshape(-1)
    axes = Axes((len(batch),), plan.mesh_names)
    heads, hidden = zip(*((v.head, flat_rows(v.hidden)) for v in models))
    heads, (hidden, tokens, weight) = match_varying(
        axes, heads, (hidden, tokens, weight)
    )
    pair = Pair(*map(Model, hidden, heads))
    losses = weighted_divergence(pair, tokens, weight, plan)
    if reduction == "none":
        return losses.reshape(batch)
    if reduction == "sum":
        return jnp.sum(losses)
    included = included_classes(where, (*batch, classes), axes)
    counted = jnp.broadcast_to(included > 0, batch).reshape(-1)
    options = row_options(None, counted.shape, sample_weight=weight)
    like = jnp.zeros(counted.shape, losses.dtype)
    return mean_loss(jnp.sum(losses), mean_divisor(options, counted, like)[0])
