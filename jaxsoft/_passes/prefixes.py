"""The passes along an axis: the summary of every prefix, and what follows from it.

A prefix is one class longer than the one before it, so the merge is scanned. With the
maximum m_i of the prefix that ends in i, which never falls,

    prefix_summary    m_i, s_i             of z_j for j <= i
    prefix_sum        sum_{j <= i} v_j exp((m_j - m_i)/t)
    suffix_sum        sum_{i >= j} v_i exp((m_j - m_i)/t), its transpose

No exponential here is above 1, and each is that of a difference of two logits: factors
from one prefix to the next would gather a rounding at every step of a long axis.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import (
    Logits,
    exp_shifted,
    masked_logits,
    shifted,
    size_of,
    times,
)
from jaxsoft._core.mesh import Axes
from jaxsoft._passes.merge import Summary, merge, plus, seen_from
from jaxsoft._passes.primitive import Pass

# Less than any exponent of which the exponential is not 0.
OUT_OF_SIGHT = -1e4


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Order:
    """Whether a prefix ends in its first class, and begins at the last one."""

    reverse: bool


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    e_d: bool


def _scan(combine: Any, elements: Any, axes: Axes, reverse: bool) -> Any:
    (axis,) = axes.from_the_start(jax.tree.leaves(elements)[0].ndim).dims
    return jax.lax.associative_scan(combine, elements, reverse=reverse, axis=axis)


def _prefix_summary(axes, fixed, _):
    logits, order, wanted = fixed
    z, t = masked_logits(logits), size_of(logits.temperature)
    zero = jnp.zeros_like(z)
    numbers = Summary(z, zero, e_d=zero if wanted.e_d else None)

    def merged(a, b):
        return merge(a, b, lambda low, m, _: shifted(low, m, t))

    return _scan(merged, numbers, axes, order.reverse)


# With m held fixed, and the maximum's own term in s: with z_j seen from m_j first,
#     1 + s_i = sum_{j <= i} e_jj exp((m_j - m_i)/t)
def _smooth_prefix_summary(axes, fixed, _, results):
    logits, order, wanted = fixed
    z, t, m = masked_logits(logits), size_of(logits.temperature), results.m
    e, d = exp_shifted(z, m, t), shifted(z, m, t)
    e_d = e * jnp.where(e == 0, 0, d) if wanted.e_d else None

    def shift(low, m, _):
        return jnp.maximum(shifted(low, m, t), OUT_OF_SIGHT)

    def longer(a, b):
        return plus(b, seen_from(a, b.m, None, shift))

    return _scan(longer, Summary(m, e - 1, e_d=e_d), axes, order.reverse)


_summary_of_prefixes = Pass(
    "prefix_summary", _prefix_summary, smooth=_smooth_prefix_summary
)


def prefix_summary(
    axes: Axes, logits: Logits, *, reverse: bool, with_e_d: bool = False
) -> Summary:
    """The summary of every prefix along the one axis, in the shape of x."""
    fixed = logits, Order(reverse), Wanted(with_e_d)
    return _summary_of_prefixes(axes, fixed)


def _sum_before(axes, fixed, v):
    m, t, order = fixed

    def longer(a, b):
        (m, v), (n, w) = a, b
        return n, w + times(v, exp_shifted(m, n, t))

    return _scan(longer, (m, v), axes, order.reverse)[1]


def _sum_behind(axes, fixed, v):
    m, t, order = fixed

    def longer(a, b):
        (m, v), (n, w) = a, b
        return n, w + times(v, exp_shifted(n, m, t))

    return _scan(longer, (m, v), axes, not order.reverse)[1]


_prefix_sum = Pass(
    "prefix_sum",
    _sum_before,
    transpose=lambda axes, fixed, g, _: _suffix_sum(axes, fixed, g),
)
_suffix_sum = Pass(
    "suffix_sum",
    _sum_behind,
    transpose=lambda axes, fixed, t, _: _prefix_sum(axes, fixed, t),
)


def suffix_sum(
    axes: Axes, m: Array, t: Array | None, v: Array, *, reverse: bool
) -> Array:
    """For every class the sum over the prefixes that have it: linear in v."""
    return _suffix_sum(axes, (jax.lax.stop_gradient(m), t, Order(reverse)), v)
