"""A product that is linear in one factor, and 0 where that is 0.

A row whose cotangent is 0 has the derivative 0, also where a factor is infinite or NaN,
as in a row of padding. A comparison of the cotangent with 0 has no transpose, so the
product is a pass.
"""

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
