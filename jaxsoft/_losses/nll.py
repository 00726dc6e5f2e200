"""The rules behind the losses of given logits.

They take logits to three numbers a row, from which every option of `cross_entropy` is
made in `per_row`. With targets q, which are the indicator of the label or
probabilities, and weights w of the classes,

    -log p_c    = log(1 + s) - d_c
    nll         = sum_c q_c (-log p_c)
    logsumexp   = m/t + log(1 + s)
    uniform_nll = sum_c w_c (-log p_c)      over the included classes

The rules are there for the label's entry of the gradient, p_y - 1: autodiff rounds it
to 0 when the model is sure. They also save no second array of the size of the logits,
keep NaN out of ignored rows, and put it into rows whose label is no class.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import accumulation_dtype, cast
from jaxsoft._core.logits import (
    Logits,
    exact_at_maximum,
    is_hard,
    log_softmax_cotangent,
    nan_where,
    over_temperature,
    shifted,
    zero_if_infinite,
)
from jaxsoft._core.mesh import broadcast_like, reshard_like
from jaxsoft._elementwise import capped
from jaxsoft._losses.per_row import RowLabels, RowTerms
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.merge import Summary
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import Riders
from jaxsoft._row import Row, row_rule, summarized


# Of a label y, with cotangents g, h, k of the three terms, W = sum_c w_c and
# U = -sum_c p_c d_c,
#     t dz_c = g (p_c - 1_{c=y}) + h p_c + k (W p_c - w_c)
#     t dt   = g (d_y + U) + h (U - m/t) + k sum_c w_c (d_c + U)
#     dw_c   = sum over rows of k (-log p_c)
# At the label nothing is subtracted from a p_y that is nearly 1:
#     p_y - 1 = (e_y - 1 - s) / (1 + s)
# where e_y - 1 is exactly 0 at the maximum, and both terms are negative elsewhere.
def _label_value(axes, logits, labels, w, softcap, asked):
    seen, _ = as_seen(logits, softcap)
    riders = label_riders(labels.class_index, w, logits, asked)
    row, summary = summarized(axes, seen, riders)
    terms = terms_of_label(row, summary, labels, asked)
    return terms, summary._replace(total=(), top=None)


def _label_pullback(axes, logits, labels, w, softcap, _, summary, cotangents):
    # Two terms of a gradient are rounded to half precision together.
    seen, to_given = as_seen(logits, softcap, w is not None)
    row = Row(axes, seen, summary.m, summary.s)
    g, h, k = label_cotangents(row, labels, cotangents)
    scale, at_label = scale_and_label_entry(row, summary, g, h)
    dx = to_classes(axes, seen, row.m, scale, labels.class_index, at_label)
    dw = None
    if w is not None:
        weights = included(w, row)
        summary = summary._replace(total=(row.sum(weights),))
        dz, dweights = uniform_cotangents(row, weights, summary, k)
        dx, dw = dx + row.to_x(dz), _sum_to_shape(dweights, w)
    dx, dsoftcap = to_given(dx)
    dt = temperature_cotangent(row, summary, g, h, k)
    return dx, dt, None, dw, dsoftcap, None


label_terms = row_rule(_label_value, _label_pullback)


# Of label probabilities q with Q = sum_c q_c,
#     t dz_c = g (Q p_c - q_c) + ...      the rest as above; see log_softmax_cotangent
#     t dt   = g sum_c q_c (d_c + U) + ...
#     dq_c   = g (-log p_c)
def _probability_value(axes, logits, targets, w, softcap, asked):
    q = _coefficients(targets, logits.where)
    seen, _ = as_seen(logits, softcap)
    riders = label_riders(None, w, logits, asked)
    riders = dataclasses.replace(
        riders, coefficients=(q, *riders.coefficients), values=q
    )
    row, summary = summarized(axes, seen, riders)
    nll = nll_of_coefficients(row, summary, 0)
    uniform_nll = None if w is None else nll_of_coefficients(row, summary, 1)
    terms = RowTerms(nll, logsumexp_over_t(row), uniform_nll)
    terms = _with_metrics(terms, row, summary, asked)
    return terms, summary._replace(top=None)


def _probability_pullback(axes, logits, targets, w, softcap, _, summary, cotangents):
    q, to_targets = jax.vjp(lambda v: _coefficients(v, logits.where), targets)
    seen, to_given = as_seen(logits, softcap)
    row = Row(axes, seen, summary.m, summary.s)
    g, h, k = _of_rows(~jnp.isneginf(row.m), cotangents[:3])
    d = row.d
    dz = -log_softmax_cotangent(q, d, row.s, summary.value, summary.others)
    dz = product(g, dz * row.per_t) + product(h, row.p * row.per_t)
    dtargets = to_targets(product(g, zero_if_infinite(jnp.log1p(row.s) - d)))[0]
    dw = None
    if w is not None:
        weights = included(w, row)
        of_uniform, dweights = uniform_cotangents(row, weights, summary, k)
        dz, dw = dz + of_uniform, _sum_to_shape(dweights, w)
    dx, dsoftcap = to_given(row.to_x(dz))
    dt = temperature_cotangent(row, summary, g, h, k)
    return dx, dt, dtargets, dw, dsoftcap, None


probability_terms = row_rule(_probability_value, _probability_pullback)


def as_seen(
    logits: Logits,
    softcap: Array | None,
    is_wide: bool = False,
) -> tuple[Logits, Callable[[Array], tuple[Array, Array | None]]]:
    """The logits as the passes see them, under their cap, and what takes a cotangent of
    these to those of x and of the cap. Wide, they are in the dtype of sums."""

    def seen(x, softcap):
        z = cast(x, accumulation_dtype(x.dtype))
        return z if softcap is None else capped(z, softcap)

    if softcap is None and not is_wide:
        return logits, lambda dx: (dx, None)
    x, to_given = jax.vjp(seen, logits.x, softcap)
    return logits._replace(x=x), to_given


def _of_rows(which: Array, cotangents: Any) -> Any:
    """The cotangents of some rows; those of the others are 0."""
    return jax.tree.map(lambda c: jnp.where(which, c, 0), cotangents)


def _sum_to_shape(dweights: Array, w: Array) -> Array:
    """The cotangent of shared weights. The transpose of their broadcast would gather
    the rows of a mesh with explicit axes before it adds them."""
    shared = [i for i, n in enumerate(w.shape) if n != dweights.shape[i]]
    return jnp.sum(dweights, shared, keepdims=True).astype(w.dtype)


class WeightedProbabilities(NamedTuple):
    """Label probabilities, and class weights that broadcast to them."""

    q: Array
    class_weight: Array | None


def _coefficients(targets: WeightedProbabilities, where: Array | None) -> Array:
    """q_c w_c, without the NaN that the probability of a masked class may be. Above 0
    it stays: the loss is infinite."""
    q = targets.q
    if where is not None:
        q = jnp.where(broadcast_like(where, q) | (q > 0), q, 0)
    return q if targets.class_weight is None else q * targets.class_weight


# What follows is of one number per row, and the same for logits that are given and for
# those of a linear head, which are there a chunk of classes at a time.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Asked:
    """What is wanted beside the first three terms. In the rules here it has no
    derivative."""

    entropy: bool = False
    top_label: bool = False


METRICS = Asked(entropy=True, top_label=True)


def label_riders(
    labels: Array | None, w: Array | None, logits: Logits, asked: Asked
) -> Riders:
    """What rides along with a summary, for the terms of a row and their derivatives."""
    if w is not None and logits.where is not None:
        w = jnp.where(logits.where, w, 0)
    return Riders(
        labels=labels,
        coefficients=() if w is None else (w,),
        with_e_d=asked.entropy or logits.temperature is not None,
        with_top=asked.top_label,
    )


def terms_of_label(
    row: Row,
    summary: Summary,
    labels: RowLabels,
    asked: Asked,
    counted: Array | None = None,
) -> RowTerms:
    """With several labels to a row, `counted` says which rows count."""
    counted = labels.counted if counted is None else counted
    nll = jnp.log1p(row.s) - d_of_label(row, summary)
    nll = nll + nan_where(~labels.valid, nll.dtype)
    uniform_nll = nll_of_coefficients(row, summary, 0) if summary.total else None
    nll = jnp.where(labels.counted, nll, 0)
    terms = RowTerms(None, logsumexp_over_t(row), uniform_nll)
    terms = _of_rows(counted, _with_metrics(terms, row, summary, asked))
    if asked.top_label:
        terms = terms._replace(top_label=jnp.where(counted, terms.top_label, -1))
    return terms._replace(nll=nll)


def _with_metrics(terms, row, summary, asked):
    if asked.entropy:
        entropy = jnp.log1p(row.s) - summary.e_d / (1 + row.s)
        terms = terms._replace(entropy=entropy)
    return terms._replace(top_label=summary.top)


def d_of_label(row: Row, summary: Summary) -> Array:
    return exact_at_maximum(shifted(summary.logit, row.m, row.t), row.s)


def nll_of_coefficients(row: Row, summary: Summary, i: int) -> Array:
    """sum_c q_c (-log p_c) for the coefficients q with number i."""
    total, below = summary.total[i], over_temperature(summary.below[i], row.t)
    return jnp.where(total == 0, 0, total * jnp.log1p(row.s)) - below


def logsumexp_over_t(row: Row) -> Array:
    t = row.t
    if t is None:
        return row.m + jnp.log1p(row.s)
    t = jnp.where(is_hard(t), 0, t)
    return jnp.where(row.m == 0, 0, row.m / t) + jnp.log1p(row.s)


def label_cotangents(
    row: Row,
    labels: RowLabels,
    cotangents: RowTerms,
    counted: Array | None = None,
) -> tuple[Array, Array, Any]:
    """0 into a row that is ignored, or without a logit above -inf; NaN into the whole
    row of an invalid label. For `counted` see `terms_of_label`."""
    counted = labels.counted if counted is None else counted
    is_empty, (g, h, k, *_) = jnp.isneginf(row.m), cotangents
    g = jnp.where(labels.counted & ~is_empty, g, 0)
    h, k = _of_rows(counted & ~is_empty, (h, k))
    factor = 1 + nan_where(~labels.valid, row.s.dtype)
    return product(g, factor), h, k


def scale_and_label_entry(
    row: Row, summary: Summary, g: Array, h: Array
) -> tuple[Array, Array]:
    """dz of all classes but the label, over e_c, and dz of the label."""
    e_label = jnp.exp(d_of_label(row, summary))
    per_total = row.per_t / (1 + row.s)
    at_label = product(g, -(row.s + (1 - e_label)) * per_total)
    return product(g + h, per_total), at_label + product(h, e_label * per_total)


def included(w: Array, row: Row) -> Array:
    """Class weights in the shape of the logits, 0 where a class is masked."""
    z = row.z
    w = reshard_like(jnp.broadcast_to(w.astype(z.dtype), z.shape), z)
    return _unmasked(w, row)


def _unmasked(v: Array, row: Row) -> Array:
    where = row.logits.where
    return v if where is None else jnp.where(broadcast_like(where, v), v, 0)


def uniform_cotangents(
    row: Row, w: Array, summary: Summary, k: Array
) -> tuple[Array, Array]:
    """dz and dw of uniform_nll: k (W p_c - w_c) / t and k (-log p_c).

    Where p_c is above 1/2, the first is made as W (p_c - 1) + (W - w_c).
    """
    d, s, total = row.d, row.s, summary.total[-1]
    e = jnp.exp(d)
    sure = (total - w) * (1 + s) - total * (s + (1 - e))
    dz = jnp.where(e > s + (1 - e), sure, total * e - w * (1 + s))
    dz = product(k, dz * (row.per_t / (1 + s)))
    return dz, _unmasked(product(k, zero_if_infinite(jnp.log1p(s) - d)), row)


def temperature_cotangent(
    row: Row, summary: Summary, g: Array, h: Array, k: Array | None
) -> Array | None:
    if row.t is None:
        return None
    u = -summary.e_d / (1 + row.s)
    m_over_t = zero_if_infinite(row.m) * row.per_t
    dt = product(h, u - zero_if_infinite(m_over_t))
    if summary.logit is not None:
        of_labels = product(g, zero_if_infinite(d_of_label(row, summary) + u))
        dt = dt + _sum_to_shape(of_labels, dt)
    else:
        dt = dt + product(g, _slope_of_coefficients(row, summary, 0, u))
    if k is not None:
        dt = dt + product(k, _slope_of_coefficients(row, summary, -1, u))
    return row.sign * row.over_t(dt)


def _slope_of_coefficients(row, summary, i, u):
    """sum_c q_c (d_c + U)."""
    below = over_temperature(summary.below[i], row.t)
    return zero_if_infinite(below) + summary.total[i] * u
