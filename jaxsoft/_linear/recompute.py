"""The rule behind the losses of a linear head, which never holds its N x V logits.

`linear_terms` takes hidden states h (N, D) and the head's weights to a few numbers per
token. The vocabulary passes by in chunks of C classes, whose logits x = h w + b live
only while their chunk does. A running split (m, s) of `numerics` merges with that of a
chunk (m', s') without a digit lost: for m >= m',

    (m, s) + (m', s') = (m, s + (1 + s') exp((m' - m)/t))

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
from jaxsoft._core.mesh import (
    Axes,
    device_sum,
    first_class,
    local_index,
    varying,
)
from jaxsoft._core.numerics import (
    accumulation_dtype,
    counted_logits,
    exp_below,
    exp_shifted,
    inverse_temperature,
    shifted,
    times_log,
)
from jaxsoft._linear.chunks import (
    Head,
    Tokens,
    assembled,
    chunk_at,
    chunk_count,
    chunk_mask,
    column,
    has_narrow_range,
    head_logits,
    is_label,
    logit_of_label,
    narrowed,
    over_counted_tokens,
    product,
)
from jaxsoft._losses.per_row import times_loss
from jaxsoft._losses.row_terms import (
    included,
    label_cotangent,
    logsumexp_over_temperature,
    logsumexp_slope,
    row_cotangent,
    spread_cotangent,
    times_nll,
)
from jaxsoft._passes.cpu_sums import sum_of_choices
from jaxsoft._passes.max_and_tail import max_and_tail, over_devices


class LinearTerms(NamedTuple):
    """Per token, (N,); nll, logsumexp and spread as in `per_row.RowTerms`."""

    nll: Array
    logsumexp: Array | None
    spread: Array | None
    entropy: Array | None
    top_label: Array | None


class _Sums(NamedTuple):
    """What the forward pass carries from chunk to chunk; (N, 1)."""

    m: Array
    s: Array
    label_logit: Array
    e_d: Any  # sum of e d
    w: Any  # sum of w
    w_d: Any  # sum of w d
    top_label: Any
    frozen: Any = None  # _FrozenSums


class _FrozenSums(NamedTuple):
    """With kappa = dz/dx, the gradient of the hidden states under a frozen head."""

    e_weight: Array  # (N, D), sum of e kappa w over all classes but the label
    label_slope: Array  # (N, 1), kappa at the label


# With cotangents g, h, k, a of nll, logsumexp, spread and entropy, the letters of
# _numerics and _row_terms, and U = -sum_i p_i d_i,
#     t dz_i = g (p_i - 1_{i=y}) + h p_i + k (W p_i - w_i) - a p_i (d_i + U)
#     t dt   = g (d_y + U) + h (U - m/t) + k (sum_i w_i d_i + W U)
#              + a sum_i p_i (d_i + U)^2
# and dz reaches the logits, and through them all else, by the transpose of
# counted_logits.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_terms(hidden, head, tokens, stream):
    """LinearTerms of hidden (N, D) under a Head, for Tokens and a Stream. The hidden
    states of ignored tokens must be 0."""
    return _plain(hidden, head, tokens, stream)[0]


def _plain(hidden, head, tokens, stream, with_frozen=False):
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, stream)
    sums = _forward(hidden, head, tokens, stream, with_frozen)
    if stream.mesh_names:
        sums = _over_devices(sums, tokens.temperature, head, stream)
    m, s, temperature, labels = sums.m, sums.s, tokens.temperature, tokens.labels
    log_total = jnp.log1p(s)
    nll = log_total - shifted(sums.label_logit, m, temperature)
    nll = jnp.where(labels.valid, jnp.where(labels.counted, nll, 0), jnp.nan)
    lse = spread = entropy = None
    u: Any = None if sums.e_d is None else -sums.e_d / (1 + s)
    if stream.with_logsumexp:
        lse = logsumexp_over_temperature(m, s, temperature)
        lse = jnp.where(labels.counted, lse, 0)
    if head.spread_weight is not None:
        spread = jnp.where(sums.w == 0, 0, sums.w * log_total - sums.w_d)
        spread = jnp.where(labels.counted, spread, 0)
    if stream.with_entropy:
        entropy = log_total + u
    terms = LinearTerms(nll, lse, spread, entropy, sums.top_label)
    row_numbers = (m, s, u, sums.label_logit, sums.w, sums.w_d, sums.frozen)
    return jax.tree.map(lambda term: jnp.squeeze(term, 1), terms), row_numbers


def _fwd(hidden, head, tokens, stream):
    """The residuals; with a frozen head they hold the gradient's sums already, and the
    backward pass sees no logits. Then two matrix products remain."""
    frozen = not any(leaf.perturbed for leaf in jax.tree.leaves(head))
    frozen = frozen and not stream.with_entropy and head.spread_weight is None
    hidden, head, tokens = jax.tree.map(lambda v: v.value, (hidden, head, tokens))
    factors_dtype = jnp.promote_types(hidden.dtype, head.weight.dtype)
    frozen = frozen and not has_narrow_range(factors_dtype)
    terms, row_numbers = _plain(hidden, head, tokens, stream, with_frozen=frozen)
    return terms, (hidden, head, tokens, row_numbers)


def _bwd(stream, residuals, cotangents):
    hidden, head, tokens, row_numbers = residuals
    tokens = _with_local_labels(jax.tree.map(column, tokens), head, stream)
    m, s, u, label_logit, w, w_d, frozen = row_numbers
    g, h, k, a, _ = jax.tree.map(column, _materialised(cotangents))
    counted = tokens.labels.counted
    g = row_cotangent(jnp.where(jnp.isneginf(m), 0, g), tokens.labels)
    h = None if h is None else jnp.where(jnp.isneginf(m) | ~counted, 0, h)
    k = None if k is None else jnp.where(counted, k, 0)
    if frozen is None:
        of_rows = _RowCotangents(m, s, u, w, g, h, k, a)
        sums, dhead = _backward(hidden, head, tokens, of_rows, stream)
        dhidden, variance = sums
    else:
        of_rows = _RowCotangents(m, s, u, w, g, h, None, None)
        dhidden = _frozen_backward(head, tokens, label_logit, frozen, of_rows, stream)
        dhead = variance = None
    dhidden = device_sum(dhidden, stream.mesh_names)  # in float32
    dhidden = dhidden.astype(hidden.dtype)
    dtokens = None
    temperature = tokens.temperature
    if temperature is not None:
        d_label = shifted(label_logit, m, temperature)
        dt = g * jnp.where(jnp.isinf(d_label), 0, d_label + u)
        if h is not None:
            dt = dt + h * logsumexp_slope(u, m, temperature)
        if k is not None:
            dt = dt + k * (jnp.where(jnp.isinf(w_d), 0, w_d) + w * u)
        if a is not None:
            dt = dt + a * device_sum(variance, stream.mesh_names)
        dt = jnp.sign(temperature) * inverse_temperature(temperature) * dt
        dtokens = Tokens(None, jnp.squeeze(dt, 1), None)
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


# (1 + s) t dh = sum over j of (g + h) e_j kappa_j w_j but for the label, and
#                (h e_y - g (s + 1 - e_y)) kappa_y w_y for it: again nothing cancels.
def _frozen_backward(head, tokens, label_logit, frozen, of_rows, stream):
    m, s, g, h = of_rows.m, of_rows.s, of_rows.g, of_rows.h
    # A row without a label has no label_logit.
    label_logit = jnp.where(tokens.labels.class_index < 0, -jnp.inf, label_logit)
    e_label = exp_shifted(label_logit, m, tokens.temperature)
    of_others, of_label = g, label_cotangent(g, e_label, s)
    if h is not None:
        of_others, of_label = g + h, of_label + h * e_label
    label = jnp.maximum(tokens.labels.class_index[:, 0], 0)
    label_weight = jnp.take(head.weight, label, axis=stream.vocab_axis)
    if stream.vocab_axis == 1:
        label_weight = label_weight.T
    label_weight = label_weight.astype(m.dtype)
    dhidden = of_others * frozen.e_weight
    dhidden = dhidden + of_label * frozen.label_slope * label_weight
    return dhidden / (1 + s) * inverse_temperature(tokens.temperature)


class _RowCotangents(NamedTuple):
    m: Array
    s: Array
    u: Array | None
    w: Array | None
    g: Array
    h: Array | None
    k: Array | None
    a: Array | None


def _forward(hidden, head, tokens, stream, with_frozen):
    """The _Sums over the whole vocabulary."""
    start = _no_sums(hidden, head, tokens, stream, with_frozen)

    def of_rows(rows):
        return _forward_of_rows(rows, head, stream), None

    rows = hidden, tokens, start
    if not stream.may_skip:
        return of_rows(rows)[0]
    return over_counted_tokens(of_rows, tokens.labels.counted, rows, start)[0]


def _no_sums(hidden, head, tokens, stream, with_frozen):
    dtype = accumulation_dtype(jnp.promote_types(hidden.dtype, head.weight.dtype))
    # Zeros made of the rows, so that under shard_map they vary as the rows do.
    zero = jnp.zeros_like(tokens.labels.class_index, dtype)
    zero = varying(zero, stream.mesh_names)
    with_u = stream.with_entropy or tokens.temperature is not None
    with_w = head.spread_weight is not None
    return _Sums(
        m=zero - jnp.inf,
        s=zero,
        label_logit=zero,
        e_d=zero if with_u else None,
        w=zero if with_w else None,
        w_d=zero if with_w else None,
        top_label=zero.astype(jnp.int32) if stream.with_top_label else None,
        frozen=_FrozenSums(jnp.zeros_like(hidden, dtype) + zero, zero)
        if with_frozen
        else None,
    )


def _forward_of_rows(rows, head, stream):
    hidden, tokens, start = rows
    temperature = tokens.temperature

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(sums, position):
        chunk = chunk_at(position, head, stream)
        x = head_logits(hidden, chunk, stream.vocab_axis)
        mask = chunk_mask(chunk, tokens)
        z, to_logits = jax.vjp(
            lambda x: counted_logits(x, mask, temperature, head.softcap), x
        )
        of_chunk = _sums_of_chunk(z, chunk, mask, tokens, sums)
        if sums.frozen is not None:
            hit = is_label(chunk, tokens)
            e = jnp.where(hit, 0, exp_shifted(z, of_chunk.m, temperature))
            e, slope = to_logits(e)[0], to_logits(hit.astype(z.dtype))[0]
            factors = e.astype(jnp.promote_types(hidden.dtype, chunk.weight.dtype))
            e_weight = product(factors, chunk.weight, (1, stream.vocab_axis), z.dtype)
            frozen = _FrozenSums(e_weight, jnp.sum(slope, 1, keepdims=True))
            of_chunk = of_chunk._replace(frozen=frozen)
        return _merged(sums, of_chunk, temperature), None

    positions = jnp.arange(chunk_count(head, stream), dtype=jnp.int32)
    return jax.lax.scan(add_chunk, start, positions)[0]


def _sums_of_chunk(z, chunk, mask, tokens, like):
    t = None if tokens.temperature is None else jnp.abs(tokens.temperature)
    m, s = max_and_tail(z, None, t, Axes((1,)))
    label_logit = logit_of_label(z, chunk, tokens)
    e_d = w = w_d = top_label = None
    d = shifted(z, m, tokens.temperature)
    if like.e_d is not None:
        e = exp_shifted(z, m, tokens.temperature)
        e_d = sum_of_choices(times_log(e, d), Axes((1,)))
    if like.w is not None:
        weights = included(chunk.spread_weight, mask, z)
        w = jnp.sum(weights, 1, keepdims=True)
        w_d = sum_of_choices(times_loss(weights, d), Axes((1,)))
    if like.top_label is not None:
        top = jnp.argmax(z, 1, keepdims=True).astype(jnp.int32)
        top_label = top + chunk.classes[:, :1]
    return _Sums(m, s, label_logit, e_d, w, w_d, top_label)


def _merged(a, b, temperature):
    """The sums of two sets of classes."""
    # Of one branch with s, so that their derivatives belong together at ties.
    m = jnp.where(a.m >= b.m, a.m, b.m)
    to_a, to_b = (exp_shifted(v.m, m, temperature) for v in (a, b))
    s = jnp.where(a.m >= b.m, a.s + to_b * (1 + b.s), b.s + to_a * (1 + a.s))
    e_d, w, w_d, top_label = a.e_d, a.w, a.w_d, a.top_label
    d_a, d_b = (shifted(v.m, m, temperature) for v in (a, b))
    if e_d is not None:
        e_d = to_a * e_d + times_log(to_a, d_a) * (1 + a.s)
        e_d = e_d + to_b * b.e_d + times_log(to_b, d_b) * (1 + b.s)
    if w is not None:
        w = a.w + b.w
        w_d = a.w_d + times_loss(a.w, d_a) + b.w_d + times_loss(b.w, d_b)
    if top_label is not None:
        top_label = jnp.where(b.m > a.m, b.top_label, top_label)
    frozen = a.frozen
    if frozen is not None:
        e_weight = to_a * frozen.e_weight + to_b * b.frozen.e_weight
        frozen = _FrozenSums(e_weight, frozen.label_slope + b.frozen.label_slope)
    return _Sums(m, s, a.label_logit + b.label_logit, e_d, w, w_d, top_label, frozen)


def _with_local_labels(tokens, head, stream):
    """The labels as indices into this device's classes; -1 for those of others."""
    if not stream.mesh_names:
        return tokens
    classes = head.weight.shape[stream.vocab_axis]
    index, found = local_index(tokens.labels.class_index, classes, stream.mesh_names)
    index = jnp.where(found, index, -1)
    return tokens._replace(labels=tokens.labels._replace(class_index=index))


def _over_devices(sums, temperature, head, stream):
    """The sums of all classes from those of each device: one reduction for the maximum
    and one for all else. The sums of a frozen head stay apart."""
    names = stream.mesh_names

    def rescaled(m, e):
        d = shifted(sums.m, m, temperature)
        parts = {"label_logit": sums.label_logit}
        if sums.e_d is not None:
            parts["e_d"] = e * sums.e_d + times_log(e, d) * (1 + sums.s)
        if sums.w is not None:
            parts["w"] = sums.w
            parts["w_d"] = sums.w_d + times_loss(sums.w, d)
        return parts

    m, s, totals = over_devices(sums.m, sums.s, temperature, names, rescaled)
    top_label = sums.top_label
    if top_label is not None:
        first = first_class(head.weight.shape[stream.vocab_axis], names)
        last = jnp.iinfo(top_label.dtype).max
        top_label = jnp.where(sums.m == m, first + top_label, last)
        top_label = jax.lax.pmin(top_label, names)
    frozen = sums.frozen
    if frozen is not None:
        e = exp_shifted(sums.m, m, temperature)
        frozen = frozen._replace(e_weight=e * frozen.e_weight)
    return sums._replace(m=m, s=s, top_label=top_label, frozen=frozen, **totals)


def _backward(hidden, head, tokens, of_rows, stream):
    """Cotangents of hidden and of the head, and sum_i p_i (d_i + U)^2 of each row."""
    # The sum over devices comes before the rounding.
    dtype = of_rows.s.dtype if stream.mesh_names else hidden.dtype

    def of_tokens(rows):
        (dhidden, variance), dhead = _backward_of_rows(rows, head, stream)
        return (dhidden.astype(dtype), variance), dhead

    rows = hidden, tokens, of_rows
    if not stream.may_skip:
        return of_tokens(rows)
    zero = varying(jnp.zeros_like(of_rows.s), stream.mesh_names)
    nothing = jnp.zeros_like(hidden, dtype) + zero.astype(dtype), zero
    return over_counted_tokens(of_tokens, tokens.labels.counted, rows, nothing)


def _backward_of_rows(rows, head: Any, stream):
    hidden, tokens, of_rows = rows
    zero = varying(jnp.zeros_like(of_rows.s), stream.mesh_names)

    # Transposition for forward mode would otherwise store the factors of dz, N x V.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(carry, position):
        sums, dsoftcap = carry
        chunk = chunk_at(position, head, stream)
        dchunk, more = _backward_of_chunk(
            hidden, tokens, of_rows, chunk, head.softcap, stream
        )
        if dsoftcap is not None:
            dsoftcap = dsoftcap + dchunk.softcap
        dweight = dchunk.weight.astype(head.weight.dtype)
        dchunk = dchunk._replace(weight=dweight, softcap=None)
        return (jax.tree.map(jnp.add, sums, more), dsoftcap), dchunk

    sums = jnp.zeros_like(hidden, zero.dtype) + zero, zero
    dsoftcap: Any = None if head.softcap is None else jnp.sum(zero)
    positions = jnp.arange(chunk_count(head, stream), dtype=jnp.int32)
    carry, dchunks = jax.lax.scan(add_chunk, (sums, dsoftcap), positions)
    sums, dsoftcap = carry
    return sums, assembled(dchunks, head, stream)._replace(softcap=dsoftcap)


def _backward_of_chunk(hidden, tokens, of_rows, chunk, softcap, stream):
    temperature = tokens.temperature
    m, s, u, w_total, g, h, k, a = of_rows
    x = head_logits(hidden, chunk, stream.vocab_axis)
    mask = chunk_mask(chunk, tokens)
    z, to_logits = jax.vjp(
        lambda x, softcap: counted_logits(x, mask, temperature, softcap), x, softcap
    )
    e = exp_below(z, m, temperature)
    dz = jnp.where(is_label(chunk, tokens), label_cotangent(g, e, s), g * e)
    variance = jnp.zeros_like(m)
    dspread_weight = None
    if h is not None:
        dz = dz + h * e
    if k is not None:
        w = included(chunk.spread_weight, mask, z)
        dz = dz + spread_cotangent(k, w, w_total, e, s)
        dw = times_nll(k, jnp.log1p(s) - shifted(z, m, temperature))
        dw = dw if mask is None else jnp.where(mask, dw, 0)
        dspread_weight = jnp.sum(dw, 0)
    if a is not None:
        surprise = jnp.where(e == 0, 0, shifted(z, m, temperature) + u)
        dz = dz - a * e * surprise
        variance = sum_of_choices(e * surprise**2, Axes((1,))) / (1 + s)
    dz = dz * (inverse_temperature(temperature) / (1 + s))
    dx, dsoftcap = to_logits(dz)

    factors = narrowed(dx, jnp.promote_types(hidden.dtype, chunk.weight.dtype))
    classes_axis = stream.vocab_axis
    dhidden = product(factors, chunk.weight, (1, classes_axis), dx.dtype)
    if classes_axis == 0:
        dweight = product(factors, hidden, (0, 0), dx.dtype)
    else:
        dweight = product(hidden, factors, (0, 0), dx.dtype)
    dbias = None if chunk.bias is None else jnp.sum(dx, 0)
    return Head(dweight, dbias, dspread_weight, dsoftcap), (dhidden, variance)
