"""No NaN, whatever the logits and the temperature, in value, gradient or tangent."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import LAWS, Law

import jaxsoft

LOGITS = (0.0, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3, 1e8, -1e8, np.inf, -np.inf)
TEMPERATURES = (0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3, -1e-38, -1e-3, -1.0)
CLASSES = 3
# Every combination of logits, ties included, at every temperature.
ROWS = np.array(list(itertools.product(LOGITS, repeat=CLASSES)))
GRID_LOGITS = np.tile(ROWS, (len(TEMPERATURES), 1))
GRID_TEMPERATURES = np.repeat(TEMPERATURES, len(ROWS))[:, None]

STABLE_LAWS = [law for law in LAWS if law.by_row]


def on_grid(kind: str) -> bool:
    return kind in ("logits", "similarities", "temperature")


def grid_arguments(law: Law, dtype: str) -> list[jax.Array]:
    """Logits and temperatures of the grid; the other arguments are drawn."""
    with_temperature = "temperature" in law.kinds
    logits = GRID_LOGITS if with_temperature else ROWS
    drawn = law.draw(8, len(logits), CLASSES)
    shuffle = np.random.default_rng(8).permutation(len(logits))
    arguments = []
    for kind, argument in zip(law.kinds, drawn):
        if kind == "temperature":
            argument = GRID_TEMPERATURES
        if kind in ("logits", "similarities"):
            argument, logits = logits, logits[shuffle]
        if kind == "signed weights":
            argument = np.abs(argument)  # a negative sum has no logarithm
        arguments.append(argument)
    return law.cast(arguments, dtype)


def with_argument(f, arguments, position, argument):
    return f(*arguments[:position], argument, *arguments[position + 1 :])


# A law with all options has every dtype; the others, whose programs are parts of it,
# the two that differ most.
FULLEST = {
    law.function: law for law in sorted(STABLE_LAWS, key=lambda law: len(law.kinds))
}
CASES = [
    (law, dtype)
    for law in STABLE_LAWS
    for dtype in ("float32", "float16", "bfloat16", "float64")
    if dtype in ("float32", "float16") or law in FULLEST.values()
]


@pytest.mark.parametrize(
    ("law", "dtype"), CASES, ids=[f"{law.name}-{dtype}" for law, dtype in CASES]
)
@pytest.mark.usefixtures("x64")
def test_no_nan_on_the_grid(law: Law, dtype: str, record_property):
    given = grid_arguments(law, dtype)
    moving = [i for i, kind in enumerate(law.kinds) if on_grid(kind)]
    rng = np.random.default_rng(9)

    @jax.jit
    def everything(given):
        def f(*arguments):
            every = list(given)
            for position, argument in zip(moving, arguments):
                every[position] = argument
            return law.call(*every)

        # Between 0 and 1: a derivative that is rightly infinite meets no -infinity.
        def between_0_and_1(like):
            return jnp.asarray(rng.random(like.shape)).astype(like.dtype)

        arguments = [given[i] for i in moving]
        value, pull = jax.vjp(f, *arguments)
        tangents = []
        for i, argument in enumerate(arguments):
            in_one = functools.partial(with_argument, f, arguments, i)
            tangent = between_0_and_1(argument)
            tangents.append(jax.jvp(in_one, (argument,), (tangent,))[1])
        return value, tangents, pull(between_0_and_1(value))

    value, tangents, gradients = everything(given)
    results = {"value": value}
    # 1/t at t = 1e-38 and half precision leave the range of the numbers.
    in_range = np.ones(len(given[0]), bool)
    for position, tangent, gradient in zip(moving, tangents, gradients):
        results[f"jvp in {law.kinds[position]} {position}"] = tangent
        results[f"gradient in {law.kinds[position]} {position}"] = gradient
        if law.kinds[position] == "temperature":
            in_range = np.abs(GRID_TEMPERATURES[:, 0]) >= 1e-3
            in_range |= GRID_TEMPERATURES[:, 0] == 0
        if law.kinds[position] == "similarities":  # the slope is the similarity itself
            in_range &= np.all(np.isfinite(given[position]), axis=-1)

    for name, numbers in results.items():
        numbers = np.asarray(numbers, np.float64)
        bad = np.isnan(numbers).reshape(len(numbers), -1).any(axis=-1)
        if bad.any():
            first = int(np.argmax(bad))
            at = [
                np.asarray(a)[first] for a in given if np.ndim(a) and len(a) == len(bad)
            ]
            pytest.fail(f"{name}: NaN in {bad.sum()} rows, the first at {at}")
        if name.startswith("gradient") and dtype in ("float32", "float64"):
            chex.assert_tree_all_finite(numbers[in_range])
    counted = sum(np.size(numbers) for numbers in results.values())
    print(f"{law.name} {dtype}: {len(given[0])} rows, {counted} numbers")
    record_property("grid", f"{len(given[0])} rows, {counted} numbers without NaN")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "first_entry",
    [
        lambda x: jaxsoft.softmax(x, temperature=1e-6)[0],
        lambda x: jaxsoft.log_softmax(x, temperature=1e-6)[0],
        lambda x: jaxsoft.cross_entropy(x, 0, temperature=1e-6),
        lambda x: jaxsoft.kl_divergence(x[::-1], x, temperature=1e-6),
        lambda x: jaxsoft.softargmax(x, temperature=1e-6),
        lambda x: jaxsoft.boltzmann_max(x, temperature=1e-6),
    ],
)
def test_derivatives_saturate_in_half_precision(first_entry, dtype):
    """At a tie they are as large as 1/(4 temperature), which float16 does not hold."""
    x = jnp.ones(2, dtype)
    gradient = jax.grad(first_entry)(x)
    _, tangent = jax.jvp(first_entry, (x,), (jnp.array([1, 0], dtype),))
    chex.assert_tree_all_finite((gradient, tangent))
