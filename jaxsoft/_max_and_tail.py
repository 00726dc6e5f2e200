"""The maximum and the tail of every row, and how a CPU finds them.

Both are reductions of the whole array. An accelerator fuses what they add up into one
pass, and `_plainly` says all there is to say. XLA's CPU backend does not: it runs a sum
as a kernel of its own, which takes in arithmetic and exp but no comparison, so that the
tail, which leaves the maximum out, would first be written to memory, twice. Measured on
two cores in float32, beside jax.nn.logsumexp:

    rows x classes    jax.nn    plainly    by blocks
    256 x 131072       76 ms     150 ms        17 ms
    4096 x 8192        16 ms     150 ms        20 ms

`_by_blocks` adds up the exponentials of blocks of classes without any comparison, and
then goes again through the one block of each row that holds the maximum, this time
without it: 1/K of the row for K blocks. Blocks are also what a long row needs: the
kernel is several times slower when a row does not fit into the cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._autodiff import with_jvp
from jaxsoft._numerics import (
    Axes,
    bounded_maximum,
    exp_shifted,
    is_hard,
    row_sum,
    weighted_exp,
)

# A row of fewer classes is not worth splitting.
FEWEST_CLASSES = 32
MOST_BLOCKS = 64


# With m held fixed, s' = sum_i (b_i e_i)', now with the maximum's term. A rule, since
# the schedules below compute s in ways that have no such derivative. As a custom_vjp
# it also survives in a scan that is differentiated twice in reverse.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def max_and_tail(
    z: Array, weights: Array | None, temperature: Array | None, axes: Axes
) -> tuple[Array, Array]:
    """(m, s) over axes, which are kept with size 1. Nothing that counts: (-inf, 0).

    With weights b (those of `logsumexp`), s = sum_i b_i e_i - 1, and m is the maximum
    where b is not 0.
    """
    m, s = _local_max_and_tail(z, weights, temperature, axes)
    return _over_devices(m, s, temperature, axes) if axes.mesh_names else (m, s)


def _fwd(z, weights, temperature, axes):
    m, s = max_and_tail(z, weights, temperature, axes)
    return (m, s), (z, weights, temperature, m)


def _bwd(axes, residuals, cotangents):
    z, weights, temperature, m = residuals

    def total(z, weights, temperature):
        return row_sum(weighted_exp(z, m, weights, temperature), axes)

    return jax.vjp(total, z, weights, temperature)[1](cotangents[1])


max_and_tail.defvjp(_fwd, _bwd)


def _local_max_and_tail(z, weights, temperature, axes):
    plainly = functools.partial(_plainly, weights=weights, axes=axes)
    in_blocks = weights is None and len(axes) == 1 and z.dtype == jnp.float32
    if not in_blocks or z.shape[axes[0]] < FEWEST_CLASSES or z.size == 0:
        return plainly(z, temperature)
    return jax.lax.platform_dependent(
        z, temperature, cpu=functools.partial(_by_blocks, axis=axes[0]), default=plainly
    )


def _over_devices(m, s, temperature, axes):
    """The split of a row from those of its parts: one reduction for the maximum, and
    one for the tail and the number of devices that hold the maximum."""
    m_of_all = jax.lax.pmax(m, axes.mesh_names)
    at_maximum = m == m_of_all
    e = exp_shifted(m, m_of_all, temperature)
    tail = jnp.where(at_maximum, s, e * (1 + s))
    tail, holders = jax.lax.psum(
        jnp.stack([tail, at_maximum.astype(s.dtype)]), axes.mesh_names
    )
    s = tail + (holders - 1)
    return m_of_all, jnp.where(jnp.isneginf(m_of_all), 0, s)


def _plainly(z, temperature, *, weights, axes):
    of_weight = z if weights is None else jnp.where(weights == 0, -jnp.inf, z)
    m = jnp.max(of_weight, axes, keepdims=True, initial=-jnp.inf)
    return m, _tail(z, m, weights, temperature, axes)


def _tail(z, m, weights, temperature, axes):
    top = z == m
    e = jnp.where(top, 0, weighted_exp(z, m, weights, temperature))
    terms_of_maximum = jnp.where(top, 1 if weights is None else weights, 0)
    s = jnp.sum(e, axes, keepdims=True) + (
        jnp.sum(terms_of_maximum, axes, keepdims=True, dtype=z.dtype) - 1
    )
    return jnp.where(jnp.isneginf(m), 0, s)


def _by_blocks(z, temperature, *, axis):
    blocks = _in_blocks(z, axis)
    t = None if temperature is None else jnp.expand_dims(temperature, axis)
    m_of_block = jnp.max(blocks, axis + 1, keepdims=True)
    m = jnp.max(m_of_block, axis, keepdims=True)
    # The first block that holds the maximum.
    chosen = jnp.argmax(m_of_block, axis, keepdims=True)
    block = jnp.take_along_axis(blocks, chosen, axis, mode="promise_in_bounds")
    tail = _tail_in_one_pass(block, m, t, axis + 1)
    # In this order, so that no two arrays of one number per block are ever needed.
    m, chosen, tail = jax.lax.optimization_barrier((m, chosen, tail))
    e = _exp_without_comparison(blocks, m, t)
    sum_of_block = jnp.sum(e, axis + 1, keepdims=True)
    number = jax.lax.broadcasted_iota(chosen.dtype, sum_of_block.shape, axis)
    others = jnp.where(number == chosen, 0, sum_of_block)
    s = tail + jnp.sum(others, axis, keepdims=True)
    s = jnp.where(jnp.isneginf(m), 0, s)
    return jnp.squeeze(m, axis), jnp.squeeze(s, axis)


def _tail_in_one_pass(z, m, temperature, axis):
    """_tail, where z is not to be written to memory first: a reduction of two arrays
    at once is no kernel, but a loop that takes in everything."""
    top = z == m
    e = jnp.where(top, 0, exp_shifted(z, m, temperature))
    below, at_maximum = jax.lax.reduce(
        (e, top.astype(e.dtype)),
        (jnp.zeros((), e.dtype), jnp.zeros((), e.dtype)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (axis,),
    )
    return jnp.expand_dims(below + (at_maximum - 1), axis)


def _exp_without_comparison(z, m, temperature):
    """exp_shifted, up to the rounding of z - m. An entry +inf counts as the largest
    finite number, and rows of -inf have all 0."""
    largest = jnp.finfo(z.dtype).max
    gap = jnp.minimum(z, largest) - bounded_maximum(m)
    if temperature is None:
        return jnp.exp(gap)
    # At tau = 0 a gap is divided by the smallest number, which leaves at least 1, and
    # then made huge.
    hard = is_hard(temperature)
    smallest = jnp.finfo(z.dtype).tiny
    divisor = jnp.where(hard, smallest, jnp.minimum(jnp.abs(temperature), largest))
    return jnp.exp(gap / divisor * jnp.where(hard, largest, 1))


def _in_blocks(z, axis):
    """z with its class axis split into (blocks, classes of a block)."""
    classes = z.shape[axis]
    length = _block_length(classes)
    missing = -classes % length
    if missing:
        padding = [(0, 0, 0)] * z.ndim
        padding[axis] = (0, missing, 0)
        z = jax.lax.pad(z, jnp.array(-jnp.inf, z.dtype), padding)
    return z.reshape(*z.shape[:axis], -1, length, *z.shape[axis + 1 :])


def _block_length(classes: int) -> int:
    """Near the square root, so that neither the blocks nor the classes of a block are
    many, and not too many blocks to be called O(1). A divisor if there is one: a row
    that has to be padded is copied."""
    ideal = max(math.isqrt(classes), classes // MOST_BLOCKS)
    divisors = [d for d in range(ideal // 3, 3 * ideal) if classes % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / ideal)), default=ideal)
