"""One rule for dtypes, in all functions and for every argument.

What is computed on (logits, targets, weights in a logsumexp, hidden states, the head)
decides on the dtype of the result; options, as a temperature, do not. Integers count as
float32. Losses are float32 where that is half precision. A gradient has the dtype of
its argument.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import LIKE_LOGITS, Law, each, every_law, problem

BF16, F16, F32, I32 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32
# Of the data, one after the other, and of the options.
COMBINATIONS = [
    ((BF16,), F32),
    ((F32,), BF16),
    ((F16,), BF16),
    ((I32,), BF16),
    ((BF16, F32), F16),
    ((F32, BF16), F32),
    ((BF16, F16), F32),
    ((I32, BF16), F32),
]
# Probabilities are data of the binary loss alone, whose labels they are.
DATA = (*LIKE_LOGITS, "lower", "upper")


def is_data(law: Law, name: str, kind: str) -> bool:
    return kind in DATA or name == "positions"


def in_dtypes(law: Law, of_data: Any, of_options: Any) -> list[Any]:
    """The arguments of `problem` as shapes; the data take turns."""
    names = [*["" for _ in law.positional], *law.keywords]
    turn = 0
    arguments = []
    for name, kind, a in zip(names, law.kinds, problem(law)[1], strict=True):
        dtype = a.dtype
        if np.issubdtype(dtype, np.floating):
            if is_data(law, name, kind):
                dtype = of_data[turn % len(of_data)]
                turn += 1
            else:
                dtype = of_options
        arguments.append(jax.ShapeDtypeStruct(a.shape, dtype))
    return arguments


def expected(law: Law, arguments: list[Any]) -> Any:
    names = [*["" for _ in law.positional], *law.keywords]
    of = [
        a.dtype
        for name, kind, a in zip(names, law.kinds, arguments, strict=True)
        if is_data(law, name, kind)
    ]
    dtype = jnp.promote_types(of[0], of[-1])
    return law.result_dtype(dtype if jnp.issubdtype(dtype, jnp.floating) else F32)


@every_law
def test_the_dtype_of_a_result(law: Law):
    with jax.numpy_dtype_promotion("standard"):
        for of_data, of_options in COMBINATIONS:
            arguments = in_dtypes(law, of_data, of_options)
            result = jax.eval_shape(law.call, *arguments)
            what = f"{law.name} of {[str(a.dtype) for a in arguments]}"
            assert result.dtype == expected(law, arguments), what
