"""What every loss does with one number per row: labels, weights, reduction.

A loss of given logits and a loss that never holds them differ in how a row's
log-probability is found. From there on they share this module, which works on O(rows)
numbers and leaves all derivatives to JAX.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify

from jaxsoft._core.mesh import (
    Axes,
    class_count,
    device_sum,
    entries_at,
    first_class,
    local_index,
    row_sum,
)
from jaxsoft._losses.checkify import attach_check


class RowLabels(NamedTuple):
    """Class indices, and which rows they count in; all of the rows' shape."""

    class_index: Array  # int32; -1 names no class
    counted: Array  # False in a row with label ignore_index
    valid: Array  # False in a counted row whose label is no class


class RowTerms(NamedTuple):
    """What a row's loss is made of, or the cotangents of it; None is not asked for. In
    a row that is not counted, all are 0."""

    nll: Any  # sum_c q_c (-log p_c), for the label or the label probabilities q
    logsumexp: Any  # of the logits over the temperature
    uniform_nll: Any  # sum_c w_c (-log p_c) over the included classes


class RowOptions(NamedTuple):
    """The options of a loss that act on rows, one entry per row; None is neutral."""

    label_weight: Array | None = None
    sample_weight: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None


def row_labels(
    function: str, labels: Array, classes: int, ignore_index: int | None
) -> RowLabels:
    """Labels in 32 bits. What is no class becomes -1, so that nothing wraps."""
    # Compared in a dtype that holds both sides: 300 classes do not fit into int8, nor
    # does ignore_index = -100 into uint32.
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    ignored = jnp.zeros(labels.shape, bool)
    limits = jnp.iinfo(labels.dtype)
    if ignore_index is not None and limits.min <= ignore_index <= limits.max:
        ignored = labels == np.asarray(ignore_index, labels.dtype)
    is_class = ~ignored & (labels >= 0) & (labels < classes)
    valid = is_class | ignored
    if labels.size:
        check = functools.partial(_check_labels, function, classes, ignore_index)
        labels, valid = attach_check(check, labels, valid)
    index = jnp.where(is_class, labels, 0).astype(jnp.int32)
    return RowLabels(jnp.where(is_class, index, -1), ~ignored, valid)


def _check_labels(
    function: str,
    classes: int,
    ignore_index: int | None,
    labels: Array,
    valid: Array,
) -> None:
    smallest = np.asarray(jnp.iinfo(labels.dtype).min, labels.dtype)
    largest_invalid = jnp.max(jnp.where(valid, smallest, labels))
    ignored = "" if ignore_index is None else " or equal ignore_index"
    checkify.debug_check(
        jnp.all(valid),
        f"{function}: labels must lie in [0, {classes}){ignored}; got label {{label}}",
        label=largest_invalid,
    )


def included_classes(where: Array | None, shape: tuple[int, ...], axes: Axes) -> Array:
    """The number of classes that count, for every row or one for all."""
    if where is None:
        return jnp.asarray(class_count(shape, axes))
    over_classes = [
        shape[i] if i in axes.dims else n for i, n in enumerate(where.shape)
    ]
    included = jnp.broadcast_to(where, over_classes)
    count = jnp.squeeze(row_sum(included, axes, jnp.int32), axes.dims)
    return jnp.broadcast_to(
        count, [n for i, n in enumerate(shape) if i not in axes.dims]
    )


def local_weight(
    class_weight: Array | None, shape: tuple[int, ...], axes: Axes
) -> Array | None:
    """The class weights of the classes that this device holds."""
    here = axes.count_here(shape)
    if class_weight is None or len(class_weight) == here:
        return class_weight
    start = first_class(here, axes.mesh_names)
    return jax.lax.dynamic_slice_in_dim(class_weight, start, here)


def row_options(
    labels: RowLabels | None,
    shape: tuple[int, ...],
    axes: Axes | None = None,
    class_weight: Array | None = None,
    sample_weight: Array | None = None,
    label_smoothing: Array | None = None,
    z_loss: Array | None = None,
) -> RowOptions:
    """Options of a loss of the given shape, spread over its rows; class_weight is of
    the classes that this device holds."""
    label_weight = None
    if class_weight is not None and labels is not None:
        names = axes.mesh_names if axes else ()
        label_weight = _weight_of_label(class_weight, labels.class_index, names)
        # A label that is no class has no weight, but its loss is NaN.
        label_weight = jnp.where(labels.valid, label_weight, 1)
    spread = (sample_weight, label_smoothing, z_loss)
    return RowOptions(
        label_weight, *(v if v is None else jnp.broadcast_to(v, shape) for v in spread)
    )


def _weight_of_label(class_weight, class_index, mesh_names):
    index, found = local_index(class_index, len(class_weight), mesh_names)
    return device_sum(jnp.where(found, entries_at(class_weight, index), 0), mesh_names)


def combined_terms(
    terms: RowTerms,
    labels: RowLabels | None,
    included_classes: Array,
    options: RowOptions,
) -> tuple[Array, Array]:
    """The loss of every row, and its weight in a mean.

    loss = v ((1 - eps) w_y nll + (eps / C) uniform_nll + z_loss lse^2)
    weight = v w_y, for label probabilities v.
    """
    loss = terms.nll
    if options.label_weight is not None:
        loss = times_loss(options.label_weight, loss)
    if options.label_smoothing is not None and terms.uniform_nll is not None:
        eps = options.label_smoothing
        share = eps / jnp.maximum(included_classes, 1).astype(eps.dtype)
        loss = times_loss(1 - eps, loss) + times_loss(share, terms.uniform_nll)
    if options.z_loss is not None and terms.logsumexp is not None:
        infinite = jnp.isinf(terms.logsumexp**2)
        square = jnp.where(infinite, 0, terms.logsumexp) ** 2
        square = jnp.where(infinite, jnp.inf, square)
        loss = loss + times_loss(options.z_loss, square)
    if options.sample_weight is not None:
        loss = times_loss(options.sample_weight, loss)
    if labels is not None:
        loss = jnp.where(labels.counted, loss, 0)
    return loss, row_weight(labels, options, loss)


def row_weight(labels: RowLabels | None, options: RowOptions, like: Array) -> Array:
    """The weight of every row in a mean."""
    weight = jnp.ones_like(like)
    for factor in (options.label_weight, options.sample_weight):
        weight = weight if factor is None else weight * factor
    return weight if labels is None else jnp.where(labels.counted, weight, 0)


@jax.custom_jvp
def times_loss(weight: Array, loss: Array) -> Array:
    """weight * loss with 0 * inf = 0. An infinite loss has derivative 0 in the weight:
    the weights are shared, and one such row would fill their gradient with infinity."""
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)


@times_loss.defjvp
def _times_loss_jvp(primals, tangents):
    (weight, loss), (weight_dot, loss_dot) = primals, tangents
    finite_loss = jnp.where(jnp.isinf(loss), 0, loss)
    return times_loss(weight, loss), weight * loss_dot + finite_loss * weight_dot


@jax.custom_jvp
def mean_loss(total: Array, total_weight: Array) -> Array:
    """total / total_weight, 0 without any weight, with derivatives as `times_loss`."""
    empty = total_weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, total_weight))


@mean_loss.defjvp
def _mean_loss_jvp(primals, tangents):
    (total, total_weight), (total_dot, weight_dot) = primals, tangents
    mean = mean_loss(total, total_weight)
    empty = total_weight == 0
    share = jnp.where(empty, 0, 1 / jnp.where(empty, 1, total_weight))
    finite_mean = jnp.where(jnp.isinf(mean), 0, mean)
    return mean, share * (total_dot - finite_mean * weight_dot)


def reduced_loss(loss: Array, weight: Array, reduction: str) -> Array:
    """The sum, the weighted mean, or the loss of every row."""
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    return total if reduction == "sum" else mean_loss(total, jnp.sum(weight))
