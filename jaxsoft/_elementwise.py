"""What the functions of single numbers share: the temperature of every entry, half
precision, and the form of their rules."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxsoft._checks import as_broadcastable, as_real, is_number
from jaxsoft._core.dtypes import accumulation_dtype, cast
from jaxsoft._passes.product import product


def as_elementwise_temperature(
    function: str, temperature: ArrayLike, x: Array
) -> Array | None:
    """None for the number 1, else an array with the rank of x."""
    if is_number(temperature) and temperature == 1:
        return None
    array = as_real(function, "temperature", temperature)
    return as_broadcastable(function, "temperature", array, x.shape, "the shape of x,")


@functools.partial(jax.jit, static_argnums=0)
def elementwise(
    core: Callable[..., Array], arrays: tuple[Array, ...], temperature: Array | None
) -> Array:
    """core(*arrays, temperature) in the accumulation dtype, back in theirs."""
    dtype = arrays[0].dtype
    wide = accumulation_dtype(dtype)
    if temperature is not None:
        temperature = cast(temperature, wide)
    return cast(core(*(cast(a, wide) for a in arrays), temperature), dtype)


def rule_from_partials(function: Any, *partials: Callable[..., Any]) -> None:
    """The rule of an elementwise custom_jvp function: one partial derivative for each
    of its arguments.

    Nothing is computed or saved for those that do not move. An entry whose tangent or
    cotangent is 0 has the derivative 0, also where the partial is infinite or NaN.
    """

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        out = function(*primals)
        terms = [
            _times_partial(tangent, partial(*primals))
            for partial, tangent in zip(partials, tangents, strict=True)
            if tangent is not None and not isinstance(tangent, SymbolicZero)
        ]
        if not terms:
            return out, jnp.zeros_like(out)
        return out, jnp.broadcast_to(functools.reduce(jnp.add, terms), out.shape)

    function.defjvp(rule, symbolic_zeros=True)


def _times_partial(tangent: Array, partial: Array | float) -> Array:
    partial = jnp.asarray(partial, tangent.dtype)
    rank = max(tangent.ndim, partial.ndim)
    return product(
        *(jax.lax.expand_dims(v, range(rank - v.ndim)) for v in (tangent, partial))
    )


@jax.custom_jvp
def log1p_exp(z: Array) -> Array:
    """log(1 + exp(z)), with the digits of exp(z) where z is very negative.

    The smooth maximum of z and 0 at temperature 1, several times faster than the pair
    of any numbers at any temperature in `_smooth.pair`.
    """
    return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))


@jax.custom_jvp
def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


# The sigmoid is finite where z is infinite. JAX's own derivative of it has the factor
# 1 - sigmoid(z), without digits at large z.
rule_from_partials(log1p_exp, _sigmoid)
rule_from_partials(_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z))


@jax.custom_jvp
def capped(z: Array, softcap: Array) -> Array:
    """c tanh(z/c), which is z where z/c is small: up to an infinite cap."""
    linear = float(jnp.finfo(z.dtype).eps) ** 0.5 / 4
    curved = softcap * jnp.tanh(z / softcap)
    return jnp.where(jnp.abs(z) <= softcap * linear, z, curved)


# With u = z/c: dz has the factor sech(u)^2, and dc has tanh(u) - u sech(u)^2. The forms
# 1 - tanh(u)^2 and u (1 - tanh(u)^2) lose their digits at large u, and are NaN at
# infinity; the difference loses its digits at small u, where its Taylor series has
# converged.
def _slope_in_z(z, c):
    return 1 / jnp.cosh(_over_cap(z, c)) ** 2


def _slope_in_cap(z, c):
    u, sech2 = _over_cap(z, c), _slope_in_z(z, c)
    is_small = jnp.abs(u) < (0.05 if u.dtype == jnp.float64 else 0.25)
    small = jnp.where(is_small, u, 0)
    series = jnp.zeros_like(u)
    for coefficient in _SLOPE_SERIES:
        series = coefficient + small**2 * series
    direct = jnp.tanh(u) - jnp.where(sech2 == 0, 0, u) * sech2
    return jnp.where(is_small, small**3 * series, direct)


def _over_cap(z, c):
    return jnp.where(jnp.isinf(c), 0, z / c)


# tanh(u) - u sech(u)^2 over u^3, in powers of u^2 from the highest.
_SLOPE_SERIES = (
    -12 * 21844 / 6081075,
    10 * 1382 / 155925,
    -8 * 62 / 2835,
    6 * 17 / 315,
    -4 * 2 / 15,
    2 / 3,
)

rule_from_partials(capped, _slope_in_z, _slope_in_cap)
