"""The maximum and the tail of every row, and how a CPU finds them.

Both are reductions of the whole array. An accelerator fuses what they add up into one
pass, and `_plainly` says all there is to say. XLA's CPU backend does not: it would
write the terms of the tail, from which the maximum is left out, to memory, twice. There
rows are taken apart into lanes (`lanes`), in two passes: the maximum of every lane,
and then the tail of every lane, which leaves out the maximum of the whole row. Measured
on two cores in float32, in ms, beside jax.nn.logsumexp:

    rows x classes    jax.nn    _plainly    _in_lanes
    256 x 131072          85         150           11
    512 x 50257           67           -            7
    4096 x 8192           15         100           10
    65536 x 128            7          23            3
"""

import functools
import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.lanes import (
    OF_COMPUTED,
    OF_GIVEN,
    Lanes,
    apart,
    computed_once,
    lanes_of,
    of_lanes,
    part_of,
    steps_of_lanes,
    sum_of_lanes,
    unseen,
)
from jaxsoft._core.mesh import Axes, in_one_piece, row_sum
from jaxsoft._core.numerics import (
    NEAR,
    accumulation_dtype,
    capped,
    counted_logits,
    exp_below,
    exp_below_on_cpu,
    exp_shifted,
    shifted,
    weighted_exp,
    with_value,
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def max_and_tail(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    axes: Axes,
    softcap: Array | None = None,
    weights: Array | None = None,
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
        in_lanes = functools.partial(_in_lanes, axis=axes[0])
        m, s = jax.lax.platform_dependent(*given, cpu=in_lanes, default=plainly)
    else:
        m, s = plainly(*given)
    if axes.mesh_names:
        m, s, _ = over_devices(m, s, temperature, axes.mesh_names)
    # Of 512 numbers or more, the maximum that XLA finds on a CPU may ignore NaN, or be
    # -inf with one (jaxlib 0.10.2). Until it is not, a sum tells.
    return jnp.where(jnp.isnan(s), s, m), s


# JAX drops the rule in a scan that is differentiated twice, first in reverse; so what a
# CPU computes has the same derivative, if a slower one.
@max_and_tail.defjvp
def _max_and_tail_jvp(axes, primals, tangents):
    x, where, temperature, softcap, weights = primals
    m, s = max_and_tail(x, where, temperature, axes, softcap, weights)
    return (m, s), split_tangents(m, axes, primals, tangents)


def split_tangents(
    m: Array, axes: Axes, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """With m held fixed, s' = sum_i (b_i e_i)', now with the term of m itself."""

    def total(x, where, temperature, softcap, weights):
        z = counted_logits(x, where, temperature, softcap)
        return row_sum(weighted_exp(z, m, weights, temperature), axes)

    return jnp.zeros_like(m), jax.jvp(total, primals, tangents)[1]


# Under jit JAX traces each once for its shapes, however often it is called: for a
# value, for its rule, and for every branch that falls back on it.
@functools.partial(jax.jit, static_argnames="axes")
def _plainly(x, where, softcap, temperature, *, weights, axes):
    z = counted_logits(x, where, temperature, softcap)
    of_weight = z if weights is None else jnp.where(weights == 0, -jnp.inf, z)
    m = jnp.max(of_weight, axes, keepdims=True, initial=-jnp.inf)
    m = jax.lax.stop_gradient(m)

    def total(terms):
        return jnp.sum(terms, axes, keepdims=True, dtype=z.dtype)

    if weights is None:
        far, near = map(total, _far_and_near(exp_below(z, m, temperature)))
        return m, far + _without_maximum(near)
    # Found by equality, a maximum leaves the digits of small weights near it alone.
    near = (weights != 0) & (shifted(z, m, temperature) > math.log(NEAR))
    at_maximum = jnp.where(total(near) == 1, near, z == m)
    terms = weighted_exp(z, m, weights, temperature)
    others = total(with_value(0, at_maximum, terms))
    s = others + (total(jnp.where(at_maximum, weights, 0)) - 1)
    return m, _of_something(m, s)


@functools.partial(jax.jit, static_argnames="axis")
def _in_lanes(x, where, softcap, temperature, *, axis):
    both = axis, axis + 1
    rows = Rows(x, axis, where, softcap, temperature)

    def maxima(lanes):
        if rows.are_one_lane:
            # XLA would find it again wherever it is used, if it were that of parts.
            row = rows.logits(lambda v: v)
            return jnp.expand_dims(jnp.max(row, axis, keepdims=True), axis)
        return of_lanes(jnp.maximum, lambda k: rows.part(lanes, k), lanes)

    all_lanes = rows.lanes
    m_of_lanes = [jax.lax.stop_gradient(maxima(lanes)) for lanes in all_lanes]
    m_of_lanes = [apart(m, m) for m in m_of_lanes]
    tops = (jnp.max(v, both, keepdims=True) for v in m_of_lanes)
    m = functools.reduce(jnp.maximum, tops)
    # One lane that holds the maximum, by its number, which is exact up to 2^24.
    before = itertools.accumulate((lanes.number for lanes in all_lanes), initial=0)
    numbers = [
        (first + steps_of_lanes(lanes, x.ndim, axis, lanes.width)).astype(jnp.float32)
        for first, lanes in zip(before, all_lanes)
    ]
    holding = (
        jnp.where(v == m, number, math.inf) for v, number in zip(m_of_lanes, numbers)
    )
    holder = functools.reduce(
        jnp.minimum, (jnp.min(v, both, keepdims=True) for v in holding)
    )
    holder = apart(holder, m)
    t = None if temperature is None else jnp.expand_dims(temperature, axis)
    # -inf again. XLA would write to memory what both passes make of x and where.
    bottom = jnp.minimum(m, -math.inf)
    capped_m = jax.lax.stop_gradient(capped_counted(m, softcap))

    def tail(lanes, number):
        far, near = of_lanes(
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            lambda k: _terms(rows.part(lanes, k, bottom), capped_m, softcap, t),
            lanes,
        )
        near = jnp.where(number == holder, _without_maximum(near), near)
        return sum_of_lanes(apart(far + near, m), axis)

    s = sum(map(tail, all_lanes, numbers))
    m = jnp.squeeze(m, axis)
    s = _of_something(m, s)
    s = computed_once(s, m) if rows.are_one_lane else s
    return jnp.squeeze(capped_m, axis), s


@jax.jit
def _terms(z, capped_m, softcap, temperature):
    """_far_and_near of logits that are not capped yet. A cap keeps their order."""
    return _far_and_near(
        exp_below_on_cpu(capped_counted(z, softcap), capped_m, temperature)
    )


class Rows(NamedTuple):
    """Counted logits as a pass over the rows makes them, a part at a time: no array of
    all of them is made. They are not capped yet."""

    x: Array
    axis: int
    where: Array | None = None
    softcap: Array | None = None
    temperature: Array | None = None

    @property
    def lanes(self) -> list[Lanes]:
        cut = OF_GIVEN if self.x.dtype == jnp.float32 else OF_COMPUTED
        return lanes_of(self.x.shape, self.axis, cut)

    @property
    def are_one_lane(self) -> bool:
        return [lanes.number for lanes in self.lanes] == [1]

    def logits(
        self, cut: Callable[[Array], Array], bottom: Array | float = -math.inf
    ) -> Array:
        mask, t = (v if v is None else cut(v) for v in (self.where, self.temperature))
        uncapped = cut(self.x)
        if self.softcap is not None:
            # Below, -inf is a masked class alone.
            largest = float(jnp.finfo(uncapped.dtype).max)
            largest = jnp.where(jnp.isinf(self.softcap), jnp.inf, largest)
            largest = largest.astype(uncapped.dtype)
            uncapped = jnp.clip(uncapped, -largest, largest)
        z = counted_logits(uncapped, mask, t, narrow=True, bottom=bottom)
        return z.astype(jnp.float32)

    def part(self, lanes: Lanes, k: int, bottom: Array | float = -math.inf) -> Array:
        z = self.logits(lambda v: part_of(v, k, lanes, self.axis), bottom)
        return unseen(z, k, lanes, self.axis, -math.inf)


def _of_something(m, s):
    """s, and 0 where nothing counts."""
    return jnp.where(jnp.isneginf(m) & ~jnp.isnan(s), 0, s)


def capped_counted(z: Array, softcap: Array | None) -> Array:
    """The cap of logits that `Rows` made: -inf is a masked class, and stays."""
    if softcap is None:
        return z
    masked = jnp.isneginf(z)
    return jnp.where(masked, z, capped(jnp.where(masked, 0, z), softcap))


def _far_and_near(e):
    """e of the classes that cannot be the maximum, and of those that can.

    The maximum is not looked for by equality: XLA may compute logits anew in every pass
    over a row, and not to the last bit.
    """
    near = e > NEAR
    return jnp.where(near, 0, e), jnp.where(near, e, 0)


def _without_maximum(near):
    """The sum over the classes near the maximum, which is one of them, without it. It
    is the only one where no second one, of more than NEAR, can be in the sum."""
    return with_value(0, near < 1 + NEAR / 2, near - 1)


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
