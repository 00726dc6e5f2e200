"""loss_weight: what the mean of a loss divides by, row by row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    as_array,
    as_axes,
    as_ignore_index,
    as_mask,
    as_real,
    as_sample_weight,
    is_of,
    reduced_shape,
    reject_other_labels,
)
from jaxsoft._hints import with_hints
from jaxsoft._losses.per_row import (
    included_classes,
    row_labels,
    row_options,
    row_weight,
)


@with_hints
def loss_weight(
    labels: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | None = -100,
) -> Array:
    """The weight of every row in the mean of a loss.

    ``class_weight[label] * sample_weight`` for class indices, ``sample_weight`` for
    label probabilities, and 0 in a row that is ignored. The mean of `cross_entropy` or
    `linear_cross_entropy` over several microbatches or devices is the sum of all losses
    over the sum of all these weights; it is not the mean of their means. (The term of
    ``z_loss`` is divided by the weights without ``class_weight``: with both, add up the
    two parts apart.)

    Args:
        labels: as in `cross_entropy`: class indices of the rows' shape, or label
            probabilities, whose classes lie along ``axis``.
        axis: axis or axes of the classes, in label probabilities and in ``where``.
        where: boolean, with the rank of the logits; a row in which nothing is included
            has no weight.
        class_weight: shape (classes,).
        sample_weight: broadcastable to the losses; booleans are 0 and 1.
        ignore_index: an integer label whose row has no weight. None switches it off.

    Returns:
        One weight per row, float32, or float64 if one of the weights is.

    Raises:
        TypeError: labels, weights or ``where`` of the wrong dtype, ``axis`` or
            ``ignore_index`` not an int.
        ValueError: weights or ``where`` of the wrong shape, ``axis`` out of range.

    Gradient:
        With respect to both weights. Residuals: O(rows).

    Edge cases:
        In a row with an invalid label, whose loss is NaN, ``class_weight`` counts as 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> labels = jnp.array([2, 0, -100])
        >>> print(jaxsoft.loss_weight(labels, class_weight=jnp.array([0.5, 1.0, 2.0])))
        [2.  0.5 0. ]

    References:
        The means of `torch.nn.functional.cross_entropy`.
    """
    name = "loss_weight"
    labels = as_array(name, "labels", labels)
    reject_other_labels(name, labels)
    are_indices = is_of(labels.dtype, jnp.integer)
    rows = labels.shape
    if not are_indices:
        rows = reduced_shape(rows, as_axes(name, axis, labels.ndim))
    given = [v for v in (class_weight, sample_weight) if v is not None]
    given = [as_array(name, "weights", v).dtype for v in given]
    dtype = jnp.dtype(jnp.float64 if jnp.dtype("float64") in given else jnp.float32)
    weights = {"sample_weight": as_sample_weight(name, sample_weight, rows, dtype)}
    if class_weight is not None and are_indices:
        weights["class_weight"] = _as_class_weight(name, class_weight, dtype)
    return _loss_weight(
        labels if are_indices else None,
        _some_included(name, where, rows, axis),
        weights,
        jnp.zeros(rows, dtype),
        ignore_index=as_ignore_index(name, ignore_index),
    )


def _as_class_weight(name, class_weight, dtype):
    array = as_real(name, "class_weight", class_weight)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: class_weight must have one entry per class; got shape "
            f"{array.shape}"
        )
    return array.astype(dtype)


def _some_included(name, where, rows, axis):
    """Of the shape of the rows: whether some class is included."""
    if where is None:
        return None
    where = as_array(name, "where", where)
    as_mask(name, "where", where, where.shape)
    axes = as_axes(name, axis, where.ndim)
    try:
        return jnp.broadcast_to(included_classes(where, where.shape, axes) > 0, rows)
    except ValueError:
        raise ValueError(
            f"{name}: where must have the logits' rank, and without the class axis "
            f"broadcast to the shape of the rows {rows}; got {where.shape}"
        ) from None


@functools.partial(jax.jit, static_argnames="ignore_index")
def _loss_weight(labels, counted, weights, like, *, ignore_index):
    index = None
    if labels is not None:
        class_weight = weights.get("class_weight")
        classes = (
            jnp.iinfo(jnp.int32).max if class_weight is None else len(class_weight)
        )
        index = row_labels("loss_weight", labels, classes, ignore_index)
        counted = index.counted if counted is None else index.counted & counted
    return row_weight(row_options(index, like.shape, **weights), counted, like)
