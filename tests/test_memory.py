"""Temporary memory of a loss and its gradient: what XLA compiles, beside optax.

No device is needed to know it: `memory_analysis` tells what the compiled program
allocates beyond its arguments and results.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_optax import LOSSES
from laws import as_users_have_it

import jaxsoft

# Without them XLA writes the terms of a sum to memory.
pytestmark = pytest.mark.skipif(
    not jaxsoft.cpu_kernels(), reason="the compiled kernels are not there"
)

# Few rows of many classes, the batch of a language model, and many rows of few.
CASES = [name for name in LOSSES if name.startswith(("indices", "probabilities"))]
SHAPES = ((64, 4096), (8, 16, 512), (4096, 64))


# With a gradient of class indices: what the kernels and XLA pass from one to the other.
NUMBERS_PER_ROW = 12


def temporaries(f: Callable[..., Any], *arguments: Any) -> int:
    compiled = as_users_have_it(f).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def value_and_gradient(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    def both(logits, others):
        value, pull = jax.vjp(lambda x: loss(logits=x, **others), logits)
        return value, pull(jnp.ones_like(value))[0]

    return both


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, marks=[pytest.mark.slow] * is_slow)
        for dtype in ("float32", "bfloat16")
        for shape in SHAPES
        for is_slow in [dtype == "bfloat16" or shape == SHAPES[-1]]
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_never_more_than_optax(case, shape, dtype, record_property):
    names, ours, theirs = LOSSES[case]
    described = {
        "y": jax.ShapeDtypeStruct(shape[:-1], jnp.int32),
        "where": jax.ShapeDtypeStruct(shape, jnp.bool_),
        "q": jax.ShapeDtypeStruct(shape, dtype),
    }
    logits = jax.ShapeDtypeStruct(shape, dtype)
    others = {name: described[source] for name, source in names.items()}
    given = temporaries(value_and_gradient(ours), logits, others)
    limit = temporaries(value_and_gradient(theirs), logits, others)
    if case.startswith("indices"):
        limit = max(limit, NUMBERS_PER_ROW * 4 * int(np.prod(shape[:-1])))
    record_property(
        "bytes per logit",
        f"{given / logits.size:.2f} ({limit / logits.size:.2f} optax)",
    )
    assert given <= limit, f"{case}, {shape}, {dtype}: {given} bytes, optax {limit}"


@pytest.mark.parametrize("donated", [False, True])
def test_a_gradient_of_long_rows(donated, record_property):
    """Some numbers a row; and where the logits are donated a copy of them, since the
    kernels write beside what they read."""
    logits = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    labels = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    gradient = jax.grad(lambda x, y: jnp.sum(jaxsoft.cross_entropy(x, y)))
    program = as_users_have_it(gradient, donate_argnums=0 if donated else ())
    memory = program.lower(logits, labels).compile().memory_analysis()
    assert memory.alias_size_in_bytes == (4 * logits.size if donated else 0)
    numbers = memory.temp_size_in_bytes / 4
    record_property("numbers per row", f"{numbers / 64:.1f}")
    assert numbers <= NUMBERS_PER_ROW * 64 + donated * logits.size
