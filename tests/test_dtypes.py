"""One rule for dtypes, in all functions and for every argument.

What is computed on (logits, targets, weights in a logsumexp, positions, hidden states,
the head) decides on the dtype of the result: the widest of them does. Options, as a
temperature, do not. Integers count as float32. Losses are float32 where that dtype is
of half precision.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from laws import LIKE_LOGITS, Law, every_law, problem

BF16, F16, F32, I32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32
# Of the data, one after the other, and of the options.
COMBINATIONS: list[tuple[tuple[Any, ...], Any]] = [
    ((BF16,), F32),
    ((F32,), BF16),
    ((F16,), BF16),
    ((I32,), BF16),
    ((BF16, F32), F16),
    ((F32, BF16), F32),
    ((BF16, F16), F32),
    ((I32, BF16), F32),
]


def are_data(law: Law) -> list[bool]:
    names = [*["" for _ in law.positional], *law.keywords]
    return [
        kind in LIKE_LOGITS or name == "positions"
        for name, kind in zip(names, law.kinds, strict=True)
    ]


def in_dtypes(law: Law, of_data: Any, of_options: Any) -> list[Any]:
    """The arguments of `problem` as shapes; the data take turns."""
    arguments, turns = [], itertools.cycle(of_data)
    for a, is_data in zip(problem(law)[1], are_data(law), strict=True):
        dtype = a.dtype
        if np.issubdtype(dtype, np.floating):
            dtype = next(turns) if is_data else of_options
        arguments.append(jax.ShapeDtypeStruct(a.shape, dtype))
    return arguments


def expected(law: Law, arguments: list[Any]) -> Any:
    of = [a.dtype for a, data in zip(arguments, are_data(law), strict=True) if data]
    dtype = functools.reduce(jnp.promote_types, of)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = F32
    # Its law is of float32 positions, whatever the logits.
    return dtype if law.function == "softargmax" else law.result_dtype(dtype)


@every_law
def test_the_dtype_of_a_result(law: Law):
    with jax.numpy_dtype_promotion("standard"):
        for of_data, of_options in COMBINATIONS:
            arguments = in_dtypes(law, of_data, of_options)
            result = jax.eval_shape(law.call, *arguments)
            what = f"{law.name} of {[str(a.dtype) for a in arguments]}"
            assert result.dtype == expected(law, arguments), what
