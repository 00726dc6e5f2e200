"""A draw from a linear head, and its log-probability, without the N x V logits.

With independent Gumbel noise G_c, argmax_c (z_c/t + G_c) is a sample of softmax(z/t).
The vocabulary passes by in chunks, as in `recompute`, and each row keeps what is ahead.

The noise costs more than the logits if every class has its own. But the maximum over a
block B of classes is itself a Gumbel variable,

    max_{c in B} (z_c/t + G_c)  is distributed as  L_B + G,   L_B = log sum_{c in B} e_c

and which class of the block attains it does not depend on it: it is c with probability
e_c / exp(L_B). So one number of noise for each block decides which block wins, and only
in that block every class gets noise of its own.

A block's noise is made of the row's key and the index of the block's first class in the
whole vocabulary. Chunks and devices, which hold whole blocks, do not change it: the
size of a block follows from that of the whole vocabulary alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits, is_hard, masked_logits, shifted, size_of
from jaxsoft._core.mesh import Axes, class_count, first_class, varying
from jaxsoft._linear.chunks import chunk_at, column, on_platform
from jaxsoft._linear.forward import AXES, logits_of_chunk
from jaxsoft._linear.recompute import pullback_of_terms, row_of
from jaxsoft._losses.nll import Asked, label_riders, terms_of_label
from jaxsoft._losses.per_row import RowLabels, RowTerms
from jaxsoft._passes.merge import Summary, merge, of_nothing
from jaxsoft._passes.summary import (
    LAST,
    NO_RIDERS,
    over_devices,
    summarize,
    without_nothing,
)

# Noise for 1024 x 4096 logits takes a CPU 13 ms in blocks of 16, and 220 if every class
# has its own.
LARGEST_BLOCK = 16
# Over so many devices a vocabulary may be split, if they divide it.
DEVICES = 8


class Ahead(NamedTuple):
    """Of every row, the block that is ahead; (N, 1)."""

    m: Array  # its summary
    s: Array
    noise: Array
    first_class: Array  # int32, on this device
    z: Array  # (N, B), the logits of the block


# The value is one pass. Its derivative is that of log p at the class drawn, which needs
# what this pass has summed, and so the residuals and the pullback are those of
# `linear_terms` with the draw as the label.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def drawn(hidden, head, keys, tokens, plan):
    """A class for each row of hidden (N, D), and its log-probability; of keys (N,), one
    for each row, and Tokens without labels."""
    return _plain(hidden, head, keys, tokens, plan)[:2]


def _plain(hidden, head, keys, tokens, plan):
    tokens = jax.tree.map(column, tokens)
    of_blocks, within = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    summary, ahead = on_platform(
        _over_chunks, hidden, head, of_blocks, tokens, plan=plan
    )
    index, logit = _within_block(ahead, within, tokens)
    if plan.mesh_names:
        summary, index = _over_devices(summary, ahead, index, logit, head, plan)
    else:
        summary = summary._replace(logit=logit)
    summary = without_nothing(summary)
    row = row_of(summary, tokens)
    counted = ~jnp.isneginf(row.m)
    labels = RowLabels(index, counted, jnp.ones_like(counted))
    log_prob = 0 - terms_of_label(row, summary, labels, Asked()).nll
    index = jnp.where(counted & ~jnp.isnan(log_prob), index, -1)
    labels = RowLabels(index, counted, labels.valid)
    labels = jax.tree.map(lambda v: v[:, 0], labels)
    return index[:, 0], log_prob[:, 0], (labels, summary)


def _fwd(hidden, head, keys, tokens, plan):
    index, log_prob, (labels, summary) = _plain(hidden, head, keys, tokens, plan)
    tokens = tokens._replace(labels=labels)
    return (index, log_prob), (hidden, head, tokens, (summary, None))


def _bwd(plan, residuals, cotangents):
    _, g = cotangents
    of_terms = RowTerms(-g, jnp.zeros_like(g))
    dhidden, dhead, dtokens = pullback_of_terms(plan, residuals, of_terms)
    return dhidden, dhead, None, dtokens


drawn.defvjp(_fwd, _bwd)


def block_size(classes):
    """Classes in a block, for so many in the whole vocabulary: a power of 2 that
    divides the classes of every device, if they are split over 2, 4 or 8."""
    if classes % 2:
        return LARGEST_BLOCK
    power_of_2 = classes & -classes
    return max(min(power_of_2 // DEVICES, LARGEST_BLOCK), 1)


def _over_chunks(hidden, head, keys, tokens, plan):
    """The Summary of the classes of this device, without a label, and what is Ahead."""
    size = head.weight.shape[plan.vocab_axis]
    block = block_size(class_count((size,), Axes((0,), plan.mesh_names)))
    whole = size - size % block  # the classes in blocks that are whole
    # Half of the room is for what the blocks of a chunk come to.
    chunk = min(-(-plan.chunk // (2 * block)) * block, whole)
    width = min(block, size)

    def step(carry, position, plan, size):
        chunk = chunk_at(position, head, plan, size)
        return _with_chunk(carry, hidden, head, keys, tokens, chunk, plan, width)

    carry = _nothing(hidden, head, tokens, plan, width)
    if whole:
        in_chunks = plan._replace(chunk=chunk)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def add_chunk(carry, position):
            return step(carry, position, in_chunks, whole), None

        positions = jnp.arange(-(-whole // chunk), dtype=jnp.int32)
        carry = jax.lax.scan(add_chunk, carry, positions)[0]
    if size > whole:
        last = plan._replace(chunk=width)
        carry = step(carry, whole // width, last, size)
    return carry


def _nothing(hidden, head, tokens, plan, width):
    dtype = accumulation_dtype(jnp.promote_types(hidden.dtype, head.weight.dtype))
    # Zeros made of the rows, so that under shard_map they vary as the rows do.
    zero = jnp.zeros_like(hidden[:, :1], dtype)
    zero = varying(zero, plan.mesh_names)
    t = size_of(tokens.temperature)
    like = Summary(m=zero, s=zero, e_d=None if t is None else zero)
    summary = jax.tree.map(lambda v, nothing: v + nothing, like, of_nothing(like))
    z = jnp.broadcast_to(summary.m, (len(hidden), width))
    ahead = Ahead(summary.m, zero, zero, zero.astype(jnp.int32), z)
    return summary._replace(temperature=None if t is None else zero + t), ahead


def _with_chunk(carry, hidden, head, keys, tokens, chunk, plan, width):
    before, ahead = carry
    logits, _ = logits_of_chunk(hidden, tokens, chunk, head.softcap, plan)
    summary = summarize(AXES, logits, label_riders(None, None, logits, Asked()))
    summary = summary._replace(temperature=before.temperature)
    summary = merge(before, summary, shifted)
    size = head.weight.shape[plan.vocab_axis]
    first_here = first_class(size, plan.mesh_names)
    blocks = _blocks(logits, chunk, keys, first_here, width)
    best = jnp.argmax(_score(blocks, summary), 1, keepdims=True)
    z = jnp.take_along_axis(blocks.z, best[..., None], 1)[:, 0]
    of_rows = blocks._replace(z=blocks.m)  # all (N, C/B)
    best = jax.tree.map(lambda v: jnp.take_along_axis(v, best, 1), of_rows)
    best = best._replace(z=z)
    wins = _score(best, summary) > _score(ahead, summary)
    return summary, jax.tree.map(lambda v, w: jnp.where(wins, v, w), best, ahead)


def _blocks(logits, chunk, keys, first_here, width):
    """All blocks of a chunk, as those that are Ahead: (N, C/B)."""
    z = masked_logits(logits)
    z = z.reshape(len(z), z.shape[1] // width, width)
    t = size_of(logits.temperature)
    t = None if t is None else t[..., None]
    sums = summarize(Axes((2,)), Logits(jax.lax.stop_gradient(z), None, t), NO_RIDERS)
    m, s = sums.m[..., 0], sums.s[..., 0]
    first = chunk.classes[:, ::width]
    noise = jax.vmap(_noise, (0, None, None))(keys, first[0] + first_here, m.dtype)
    return Ahead(m, s, noise, jnp.broadcast_to(first, m.shape), z)


def _noise(key, numbers, dtype):
    """One number of Gumbel noise for each of these."""

    def of_one(number):
        return jax.random.gumbel(jax.random.fold_in(key, number), (), dtype, "high")

    return jax.vmap(of_one)(numbers)


def _score(ahead, summary):
    """L_B + G of blocks, less m/t of their row. At t = 0 the noise counts for nothing,
    and the first of the highest is ahead."""
    t = summary.temperature
    d = shifted(ahead.m, summary.m, t)
    noisy = d + (jnp.log1p(ahead.s) + ahead.noise)
    score = noisy if t is None else jnp.where(is_hard(t), d, noisy)
    return jax.lax.stop_gradient(score)


def _within_block(ahead, keys, tokens):
    """The class drawn in the block that is ahead, by its index on this device, and its
    logit."""
    t = size_of(tokens.temperature)
    d = shifted(ahead.z, ahead.m, t)
    width = ahead.z.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (width,), d.dtype, "high"))(
        keys
    )
    score = d + noise if t is None else d + jnp.where(is_hard(t), 0, noise)
    best = jnp.argmax(jax.lax.stop_gradient(score), 1, keepdims=True)
    logit = jnp.take_along_axis(ahead.z, best, 1)
    return ahead.first_class + best.astype(jnp.int32), logit


def _over_devices(summary, ahead, index, logit, head, plan):
    """The summary of all classes, with the logit of the class drawn, and its index
    among all: that of the device whose block is ahead, the first of equal ones."""
    names = plan.mesh_names
    m = jax.lax.pmax(jax.lax.stop_gradient(summary.m), names)
    score = _score(ahead, summary._replace(m=m))
    index = index + first_class(head.weight.shape[plan.vocab_axis], names)
    in_front = score == jax.lax.pmax(score, names)
    winner = jax.lax.pmin(jnp.where(in_front, index, LAST), names)
    t = summary.temperature
    summary = without_nothing(summary)._replace(
        temperature=t, logit=jnp.where(index == winner, logit, 0)
    )
    return over_devices(names, summary), winner
