"""Products that are linear in one factor, in forms that JAX could not transpose.

A row whose cotangent is 0 has the derivative 0, also where a factor is infinite or NaN,
as in a row of padding. A comparison of the cotangent with 0 has no transpose, so the
product is a pass.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import times
from jaxsoft._core.mesh import Axes
from jaxsoft._passes.primitive import Pass


def _transpose(axes, factor, t, like):
    t = _product(axes, factor, t)
    shared = [i for i, n in enumerate(like.shape) if n != t.shape[i]]
    return jnp.sum(t, shared, keepdims=True)


_product = Pass("product", lambda _, factor, g: times(g, factor), transpose=_transpose)


def product(g: Array, factor: Array | float) -> Array:
    """g factor, linear in g; 0 where g is 0."""
    return _product(Axes(()), jnp.asarray(factor), g)


# Scaled in this many parts.
PARTS = 32


def _plain_scaled(_, v, g):
    return (g * v.astype(g.dtype)).astype(v.dtype)


# XLA writes the carry of a loop in place, and any other result beside what it reads.
def _scaled_in_place(axes, v, g):
    rows = len(v)
    size = max(-(-rows // PARTS), 1)

    def scale(i, v):
        start = jnp.minimum(i * size, rows - size)
        part = jax.lax.dynamic_slice_in_dim(v, start, size)
        # Under jax.vmap every element has its own.
        own = g if len(g) == 1 else jax.lax.dynamic_slice_in_dim(g, start, size)
        # The last part starts early, with rows that are scaled already.
        iota = jax.lax.broadcasted_iota(jnp.int32, (size, *[1] * (v.ndim - 1)), 0)
        own = jnp.where(start + iota < i * size, 1, own)
        part = _plain_scaled(axes, part, own)
        return jax.lax.dynamic_update_slice_in_dim(v, part, start, 0)

    return jax.lax.fori_loop(0, -(-rows // size), scale, v)


_scaled = Pass("scaled", _plain_scaled, merged=_scaled_in_place)


def scaled(v: Array, g: Array) -> Array:
    """g v for a number g, in the dtype of v: on accelerators in the memory of a v that
    nobody else reads."""
    if v.ndim == 0 or v.size == 0:
        return _plain_scaled(Axes(()), v, g)
    return _scaled(Axes(()), v, jnp.reshape(g, (1,) * v.ndim))
