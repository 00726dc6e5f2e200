"""What every loss does with one number per row: labels, weights, reduction.

A loss of given logits and a loss that never holds them differ in how a row's
log-probability is found. From there on they share this module, which works on O(rows)
numbers and leaves all derivatives to JAX.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.experimental import checkify

from jaxsoft._checks import reduced_shape
from jaxsoft._core.logits import zero_if_infinite
from jaxsoft._core.mesh import (
    Axes,
    class_count,
    device_sum,
    entries_at,
    first_class,
    local_index,
    row_sum,
)
from jaxsoft._elementwise import rule_from_partials
from jaxsoft._passes.product import product


class RowLabels(NamedTuple):
    """Class indices, and which rows they count in; all of the rows' shape."""

    class_index: Array  # int32; -1 names no class
    counted: Array  # False in a row with label ignore_index, or with no class included
    valid: Array  # False in a counted row whose label is no class


class RowTerms(NamedTuple):
    """What a row's loss is made of, or the cotangents of it; None is not asked for. In
    a row that is not counted, all are 0."""

    nll: Any  # sum_c q_c (-log p_c), for the label or the label probabilities q
    logsumexp: Any = None  # of the logits over the temperature
    uniform_nll: Any = None  # sum_c w_c (-log p_c) over the included classes
    entropy: Any = None
    top_label: Any = None  # int32, -1 in a row that is not counted


class LossMetrics(NamedTuple):
    """What `cross_entropy` and `linear_cross_entropy` return beside the loss, one entry
    per row. None of it has a gradient; a row that is ignored has 0, and top_label -1.
    """

    nll: Array
    """-log p of the label, without weights, smoothing, focal factor and z_loss."""
    logsumexp: Array
    """Logsumexp of the logits over the temperature."""
    z_loss: Array
    """The option z_loss times the squared logsumexp."""
    entropy: Array
    """Entropy of the prediction, in nats."""
    top_label: Array
    """The most probable class, int32; the first of tied ones."""


export.register_namedtuple_serialization(
    LossMetrics, serialized_name="jaxsoft.LossMetrics"
)


class RowOptions(NamedTuple):
    """The options of a loss that act on rows, one entry per row; None is neutral."""

    label_weight: Array | None = None
    sample_weight: Array | None = None
    label_smoothing: Array | None = None
    uniform_share: Array | None = None  # what uniform_nll is multiplied by
    z_loss: Array | None = None
    focal_gamma: Array | None = None


def row_labels(
    function: str,
    labels: Array,
    classes: int | Array,
    ignore_index: int | None,
    check_labels: bool = False,
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
    if labels.size and check_labels:
        _check_labels(function, classes, ignore_index, labels, valid)
    index = jnp.where(is_class, labels, 0).astype(jnp.int32)
    return RowLabels(jnp.where(is_class, index, -1), ~ignored, valid)


def _check_labels(function, classes, ignore_index, labels, valid):
    smallest = np.asarray(jnp.iinfo(labels.dtype).min, labels.dtype)
    largest_invalid = jnp.max(jnp.where(valid, smallest, labels))
    ignored = "" if ignore_index is None else " or equal ignore_index"
    checkify.debug_check(
        jnp.all(valid),
        f"{function}: labels must lie in [0, {classes}){ignored}; got label {{label}}",
        label=largest_invalid,
    )


def with_empty_rows_ignored(labels: RowLabels, included: Array) -> RowLabels:
    """The labels; a row of which no class is included counts as ignored."""
    empty = included == 0
    return RowLabels(
        jnp.where(empty, -1, labels.class_index),
        labels.counted & ~empty,
        labels.valid | empty,
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
    return jnp.broadcast_to(count, reduced_shape(shape, axes))


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
    included: Array | None = None,
    classes: int = 1,
    *,
    class_weight: Array | None = None,
    label_smoothing: Array | None = None,
    **per_row: Any,
) -> RowOptions:
    """Options of a loss of the given shape, one entry for each of its rows.

    class_weight is of the classes that this device holds; of `classes` in all, so many
    are included as `included` says.
    """
    label_weight = uniform_share = None
    if class_weight is not None and labels is not None:
        names = axes.mesh_names if axes else ()
        label_weight = _weight_of_label(class_weight, labels.class_index, names)
        # A label that is no class has no weight, but its loss is NaN.
        label_weight = jnp.where(labels.valid, label_weight, 1)
    if label_smoothing is not None and included is not None:
        count = jnp.maximum(included, 1).astype(label_smoothing.dtype)
        uniform_share = label_smoothing / (count * uniform_unit(classes))
    spread = {
        "label_smoothing": label_smoothing,
        "uniform_share": uniform_share,
        **per_row,
    }
    return RowOptions(
        label_weight=label_weight,
        **{
            name: v if v is None else jnp.broadcast_to(v, shape)
            for name, v in spread.items()
        },
    )


def uniform_unit(classes: int) -> float:
    """What the weights in uniform_nll are multiplied by before the sum, a power of 2 of
    about 1/classes: a sum of logits near the largest float would overflow."""
    return 0.5 ** (max(classes, 1) - 1).bit_length()


def _weight_of_label(class_weight, class_index, mesh_names):
    index, found = local_index(class_index, len(class_weight), mesh_names)
    return device_sum(jnp.where(found, entries_at(class_weight, index), 0), mesh_names)


# With class weights w, smoothing eps over C included classes, sample weight v, and the
# focal factor of gamma,
#     loss = v ((1 - eps) w_y (1 - p_y)^gamma nll
#               + (eps / C) sum_c w_c (-log p_c) + z_loss lse^2)
def combined_terms(
    terms: RowTerms, counted: Array | None, options: RowOptions
) -> Array:
    """The loss of every row; 0 where it is not counted."""
    loss = terms.nll
    if any(v is not None for v in options):
        loss = _with_options(terms, options)
    return loss if counted is None else jnp.where(counted, loss, 0)


# Computed again in the backward pass: that costs less than to keep every step of it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _with_options(terms: RowTerms, options: RowOptions) -> Array:
    loss = terms.nll
    if options.focal_gamma is not None:
        loss = focal(loss, options.focal_gamma)
    if options.label_weight is not None:
        loss = weighted(options.label_weight, loss)
    if options.label_smoothing is not None:
        loss = times_loss(1 - options.label_smoothing, loss)
        if terms.uniform_nll is not None:
            loss = loss + times_loss(options.uniform_share, terms.uniform_nll)
    if options.z_loss is not None:
        loss = loss + times_loss(options.z_loss, _square(terms.logsumexp))
    if options.sample_weight is not None:
        loss = weighted(options.sample_weight, loss)
    return loss


def loss_metrics(
    terms: RowTerms, counted: Array | None, z_loss: Array | None
) -> LossMetrics:
    """Of terms that have entropy and top_label."""
    if counted is not None:
        top_label = jnp.where(counted, terms.top_label, -1)
        terms = jax.tree.map(lambda v: jnp.where(counted, v, 0), terms)
        terms = terms._replace(top_label=top_label)
    lse = terms.logsumexp
    z = jnp.zeros_like(lse) if z_loss is None else times_loss(z_loss, lse * lse)
    metrics = LossMetrics(terms.nll, lse, z, terms.entropy, terms.top_label)
    return jax.lax.stop_gradient(metrics)


def reduced_loss(
    terms: RowTerms, counted: Array | None, options: RowOptions, reduction: str
) -> Array:
    """The sum, the weighted mean, or the loss of every row."""
    if reduction == "mean":
        options, divisor = options_of_mean(options, counted, terms.nll)
        return mean_loss(jnp.sum(combined_terms(terms, counted, options)), divisor)
    loss = combined_terms(terms, counted, options)
    return loss if reduction == "none" else jnp.sum(loss)


def options_of_mean(
    options: RowOptions, counted: Array | None, like: Array
) -> tuple[RowOptions, Array]:
    """The options of a loss that is summed, and then divided by the number returned."""
    divisor, ratio = mean_divisor(options, counted, like)
    if ratio is not None and options.z_loss is not None:
        options = options._replace(z_loss=options.z_loss * ratio)
    return options, divisor


def mean_divisor(
    options: RowOptions,
    counted: Array | None,
    like: Array,
    total: Callable[[Array], Array] = jnp.sum,
) -> tuple[Array, Array | None]:
    """The sum of the rows' weights, and with class weights what z_loss is multiplied
    by. They do not rescale it: in a mean its own divisor is that of sample weights."""
    divisor = total(row_weight(options, counted, like))
    if options.label_weight is None or options.z_loss is None:
        return divisor, None
    of_z = total(row_weight(options._replace(label_weight=None), counted, like))
    divisor = jnp.where(divisor == 0, of_z, divisor)
    return divisor, divisor / jnp.where(of_z == 0, 1, of_z)


def row_weight(options: RowOptions, counted: Array | None, like: Array) -> Array:
    """The weight of every row in a mean: v w_y, or v for label probabilities."""
    weight = jnp.ones_like(like)
    for factor in (options.label_weight, options.sample_weight):
        weight = weight if factor is None else weight * factor
    return weight if counted is None else jnp.where(counted, weight, 0)


@jax.custom_jvp
def times_loss(weight: Array, loss: Array) -> Array:
    """weight * loss with 0 * inf = 0. An infinite loss has derivative 0 in the weight:
    the weights are shared, and one such row would fill their gradient with infinity."""
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)


rule_from_partials(
    times_loss,
    lambda weight, loss: zero_if_infinite(loss),
    lambda weight, loss: weight,
)


@jax.custom_jvp
def weighted(weight: Array, loss: Array) -> Array:
    """weight * loss, and 0 where the weight is 0, whatever the loss: NaN too. The
    derivative in the weight is the loss there as everywhere."""
    return jnp.where(weight == 0, 0, weight * loss)


@weighted.defjvp
def _weighted_jvp(primals, tangents):
    (weight, loss), (weight_dot, loss_dot) = primals, tangents
    finite = zero_if_infinite(loss)
    loss_dot = jnp.where(weight == 0, 0, loss_dot)
    return weighted(*primals), product(weight_dot, finite) + product(loss_dot, weight)


# f = q^gamma nll with q = 1 - p = -expm1(-nll), which keeps its digits where p rounds
# to 1. With r = nll / q, which is 1 at nll = 0,
#     df/dnll = q^gamma (1 + gamma p r)        df/dgamma = f log q
# T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017.
@jax.custom_jvp
def focal(nll: Array, gamma: Array) -> Array:
    """(1 - p)^gamma nll with nll = -log p."""
    return _power_of_rest(nll, gamma) * nll


def _power_of_rest(nll, gamma):
    rest = -jnp.expm1(-nll)
    some = jnp.where(rest == 0, 1, rest)
    return jnp.where(rest == 0, jnp.where(gamma == 0, 1, 0), some**gamma)


def _slope_of_focal(nll, gamma):
    tiny = nll < jnp.finfo(nll.dtype).tiny
    some = jnp.where(tiny, 1, nll)
    # p r, which is 0 where the loss is infinite.
    p_r = zero_if_infinite(some) / jnp.expm1(some)
    return _power_of_rest(nll, gamma) * (1 + gamma * jnp.where(tiny, 1, p_r))


def _log_of_rest(nll, gamma):
    rest = -jnp.expm1(-nll)
    finite = zero_if_infinite(nll)
    log_rest = jnp.log(jnp.where(rest == 0, 1, rest))
    return _power_of_rest(nll, gamma) * finite * log_rest


rule_from_partials(focal, _slope_of_focal, _log_of_rest)


@jax.custom_jvp
def _square(v: Array) -> Array:
    return v * v


rule_from_partials(_square, lambda v: 2 * jnp.where(jnp.isinf(v * v), 0, v))


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
    finite_mean = zero_if_infinite(mean)
    return mean, share * (total_dot - finite_mean * weight_dot)
