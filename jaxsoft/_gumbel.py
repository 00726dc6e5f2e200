"""gumbel_softmax: a sample of a categorical distribution that can be differentiated.

With independent Gumbel noise G_i, argmax_i (x_i + G_i) is a sample of softmax(x). The
softmax of x + G in its place is a relaxed sample, which has a derivative; as the
temperature goes to 0 it becomes the sample.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import (
    Axis,
    as_axes,
    as_flag,
    as_key,
    as_mask,
    as_real,
    as_temperature,
)
from jaxsoft._core.dtypes import accumulation_dtype, cast
from jaxsoft._core.logits import Logits, masked_logits, nan_where
from jaxsoft._core.mesh import Axes
from jaxsoft._hints import with_hints
from jaxsoft._smooth.straight_through import straight_through
from jaxsoft._softmax import softmax


@with_hints
def gumbel_softmax(
    key: Array,
    logits: ArrayLike,
    axis: Axis = -1,
    *,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    hard: bool = False,
) -> Array:
    """A relaxed sample of softmax(logits), or a one-hot sample with its derivative.

    ``y = softmax((logits + G) / temperature)`` with Gumbel noise G. The class of its
    largest entry is distributed as softmax(logits), at every temperature above 0; the
    smaller the temperature, the nearer y is to the one-hot vector of that class.

    Args:
        key: a key of `jax.random`.
        logits: of any shape; every row has noise of its own.
        axis: axis or axes of the classes; None takes all.
        where: boolean, broadcastable to ``logits``; True includes a class. An excluded
            class has probability 0 exactly, and is never drawn.
        temperature: of the relaxation, in the units of the logits; larger is softer.
            Broadcastable to ``logits`` reduced over ``axis`` (kept with size 1); may be
            traced and differentiated. At 0 y is the one-hot sample; below 0 the softmax
            favours the minimum of logits + G.
        hard: whether the value is the one-hot vector of the largest entry of y, bit for
            bit, with the derivatives of y: the straight-through estimator.

    Returns:
        The shape and dtype of ``logits``; integers give floats. Half precision is
        computed in float32, noise included.

    Raises:
        TypeError: ``key`` is not one key, ``logits`` is not an array of real numbers,
            ``where`` is not boolean, ``axis`` is not an int, ``hard`` is not a bool.
        ValueError: ``axis`` is out of range or repeated; ``where`` or ``temperature``
            would enlarge ``logits``.

    Gradient:
        That of `softmax` at logits + G, with the noise held fixed; also for a hard
        sample, in both modes and to all orders. Residuals: logits + G.

    Edge cases:
        A row without a class, or of -inf alone: all 0 with gradient 0. Entries +inf
        share y equally; a hard sample is one of them, each with the same probability.
        NaN only in rows where an included logit is NaN.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
        >>> keys = jax.random.split(jax.random.key(0), 10_000)
        >>> draw = jax.vmap(lambda key: jaxsoft.gumbel_softmax(key, logits, hard=True))
        >>> samples = draw(keys)
        >>> print(samples[0], jnp.abs(samples.mean(0) - jnp.exp(logits)).max() < 0.02)
        [0. 1. 0.] True

    References:
        E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax",
        ICLR 2017. C. J. Maddison, A. Mnih, Y. W. Teh, "The concrete distribution: a
        continuous relaxation of discrete random variables", ICLR 2017.
    """
    name = "gumbel_softmax"
    key = as_key(name, key)
    logits = as_real(name, "logits", logits)
    axes = as_axes(name, axis, logits.ndim)
    where = as_mask(name, "where", where, logits.shape)
    tau = as_temperature(name, temperature, logits, axes)
    as_flag(name, "hard", hard)
    return _gumbel_softmax_jit(key, logits, where, tau, axes, hard)


@functools.partial(jax.jit, static_argnames=("axes", "hard"))
def _gumbel_softmax_jit(key, x, where, temperature, axes, hard):
    wide = accumulation_dtype(x.dtype)
    # Of 32 random bits in the plain way, -log(-log(u)) would end at 17.
    noise = jax.random.gumbel(key, x.shape, wide, mode="high")

    def relaxed(x, temperature):
        tau = 1.0 if temperature is None else temperature
        y = softmax(cast(x, wide) + noise, axes.dims, where, temperature=tau)
        return cast(y, x.dtype)

    def one_hot(x, temperature):
        z = masked_logits(Logits(cast(x, wide) + noise, where, temperature))
        return _one_hot_of_maximum(z, noise, axes).astype(x.dtype)

    y = straight_through(one_hot, relaxed) if hard else relaxed
    return y(x, temperature)


def _one_hot_of_maximum(z: Array, noise: Array, axes: Axes) -> Array:
    """1 at the first maximum of every row, and of +infs at that of the most noise."""
    infinite = z == jnp.inf
    has_infinite = jnp.any(infinite, axes.dims, keepdims=True)
    rank = jnp.where(has_infinite, jnp.where(infinite, noise, -jnp.inf), z)
    # The classes as one axis, the last.
    last = tuple(range(-len(axes.dims), 0))
    moved = jnp.moveaxis(rank, axes.dims, last)
    rows = moved.shape[: z.ndim - len(last)]
    flat = moved.reshape(*rows, axes.count_here(z.shape))
    if flat.shape[-1] == 0:
        return jnp.zeros_like(z)
    best = jnp.argmax(flat, axis=-1, keepdims=True)
    hit = best == jax.lax.broadcasted_iota(best.dtype, flat.shape, len(rows))
    hit = jnp.moveaxis(hit.reshape(moved.shape), last, axes.dims)
    is_nan = jnp.any(jnp.isnan(z), axes.dims, keepdims=True)
    return jnp.where(hit & (z > -jnp.inf), 1, 0) + nan_where(is_nan, z.dtype)
