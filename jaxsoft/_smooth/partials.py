"""What the elementwise functions share: the temperature of every entry, half precision,
and the form of their rules."""

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
    of its arguments. Nothing is computed or saved for those that do not move."""

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        out = function(*primals)
        terms = [
            partial(*primals) * tangent
            for partial, tangent in zip(partials, tangents, strict=True)
            if tangent is not None and not isinstance(tangent, SymbolicZero)
        ]
        if not terms:
            return out, jnp.zeros_like(out)
        return out, jnp.broadcast_to(functools.reduce(jnp.add, terms), out.shape)

    function.defjvp(rule, symbolic_zeros=True)
