"""The summary of a set of classes, and the merge of two.

In the letters of `logits`, the summary of a row is

    m = max z        s = sum_i e_i - 1, summed without ever adding the 1.

The 1 is the term of the maximum. Kept apart, it rounds nothing away: log(1 + s) is
log1p(s), the probability p_i is e_i / (1 + s), and a model that is sure of its answer
has a tail s of 1e-9 with all its digits, where sum_i e_i would be exactly 1.

Summaries merge. With m >= n and e = exp((n - m)/t),

    (m, s) o (n, r) = (m, s + e (1 + r))

One number z is (z, 0), and nothing is (-inf, -1). So a row is one reduction, a
vocabulary in chunks or over devices is a few merges, and other sums of a row ride
along.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsoft._core.logits import times

# (low, m, temperature) -> (low - m)/t
Shift = Callable[[Any, Any, Any], Any]


class Summary(NamedTuple):
    """What a set of classes comes to, for their logits z, weights b, coefficients q and
    values v. None is a sum that was not asked for."""

    m: Any  # max z, where b is not 0
    s: Any  # sum of b e over all classes but that of the maximum
    temperature: Any = None  # t, the same in all that is merged
    weight: Any = None  # b at the maximum; None is 1
    e_d: Any = None  # sum of e d
    logit: Any = None  # sum of z over the label
    total: tuple[Any, ...] = ()  # sums of q
    below: tuple[Any, ...] = ()  # sums of q (z - m)
    value: Any = None  # v at the maximum
    deviation: Any = None  # sum of e (v - value)
    others: Any = None  # sum of v over all classes but that of the maximum
    top: Any = None  # index of the maximum, the first of tied ones


def quotient(low: Any, m: Any, temperature: Any) -> Any:
    """(low - m)/t for low <= m, as a reduction does it, which nobody differentiates."""
    gap = jnp.where(low == m, 0, low - m)
    return gap if temperature is None else jnp.where(low == m, 0, gap / temperature)


def merge(a: Summary, b: Summary, shift: Shift = quotient) -> Summary:
    """The summary of the classes of a and those of b."""
    a_is_high = a.m >= b.m
    high = jax.tree.map(lambda v, w: jnp.where(a_is_high, v, w), a, b)
    low = jax.tree.map(lambda v, w: jnp.where(a_is_high, w, v), a, b)
    high = high._replace(m=jnp.maximum(a.m, b.m))  # NaN if either is
    if a.top is not None:
        first = jnp.minimum(a.top, b.top)
        high = high._replace(top=jnp.where(a.m == b.m, first, high.top))
    return plus(high, seen_from(low, high.m, high.value, shift))


def plus(a: Summary, b: Summary) -> Summary:
    """Their sums added; what is said of the maximum is that of a."""
    added = jax.tree.map(jnp.add, a._replace(top=None), b._replace(top=None))
    return added._replace(
        m=a.m, temperature=a.temperature, weight=a.weight, value=a.value, top=a.top
    )


def seen_from(low: Summary, m: Any, value: Any, shift: Shift) -> Summary:
    """What low adds to the sums of a summary with a maximum m >= low.m and this value.

    With delta = (low.m - m)/t, e = exp(delta), and the mass M = b + s of low at its own
    maximum, low.m,

        sum of b e             e M
        sum of e d             e (e_d) + e delta M
        sum of q (z - m)       below + total (low.m - m)
        sum of e (v - value)   e (deviation + (low.value - value) M)
    """
    delta = shift(low.m, m, low.temperature)
    e = jnp.exp(delta)
    mass = (1 if low.weight is None else low.weight) + low.s
    e_d, deviation, others, below = low.e_d, low.deviation, low.others, low.below
    if e_d is not None:
        e_d = times(e, e_d) + times(times(e, mass), delta)
    if deviation is not None:
        # 0 for values that are all 0, whatever the logits.
        deviation = times(deviation + times(low.value - value, mass), e)
        others = others + low.value
    if below:
        # In halves, whose difference does not overflow.
        half = jnp.where(low.m == m, 0, low.m / 2 - m / 2)
        below = tuple(w + 2 * times(q, half) for q, w in zip(low.total, below))
    return low._replace(
        s=times(e, mass), e_d=e_d, deviation=deviation, others=others, below=below
    )


def of_nothing(like: Summary) -> Summary:
    """The summary of no classes, in numbers of NumPy: of an infinite number of JAX's,
    jax_debug_infs would complain."""
    nothing = jax.tree.map(lambda v: np.zeros((), v.dtype), like)
    no_tail = 0 if like.weight is not None else -1
    top = like.top
    if top is not None:
        top = np.full((), np.iinfo(top.dtype).max, top.dtype)
    return nothing._replace(
        m=np.full((), -np.inf, like.m.dtype),
        s=np.full((), no_tail, like.s.dtype),
        top=top,
    )
