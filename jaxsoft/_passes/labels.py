"""The entries of a row at several of its classes, and the transpose.

A row of x has C classes, and K of them are named by their indices; -1 names none. A CPU
gathers and scatters. On accelerators, where that is slow, every class is compared with
all K indices, inside the kernel that reads or writes the row.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.mesh import Axes
from jaxsoft._passes.primitive import Pass

LAST_AXIS = Axes((-1,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Classes:
    count: int


def _gathered(_, fixed, x):
    index, _ = fixed
    found = jnp.take_along_axis(x, jnp.maximum(index, 0), -1)
    return jnp.where(index < 0, 0, found)


def _scattered(_, fixed, v):
    index, classes = fixed
    rows = jnp.arange(v.size // v.shape[-1])[:, None]
    flat = index.reshape(-1, index.shape[-1])
    flat = jnp.where(flat < 0, classes.count, flat)
    dx = jnp.zeros((len(rows), classes.count), v.dtype)
    dx = dx.at[rows, flat].add(v.reshape(flat.shape), mode="drop")
    return dx.reshape(*v.shape[:-1], classes.count)


def _hits(index, classes):
    """(..., K, C)"""
    shape = (*index.shape, classes.count)
    return jax.lax.broadcasted_iota(jnp.int32, shape, index.ndim) == index[..., None]


def _picked(_, fixed, x):
    return jnp.sum(jnp.where(_hits(*fixed), x[..., None, :], 0), -1)


def _spread(_, fixed, v):
    return jnp.sum(jnp.where(_hits(*fixed), v[..., None], 0), -2)


_at_labels = Pass(
    "at_labels",
    _gathered,
    merged=_picked,
    in_block=_picked,
    transpose=lambda axes, fixed, t, _: _to_labels(axes, fixed, t),
)
_to_labels = Pass(
    "to_labels",
    _scattered,
    merged=_spread,
    in_block=_spread,
    transpose=lambda axes, fixed, t, _: _at_labels(axes, fixed, t),
)


def at_labels(x: Array, index: Array) -> Array:
    """x of shape (..., C) at the indices of shape (..., K); 0 at the index -1."""
    return _at_labels(LAST_AXIS, (index, _Classes(x.shape[-1])), x)


def to_labels(v: Array, index: Array, classes: int) -> Array:
    """(..., C), 0 but for the v of shape (..., K), added at their indices."""
    return _to_labels(LAST_AXIS, (index, _Classes(classes)), v)
