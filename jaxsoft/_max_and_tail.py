"""The maximum and the tail of every row, and how a CPU finds them.

Both are reductions of the whole array. An accelerator fuses what they add up into one
pass, and `_plainly` says all there is to say. XLA's CPU backend does not: it would
write the terms of the tail, from which the maximum is left out, to memory, twice. There
a row is taken apart into lanes (`_lanes`), and a row of a few classes is one loop.
Measured on two cores in float32, in ms, beside jax.nn.logsumexp:

    rows x classes    jax.nn    _plainly    here
"""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._axes import Axes, in_one_piece, row_sum
from jaxsoft._cpu_sums import two_sums
from jaxsoft._lanes import Lanes, lanes_of, of_lanes, part_of, rest_of
from jaxsoft._numerics import (
    accumulation_dtype,
    apart,
    counted_logits,
    exp_shifted,
    weighted_exp,
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def max_and_tail(
    x: Array,
    where: Array | None,
    softcap: Array | None,
    weights: Array | None,
    temperature: Array | None,
    axes: Axes,
) -> tuple[Array, Array]:
    """(m, s) of the counted logits over axes, which are kept with size 1. Nothing that
    counts: (-inf, 0).

    With weights b (those of `logsumexp`), s = sum_i b_i e_i - 1, and m is the maximum
    where b is not 0.
    """
    given = x, where, softcap, temperature
    plainly = functools.partial(_plainly, weights=weights, axes=axes)
    in_float32 = accumulation_dtype(x.dtype) == jnp.float32
    if weights is None and in_float32 and in_one_piece(x, axes):
        on_cpu = functools.partial(_on_cpu, axis=axes[0])
        m, s = jax.lax.platform_dependent(*given, cpu=on_cpu, default=plainly)
    else:
        m, s = plainly(*given)
    if axes.mesh_names:
        m, s, _ = over_devices(m, s, temperature, axes.mesh_names)
    return m, s


# With m held fixed, s' = sum_i (b_i e_i)', now with the maximum's term. JAX drops the
# rule in a scan that is differentiated twice, first in reverse; so what a CPU computes
# has the same derivative, if a slower one.
@max_and_tail.defjvp
def _max_and_tail_jvp(axes, primals, tangents):
    m, s = max_and_tail(*primals, axes)

    def total(x, where, softcap, weights, temperature):
        z = counted_logits(x, where, temperature, softcap)
        return row_sum(weighted_exp(z, m, weights, temperature), axes)

    _, s_dot = jax.jvp(total, primals, tangents)
    return (m, s), (jnp.zeros_like(m), s_dot)


def _plainly(x, where, softcap, temperature, *, weights, axes):
    z = counted_logits(x, where, temperature, softcap)
    of_weight = z if weights is None else jnp.where(weights == 0, -jnp.inf, z)
    m = jnp.max(of_weight, axes, keepdims=True, initial=-jnp.inf)
    m = jax.lax.stop_gradient(m)
    below = _without_maximum(weighted_exp(z, m, weights, temperature), z, m)
    terms_of_maximum = jnp.where(z == m, 1 if weights is None else weights, 0)
    terms_of_maximum = jax.lax.stop_gradient(terms_of_maximum)
    s = jnp.sum(below, axes, keepdims=True) + (
        jnp.sum(terms_of_maximum, axes, keepdims=True, dtype=z.dtype) - 1
    )
    return m, jnp.where(jnp.isneginf(m), 0, s)


def _on_cpu(x, where, softcap, temperature, *, axis):
    def logits(cut):
        # A part at a time: no array of all the counted logits is made.
        some = (v if v is None else cut(v) for v in (x, where, temperature))
        z = counted_logits(*some, softcap, narrow=True)
        return z.astype(jnp.float32)

    lanes = lanes_of(x.shape, axis)
    if lanes is None:
        m, s = _in_one_loop(logits(lambda v: v), temperature, axis)
    else:
        m, s = _in_lanes(logits, temperature, axis, lanes)
    return m, jnp.where(jnp.isneginf(m), 0, s)


def _in_one_loop(z, temperature, axis):
    m = jax.lax.stop_gradient(jnp.max(z, axis, keepdims=True))
    below, holders = _sums_in_one_loop(z, m, temperature, axis)
    return m, below + (holders - 1)


def _in_lanes(logits, temperature, axis, lanes: Lanes):
    def part(k):
        return logits(lambda v: part_of(v, k, lanes, axis))

    m_of_lane = jax.lax.stop_gradient(of_lanes(jnp.maximum, part, lanes))
    m_of_lane = apart(m_of_lane, m_of_lane)
    both = axis, axis + 1
    m = jnp.max(m_of_lane, both, keepdims=True)
    rest = logits(lambda v: rest_of(v, lanes, axis))
    if rest.size:
        m_of_rest = jax.lax.stop_gradient(jnp.max(rest, axis, keepdims=True))
        m = jnp.maximum(m, jnp.expand_dims(m_of_rest, axis))

    holding = (m_of_lane == m).astype(m.dtype)
    holders = jnp.sum(holding, both, keepdims=True)
    # When these are counted: then no two arrays of one number per lane are ever needed.
    m = m + 0 * holders
    t = None if temperature is None else jnp.expand_dims(temperature, axis)

    def at_maximum(k):
        return (part(k) == m).astype(m.dtype)

    def below(k):
        z = part(k)
        return _without_maximum(exp_shifted(z, m, t), z, m)

    ties = of_lanes(jnp.add, at_maximum, lanes)
    ties = ties - jnp.minimum(ties, 1)
    s_of_lane = apart(of_lanes(jnp.add, below, lanes) + ties, m)
    s = jnp.sum(s_of_lane, both, keepdims=True)
    m, s, holders = (jnp.squeeze(v, axis) for v in (m, s, holders))
    if rest.size:
        of_rest, more_holders = _sums_in_one_loop(rest, m, temperature, axis)
        s, holders = s + of_rest, holders + more_holders
    return m, s + (holders - 1)


def _without_maximum(e, z, m):
    """e with 0 at the maximum, where its derivative stays."""
    return jnp.where(z == m, e - jax.lax.stop_gradient(e), e)


def _sums_in_one_loop(z, m, temperature, axis):
    """Of e below the maximum, and of the classes that hold it."""
    e = _without_maximum(exp_shifted(z, m, temperature), z, m)
    # 0 * e, for a tangent.
    below, holders = two_sums(e, (z == m).astype(e.dtype) + 0 * e, axis)
    return jnp.expand_dims(below, axis), jnp.expand_dims(holders, axis)


def over_devices(
    m: Array,
    s: Array,
    temperature: Array | None,
    mesh_names: tuple[Hashable, ...],
    more: Callable[[Array, Array], dict[str, Array]] = lambda m, e: {},
) -> tuple[Array, Array, dict[str, Array]]:
    """The split of a row from those of its parts, and the sums of what more makes of
    the maximum of all and of e, the factor from a part's maximum to it.

    One reduction for the maximum, and one for the sums, the tail and the number of
    devices that hold the maximum.
    """
    m_of_all = jax.lax.pmax(m, mesh_names)
    at_maximum = m == m_of_all
    e = exp_shifted(m, m_of_all, temperature)
    parts = more(m_of_all, e)
    tail = jnp.where(at_maximum, s, e * (1 + s))
    tail, holders, *totals = jax.lax.psum(
        jnp.stack([tail, at_maximum.astype(s.dtype), *parts.values()]), mesh_names
    )
    s = jnp.where(jnp.isneginf(m_of_all), 0, tail + (holders - 1))
    return m_of_all, s, dict(zip(parts, totals))
