"""A row taken apart into lanes, as XLA's CPU backend goes through it fastest.

XLA compiles a reduction of a row as one number after another, or hands it to a library
of kernels that takes in little else and is slow in rows that outgrow the cache. What it
does well is elementwise work on neighbouring numbers. So a row is cut into groups, and
a group into a few parts of 8 neighbours. The parts of a group are reduced to one,
elementwise and in one pass with whatever makes their terms. One number is left of every
lane, which is class l of each part of a group:

    |    group 0      |    group 1      |
    | part 0   part 1 | part 0   part 1 | ...
    | abcdefgh ABCDEFGH abcdefgh ABCDEFGH ...      a and A are in one lane

Measured on two cores in float32, in ms, for the sum of exp(x - m):

    rows x classes    one reduction    of lanes
    4096 x 8192                10.9         6.1
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Numbers that lie side by side: one or two of a processor's vectors.
WIDTH = 8
# Up to so many, a product with ones sums them faster.
FEW_LANES = 64
# XLA takes one slice into no more than 15 places of a kernel; into more, it copies it.
PLACES_OF_A_SLICE = 12


class Cut(NamedTuple):
    """How rows are cut. Each part is code of its own, and takes its time to compile."""

    most_parts: int
    width: int
    one_lane: int  # rows of so many classes are


OF_GIVEN = Cut(16, WIDTH, 25)
# Of what is computed first, if only a conversion: XLA takes it into no more than 15
# places, and vectorizes longer loops alone.
OF_COMPUTED = Cut(8, 4 * WIDTH, 8)


class Lanes(NamedTuple):
    """Some classes of a row, from start. Where the row ends inside the last part, that
    part starts earlier, and so many of its classes were seen by the one before it."""

    start: int
    groups: int
    parts: int
    width: int
    seen: int

    @property
    def number(self) -> int:
        return self.groups * self.width

    @property
    def classes(self) -> int:
        return self.number * self.parts


def lanes_of(shape: tuple[int, ...], axis: int, cut: Cut = OF_GIVEN) -> list[Lanes]:
    """All of a row: in one group, or in several and what is left over in one more."""
    classes, inner = shape[axis], math.prod(shape[axis + 1 :])
    most_parts, width, one_lane = cut
    while classes < 2 * width and width > WIDTH:
        width //= 2
    width = -(-width // inner)
    # A few classes are a lane, and neighbours the rows.
    if classes < 2 * width or classes <= one_lane:
        return [Lanes(0, 1, classes, 1, 0)]
    blocks = classes // width

    def one_group(start: int) -> Lanes:
        parts = -(-(classes - start) // width)
        return Lanes(start, 1, parts, width, parts * width - (classes - start))

    def rest(parts: int) -> int:
        return classes - blocks // parts * parts * width

    def cost(parts: int) -> int:  # in classes
        of_rest = classes // 8 + 4 * rest(parts) if rest(parts) else 0
        return 3 * (blocks // parts) * width + of_rest

    if one_group(0).parts <= most_parts:
        return [one_group(0)]
    # Two groups or more, or what is left over would belong to the one.
    parts = min(range(1, min(blocks // 2, most_parts) + 1), key=cost)
    lanes = Lanes(0, blocks // parts, parts, width, 0)
    return [lanes, one_group(lanes.classes)] if rest(parts) else [lanes]


def part_of(v: Array, k: int, lanes: Lanes, axis: int) -> Array:
    """Part k of all groups: the axis of the classes becomes one of groups and one of
    lanes."""
    if v.shape[axis] == 1:
        return jax.lax.expand_dims(v, (axis,))
    start, width, classes = lanes.start, lanes.width, v.shape[axis]
    if lanes.groups == 1:
        first = first_of_part(k, lanes, classes)
        v = jax.lax.slice_in_dim(v, first, first + width, axis=axis)
        return jax.lax.expand_dims(v, (axis,))
    # From different slices of the row, where there is room for them.
    room = classes - start - lanes.classes
    shift = min(k // PLACES_OF_A_SLICE, room)
    start = start + shift
    v = jax.lax.slice_in_dim(v, start, start + lanes.classes, axis=axis)
    inner = v.shape[axis + 1 :]
    v = v.reshape(*v.shape[:axis], lanes.groups, lanes.parts * width, *inner)
    first = k * width - shift
    return jax.lax.slice_in_dim(v, first, first + width, axis=axis + 1)


def first_of_part(k: int, lanes: Lanes, classes: int) -> int:
    """The class of the first lane that part k has."""
    first = lanes.start + k * lanes.width
    # A last part that would end outside starts earlier.
    return min(first, classes - lanes.width) if lanes.groups == 1 else first


def steps_of_lanes(lanes: Lanes, ndim: int, axis: int, of_group: int) -> Array:
    """of_group g + l of lane l of group g, for an array of ndim + 1 axes."""
    shape = [1] * (ndim + 1)
    shape[axis], shape[axis + 1] = lanes.groups, lanes.width
    group, lane = (
        jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (axis, axis + 1)
    )
    return of_group * group + lane


def unseen(v: Array, k: int, lanes: Lanes, axis: int, otherwise: float) -> Array:
    """Part k without what other parts have seen."""
    if k < lanes.parts - 1 or lanes.seen == 0:
        return v
    lane = jax.lax.broadcasted_iota(jnp.int32, v.shape, axis + 1)
    return jnp.where(lane < lanes.seen, otherwise, v)


def of_lanes(
    reducer: Callable[[Any, Any], Any], f: Callable[[int], Any], lanes: Lanes
) -> Any:
    """What the reducer makes of f of every part."""
    return functools.reduce(reducer, map(f, range(lanes.parts)))


def sum_of_lanes(v: Array, axis: int) -> Array:
    """The sum over the groups and the lanes of a row; one axis of size 1 is left.

    Of a few lanes as a product with ones, in a quarter of the time of a sum: 65536 rows
    of 8 lanes take 0.15 ms in place of 0.53.
    """
    lanes = v.shape[axis : axis + 2]
    if axis + 2 < v.ndim or not 1 < math.prod(lanes) <= FEW_LANES:
        return jnp.squeeze(jnp.sum(v, (axis, axis + 1), keepdims=True), axis)
    both = (axis, axis + 1), (0, 1)
    total = jax.lax.dot_general(
        v, jnp.ones(lanes, v.dtype), (both, ((), ())), jax.lax.Precision.HIGHEST
    )
    return jnp.expand_dims(total, axis)


def apart(numbers: Array, witness: Array) -> Array:
    """The same numbers, except for NaN where the witness is NaN already.

    A choice, for the sake of XLA's CPU backend: a sum's kernel grows into arithmetic
    before and after it, as far as the next comparison, and has what it cannot take in,
    and what it broadcasts, written to memory as whole arrays. Here it ends.
    """
    return jnp.where(jnp.isnan(witness), jnp.nan, numbers)


def computed_once(numbers: Array, witness: Array) -> Array:
    """As apart, of a whole row that is one lane.

    XLA computes what is cheap by its rules anew in every kernel that uses it, and a sum
    over a lane is cheap by these, whatever is summed. A quotient is not.
    """
    return numbers / jnp.where(jnp.isnan(witness), jnp.nan, 1)
