"""softargmax, the smooth form of argmax.

    A = sum_i p_i a_i    with p = softmax(x / tau) and positions a, or the index

The rule saves the arguments and two numbers a row, where autodiff would save p, and
subtracts nothing that is nearly equal: when the model is sure, A is the position of the
maximum up to rounding, and the derivatives are made of its distance to the others.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    as_array,
    as_axes,
    as_broadcastable,
    as_flag,
    as_mask,
    as_real,
    as_temperature,
    is_of,
)
from jaxsoft._core.dtypes import accumulation_dtype, cast, clip_tangent
from jaxsoft._core.logits import shifted
from jaxsoft._core.mesh import broadcast_like
from jaxsoft._hints import with_hints
from jaxsoft._passes.product import product
from jaxsoft._row import Row, computed_anew, logits_of, row_rule, summarized


@with_hints
def softargmax(
    x: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    positions: ArrayLike | None = None,
    keepdims: bool = False,
) -> Array:
    """Soft argmax: the expected index, or position, under the softmax of x.

    ``A = sum(p * positions)`` with ``p = softmax(x / temperature)``.

    Args:
        x: real array of any shape.
        axis: axis or axes to reduce; None reduces all. Over several axes the index is
            the flat one, in the order given.
        where: boolean, broadcastable to ``x``; True includes an entry.
        temperature: in the units of ``x``, as in `softmax`. At 0 the result is the
            position of the maximum, the mean of them at ties; below 0 of the minimum.
        positions: a number for every entry, in place of its index: broadcastable to
            ``x``, or with a single ``axis`` an array of its length. May be
            differentiated.
        keepdims: keep the reduced axes with size 1.

    Returns:
        The reduced array in the units of ``positions``, and in the dtype to which
        ``x`` and floating ``positions`` are promoted. Half precision is computed in
        float32, but has no place for an index above 2048 (in bfloat16 256): there give
        ``x`` or ``positions`` in float32.

    Raises:
        TypeError: ``x`` or ``positions`` is not an array of real numbers, ``where`` is
            not boolean, ``axis`` is not an int, ``temperature`` is complex.
        ValueError: ``axis`` is out of range or repeated; ``where``, ``temperature`` or
            ``positions`` does not fit ``x``.

    Gradient:
        dA/dx_i = p_i (positions_i - A) / temperature; dA/dpositions = p.
        dA/dtemperature = -covariance of positions and x under p, divided by
        temperature^2. The first and the last are 0 at temperature 0, where they diverge
        at ties. Derivatives too large for the dtype of ``x`` or of the temperature stop
        at its largest finite number. Residuals: the arguments and two numbers per row.

    Edge cases:
        Nothing included, or all -inf: 0 with gradient 0. Entries +inf share the
        probability equally. The position of an excluded entry may be anything. NaN only
        if an included entry, or its position, is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x = jnp.array([1.0, 5.0, 5.0])
        >>> jaxsoft.softargmax(x)
        Array(1.4863878, dtype=float32)
        >>> jaxsoft.softargmax(x, temperature=0.0)
        Array(1.5, dtype=float32)
        >>> print(jaxsoft.softargmax(x, positions=jnp.array([-10.0, 0.0, 20.0])))
        9.818504
    """
    name = "softargmax"
    x = as_array(name, "x", x)
    given, x = x.dtype, as_real(name, "x", x)
    as_flag(name, "keepdims", keepdims)
    axes = as_axes(name, axis, x.ndim)
    where = as_mask(name, "where", where, x.shape)
    tau = as_temperature(name, temperature, x, axes)
    dtype = x.dtype
    if positions is not None:
        positions = as_array(name, "positions", positions)
        if is_of(positions.dtype, jnp.floating):
            # Strict promotion too allows a result that is wider than x.
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(given, positions.dtype)
        positions = _as_positions(name, positions, x, axes)
    return _softargmax_jit(x, positions, where, tau, axes, keepdims, dtype)


@functools.partial(jax.jit, static_argnames=("axes", "keepdims", "dtype"))
def _softargmax_jit(x, positions, where, temperature, axes, keepdims, dtype):
    x = cast(x, dtype)
    positions = None if positions is None else broadcast_like(positions, x)
    a = _softargmax(axes, logits_of(x, where, temperature, axes), positions)
    a = cast(a, dtype)
    return a if keepdims else jnp.squeeze(a, axes.dims)


# For any number c, since sum_j p_j = 1,
#     dz_i = g p_i (h_i - sum_j p_j h_j) / t    with h = a - c
#     dtau = -sigma sum_i dz_i d_i              da = g p
# For c the position of an entry with p > 1/2, h is 0 there, and the sum runs over the
# others: a_i - A would be a difference of nearly equal numbers.
def _softargmax_value(axes, logits, positions):
    row, _ = summarized(axes, logits)
    e = row.exact_e
    a = _positions_that_count(positions, e, axes)
    return row.sum(e * a) / (1 + row.s), (row.m, row.s)


def _softargmax_pullback(axes, logits, positions, kept, g):
    row = Row(axes, computed_anew(logits), *kept)
    p = row.exact_e / (1 + row.s)
    a = _positions_that_count(positions, p, axes)
    h = a - row.sum(jnp.where(p > 0.5, a, 0))
    slope = p * (h - row.sum(p * h))
    dx = row.to_x(clip_tangent(row.over_t(product(g, slope)), p.dtype))
    dtemperature = dpositions = None
    if logits.temperature is not None:
        d = jnp.where(p == 0, 0, shifted(row.z, row.m, row.t))
        dtemperature = product(g, -row.sum(slope * d) * row.per_t) * row.sign
    if positions is not None:
        shared = [i for i, n in enumerate(positions.shape) if n != p.shape[i]]
        dpositions = jnp.sum(product(g, p), shared, keepdims=True)
    return dx, dtemperature, dpositions


_softargmax = row_rule(_softargmax_value, _softargmax_pullback)


def _positions_that_count(positions, p, axes):
    """0 where p is 0: the position of an entry that does not count may be infinite."""
    if positions is not None:
        return jnp.where(p == 0, 0, positions)
    index, stride = jnp.zeros((1,) * p.ndim, p.dtype), 1
    for axis in reversed(axes.dims):
        along_axis = [n if i == axis else 1 for i, n in enumerate(p.shape)]
        index = index + stride * jax.lax.broadcasted_iota(p.dtype, along_axis, axis)
        stride *= p.shape[axis]
    return index


def _as_positions(function, positions, x, axes):
    """In the accumulation dtype of x, with its rank."""
    positions = as_real(function, "positions", positions)
    positions = cast(positions, accumulation_dtype(x.dtype))
    if positions.ndim == 1 and len(axes.dims) == 1:
        (axis,) = axes.dims
        if positions.shape != (x.shape[axis],):
            raise ValueError(
                f"{function}: positions of one dimension must have the length of axis "
                f"{axis} of x, {x.shape}; got {positions.shape}"
            )
        others = [i for i in range(x.ndim) if i != axis]
        return jax.lax.expand_dims(positions, others)
    return as_broadcastable(
        function, "positions", positions, x.shape, "the shape of x,"
    )
