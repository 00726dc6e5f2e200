"""The rule behind the losses of a linear head, which never holds its N x V logits.

`linear_terms` takes hidden states h (N, D) and the head's weights to a few numbers per
token. The vocabulary passes by in chunks of C classes, whose logits x = h w + b live
only while their chunk does. The summary of a chunk merges with that of the chunks
before it, without a digit lost, and what follows from the whole is the code of the
losses of given logits.

The forward pass is one matrix product; the backward pass recomputes the chunk's logits,
and with the cotangent dx of the logits needs two more, dh += dx w and dw = dx^T h.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.logits import Logits, nan_where
from jaxsoft._core.mesh import device_sum, local_index
from jaxsoft._linear.backward import RowCotangents, head_and_row_cotangents
from jaxsoft._linear.chunks import Tokens, column, has_narrow_range, is_counted
from jaxsoft._linear.forward import AXES, sums_of_vocabulary
from jaxsoft._losses.nll import (
    label_cotangents,
    scale_and_label_entry,
    temperature_cotangent,
    terms_of_label,
)
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import without_nothing
from jaxsoft._row import Row


def row_of(summary, tokens):
    """What is known of the tokens' logits without having them."""
    nothing: Any = None
    logits = Logits(nothing, None, tokens.temperature)
    return Row(AXES, logits, summary.m, summary.s)


# dz of the first three terms is that of given logits (`nll`). With the cotangent a of
# the entropy, and U = -sum_i p_i d_i,
#     t dz_i = ... - a p_i (d_i + U)        t dt = ... + a sum_i p_i (d_i + U)^2
# dz reaches the logits, and through them all else, by the transpose of what made z.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_terms(hidden, head, tokens, plan):
    """RowTerms of hidden (N, D) under a Head, for Tokens and a VocabularyPlan: (N,),
    and for K labels each the nll (N, K)."""
    return _plain(hidden, head, tokens, plan)[0]


def _plain(hidden, head, tokens, plan, with_frozen=False):
    several = tokens.labels.class_index.ndim > 1
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, plan)
    sums = sums_of_vocabulary(hidden, head, tokens, plan, with_frozen)
    summary = without_nothing(sums.summary)
    row, counted = row_of(summary, tokens), is_counted(tokens.labels)
    terms = terms_of_label(row, summary, tokens.labels, plan.asked, counted)
    of_labels = terms.nll if several else terms.nll[:, 0]
    terms = jax.tree.map(lambda v: v[:, 0], terms)._replace(nll=of_labels)
    return terms, (summary._replace(top=None), sums.frozen)


def _fwd(hidden, head, tokens, plan):
    """The residuals; with a frozen head they hold the gradient's sums already, and the
    backward pass sees no logits. Then two matrix products remain."""
    frozen = not any(leaf.perturbed for leaf in jax.tree.leaves(head))
    frozen = frozen and not plan.entropy_moves and head.uniform_weight is None
    hidden, head, tokens = jax.tree.map(lambda v: v.value, (hidden, head, tokens))
    factors_dtype = jnp.promote_types(hidden.dtype, head.weight.dtype)
    frozen = frozen and not has_narrow_range(factors_dtype)
    frozen = frozen and tokens.labels.class_index.ndim == 1
    terms, kept = _plain(hidden, head, tokens, plan, with_frozen=frozen)
    return terms, (hidden, head, tokens, kept)


def pullback_of_terms(plan, residuals, cotangents):
    hidden, head, tokens, (summary, frozen) = residuals
    several = tokens.labels.class_index.ndim > 1
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, plan)
    row = row_of(summary, tokens)
    g, h, k, a = _cotangents_of_rows(row, hidden, tokens, cotangents, plan)
    if several:
        scale = product(h, row.per_t / (1 + row.s))
        of_rows = RowCotangents(summary, scale, None, g, k, a)
    else:
        scales = scale_and_label_entry(row, summary, g, h)
        of_rows = RowCotangents(summary, *scales, None, k, a)
    variance = dhead = None
    if frozen is not None:
        dhidden = _frozen_backward(head, tokens, frozen, of_rows, plan)
    else:
        (dhidden, variance), dhead = head_and_row_cotangents(
            hidden, head, tokens, of_rows, plan
        )
        if head.softcap is not None:
            dhead = dhead._replace(softcap=dhead.softcap.astype(head.softcap.dtype))
    dhidden = device_sum(dhidden, plan.mesh_names)  # in float32
    dhidden = dhidden.astype(hidden.dtype)
    dtokens = None
    dtemperature = temperature_cotangent(row, summary, g, h, k)
    if dtemperature is not None:
        if a is not None:
            variance = device_sum(variance, plan.mesh_names)
            dtemperature = dtemperature + product(a, variance * row.sign * row.per_t)
        dtokens = Tokens(None, jnp.squeeze(dtemperature, 1), None)
    return dhidden, dhead, dtokens


linear_terms.defvjp(_fwd, pullback_of_terms, symbolic_zeros=True)


def _cotangents_of_rows(row, hidden, tokens, cotangents, plan):
    """Those of nll, logsumexp, uniform_nll and entropy; (N, 1), of K labels (N, K)."""
    cotangents = jax.tree.map(
        column, _materialised(cotangents._replace(top_label=None))
    )
    counted = is_counted(tokens.labels)
    g, h, k = label_cotangents(row, tokens.labels, cotangents, counted)
    a = jnp.where(counted, cotangents.entropy, 0) if plan.entropy_moves else None
    # The products of the backward pass see no infinity and no NaN of a hidden state,
    # which 0 times would be NaN in the weights. A token that has one, and a cotangent
    # that is not 0, gets NaN here.
    broken = ~jnp.all(jnp.isfinite(hidden), 1, keepdims=True)
    factor = 1 + nan_where(broken, row.s.dtype)
    return jax.tree.map(lambda v: product(v, factor), (g, h, k, a))


def _materialised(cotangents):
    def zeros_if_symbolic(c: Any) -> Any:
        if not isinstance(c, SymbolicZero):
            return c
        aval: Any = c.aval
        return jnp.zeros(aval.shape, aval.dtype)

    return jax.tree.map(
        zeros_if_symbolic, cotangents, is_leaf=lambda c: isinstance(c, SymbolicZero)
    )


# dh = sum over all classes but the label of scale e_j kappa_j w_j, and for the label
# its own dz kappa_y w_y: again nothing cancels.
def _frozen_backward(head, tokens, frozen, of_rows, plan):
    scale, at_label = of_rows.scale, of_rows.at_label
    index = tokens.labels.class_index[:, 0]
    label_weight = jnp.take(head.weight, jnp.maximum(index, 0), axis=plan.vocab_axis)
    if plan.vocab_axis == 1:
        label_weight = label_weight.T
    label_weight = frozen.label_slope * label_weight.astype(scale.dtype)
    at_label = jnp.where(index[:, None] < 0, 0, at_label)
    return product(scale, frozen.e_weight) + product(at_label, label_weight)


def _with_local_labels(tokens, head, plan):
    """The labels as indices into this device's classes; -1 for those of others."""
    if not plan.mesh_names:
        return tokens
    classes = head.weight.shape[plan.vocab_axis]
    index, found = local_index(tokens.labels.class_index, classes, plan.mesh_names)
    index = jnp.where(found, index, -1)
    return tokens._replace(labels=tokens.labels._replace(class_index=index))
