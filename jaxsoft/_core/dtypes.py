"""Conversions between dtypes whose derivatives do not overflow.

The derivative of a soft step at temperature tau is as large as 1/(4 tau): 2.5e5 at
tau = 1e-6, which float32 holds and float16 does not. Inside the library it is a float32
number. Here, where it leaves for the dtype of the input, it stops at the largest finite
number of that dtype instead of becoming infinite.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for half precision and narrower, else the dtype itself."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def cast(x: Array, dtype: DTypeLike) -> Array:
    """x in the given dtype. Its tangents and cotangents stop at the largest finite
    number of the narrower of the two dtypes."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        return _with_derivatives_within(x, jnp.dtype(dtype)).astype(dtype)
    if jnp.finfo(dtype).max > jnp.finfo(x.dtype).max:
        return _with_derivatives_within(x.astype(dtype), x.dtype)
    return x.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _with_derivatives_within(x, dtype):
    return x


@_with_derivatives_within.defjvp
def _with_derivatives_within_jvp(dtype, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    return _with_derivatives_within(x, dtype), clip_tangent(x_dot, dtype)


def within_range(v: Array, dtype: DTypeLike) -> Array:
    """v, stopped at the largest finite number of dtype."""
    largest = jnp.finfo(dtype).max.astype(v.dtype)
    return jnp.clip(v, -largest, largest)


def clip_tangent(tangent: Array, dtype: DTypeLike) -> Array:
    """A tangent or a cotangent, kept within the finite range of dtype.

    It counts as linear, and saturates in both directions of differentiation.
    """

    def limited(_, t):
        return within_range(t, dtype)

    # To solve 1 t = tangent is JAX's only linear operation that takes its transpose
    # from the caller, and that jit, vmap and both modes know. XLA sees one clamp.
    return jax.lax.custom_linear_solve(lambda t: t, tangent, limited, limited)


def widened(cotangent: Array, dtype: DTypeLike) -> Array:
    """The cotangent of a result that left in its dtype, in the wider dtype of a rule.

    The transpose takes a tangent the other way, and stops at the largest finite number.
    """
    if cotangent.dtype == dtype:
        return cotangent
    return clip_tangent(cotangent.astype(dtype), cotangent.dtype)
