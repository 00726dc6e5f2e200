"""A smooth function at many numbers, through one program, and the oracle's there.

Arguments are rows: arrays of shape (n, k), and a result of row i is that of row i of
them all. The last is the temperature. Elementwise functions have rows of one number.

The formulas are those of the oracle, at 150 digits and with exponents without limit,
and their derivatives are central differences of them. A function is compiled once for
each dtype: all numbers pass through that program, `SIZE` rows at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import as_users_have_it

import jaxsoft

SIZE = 512
TEMPERATURES = [0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3]

every_dtype = pytest.mark.parametrize(
    "dtype",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), "float16"],
)


def function_of_rows(module: Any, name: str) -> Callable[..., Any]:
    """Of jaxsoft or of the oracle. Positions lie between the logits and temperature."""

    def call(*arguments):
        *numbers, t = arguments
        positions = {"positions": numbers.pop()} if name == "softargmax" else {}
        return getattr(module, name)(*numbers, temperature=t, **positions)

    return call


@functools.cache
def program(name: str) -> Any:
    def value_and_slopes(*arguments):
        value, pull = jax.vjp(function_of_rows(jaxsoft, name), *arguments)
        return value, *pull(jnp.ones_like(value))

    return as_users_have_it(jax.vmap(value_and_slopes))


def as_float64(v: Any) -> np.ndarray:
    return np.asarray(v).astype(np.float64)


def in_dtype(dtype: Any, *arguments: Any) -> list[jax.Array]:
    """The numbers in that dtype, and the temperature in float32."""
    *numbers, t = arguments
    with np.errstate(over="ignore"):  # 1e8 is infinite in float16
        return [*(jnp.asarray(v, dtype) for v in numbers), jnp.asarray(t, "float32")]


def value_and_slopes(name: str, *arguments: Any, dtype: Any = "float32") -> Any:
    """jaxsoft's value and its derivatives in every argument."""
    given = in_dtype(dtype, *arguments)
    count = len(given[0])
    size = -(-count // SIZE) * SIZE
    padded = [jnp.asarray(np.resize(v, (size, v.shape[1]))) for v in given]
    parts = [
        program(name)(*(v[start : start + SIZE] for v in padded))
        for start in range(0, size, SIZE)
    ]
    return [np.concatenate([*map(np.asarray, p)])[:count] for p in zip(*parts)]


def meaning(name: str, *arguments: Any, dtype: Any = "float32") -> list[np.ndarray]:
    """The oracle's value and derivatives, for the numbers as jaxsoft sees them."""
    *numbers, t = map(as_float64, in_dtype(dtype, *arguments))
    # Infinite bounds are farther away than what they bound.
    fars = [oracle.FAR] + [oracle.FAR ** (len(numbers) - 1)] * 2
    numbers = [oracle.at_limit(v, far) for v, far in zip(numbers, fars)]

    def f(*arguments, temperature):
        return function_of_rows(oracle, name)(*arguments, temperature)

    return oracle.value_and_slopes(f, numbers, t)


def in_range(wanted: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """Values round to infinity; derivatives stop at the largest number of the dtype."""
    largest = float(jnp.finfo(dtype).max)
    beyond = np.inf if what == "value" else largest
    return np.where(np.abs(wanted) > largest, np.copysign(beyond, wanted), wanted)
