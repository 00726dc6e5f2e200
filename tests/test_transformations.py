"""Every function under every transformation, over the table of laws.

jit and vmap: all of them. grad, jvp, linearize, vjp, jacfwd, jacrev, hessian and their
nestings, inside scan and around checkpoint, in 64 bits: `every_derivative`, against the
oracle. eval_shape: `test_shapes_and_dtypes`. checkify, shard_map, export and donated
buffers: the test of that name. With and without jit, in 32 bits: test_laws.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.experimental import checkify
from laws import (
    LAWS,
    WITHOUT_LAW,
    Law,
    assert_close,
    cotangent_for,
    of_floats,
    plainest,
    quickly,
    tangents_for,
    value_and_pullback,
)

import jaxsoft

ROWS, CLASSES = 2, 4

every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)


@every_law
def test_vmap_is_a_loop(law: Law):
    problems = [
        law.cast(law.draw(seed, ROWS, CLASSES), jnp.float32) for seed in range(3)
    ]
    one = quickly(law.call)
    loop = jnp.stack([one(*problem) for problem in problems])
    together = quickly(jax.vmap(law.call))(*map(jnp.stack, zip(*problems)))
    chex.assert_equal_shape([loop, together])
    # The same operations; a vectorised exp or log may round its last digit otherwise,
    # which costs an entry as much as any of its few roundings.
    assert_close(together, loop, 8, law.name)


# Second derivatives are some ten sums and products deep, with terms larger than their
# sum; float64 leaves room for all of it, and a wrong term is off by 1.
DERIVATIVE_ROUNDINGS = 2000


def some_derivatives(law: Law, f, arguments, tangents, cotangent):
    """Both modes, and a second derivative along the tangents that passes through both
    halves of a rule."""
    f, moving = of_floats(law, arguments, f)
    tangents = [t for t in tangents if t is not None]
    positions = tuple(range(len(moving)))

    def gradient_along(*moving):
        total = lambda *moving: jnp.sum(cotangent * f(*moving))  # noqa: E731
        gradients = jax.grad(total, positions)(*moving)
        return sum(map(jnp.vdot, gradients, tangents))

    return {
        "value": f(*moving),
        "jacfwd": jax.jacfwd(f, positions)(*moving),
        "jacrev": jax.jacrev(f, positions)(*moving),
        "reverse over reverse": jax.grad(gradient_along, positions)(*moving),
    }


def every_derivative(law: Law, f, arguments, tangents, cotangent):
    derivatives = some_derivatives(law, f, arguments, tangents, cotangent)
    f, moving = of_floats(law, arguments, f)
    tangents = [t for t in tangents if t is not None]
    positions = tuple(range(len(moving)))

    def total(*moving):
        return jnp.sum(cotangent * f(*moving))

    def total_along(*moving):
        return jax.jvp(total, list(moving), tangents)[1]

    return derivatives | {
        "jvp": jax.jvp(f, moving, tangents)[1],
        "linearize": jax.linearize(f, *moving)[1](*tangents),
        "vjp": jax.vjp(f, *moving)[1](cotangent),
        "hessian": jax.hessian(total)(*moving),
        "reverse over forward": jax.grad(total_along, positions)(*moving),
        "forward over forward": jax.jvp(total_along, moving, tangents)[1],
    }


def expected_derivatives(law: Law, arguments, tangents, cotangent):
    jacobian = oracle.jacobian(law.meaning, arguments)
    jacobian = [jacobian[i] for i in law.floats]
    pushed = sum(
        np.tensordot(j, oracle.exact(tangents[i]), np.ndim(tangents[i]))
        for i, j in zip(law.floats, jacobian)
    )
    pulled = [
        np.tensordot(oracle.exact(cotangent), j, np.ndim(cotangent)) for j in jacobian
    ]
    curvature = oracle.curvature_along(law.meaning, arguments, cotangent, tangents)
    curvature = [curvature[i] for i in law.floats]
    return {
        "value": [law.meaning(*arguments)],
        "jvp": [pushed],
        "linearize": [pushed],
        "vjp": pulled,
        "jacfwd": jacobian,
        "jacrev": jacobian,
        "hessian": [oracle.hessian(law.meaning, arguments, cotangent)],
        "reverse over reverse": curvature,
        "reverse over forward": curvature,
        "forward over forward": [
            sum(
                np.sum(c * oracle.exact(tangents[i]))
                for i, c in zip(law.floats, curvature)
            )
        ],
    }


def check_derivatives(law: Law, derivatives, transform) -> None:
    problems = []
    for seed in range(2):
        arguments = law.draw(seed, ROWS, CLASSES)
        cotangent = cotangent_for(law, arguments, seed).astype(np.float64)
        problems.append((arguments, tangents_for(law, arguments, seed), cotangent))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    actual = quickly(functools.partial(transform, derivatives))(stacked)
    for number, problem in enumerate(problems):
        expected = expected_derivatives(law, *problem)
        for name, given in actual.items():
            given = given if isinstance(given, tuple) else (given,)
            for a, e in zip(given, expected[name], strict=True):
                assert_close(a[number], e, DERIVATIVE_ROUNDINGS, name)


def under_vmap(derivatives, problems):
    return jax.vmap(lambda problem: derivatives(*problem))(problems)


def under_scan_of_vmap(derivatives, problems):
    """Two steps of both problems; the second finds them in the other order."""

    def step(order, _):
        ordered = jax.tree.map(lambda leaf: leaf[order], problems)
        results = under_vmap(derivatives, ordered)
        return order[::-1], jax.tree.map(lambda leaf: leaf[order], results)

    _, results = jax.lax.scan(step, jnp.array([0, 1]), length=2)
    same = jax.tree.map(lambda leaf: jnp.all(leaf[0] == leaf[1]), results)
    return jax.tree.map(lambda s, leaf: jnp.where(s, leaf[0], jnp.nan), same, results)


# Transformations see a rule and its wrapper, which are the same for all options: a
# function's law with the fewest of them meets every transformation, all at once.
PLAINEST = plainest(LAWS)
every_function = pytest.mark.parametrize(
    "law", PLAINEST.values(), ids=lambda law: law.name
)


def test_every_public_function_has_a_law():
    assert {*PLAINEST, *WITHOUT_LAW} == set(jaxsoft.__all__)
    assert not PLAINEST.keys() & WITHOUT_LAW.keys()


@every_function
@pytest.mark.usefixtures("x64")
def test_every_derivative_under_jit_scan_vmap_and_checkpoint(law: Law):
    f = jax.checkpoint(law.call)
    derivatives = functools.partial(every_derivative, law, f)
    check_derivatives(law, derivatives, under_scan_of_vmap)


@pytest.mark.parametrize(
    "law",
    [law for law in LAWS if law not in PLAINEST.values()],
    ids=lambda law: law.name,
)
@pytest.mark.usefixtures("x64")
def test_derivatives_of_the_other_laws_under_jit_and_vmap(law: Law):
    derivatives = functools.partial(some_derivatives, law, law.call)
    check_derivatives(law, derivatives, under_vmap)


ROW_SPEC = jax.sharding.PartitionSpec("i")


def by_rows(law: Law) -> list[jax.sharding.PartitionSpec]:
    """The rows of every argument that has rows over the devices "i"."""
    shapes = ([np.shape(a) for a in law.draw(0, rows, CLASSES)] for rows in (2, 3))
    return [
        jax.sharding.PartitionSpec() if of_two == of_three else ROW_SPEC
        for of_two, of_three in zip(*shapes)
    ]


@every_function
def test_checkify_and_shard_map_exported_and_back_with_a_donated_buffer(law: Law):
    arguments = law.draw(2, ROWS, CLASSES)
    given = law.cast(arguments, jnp.float32)
    cotangent = jnp.asarray(cotangent_for(law, arguments, 2))
    both = value_and_pullback(law)
    checked = quickly(checkify.checkify(both))
    error, wanted = checked(given, cotangent)
    assert error.get() is None
    expected = oracle.pullback(law.meaning, [np.asarray(a) for a in given], cotangent)
    for position, gradient in zip(law.floats, wanted[1]):
        assert_close(gradient, expected[position], 64, law.kinds[position])
    if "labels" in law.kinds:
        labels = law.kinds.index("labels")
        bad = [a + CLASSES if i == labels else a for i, a in enumerate(given)]
        message = str(checked(bad, cotangent)[0].get())
        assert f"{law.function}: labels must lie in [0, {CLASSES})" in message
        assert f"got label {np.max(bad[labels])}" in message

    specs = by_rows(law)
    float_specs = tuple(specs[i] for i in law.floats)
    sharded = jax.shard_map(
        both,
        mesh=jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(specs, ROW_SPEC),
        out_specs=(ROW_SPEC, float_specs),
    )

    def of_donated(first, rest, cotangent):
        return sharded([first, *rest], cotangent)

    program = jax.jit(of_donated, donate_argnums=0)
    first, *rest = given
    # An effect would send every call by way of Python.
    assert not jax.make_jaxpr(of_donated)(first, rest, cotangent).effects
    exported = export.export(program)(first, rest, cotangent).serialize()
    again = quickly(export.deserialize(exported).call, donate_argnums=0)
    result = again(first, rest, cotangent)
    assert first.is_deleted()
    for actual, value in zip(jax.tree.leaves(result), jax.tree.leaves(wanted)):
        assert_close(actual, np.asarray(value), 4, law.name)


@every_law
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_shapes_and_dtypes(law: Law, dtype: str):
    arguments = law.draw(3, ROWS, CLASSES)
    given = law.cast(arguments, dtype)
    f, moving = of_floats(law, given)
    value, pull = jax.eval_shape(lambda *moving: jax.vjp(f, *moving), *moving)
    assert value.shape == np.shape(law.meaning(*arguments))
    assert value.dtype == law.result_dtype(dtype)
    for gradient, argument in zip(jax.eval_shape(pull, value), moving):
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)
    _, tangent = jax.eval_shape(lambda *m: jax.jvp(f, m, m), *moving)
    assert (tangent.shape, tangent.dtype) == (value.shape, value.dtype)
