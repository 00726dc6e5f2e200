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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits, exact_at_maximum, shifted, size_of
from jaxsoft._core.mesh import (
    Axes,
    device_sum,
    first_class,
    local_index,
    varying,
)
from jaxsoft._linear.chunks import (
    Head,
    Tokens,
    assembled,
    chunk_at,
    chunk_count,
    chunk_label,
    chunk_mask,
    column,
    has_narrow_range,
    head_logits,
    matrix_product,
    narrowed,
    over_counted_tokens,
)
from jaxsoft._losses.nll import (
    as_seen,
    included,
    label_cotangents,
    label_riders,
    scale_and_label_entry,
    temperature_cotangent,
    terms_of_label,
    uniform_cotangents,
)
from jaxsoft._losses.per_row import RowTerms
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.merge import Summary, merge
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import over_devices, summarize, without_nothing
from jaxsoft._row import Row

AXES = Axes((1,))


class LinearTerms(NamedTuple):
    """Per token, (N,); the first three as in `per_row.RowTerms`."""

    nll: Array
    logsumexp: Array
    uniform_nll: Array | None
    entropy: Array | None
    top_label: Array | None


class _Sums(NamedTuple):
    """What the forward pass carries from chunk to chunk; (N, 1)."""

    summary: Summary
    top_label: Array | None
    frozen: Any = None  # _FrozenSums


class _FrozenSums(NamedTuple):
    """With kappa = dz/dx, the gradient of the hidden states under a frozen head."""

    e_weight: Array  # (N, D), sum of e kappa w over all classes but the label
    label_slope: Array  # (N, 1), kappa at the label


def _row(summary, tokens):
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
    """LinearTerms of hidden (N, D) under a Head, for Tokens and a VocabularyPlan.

    The hidden states of ignored tokens must be 0."""
    return _plain(hidden, head, tokens, plan)[0]


def _plain(hidden, head, tokens, plan, with_frozen=False):
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, plan)
    sums = _forward(hidden, head, tokens, plan, with_frozen)
    if plan.mesh_names:
        sums = _over_devices(sums, head, plan)
    summary = without_nothing(sums.summary)
    row = _row(summary, tokens)
    terms = terms_of_label(row, summary, tokens.labels)
    entropy = None
    if plan.with_entropy:
        entropy = jnp.log1p(row.s) - summary.e_d / (1 + row.s)
    terms = LinearTerms(*terms, entropy, sums.top_label)
    terms = jax.tree.map(lambda term: jnp.squeeze(term, 1), terms)
    return terms, (summary, sums.frozen)


def _fwd(hidden, head, tokens, plan):
    """The residuals; with a frozen head they hold the gradient's sums already, and the
    backward pass sees no logits. Then two matrix products remain."""
    frozen = not any(leaf.perturbed for leaf in jax.tree.leaves(head))
    frozen = frozen and not plan.with_entropy and head.uniform_weight is None
    hidden, head, tokens = jax.tree.map(lambda v: v.value, (hidden, head, tokens))
    factors_dtype = jnp.promote_types(hidden.dtype, head.weight.dtype)
    frozen = frozen and not has_narrow_range(factors_dtype)
    terms, kept = _plain(hidden, head, tokens, plan, with_frozen=frozen)
    return terms, (hidden, head, tokens, kept)


def _bwd(plan, residuals, cotangents):
    hidden, head, tokens, (summary, frozen) = residuals
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, plan)
    row = _row(summary, tokens)
    g, h, k, a, _ = jax.tree.map(column, _materialised(cotangents))
    g, h, k = label_cotangents(row, tokens.labels, RowTerms(g, h, k))
    scales = scale_and_label_entry(row, summary, g, h)
    variance = dhead = None
    if frozen is None:
        of_rows = _RowCotangents(summary, *scales, k, a)
        (dhidden, variance), dhead = _backward(hidden, head, tokens, of_rows, plan)
    else:
        dhidden = _frozen_backward(head, tokens, frozen, scales, plan)
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


linear_terms.defvjp(_fwd, _bwd, symbolic_zeros=True)


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
def _frozen_backward(head, tokens, frozen, scales, plan):
    scale, at_label = scales
    index = tokens.labels.class_index[:, 0]
    label_weight = jnp.take(head.weight, jnp.maximum(index, 0), axis=plan.vocab_axis)
    if plan.vocab_axis == 1:
        label_weight = label_weight.T
    label_weight = frozen.label_slope * label_weight.astype(scale.dtype)
    at_label = jnp.where(index[:, None] < 0, 0, at_label)
    return product(scale, frozen.e_weight) + product(at_label, label_weight)


class _RowCotangents(NamedTuple):
    summary: Summary
    scale: Array  # dz over e_c, at all classes but the label
    at_label: Array  # dz at the label
    k: Array | None
    a: Array | None


def _forward(hidden, head, tokens, plan, with_frozen):
    """The _Sums over the whole vocabulary."""
    start = _no_sums(hidden, head, tokens, plan, with_frozen)

    def of_rows(rows):
        return _forward_of_rows(rows, head, plan), None

    rows = hidden, tokens, start
    if not plan.may_skip:
        return of_rows(rows)[0]
    return over_counted_tokens(of_rows, tokens.labels.counted, rows, start)[0]


def _no_sums(hidden, head, tokens, plan, with_frozen):
    dtype = accumulation_dtype(jnp.promote_types(hidden.dtype, head.weight.dtype))
    # Zeros made of the rows, so that under shard_map they vary as the rows do.
    zero = jnp.zeros_like(tokens.labels.class_index, dtype)
    zero = varying(zero, plan.mesh_names)
    with_e_d = plan.with_entropy or tokens.temperature is not None
    coefficients = 0 if head.uniform_weight is None else 1
    temperature = size_of(tokens.temperature)
    summary = Summary(
        m=zero - jnp.inf,
        s=zero - 1,
        temperature=None if temperature is None else zero + temperature,
        e_d=zero if with_e_d else None,
        logit=zero,
        total=(zero,) * coefficients,
        below=(zero,) * coefficients,
    )
    frozen = None
    if with_frozen:
        frozen = _FrozenSums(jnp.zeros_like(hidden, dtype) + zero, zero)
    top_label = zero.astype(jnp.int32) if plan.with_top_label else None
    return _Sums(summary, top_label, frozen)


def _logits_of(hidden, tokens, chunk, softcap, plan):
    """The logits of a chunk as the passes see them, and what takes a cotangent of these
    to that of h w + b and of the cap."""
    x = head_logits(hidden, chunk, plan.vocab_axis)
    logits = Logits(x, chunk_mask(chunk, tokens), tokens.temperature)
    return as_seen(logits, softcap)


def _forward_of_rows(rows, head, plan):
    hidden, tokens, start = rows

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(sums, position):
        chunk = chunk_at(position, head, plan)
        logits, to_given = _logits_of(hidden, tokens, chunk, head.softcap, plan)
        label = chunk_label(chunk, tokens)
        riders = label_riders(label, chunk.uniform_weight, logits, plan.with_entropy)
        summary = summarize(AXES, logits, riders)
        summary = summary._replace(temperature=sums.summary.temperature)
        top_label = sums.top_label
        if top_label is not None:
            z = Row(AXES, logits, summary.m, summary.s).z
            top = jnp.argmax(z, 1, keepdims=True).astype(jnp.int32)
            top = top + chunk.classes[:, :1]
            top_label = jnp.where(summary.m > sums.summary.m, top, top_label)
        frozen = sums.frozen
        if frozen is not None:
            row = Row(AXES, logits, summary.m, summary.s)
            of_chunk = _frozen_sums(row, label, hidden, chunk, to_given, plan)
            frozen = _merged_frozen(sums.summary, frozen, row, of_chunk)
        merged = merge(sums.summary, summary, shifted)
        return _Sums(merged, top_label, frozen), None

    positions = jnp.arange(chunk_count(head, plan), dtype=jnp.int32)
    return jax.lax.scan(add_chunk, start, positions)[0]


def _frozen_sums(row, label, hidden, chunk, to_given, plan):
    ones, zeros = jnp.ones_like(row.m), jnp.zeros_like(row.m)
    e = to_classes(AXES, row.logits, row.m, ones, label, zeros)
    slope = to_classes(AXES, row.logits, row.m, zeros, label, ones)
    e, slope = to_given(e)[0], to_given(slope)[0]
    factors = e.astype(jnp.promote_types(hidden.dtype, chunk.weight.dtype))
    e_weight = matrix_product(factors, chunk.weight, (1, plan.vocab_axis), e.dtype)
    return _FrozenSums(e_weight, jnp.sum(slope, 1, keepdims=True))


def _merged_frozen(before, frozen, row, of_chunk):
    m = jnp.maximum(before.m, row.m)
    to_before, to_chunk = (jnp.exp(shifted(v, m, row.t)) for v in (before.m, row.m))
    e_weight = to_before * frozen.e_weight + to_chunk * of_chunk.e_weight
    return _FrozenSums(e_weight, frozen.label_slope + of_chunk.label_slope)


def _with_local_labels(tokens, head, plan):
    """The labels as indices into this device's classes; -1 for those of others."""
    if not plan.mesh_names:
        return tokens
    classes = head.weight.shape[plan.vocab_axis]
    index, found = local_index(tokens.labels.class_index, classes, plan.mesh_names)
    index = jnp.where(found, index, -1)
    return tokens._replace(labels=tokens.labels._replace(class_index=index))


def _over_devices(sums, head, plan):
    """The sums of all classes from those of each device. Those of a frozen head stay
    apart."""
    names, here = plan.mesh_names, sums.summary
    summary = over_devices(
        names, without_nothing(here)._replace(temperature=here.temperature)
    )
    top_label = sums.top_label
    if top_label is not None:
        first = first_class(head.weight.shape[plan.vocab_axis], names)
        last = jnp.iinfo(top_label.dtype).max
        top_label = jnp.where(here.m == summary.m, first + top_label, last)
        top_label = jax.lax.pmin(top_label, names)
    frozen = sums.frozen
    if frozen is not None:
        e = jnp.exp(shifted(here.m, summary.m, here.temperature))
        frozen = frozen._replace(e_weight=e * frozen.e_weight)
    return _Sums(summary, top_label, frozen)


def _backward(hidden, head, tokens, of_rows, plan):
    """Cotangents of hidden and of the head, and sum_i p_i (d_i + U)^2 of each row."""
    # The sum over devices comes before the rounding.
    dtype = of_rows.scale.dtype if plan.mesh_names else hidden.dtype

    def of_tokens(rows):
        (dhidden, variance), dhead = _backward_of_rows(rows, head, plan)
        return (dhidden.astype(dtype), variance), dhead

    rows = hidden, tokens, of_rows
    if not plan.may_skip:
        return of_tokens(rows)
    zero = varying(jnp.zeros_like(of_rows.scale), plan.mesh_names)
    nothing = jnp.zeros_like(hidden, dtype) + zero.astype(dtype), zero
    return over_counted_tokens(of_tokens, tokens.labels.counted, rows, nothing)


def _backward_of_rows(rows, head: Any, plan):
    hidden, tokens, of_rows = rows
    zero = varying(jnp.zeros_like(of_rows.scale), plan.mesh_names)

    # Transposition for forward mode would otherwise store the factors of dz, N x V.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(carry, position):
        sums, dsoftcap = carry
        chunk = chunk_at(position, head, plan)
        dchunk, more = _backward_of_chunk(
            hidden, tokens, of_rows, chunk, head.softcap, plan
        )
        if dsoftcap is not None:
            dsoftcap = dsoftcap + dchunk.softcap
        dweight = dchunk.weight.astype(head.weight.dtype)
        dchunk = dchunk._replace(weight=dweight, softcap=None)
        return (jax.tree.map(jnp.add, sums, more), dsoftcap), dchunk

    sums = jnp.zeros_like(hidden, zero.dtype) + zero, zero
    dsoftcap: Any = None if head.softcap is None else jnp.sum(zero)
    positions = jnp.arange(chunk_count(head, plan), dtype=jnp.int32)
    carry, dchunks = jax.lax.scan(add_chunk, (sums, dsoftcap), positions)
    sums, dsoftcap = carry
    return sums, assembled(dchunks, head, plan)._replace(softcap=dsoftcap)


def _backward_of_chunk(hidden, tokens, of_rows, chunk, softcap, plan):
    summary, scale, at_label, k, a = of_rows
    logits, to_given = _logits_of(hidden, tokens, chunk, softcap, plan)
    row = Row(AXES, logits, summary.m, summary.s)
    label = chunk_label(chunk, tokens)
    dx = to_classes(
        AXES,
        logits,
        row.m,
        scale,
        label,
        at_label,
        overwrites_x=k is None and a is None,
    )
    variance, dspread_weight = jnp.zeros_like(row.m), None
    if k is not None:
        w = included(chunk.uniform_weight, row)
        dz, dw = uniform_cotangents(row, w, summary, k)
        dx = dx + row.to_x(dz)
        dspread_weight = jnp.sum(dw, 0)
    if a is not None:
        p, u = row.p, -summary.e_d / (1 + row.s)
        surprise = jnp.where(p == 0, 0, exact_at_maximum(row.d, row.s) + u)
        dx = dx + row.to_x(product(a, -p * surprise * row.per_t))
        variance = jnp.sum(p * surprise**2, 1, keepdims=True)
    dx, dsoftcap = to_given(dx)

    factors = narrowed(dx, jnp.promote_types(hidden.dtype, chunk.weight.dtype))
    classes_axis = plan.vocab_axis
    dhidden = matrix_product(factors, chunk.weight, (1, classes_axis), dx.dtype)
    if classes_axis == 0:
        dweight = matrix_product(factors, hidden, (0, 0), dx.dtype)
    else:
        dweight = matrix_product(hidden, factors, (0, 0), dx.dtype)
    dbias = None if chunk.bias is None else jnp.sum(dx, 0)
    return Head(dweight, dbias, dspread_weight, dsoftcap), (dhidden, variance)
