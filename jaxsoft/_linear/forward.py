"""The forward pass of a linear head: its vocabulary in chunks, whose sums merge."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits, masked_logits, shifted, size_of
from jaxsoft._core.mesh import Axes, first_class, varying
from jaxsoft._linear.chunks import (
    chunk_at,
    chunk_count,
    chunk_label,
    chunk_mask,
    head_logits,
    is_counted,
    matrix_product,
    on_platform,
    over_counted_tokens,
    without_infinities,
)
from jaxsoft._losses.nll import as_seen, label_riders
from jaxsoft._passes.classes import to_classes
from jaxsoft._passes.labels import at_labels
from jaxsoft._passes.merge import Summary, merge, of_nothing
from jaxsoft._passes.summary import over_devices, summarize, without_nothing
from jaxsoft._row import Row

AXES = Axes((1,))


class Sums(NamedTuple):
    """What the forward pass carries from chunk to chunk; (N, 1)."""

    summary: Summary  # its logit (N, K)
    frozen: Any = None  # FrozenSums


class FrozenSums(NamedTuple):
    """With kappa = dz/dx, the gradient of the hidden states under a frozen head."""

    e_weight: Array  # (N, D), sum of e kappa w over all classes but the label
    label_slope: Array  # (N, 1), kappa at the label


def sums_of_vocabulary(hidden, head, tokens, plan, with_frozen):
    """The Sums over all classes, of this device and the others."""
    sums = on_platform(
        functools.partial(_sums_here, with_frozen), hidden, head, tokens, plan=plan
    )
    return _over_devices(sums, head, plan) if plan.mesh_names else sums


def _sums_here(with_frozen, hidden, head, tokens, plan):
    start = _no_sums(hidden, head, tokens, plan, with_frozen)

    def of_rows(rows):
        return _sums_of_rows(rows, head, plan), None

    rows = hidden, tokens, start
    if not plan.may_skip:
        return of_rows(rows)[0]
    return over_counted_tokens(of_rows, is_counted(tokens.labels), rows, start)[0]


def _no_sums(hidden, head, tokens, plan, with_frozen):
    dtype = accumulation_dtype(jnp.promote_types(hidden.dtype, head.weight.dtype))
    # Zeros made of the rows, so that under shard_map they vary as the rows do.
    per_label = jnp.zeros_like(tokens.labels.class_index, dtype)
    per_label = varying(per_label, plan.mesh_names)
    zero = per_label[:, :1]
    with_e_d = plan.asked.entropy or tokens.temperature is not None
    coefficients = 0 if head.uniform_weight is None else 1
    like = Summary(
        m=zero,
        s=zero,
        e_d=zero if with_e_d else None,
        logit=per_label,
        total=(zero,) * coefficients,
        below=(zero,) * coefficients,
        top=zero.astype(jnp.int32) if plan.asked.top_label else None,
    )
    summary = jax.tree.map(lambda v, nothing: v + nothing, like, of_nothing(like))
    temperature = size_of(tokens.temperature)
    if temperature is not None:
        summary = summary._replace(temperature=zero + temperature)
    frozen = None
    if with_frozen:
        frozen = FrozenSums(jnp.zeros_like(hidden, dtype) + zero, zero)
    return Sums(summary, frozen)


def logits_of_chunk(hidden, tokens, chunk, softcap, plan):
    """The logits of a chunk as the passes see them, and what takes a cotangent of these
    to that of h w + b and of the cap."""
    x = head_logits(hidden, chunk, plan.vocab_axis)
    logits = Logits(x, chunk_mask(chunk, tokens), tokens.temperature)
    return as_seen(logits, softcap)


def _sums_of_rows(rows, head, plan):
    hidden, tokens, start = rows

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(sums, position):
        chunk = chunk_at(position, head, plan)
        logits, to_given = logits_of_chunk(hidden, tokens, chunk, head.softcap, plan)
        label = chunk_label(chunk, tokens)
        summary = _summary_of_chunk(logits, label, chunk, plan)
        frozen = sums.frozen
        if frozen is not None:
            row = Row(AXES, logits, summary.m, summary.s)
            of_chunk = _frozen_sums(row, label, hidden, tokens, chunk, to_given, plan)
            frozen = _merged_frozen(sums.summary, frozen, row, of_chunk)
        summary = summary._replace(temperature=sums.summary.temperature)
        return Sums(merge(sums.summary, summary, shifted), frozen), None

    positions = jnp.arange(chunk_count(head, plan), dtype=jnp.int32)
    return jax.lax.scan(add_chunk, start, positions)[0]


def _summary_of_chunk(logits, label, chunk, plan):
    single = label.shape[1] == 1
    riders = label_riders(
        label if single else None, chunk.uniform_weight, logits, plan.asked
    )
    summary = summarize(AXES, logits, riders)
    if not single:
        summary = summary._replace(logit=at_labels(masked_logits(logits), label))
    if plan.asked.top_label:
        summary = summary._replace(top=summary.top + chunk.classes[:, :1])
    return summary


def _frozen_sums(row, label, hidden, tokens, chunk, to_given, plan):
    ones, zeros = jnp.ones_like(row.m), jnp.zeros_like(row.m)
    e = to_classes(AXES, row.logits, row.m, ones, label, zeros)
    slope = to_classes(AXES, row.logits, row.m, zeros, label, ones)
    e, slope = to_given(e)[0], to_given(slope)[0]
    factors = e.astype(jnp.promote_types(hidden.dtype, chunk.weight.dtype))
    weight = chunk.weight
    weight = weight if tokens.where is None else without_infinities(weight)
    e_weight = matrix_product(factors, weight, (1, plan.vocab_axis), e.dtype)
    return FrozenSums(e_weight, jnp.sum(slope, 1, keepdims=True))


def _merged_frozen(before, frozen, row, of_chunk):
    m = jnp.maximum(before.m, row.m)
    to_before, to_chunk = (jnp.exp(shifted(v, m, row.t)) for v in (before.m, row.m))
    e_weight = to_before * frozen.e_weight + to_chunk * of_chunk.e_weight
    return FrozenSums(e_weight, frozen.label_slope + of_chunk.label_slope)


def _over_devices(sums, head, plan):
    """The sums of all classes from those of each device. Those of a frozen head stay
    apart."""
    names, here = plan.mesh_names, sums.summary
    if here.top is not None:
        first = first_class(head.weight.shape[plan.vocab_axis], names)
        here = here._replace(top=here.top + first)
    summary = over_devices(
        names, without_nothing(here)._replace(temperature=here.temperature)
    )
    frozen = sums.frozen
    if frozen is not None:
        e = jnp.exp(shifted(here.m, summary.m, here.temperature))
        frozen = frozen._replace(e_weight=e * frozen.e_weight)
    return Sums(summary, frozen)
