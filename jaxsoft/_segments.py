"""logsumexp, softmax and log_softmax of the segments of an array.

Entry i of x, x[i], belongs to the segment k = segment_ids[i]; every segment is a row of
its own, whose entries may stand anywhere. In the letters of `logits`, with m, s and t
of the segment,

    L_k = sigma (m + t log(1 + s))        p_i = e_i / (1 + s)
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    as_array,
    as_broadcastable,
    as_flag,
    as_integer,
    as_mask,
    as_real,
    is_number,
    is_of,
)
from jaxsoft._core.dtypes import accumulation_dtype, cast, widened
from jaxsoft._core.logits import (
    Logits,
    exact_at_maximum,
    inverse_temperature,
    is_maximum,
    log_softmax_cotangent,
    times_log,
    zero_if_infinite,
)
from jaxsoft._grouped import Grouped, Segments, grouped
from jaxsoft._hints import with_hints
from jaxsoft._passes.product import product
from jaxsoft._row import row_rule


@with_hints
def segment_logsumexp(
    x: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    where: ArrayLike | None = None,
    indices_are_sorted: bool = False,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Log of the sum of exponentials of every segment: its smooth maximum.

    ``L_k = temperature * log(sum(exp(x_i / temperature)))`` over the i with
    ``segment_ids[i] == k``. `logsumexp` of groups of any sizes: the neighbours of a
    node, the tokens of a document. The arguments are those of `jax.ops.segment_sum`.

    Args:
        x: logits of shape (N, ...); every number along the other axes is grouped alike.
        segment_ids: integers of shape (N,), in any order. Entries whose id is not in
            [0, num_segments) are left out.
        num_segments: the number of segments, static. By default the largest id plus 1,
            or 0 of no entries; that needs the values, so under `jax.jit` it must be
            given.
        where: boolean, broadcastable to ``x``; True includes an entry.
        indices_are_sorted: whether ``segment_ids`` are in ascending order, which may be
            faster. The result is undefined if they are not.
        temperature: in the units of ``x``; larger is softer. Broadcastable to the
            result, so each segment may have its own; may be traced and differentiated.
            At 0 the result is the maximum; below 0 it is the smooth minimum.

    Returns:
        Shape (num_segments, ...), in the units and the dtype of ``x``; integers give
        floats. Half precision is computed in float32.

    Raises:
        TypeError: ``x`` is not an array of real numbers, ``segment_ids`` are not
            integers, ``num_segments`` is not an int, ``where`` is not boolean.
        ValueError: ``x`` has no axis, ``segment_ids`` are not of shape (N,),
            ``num_segments`` is negative or missing under `jax.jit`, ``where`` or
            ``temperature`` would enlarge the result.

    Gradient:
        dL_k/dx_i = p_i, the `segment_softmax`, for i in the segment.
        dL_k/dtemperature_k = entropy of p in the segment.
        Residuals: the arguments and two numbers per segment, three with a temperature.

    Edge cases:
        A segment without entries, or of -inf alone: -inf with gradient 0 (+inf below
        temperature 0). Entries +inf: +inf; they share the gradient equally. NaN only in
        segments where an included entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x, segment_ids = jnp.array([1.0, 2.0, 5.0]), jnp.array([0, 0, 2])
        >>> print(jaxsoft.segment_logsumexp(x, segment_ids, 3).round(4))
        [2.3133   -inf 5.    ]
    """
    arguments = x, segment_ids, num_segments, where, indices_are_sorted, temperature
    return _segment_logsumexp_jit(*_checked("segment_logsumexp", *arguments))


@with_hints
def segment_softmax(
    x: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    where: ArrayLike | None = None,
    indices_are_sorted: bool = False,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Softmax within every segment: attention over neighbours, mixtures, ragged rows.

    ``p_i = exp(x_i / temperature) / sum_j exp(x_j / temperature)`` over the j with
    ``segment_ids[j] == segment_ids[i]``.

    Args:
        x: logits of shape (N, ...), as in `segment_logsumexp`.
        segment_ids: integers of shape (N,), in any order; see `segment_logsumexp`.
        num_segments: the number of segments, static; must be given under `jax.jit`.
        where: boolean, broadcastable to ``x``; an excluded entry has probability 0.
        indices_are_sorted: whether ``segment_ids`` are in ascending order.
        temperature: as in `segment_logsumexp`, of shape (num_segments, ...) or one that
            broadcasts to it. At 0 the tied maxima of a segment share equally.

    Returns:
        Probabilities of the shape and dtype of ``x``, which sum to 1 in each segment
        that has an entry. Half precision is computed in float32.

    Raises:
        TypeError, ValueError: as `segment_logsumexp`.

    Gradient:
        dp_i/dx_j = p_i (delta_ij - p_j) / temperature within a segment.
        dp_i/dtemperature = -p_i (x_i - sum_j p_j x_j) / temperature^2.
        Both are 0 at temperature 0. Residuals: the arguments and two numbers per
        segment.

    Edge cases:
        An entry whose id is out of range: probability 0, gradient 0. A segment of -inf
        alone: all 0 with gradient 0. Entries +inf share the probability equally. NaN
        only in segments where an included entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x, segment_ids = jnp.array([2.0, 2.0, 5.0]), jnp.array([0, 0, 2])
        >>> print(jaxsoft.segment_softmax(x, segment_ids, 3))
        [0.5 0.5 1. ]
    """
    arguments = x, segment_ids, num_segments, where, indices_are_sorted, temperature
    return _segment_softmax_jit(*_checked("segment_softmax", *arguments))


@with_hints
def segment_log_softmax(
    x: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    where: ArrayLike | None = None,
    indices_are_sorted: bool = False,
    temperature: ArrayLike = 1.0,
) -> Array:
    """Logarithms of the softmax probabilities within every segment, in nats.

    ``log p_i = (x_i - L_k) / temperature`` with ``L = segment_logsumexp(x)`` and
    ``k = segment_ids[i]``.

    Args:
        x: logits of shape (N, ...), as in `segment_logsumexp`.
        segment_ids: integers of shape (N,), in any order; see `segment_logsumexp`.
        num_segments: the number of segments, static; must be given under `jax.jit`.
        where: boolean, broadcastable to ``x``; an excluded entry has -inf.
        indices_are_sorted: whether ``segment_ids`` are in ascending order.
        temperature: as in `segment_softmax`. At 0 the k tied maxima of a segment have
            -log(k) and all others -inf.

    Returns:
        Log-probabilities of the shape and dtype of ``x``. Half precision is computed in
        float32.

    Raises:
        TypeError, ValueError: as `segment_logsumexp`.

    Gradient:
        d(log p_i)/dx_j = (delta_ij - p_j) / temperature within a segment, computed at
        the most probable entry as the sum of the other probabilities.
        d(log p_i)/dtemperature = -(log p_i + entropy) / temperature.
        Both are 0 at temperature 0. Residuals: the arguments and two numbers per
        segment.

    Edge cases:
        An entry whose id is out of range: -inf, gradient 0. A segment of -inf alone:
        all -inf with gradient 0. Entries +inf: -log(k) on the k of them. NaN only in
        segments where an included entry is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x, segment_ids = jnp.array([20.0, 0.0, 5.0]), jnp.array([0, 0, 1])
        >>> print(jaxsoft.segment_log_softmax(x, segment_ids, 2))
        [-2.0611537e-09 -2.0000000e+01  0.0000000e+00]
    """
    arguments = x, segment_ids, num_segments, where, indices_are_sorted, temperature
    return _segment_log_softmax_jit(*_checked("segment_log_softmax", *arguments))


def _checked(name, x, segment_ids, num_segments, where, indices_are_sorted, tau):
    x = as_real(name, "x", x)
    ids = _as_ids(name, segment_ids, x.shape)
    count = _as_count(name, num_segments, ids)
    where = as_mask(name, "where", where, x.shape)
    are_sorted = as_flag(name, "indices_are_sorted", indices_are_sorted)
    if is_number(tau) and tau == 1:
        tau = None
    else:
        tau = cast(as_real(name, "temperature", tau), accumulation_dtype(x.dtype))
        of_result = (count, *x.shape[1:])
        what = "the shape of the result,"
        tau = as_broadcastable(name, "temperature", tau, of_result, what)
    return x, ids, where, tau, Segments(count, are_sorted)


def _as_ids(function: str, ids: ArrayLike, shape: tuple[int, ...]) -> Array:
    ids = as_array(function, "segment_ids", ids)
    if not is_of(ids.dtype, jnp.integer):
        raise TypeError(
            f"{function}: segment_ids must be integers; got dtype {ids.dtype}"
        )
    if not shape or ids.shape != shape[:1]:
        raise ValueError(
            f"{function}: segment_ids must have one entry for each along the first "
            f"axis of x; got segment_ids {ids.shape} for x {shape}"
        )
    return ids


def _as_count(function: str, num_segments: int | None, ids: Array) -> int:
    if num_segments is None:
        try:
            return max(int(jnp.max(ids, initial=-1)) + 1, 0)
        except jax.errors.ConcretizationTypeError:
            raise ValueError(
                f"{function}: num_segments must be given where the ids are traced, as "
                "under jax.jit; got None"
            ) from None
    count = as_integer(num_segments)
    if count is None:
        raise TypeError(
            f"{function}: num_segments must be an int or None; got {num_segments!r}"
        )
    if count < 0:
        raise ValueError(f"{function}: num_segments must not be negative; got {count}")
    return count


def _logits_of(x, ids, where, temperature, segments):
    """The logits, with a temperature for every segment, and the ids."""
    if ids.dtype.itemsize < 4:  # int8 does not hold a count of 200
        ids = ids.astype(jnp.int32)
    if temperature is not None:
        temperature = jnp.broadcast_to(temperature, (segments.count, *x.shape[1:]))
    return Logits(x, where, temperature), ids


@functools.partial(jax.jit, static_argnames="segments")
def _segment_logsumexp_jit(x, ids, where, temperature, segments):
    if segments.count == 0:
        return jnp.zeros((0, *x.shape[1:]), x.dtype)
    return _segment_logsumexp(
        segments, *_logits_of(x, ids, where, temperature, segments)
    )


@functools.partial(jax.jit, static_argnames="segments")
def _segment_softmax_jit(x, ids, where, temperature, segments):
    if segments.count == 0:
        return jnp.zeros_like(x)
    return _segment_softmax(segments, *_logits_of(x, ids, where, temperature, segments))


@functools.partial(jax.jit, static_argnames="segments")
def _segment_log_softmax_jit(x, ids, where, temperature, segments):
    if segments.count == 0:
        return jnp.full_like(x, -jnp.inf)
    return _segment_log_softmax(
        segments, *_logits_of(x, ids, where, temperature, segments)
    )


# sigma cancels, once from L and once from z:
#     dL_k/dx_i = p_i
#     dL_k/dtau = log S - sum_i p_i d_i, the entropy of p
# A rule, since autodiff differentiates the maximum too, and has NaN at +inf, in a
# segment without entries and at tau = 0.
def _logsumexp_value(segments, logits, ids):
    of = grouped(segments, logits, ids)
    log_total, entropy = jnp.log1p(of.s), None
    excess = log_total
    if of.given.temperature is not None:
        entropy = log_total - of.sum(times_log(of.p, of.d))
        # An infinite temperature may meet an excess of 0.
        excess = jnp.where(log_total == 0, 0, jnp.abs(of.given.temperature) * log_total)
    log_sum = of.sign * jnp.where(jnp.isinf(of.m), of.m, of.m + excess)
    return log_sum.astype(logits.x.dtype), (of.m, of.total, entropy)


def _logsumexp_pullback(segments, logits, ids, kept, g):
    *kept, entropy = kept
    of = Grouped(segments, logits, ids, *kept)
    g = widened(g, of.m.dtype)
    # sigma again: to_x has it once more.
    dx = of.to_x(product(of.at_entries(of.sign * g), of.p))
    return dx, None if entropy is None else product(g, entropy), None


_segment_logsumexp = row_rule(_logsumexp_value, _logsumexp_pullback)


# With v the value of g at an entry with most of the probability, or 0,
#     t dz_i = p_i ((g_i - v) - sum_j p_j (g_j - v))
# where nothing cancels when a segment is sure.  dtau = -sum_i dx_i d_i.
def _softmax_value(segments, logits, ids):
    of = grouped(segments, logits, ids)
    return of.p.astype(logits.x.dtype), (of.m, of.total)


def _softmax_pullback(segments, logits, ids, kept, g):
    of = Grouped(segments, logits, ids, *kept)
    g = _included(of, g)
    deviation = g - of.at_entries(of.sum(jnp.where(of.is_top, g, 0)))
    mean = of.sum(product(deviation, of.p))
    dz = product(deviation - of.at_entries(mean), of.p)
    if of.given.temperature is None:
        return of.to_x(dz), None, None
    dz = product(dz, inverse_temperature(of.logits.temperature))
    d = of.d
    dt = -of.sum(product(dz, zero_if_infinite(d)))
    return of.to_x(dz), of.sign * dt, None


def _included(of, g):
    """A cotangent of every entry, in the dtype of sums, 0 at masked ones."""
    return jnp.where(of.logits.where, widened(g, of.m.dtype), 0)


_segment_softmax = row_rule(_softmax_value, _softmax_pullback)


# With U = -sum_i p_i d_i,
#     t dz_i = g_i - p_i sum_j g_j        (`log_softmax_cotangent`)
#     t dt   = -sum_i g_i (d_i + U)       over the entries above -inf
def _log_softmax_value(segments, logits, ids):
    of = grouped(segments, logits, ids)
    s = of.s
    log_total = of.at_entries(jnp.log1p(s))
    # One gather for both: s is below 0.5 where log(1 + s) is below log 1.5.
    d = exact_at_maximum(of.d_as_rounded, log_total + (0.5 - math.log(1.5)))
    return (d - log_total).astype(logits.x.dtype), (of.m, s)


def _log_softmax_pullback(segments, logits, ids, kept, g):
    m, s = kept
    of = Grouped(segments, logits, ids, m, 1 + s)
    d, s = of.d_as_rounded, of.at_entries(s)
    is_top = is_maximum(d, s) & (s < 0.5)
    g = jnp.where(of.at_entries(jnp.isneginf(m)), 0, _included(of, g))
    value = of.at_entries(of.sum(jnp.where(is_top, g, 0)))
    others = of.at_entries(of.sum(jnp.where(is_top, 0, g)))
    dz = log_softmax_cotangent(g, d, s, value, others, product)
    if of.given.temperature is None:
        return of.to_x(dz), None, None
    dz = product(dz, inverse_temperature(of.logits.temperature))
    u = -of.sum(times_log(of.p, d))
    slope = of.sum(product(g, jnp.where(jnp.isinf(d), 0, d + of.at_entries(u))))
    per_t = inverse_temperature(of.given.temperature)
    return of.to_x(dz), product(slope, -of.sign * per_t), None


_segment_log_softmax = row_rule(_log_softmax_value, _log_softmax_pullback)
