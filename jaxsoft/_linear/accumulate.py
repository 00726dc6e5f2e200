"""The rule of a summed loss of a linear head: its gradient in the forward pass.

A sum over tokens has one cotangent, which scales the gradient and does not shape it. So
the gradient can be taken while the logits of a chunk of tokens are there, and nothing
is recomputed: three matrix products in place of the four of `recompute`. The price
is a chunk of logits over the whole vocabulary, and the weights' gradient in float32,
which a forward pass that is differentiated holds until the backward pass scales it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits
from jaxsoft._core.mesh import Axes, varying_like
from jaxsoft._linear.chunks import (
    Head,
    Tokens,
    column,
    head_logits,
    matrix_product,
    narrowed,
    over_counted_tokens,
    rows_at,
    without_infinities,
)
from jaxsoft._losses.nll import METRICS, Asked, label_terms
from jaxsoft._losses.per_row import RowLabels, RowTerms, combined_terms


class TokenPlan(NamedTuple):
    """Static facts of a pass over the tokens."""

    vocab_axis: int
    chunk: int  # tokens in a chunk
    may_skip: bool  # tokens that do not count
    with_metrics: bool


class TokenInputs(NamedTuple):
    """What the loss of a token is made of, beside its logits; one entry per token."""

    tokens: Any  # Tokens
    options: Any  # RowOptions


# With the logits x = h w + b of a chunk of tokens, and dx = dL/dx from the rule of
# `label_terms`, the forward pass sums
#     dw += dx^T h      db += sum of dx over tokens      dh = dx w of the chunk
# and the backward pass multiplies them by the cotangent of L.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_loss(hidden, head, inputs, chunks):
    """Sum over tokens of `combined_terms`, for hidden (N, D) under a Head; and the
    terms of each that its LossMetrics are made of, if they are asked for."""

    def add_chunk(total, rows):
        hidden, inputs = rows
        x = head_logits(hidden, head, chunks.vocab_axis)
        loss, metrics = _loss_of_logits(x, _shared(head), inputs, chunks)
        return total + loss, metrics

    zero, nothing = _zero_loss(hidden, head), _no_terms(hidden, head, chunks)
    return _over_chunks(add_chunk, zero, nothing, hidden, inputs, chunks)


def _fwd(hidden, head, inputs, chunks):
    # Arguments that are not differentiated cost nothing: with a frozen head two matrix
    # products remain.
    wants_weight, wants_bias = head.weight.perturbed, _is_perturbed(head.bias)
    hidden, head, inputs = jax.tree.map(
        lambda leaf: leaf.value, (hidden, head, inputs), is_leaf=_is_argument
    )

    def add_chunk(sums, rows):
        total, dhead = sums
        hidden, inputs = rows
        x = head_logits(hidden, head, chunks.vocab_axis)
        loss, pullback, metrics = jax.vjp(
            lambda x, shared, smooth: _loss_of_logits(
                x, shared, _with_smooth(inputs, smooth), chunks
            ),
            x,
            _shared(head),
            _smooth(inputs),
            has_aux=True,
        )
        dx, dshared, dsmooth = pullback(jnp.ones_like(loss))
        factors = narrowed(dx, jnp.promote_types(hidden.dtype, head.weight.dtype))
        weight = head.weight
        weight = weight if inputs.tokens.where is None else without_infinities(weight)
        dhidden = matrix_product(factors, weight, (1, chunks.vocab_axis), dx.dtype)
        dweight = dbias = None
        if wants_weight:
            hidden = without_infinities(hidden)
            pair = (factors, hidden) if chunks.vocab_axis == 0 else (hidden, factors)
            dweight = matrix_product(*pair, (0, 0), dx.dtype)
        if wants_bias:
            dbias = jnp.sum(dx, 0)
        more = Head(dweight, dbias, dshared.uniform_weight, dshared.softcap)
        dhead = jax.tree.map(jnp.add, dhead, more)
        of_rows = dhidden.astype(hidden.dtype), dsmooth, metrics
        return (total + loss, dhead), of_rows

    zero = _zero_loss(hidden, head)
    start = Head(
        jnp.zeros_like(head.weight, zero.dtype) + zero if wants_weight else None,
        jnp.zeros_like(head.bias, zero.dtype) + zero if wants_bias else None,
        *(
            v if v is None else 0 * v + zero
            for v in (head.uniform_weight, head.softcap)
        ),
    )
    nothing = jax.tree.map(jnp.zeros_like, (hidden, _smooth(inputs)))
    nothing = *nothing, _no_terms(hidden, head, chunks)
    (total, dhead), (dhidden, dsmooth, metrics) = _over_chunks(
        add_chunk, (zero, start), nothing, hidden, inputs, chunks
    )
    return (total, metrics), (hidden, head, dhidden, dhead, dsmooth)


def _bwd(chunks, residuals, cotangents):
    g, _ = cotangents
    if isinstance(g, SymbolicZero):
        aval: Any = g.aval
        g = jnp.zeros(aval.shape, aval.dtype)
    hidden, head, dhidden, dhead, dsmooth = residuals
    dtemperature, doptions = jax.tree.map(lambda v: g * v, dsmooth)
    dinputs = TokenInputs(Tokens(None, dtemperature, None), doptions)
    dhidden = (g * dhidden.astype(g.dtype)).astype(hidden.dtype)
    dhead = Head(
        *(
            None if v is None else (g * v).astype(like.dtype)
            for v, like in zip(dhead, head)
        )
    )
    return dhidden, dhead, dinputs


summed_loss.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _loss_of_logits(x, shared, inputs, chunks):
    tokens = jax.tree.map(column, inputs.tokens)
    uniform_weight = shared.uniform_weight
    logits = Logits(x, tokens.where, tokens.temperature)
    w = None if uniform_weight is None else uniform_weight[None]
    asked = METRICS if chunks.with_metrics else Asked()
    terms = label_terms(Axes((1,)), logits, tokens.labels, w, shared.softcap, asked)
    terms = jax.tree.map(lambda term: jnp.squeeze(term, 1), terms)
    labels, options = inputs.tokens.labels, inputs.options
    loss = jnp.sum(combined_terms(terms, labels.counted, options))
    return loss, terms._replace(uniform_nll=None) if chunks.with_metrics else None


def _over_chunks(add_chunk, start, nothing, hidden, inputs, chunks):
    """Scan over chunks of tokens; the last sum, and what add_chunk returns of rows, or
    nothing of those that do not count."""

    def of_tokens(rows):
        return _scan_of_chunks(add_chunk, start, rows, chunks.chunk)

    rows = hidden, inputs
    if chunks.may_skip:
        counted = inputs.tokens.labels.counted
        of_rows, carry = over_counted_tokens(of_tokens, counted, rows, nothing)
    else:
        of_rows, carry = of_tokens(rows)
    return carry, of_rows


def _scan_of_chunks(add_chunk, start, rows, chunk):
    count = len(rows[0])
    chunk = min(chunk, count)

    # The last chunk may start early, with tokens that an earlier one had.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry, position):
        first = jnp.minimum(position, count - chunk)
        index = first + jnp.arange(chunk, dtype=jnp.int32)
        hidden, inputs = rows_at(rows, index)
        labels, fresh = inputs.tokens.labels, index >= position
        labels = RowLabels(
            jnp.where(fresh, labels.class_index, -1),
            labels.counted & fresh,
            labels.valid | ~fresh,
        )
        tokens = inputs.tokens._replace(labels=labels)
        return add_chunk(carry, (hidden, inputs._replace(tokens=tokens)))

    positions = jnp.arange(0, count, chunk, dtype=jnp.int32)
    carry, of_rows = jax.lax.scan(step, start, positions)

    def joined(stacked):
        v = jax.lax.collapse(stacked, 0, 2)
        before, repeated = len(v) - chunk, -count % chunk
        return jnp.concatenate([v[:before], v[before + repeated :]])

    return jax.tree.map(joined, of_rows), carry


def _no_terms(hidden, head, chunks):
    if not chunks.with_metrics:
        return None
    zero = jnp.broadcast_to(_zero_loss(hidden, head), len(hidden))
    return RowTerms(zero, zero, None, zero, zero.astype(jnp.int32))


def _zero_loss(hidden, head):
    dtype = jnp.promote_types(hidden.dtype, head.weight.dtype)
    return varying_like(jnp.zeros((), accumulation_dtype(dtype)), hidden)


def _shared(head):
    return head._replace(weight=None, bias=None)


def _smooth(inputs):
    return inputs.tokens.temperature, inputs.options


def _with_smooth(inputs, smooth):
    temperature, options = smooth
    tokens = inputs.tokens._replace(temperature=temperature)
    return inputs._replace(tokens=tokens, options=options)


def _is_argument(leaf):
    return hasattr(leaf, "perturbed")


def _is_perturbed(leaf):
    return leaf is not None and leaf.perturbed
