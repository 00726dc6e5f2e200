"""The backward pass of a linear head: the logits of a chunk again, and two products."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import exact_at_maximum
from jaxsoft._core.mesh import varying
from jaxsoft._linear.chunks import (
    Head,
    chunk_at,
    chunk_count,
    chunk_label,
    head_products,
    is_counted,
    on_platform,
    over_counted_tokens,
    room_for_chunks,
    with_chunk,
    without_infinities,
)
from jaxsoft._linear.forward import AXES, logits_of_chunk
from jaxsoft._losses.nll import included, uniform_cotangents
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.labels import to_labels
from jaxsoft._passes.merge import Summary
from jaxsoft._passes.product import product
from jaxsoft._row import Row


class RowCotangents(NamedTuple):
    """The cotangents of a token's terms, as its chunks need them; None is 0."""

    summary: Summary
    scale: Array  # (N, 1), dz over e_c at the classes that are no label
    at_label: Array | None  # (N, 1), dz at the one label
    g: Array | None  # (N, K), of the nll of several labels
    k: Array | None  # of uniform_nll
    a: Array | None  # of the entropy


def head_and_row_cotangents(hidden, head, tokens, of_rows, plan):
    """Cotangents of hidden and of the head, and sum_i p_i (d_i + U)^2 of each row."""
    arguments = hidden, head, tokens, of_rows
    return on_platform(_backward, *arguments, plan=plan)


def _backward(hidden, head, tokens, of_rows, plan):
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
    counted = is_counted(tokens.labels)
    return over_counted_tokens(of_tokens, counted, rows, nothing)


def _backward_of_rows(rows, head: Any, plan):
    hidden, tokens, of_rows = rows
    # A TPU does it inside the products, without a copy of the hidden states.
    hidden = without_infinities(hidden) if plan.is_on_gpu else hidden
    zero = varying(jnp.zeros_like(of_rows.scale), plan.mesh_names)

    # Who differentiates this would otherwise store the factors of dz, N x V.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(position):
        chunk = chunk_at(position, head, plan)
        return _backward_of_chunk(hidden, tokens, of_rows, chunk, head.softcap, plan)

    classes = head.weight.shape[plan.vocab_axis]

    def add_chunk(carry, position):
        sums, dhead = carry
        dchunk, more = of_chunk(position)
        sums = jax.tree.map(jnp.add, sums, more)
        dhead = with_chunk(dhead, dchunk, position, classes, plan)
        return (sums, dhead), None

    start = (
        (jnp.zeros_like(hidden, zero.dtype) + zero, zero),
        room_for_chunks(head, zero),
    )
    positions = jnp.arange(chunk_count(head, plan), dtype=jnp.int32)
    return jax.lax.scan(add_chunk, start, positions, reverse=True)[0]


def _backward_of_chunk(hidden, tokens, of_rows, chunk, softcap, plan):
    # Rows with anything else have a cotangent that is 0 or NaN (`recompute`).
    hidden = hidden if plan.is_on_gpu else without_infinities(hidden)
    logits, to_given = logits_of_chunk(hidden, tokens, chunk, softcap, plan)
    row = Row(AXES, logits, of_rows.summary.m, of_rows.summary.s)
    label = chunk_label(chunk, tokens)
    dx, variance, duniform_weight = _cotangent_of_logits(row, label, of_rows, chunk)
    dx, dsoftcap = to_given(dx)
    dhidden, dweight = head_products(dx, hidden, tokens, chunk, plan)
    dbias = None if chunk.bias is None else jnp.sum(dx, 0)
    return Head(dweight, dbias, duniform_weight, dsoftcap), (dhidden, variance)


def _cotangent_of_logits(row, label, of_rows, chunk):
    summary, scale, at_label, g, k, a = of_rows
    variance, duniform_weight = jnp.zeros_like(row.m), None
    if g is None:
        dx = to_classes(
            AXES,
            row.logits,
            row.m,
            scale,
            label,
            at_label,
            overwrites_x=k is None and a is None,
        )
    else:
        dx = row.to_x(_of_several_labels(row, label, scale, g))
    if k is not None:
        w = included(chunk.uniform_weight, row)
        dz, dw = uniform_cotangents(row, w, summary, k)
        dx = dx + row.to_x(dz)
        duniform_weight = jnp.sum(dw, 0)
    if a is not None:
        p, u = row.p, -summary.e_d / (1 + row.s)
        surprise = jnp.where(p == 0, 0, exact_at_maximum(row.d, row.s) + u)
        dx = dx + row.to_x(product(a, -p * surprise * row.per_t))
        variance = jnp.sum(p * surprise**2, 1, keepdims=True)
    return dx, variance, duniform_weight


# With g_k for each of K labels, gamma_c their sum at class c and G over all of them,
#     t dz_c = G p_c - gamma_c = (G - gamma_c) p_c - gamma_c (1 - p_c)
# where 1 - p_c = (s + (1 - e_c)) / (1 + s) has all its digits.
def _of_several_labels(row, label, scale, g):
    gamma = to_labels(g, label, row.logits.x.shape[1])
    others = jnp.sum(g, 1, keepdims=True) - gamma
    per_total, e = row.per_t / (1 + row.s), jnp.exp(row.d)
    dz = product(others, e * per_total) + product(scale, e)
    return dz - product(gamma, (row.s + (1 - e)) * per_total)
