"""The maximum and the tail of every row, and how a CPU finds them.

Both are reductions of the whole array. An accelerator fuses what they add up into one
pass, and `_plainly` says all there is to say. XLA's CPU backend does not: it runs a sum
as a kernel of its own, which takes in arithmetic and exp but no comparison, so that the
tail, which leaves the maximum out, would first be written to memory, twice. Measured on
two cores in float32, beside jax.nn.logsumexp:

    rows x classes    jax.nn    _plainly    here
    256 x 131072       94 ms      150 ms    20 ms    _in_blocks
    512 x 50257        74 ms        -       22 ms    _across
    4096 x 8192        17 ms      100 ms    22 ms    _in_blocks
    65536 x 128         8 ms       23 ms     7 ms    _across

`_in_blocks` and `_across` add up the exponentials of groups of classes without any
comparison, and then go again through the one group of each row that holds the maximum,
this time without it. The groups of a long row are blocks: the kernel is several times
slower when a row does not fit into the cache. Those of a short row, and of one that no
block divides, lie across it, class l of each of a few parts making up group l, which is
elementwise work for the whole of a row. A row of a few classes is one loop.
"""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._axes import Axes, in_one_piece, row_sum
from jaxsoft._cpu_sums import divisor_near, split_axis, two_sums
from jaxsoft._numerics import (
    accumulation_dtype,
    counted_logits,
    exp_shifted,
    exp_without_comparison,
    weighted_exp,
)

# A row of fewer classes is one loop; one of more is split into blocks, if it can be.
FEWEST_CLASSES = 32
MOST_CLASSES_ACROSS = 1024
MOST_NUMBERS_IN_PLACE = 32  # XLA halves longer reductions of integers


def split_logits(
    x: Array,
    where: Array | None,
    temperature: Array | None,
    axes: Axes,
    softcap: Array | None = None,
) -> tuple[Array, Array]:
    """(m, s) of the counted logits."""
    z = counted_logits(x, where, temperature, softcap, narrow=True)
    return max_and_tail(z, None, temperature, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def max_and_tail(
    z: Array, weights: Array | None, temperature: Array | None, axes: Axes
) -> tuple[Array, Array]:
    """(m, s) over axes, which are kept with size 1. Nothing that counts: (-inf, 0).

    z may be in half precision still. With weights b (those of `logsumexp`),
    s = sum_i b_i e_i - 1, and m is the maximum where b is not 0.
    """
    m, s = _local_max_and_tail(z, weights, temperature, axes)
    if axes.mesh_names:
        m, s, _ = over_devices(m, s, temperature, axes.mesh_names)
    return m, s


# With m held fixed, s' = sum_i (b_i e_i)', now with the maximum's term. JAX drops the
# rule in a scan that is differentiated twice, first in reverse; so what the schedules
# below compute has the same derivative, if a slower one.
@max_and_tail.defjvp
def _max_and_tail_jvp(axes, primals, tangents):
    m, s = max_and_tail(*primals, axes)

    def total(z, weights, temperature):
        wide = z.astype(accumulation_dtype(z.dtype))
        return row_sum(weighted_exp(wide, m, weights, temperature), axes)

    _, s_dot = jax.jvp(total, primals, tangents)
    return (m, s), (jnp.zeros_like(m), s_dot)


def _local_max_and_tail(z, weights, temperature, axes):
    plainly = functools.partial(_plainly, weights=weights, axes=axes)
    in_float32 = accumulation_dtype(z.dtype) == jnp.float32
    schedule = None
    if weights is None and in_float32 and in_one_piece(z, axes):
        schedule = _schedule(z.shape[axes[0]])
    if schedule is None:
        return plainly(z, temperature)
    schedule = functools.partial(schedule, axis=axes[0])
    return jax.lax.platform_dependent(z, temperature, cpu=schedule, default=plainly)


def _schedule(classes: int) -> Callable[..., tuple[Array, Array]] | None:
    """What is fastest on a CPU, for a row of so many classes; None for `_plainly`."""
    if classes < FEWEST_CLASSES:
        return _in_one_loop
    if classes <= MOST_CLASSES_ACROSS:
        parts = divisor_near(8, classes)
        return None if parts is None else functools.partial(_across, parts=parts)
    # 64 of 8192 classes and 512 of 131072, as measured.
    length = divisor_near(round(classes**0.75 / 13), classes, shared_by=64)
    if length is None:
        return functools.partial(_across, parts=32)
    return functools.partial(_in_blocks, length=length)


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


def _plainly(z, temperature, *, weights, axes):
    z = z.astype(accumulation_dtype(z.dtype))
    of_weight = z if weights is None else jnp.where(weights == 0, -jnp.inf, z)
    m = jnp.max(of_weight, axes, keepdims=True, initial=-jnp.inf)
    m = jax.lax.stop_gradient(m)
    return m, _tail(z, m, weights, temperature, axes)


def _tail(z, m, weights, temperature, axes):
    top = z == m
    e = _without_top(top, weighted_exp(z, m, weights, temperature))
    terms_of_maximum = jnp.where(top, 1 if weights is None else weights, 0)
    terms_of_maximum = jax.lax.stop_gradient(terms_of_maximum)
    s = jnp.sum(e, axes, keepdims=True) + (
        jnp.sum(terms_of_maximum, axes, keepdims=True, dtype=z.dtype) - 1
    )
    return jnp.where(jnp.isneginf(m), 0, s)


def _in_one_loop(z, temperature, *, axis):
    z = z.astype(jnp.float32)
    m = jnp.max(z, axis, keepdims=True)
    m = jax.lax.stop_gradient(m)
    s = _tail_in_one_loop(z, m, temperature, axis)
    return m, jnp.where(jnp.isneginf(m), 0, s)


def _in_blocks(z, temperature, *, axis, length):
    z = split_axis(z, axis, length)
    groups, members = axis, axis + 1
    t = None if temperature is None else jnp.expand_dims(temperature, axis)

    def wide(z):  # where it is used, so that no wide copy is made
        return z.astype(jnp.float32)

    m_of_group = jax.lax.stop_gradient(jnp.max(wide(z), members, keepdims=True))
    m, chosen = _group_of_maximum(m_of_group, groups)
    group = jnp.take_along_axis(z, chosen, groups, mode="promise_in_bounds")
    tail = _tail_in_one_loop(wide(group), m, t, members)
    e = exp_without_comparison(wide(z), _after(tail, m), t)
    sum_of_group = jnp.sum(e, members, keepdims=True)
    s = _total_tail(m, tail, sum_of_group, chosen, groups)
    return jnp.squeeze(m, axis), jnp.squeeze(s, axis)


def _across(z, temperature, *, axis, parts):
    classes = z.shape[axis]
    length = -(-classes // parts)
    # The last parts start earlier, with classes that a part before them had.
    starts = [min(k * length, classes - length) for k in range(parts)]
    seen = [k * length - start for k, start in enumerate(starts)]
    shape = [length if i == axis else 1 for i in range(z.ndim)]
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def part(k):
        v = jax.lax.slice_in_dim(z, starts[k], starts[k] + length, axis=axis)
        v = v.astype(jnp.float32)
        return v if seen[k] == 0 else jnp.where(lane < seen[k], -jnp.inf, v)

    m_of_group = functools.reduce(jnp.maximum, map(part, range(parts)))
    m_of_group = jax.lax.stop_gradient(m_of_group)
    m, chosen = _group_of_maximum(m_of_group, axis)
    column = [parts if i == axis else 1 for i in range(z.ndim)]
    first, had = (jnp.array(v, jnp.int32).reshape(column) for v in (starts, seen))
    group = jnp.take_along_axis(z, first + chosen, axis, mode="promise_in_bounds")
    group = jnp.where(chosen < had, -jnp.inf, group.astype(jnp.float32))
    tail = _tail_in_one_loop(group, m, temperature, axis)
    top = _after(tail, m)
    sum_of_group = functools.reduce(
        jnp.add,
        (exp_without_comparison(part(k), top, temperature) for k in range(parts)),
    )
    return m, _total_tail(m, tail, sum_of_group, chosen, axis)


def _after(tail, m):
    """m, once the tail is known: then no two arrays of one number per group are ever
    needed."""
    return m + 0 * jax.lax.stop_gradient(tail)


def _total_tail(m, tail, sum_of_group, chosen, groups):
    others = jnp.where(_numbers(sum_of_group, groups) == chosen, 0, sum_of_group)
    s = tail + jnp.sum(others, groups, keepdims=True)
    return jnp.where(jnp.isneginf(m), 0, s)


def _group_of_maximum(m_of_group, groups):
    """The maximum, and the number of the first group that holds it.

    An argmax is a slow loop. The least of the numbers is found on vectors, but takes an
    array of its own when there are many.
    """
    m = jnp.max(m_of_group, groups, keepdims=True)
    count = m_of_group.shape[groups]
    if count > MOST_NUMBERS_IN_PLACE:
        return m, jnp.argmax(m_of_group, groups, keepdims=True).astype(jnp.int32)
    holding = jnp.where(m_of_group == m, _numbers(m_of_group, groups), count - 1)
    return m, jnp.min(holding, groups, keepdims=True)


def _numbers(v, axis):
    return jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)


def _without_top(top, e):
    """e with 0 at the maximum, where its derivative stays."""
    return jnp.where(top, e - jax.lax.stop_gradient(e), e)


def _tail_in_one_loop(z, m, temperature, axis):
    """_tail, where z is not to be written to memory first."""
    top = z == m
    e = _without_top(top, exp_shifted(z, m, temperature))
    # 0 * e, for a tangent.
    below, at_maximum = two_sums(e, top.astype(e.dtype) + 0 * e, axis)
    return jnp.expand_dims(below + (at_maximum - 1), axis)
