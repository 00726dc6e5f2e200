"""No NaN, whatever the logits, masks and temperature, in value, gradient or tangent."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import (
    LAWS,
    Law,
    as_promised,
    each,
    fullest,
    plainest,
    program,
    quickly,
    value,
)

import jaxsoft
from evidence.grid import everything, nan_rows
from evidence.points import grid_arguments


def of_rows(law: Law) -> Law:
    """The law without its reduction: every row shows."""
    static = {name: v for name, v in law.static.items() if name != "reduction"}
    return dataclasses.replace(law, static=static, by_row=True)


# The mean of a loss has no other rows than the loss with all options.
STABLE_LAWS = [of_rows(law) for law in LAWS if not law.name.endswith("_mean")]
# A law with all options has every dtype; the others, whose programs are parts of it,
# one, and their extreme rows are in test_laws.py. A linear head has the dtypes of its
# products in the small program.
IN_EVERY_DTYPE = fullest(
    law for law in STABLE_LAWS if law.name != "linear_cross_entropy_options"
).values()


def case(law: Law, dtype: str) -> Any:
    is_slow = dtype != "float32" or len(law.kinds) > 10 or law not in IN_EVERY_DTYPE
    is_slow |= law.kinds.count("hidden") > 1
    marks = [pytest.mark.xdist_group(law.name), *[pytest.mark.slow] * is_slow]
    return pytest.param(law, dtype, id=f"{law.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(
    ("law", "dtype"),
    [
        case(law, dtype)
        for law in STABLE_LAWS
        for dtype in ("float32", "float16", "bfloat16", "float64")
        if dtype == "float32" or law in IN_EVERY_DTYPE
    ],
)
@pytest.mark.usefixtures("x64")
def test_no_nan_on_the_grid(law: Law, dtype: str, form, record_property):
    given = grid_arguments(law, dtype)
    compiled = as_promised(law) if dtype == "float32" else quickly
    of = program(everything_of, law, form, compiled)
    results = of(given)
    if "vocab bias" in law.kinds:  # whole classes at an infinity
        bias = law.kinds.index("vocab bias")
        for infinity in (-np.inf, np.inf):
            given[bias] = given[bias].at[-1].set(infinity)
            more = of(given).items()
            results |= {f"{what}, bias {infinity}": numbers for what, numbers in more}
    in_range = rows_in_range(law, given)
    counted = 0
    for name, numbers in results.items():
        bad = nan_rows(numbers)
        if bad.any():
            first = int(np.argmax(bad))
            at = [
                np.asarray(a)[first] for a in given if np.ndim(a) and len(a) == len(bad)
            ]
            what = f"{law.name}, {dtype}, {name}"
            pytest.fail(f"{what}: NaN in {bad.sum()} rows, the first, {first}, at {at}")
        if name.startswith("gradient") and dtype in ("float32", "float64"):
            bad = in_range & ~np.isfinite(numbers).reshape(len(in_range), -1).all(-1)
            assert not bad.any(), f"{law.name}, {dtype}, {name}: infinite in {bad}"
        counted += np.size(numbers)
    record_property("rows without NaN", len(given[0]))
    record_property("numbers without NaN", counted)


def everything_of(law: Law):
    return everything(law, law.call)


def rows_in_range(law: Law, given) -> np.ndarray:
    """Those whose gradients do not leave the range of the numbers."""
    rows = np.ones(len(given[0]), bool)
    for kind, argument in zip(law.kinds, given):
        if kind == "temperature":  # 1/t at t = 1e-38 does
            t = np.abs(np.asarray(argument)[:, 0])
            rows &= (t >= 1e-3) | (t == 0)
        if kind == "similarities":  # the slope is the similarity itself
            rows &= np.all(np.isfinite(argument), axis=-1)
    return rows


STEEP = {
    "softmax": lambda x, t: jaxsoft.softmax(x, temperature=t)[0],
    "log_softmax": lambda x, t: jaxsoft.log_softmax(x, temperature=t)[0],
    "cross_entropy": lambda x, t: jaxsoft.cross_entropy(x, 0, temperature=t),
    "kl_divergence": lambda x, t: jaxsoft.kl_divergence(x[::-1], x, temperature=t),
    "jensen_shannon": lambda x, t: jaxsoft.jensen_shannon(x[::-1], x, temperature=t),
    "softargmax": lambda x, t: jaxsoft.softargmax(x, temperature=t),
    "boltzmann_max": lambda x, t: jaxsoft.boltzmann_max(x, temperature=t),
}


@pytest.mark.parametrize(
    "dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_derivatives_saturate_in_half_precision(dtype):
    """At a tie they are as large as 1/(4 temperature), which float16 does not hold."""

    @jax.jit
    def both_modes(x, direction):
        steep = [functools.partial(f, t=1e-6) for f in STEEP.values()]
        return [(jax.grad(f)(x), jax.jvp(f, (x,), (direction,))[1]) for f in steep]

    results = both_modes(jnp.ones(2, dtype), jnp.array([1, 0], dtype))
    for name, derivatives in zip(STEEP, results, strict=True):
        for derivative in derivatives:
            assert np.all(np.isfinite(derivative)), f"{name}, {dtype}: {derivatives}"


def is_of_rows(law: Law) -> bool:
    return law.by_row and law.kinds[0] == "logits" and not law.elementwise


@pytest.mark.parametrize("classes", [600, 9000])
@each(plainest(law for law in LAWS if is_of_rows(law)).values())
def test_a_nan_shows_in_its_row_alone(law: Law, classes: int, form):
    """XLA's maximum of 512 numbers and more may lose it on a CPU."""
    for position, kind in enumerate(law.kinds):
        if kind == "logits":
            arguments = law.draw(8, 8, classes)
            arguments[position][5, -1] = np.nan  # in a row that has no mask
            results = program(value, law, form)(*law.cast(arguments, jnp.float32))
            is_nan = np.isnan(results).reshape(8, -1)
            what = f"{law.name}, {classes} classes, NaN in argument {position}"
            assert np.all(is_nan[5]), what
            assert not np.any(np.delete(is_nan, 5, 0)), what
