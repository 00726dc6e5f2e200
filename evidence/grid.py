"""Values, gradients and tangents of a function on the grid of awkward points."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evidence.points import ON_GRID


def with_argument(f, arguments, position, argument):
    return f(*arguments[:position], argument, *arguments[position + 1 :])


def everything(law: Any, call: Callable[..., Any]) -> Callable[[Any], dict[str, Any]]:
    """{what: numbers} of the arguments of a law, for a function of them."""
    moving = [i for i, kind in enumerate(law.kinds) if kind in ON_GRID]
    rng = np.random.default_rng(9)

    # Between 0 and 1: a derivative that is rightly infinite meets no -infinity.
    def between_0_and_1(like):
        return jnp.asarray(rng.random(like.shape)).astype(like.dtype)

    def results(given):
        def f(*arguments):
            every = list(given)
            for position, argument in zip(moving, arguments):
                every[position] = argument
            return call(*every)

        arguments = [given[i] for i in moving]
        value, pull = jax.vjp(f, *arguments)
        named = {"value": value}
        gradients = pull(between_0_and_1(value))
        for i, (argument, gradient) in enumerate(zip(arguments, gradients)):
            in_one = functools.partial(with_argument, f, arguments, i)
            tangent = between_0_and_1(argument)
            of = f"{law.kinds[moving[i]]} {moving[i]}"
            named[f"tangent in {of}"] = jax.jvp(in_one, (argument,), (tangent,))[1]
            named[f"gradient in {of}"] = gradient
        return named

    return results


def nan_rows(numbers: Any) -> np.ndarray:
    """Which rows have a NaN."""
    numbers = np.asarray(numbers, np.float64)
    return np.isnan(numbers).reshape(len(numbers), -1).any(axis=-1)
