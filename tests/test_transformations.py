"""Every function under every transformation, over the table of laws.

jit and vmap: all of them. jvp, linearize, jacfwd, jacrev and their nestings,
inside scan and around checkpoint, in 64 bits: `every_derivative`, against the oracle.
eval_shape: `test_shapes_and_dtypes`. checkify, shard_map, export and donated buffers:
the tests of these names. With and without jit, in 32 bits: test_laws.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import oracle
import pytest
from jax import export
from jax.experimental import checkify
from laws import (
    LAWS,
    WITHOUT_LAW,
    Law,
    as_promised,
    assert_close,
    cotangent_for,
    each,
    every_law,
    fullest,
    of_floats,
    plainest,
    problem,
    program,
    quickly,
    tangents_for,
    value,
    value_and_pullback,
    value_and_tangent,
)

import jaxsoft

ROWS, CLASSES = 2, 4


def of_a_batch(law: Law):
    return jax.vmap(law.call)


@each(fullest(LAWS).values())
def test_vmap_is_a_loop(law: Law, form):
    problems = [problem(law, seed)[0] for seed in range(3)]
    loop = jnp.stack(
        [program(value, law, form, as_promised(law))(*given) for given in problems]
    )
    batch = map(jnp.stack, zip(*problems))
    together = program(of_a_batch, law, form)(*batch)
    # The same operations; a vectorised exp or log may round its last digit otherwise,
    # which costs an entry as much as any of its few roundings.
    assert_close(together, np.asarray(loop), 8, f"{law.name}, float32, under vmap")


# Second derivatives are some ten sums and products deep, with terms larger than their
# sum; float64 leaves room for all of it, and a wrong term is off by 1.
DERIVATIVE_ROUNDINGS = 2000


def moving_and_tangents(law: Law, f, arguments, tangents):
    f, moving = of_floats(law, arguments, f)
    return f, moving, [t for t in tangents if t is not None]


def gradient_along(f, tangents, cotangent):
    def along(*moving):
        total = lambda *moving: jnp.sum(cotangent * f(*moving))  # noqa: E731
        gradients = jax.grad(total, tuple(range(len(moving))))(*moving)
        return sum(map(jnp.vdot, gradients, tangents))

    return along


def some_derivatives(law: Law, f, arguments, tangents, cotangent):
    """Forward mode, and a second derivative along the tangents that passes through both
    halves of a rule. Reverse mode: test_laws.py."""
    f, moving, tangents = moving_and_tangents(law, f, arguments, tangents)
    along = gradient_along(f, tangents, cotangent)
    value, tangent = jax.jvp(f, moving, tangents)
    return {
        "value": value,
        "jvp": tangent,
        "reverse over reverse": jax.grad(along, tuple(range(len(moving))))(*moving),
    }


def every_derivative(law: Law, f, arguments, tangents, cotangent):
    derivatives = some_derivatives(law, f, arguments, tangents, cotangent)
    f, moving, tangents = moving_and_tangents(law, f, arguments, tangents)
    positions = tuple(range(len(moving)))

    def total(*moving):
        return jnp.sum(cotangent * f(*moving))

    def total_along(*moving):
        return jax.jvp(total, list(moving), tangents)[1]

    gradient = jax.grad(total, positions)
    return derivatives | {
        "jacfwd": jax.jacfwd(f, positions)(*moving),
        "jacrev": jax.jacrev(f, positions)(*moving),
        "linearize": jax.linearize(f, *moving)[1](*tangents),
        "forward over reverse": jax.jvp(gradient, moving, tangents)[1],
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
    curvature = oracle.curvature_along(law.meaning, arguments, cotangent, tangents)
    curvature = [curvature[i] for i in law.floats]
    return {
        "value": [law.meaning(*arguments)],
        "jvp": [pushed],
        "linearize": [pushed],
        "jacfwd": jacobian,
        "jacrev": jacobian,
        "reverse over reverse": curvature,
        "forward over reverse": curvature,
        "reverse over forward": curvature,
        "forward over forward": [
            sum(
                np.sum(c * oracle.exact(tangents[i]))
                for i, c in zip(law.floats, curvature)
            )
        ],
    }


def check_derivatives(law: Law, transformed, form) -> None:
    problems = []
    for seed in range(2):
        arguments = law.draw(seed, ROWS, CLASSES)
        cotangent = cotangent_for(law, arguments, seed).astype(np.float64)
        problems.append((arguments, tangents_for(law, arguments, seed), cotangent))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    actual = program(transformed, law, form)(stacked)
    for number, arguments in enumerate(problems):
        expected = expected_derivatives(law, *arguments)
        for name, given in actual.items():
            given = given if isinstance(given, tuple) else (given,)
            for position, a, e in zip(law.floats, given, expected[name]):
                of = f", argument {position}" if len(given) > 1 else ""
                what = f"{law.name}, float64, {name} of problem {number}{of}"
                assert a.dtype == np.float64, what
                assert_close(a[number], e, DERIVATIVE_ROUNDINGS, what)
            assert len(given) == len(expected[name]), name


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
every_function = each(PLAINEST.values())


def test_every_public_function_has_a_law():
    assert {*PLAINEST, *WITHOUT_LAW} == set(jaxsoft.__all__)
    assert not PLAINEST.keys() & WITHOUT_LAW.keys()


def of_all_nestings(law: Law):
    """All at once under checkpoint, vmap and scan."""
    of = functools.partial(every_derivative, law, jax.checkpoint(law.call))
    return functools.partial(under_scan_of_vmap, of)


# Of each kind of rule one; the nestings of the others run with what is slow.
IN_FULL = ("logsumexp", "softmax", "log_softmax", "entropy", "softplus")
IN_FULL += ("cross_entropy_probabilities", "straight_through")
OTHERS = [law for law in LAWS if law.name not in IN_FULL]
# Rules of which the laws beside them have the parts: logits, probabilities, means.
PARTS = ("linear_cross_entropy_options", "linear_cross_entropy_mean")
PARTS += ("linear_log_probs", "cross_entropy_probabilities_options")
PARTS += ("linear_jensen_shannon", "jensen_shannon_options")
PARTS += ("smooth_step", "smooth_minimum")


@each(PLAINEST.values(), slow=OTHERS)
@pytest.mark.usefixtures("x64")
def test_every_derivative_under_jit_scan_vmap_and_checkpoint(law: Law, form):
    check_derivatives(law, of_all_nestings, form)


def of_some(law: Law):
    return functools.partial(
        under_vmap, functools.partial(some_derivatives, law, law.call)
    )


@each(OTHERS, slow=[law for law in OTHERS if law.name in PARTS])
@pytest.mark.usefixtures("x64")
def test_derivatives_of_the_other_laws_under_jit_and_vmap(law: Law, form):
    check_derivatives(law, of_some, form)


LINEAR = "linear_cross_entropy"
ROW_SPEC = jax.sharding.PartitionSpec("i")


def checked(law: Law):
    if law.function in CHECKING:
        law = dataclasses.replace(law, static={**law.static, "check_labels": True})
    return checkify.checkify(value_and_pullback(law))


CHECKING = ("cross_entropy", "linear_cross_entropy")


@every_function
def test_checkify(law: Law, form):
    given, _, cotangent = problem(law)
    program_of_law = program(checked, law, form)
    if (
        law.function not in CHECKING or "labels" not in law.kinds
    ):  # nothing to check: the same operations
        program_of_law.shapes(given, cotangent)
        return
    error, result = program_of_law(given, cotangent)
    assert error.get() is None, law.name
    wanted = program(value_and_pullback, law, form, as_promised(law))(given, cotangent)
    for actual, correct in zip(jax.tree.leaves(result), jax.tree.leaves(wanted)):
        assert_close(actual, np.asarray(correct), 4, f"{law.name} under checkify")
    labels = law.kinds.index("labels")
    bad = [a + laws.CLASSES if i == labels else a for i, a in enumerate(given)]
    message = str(program_of_law(bad, cotangent)[0].get())
    assert f"{law.function}: labels must lie in [0, {laws.CLASSES})" in message
    assert f"got label {np.max(bad[labels])}" in message


# The head is an argument that all rows share.
@each(PLAINEST.values(), slow=[law for law in OTHERS if law.name != LINEAR])
def test_shard_map_exported_and_back_with_a_donated_buffer(law: Law, form):
    given, _, cotangent = problem(law)
    specs = [
        ROW_SPEC if rows else jax.sharding.PartitionSpec() for rows in law.have_rows
    ]
    sharded = jax.shard_map(
        value_and_pullback(law),
        mesh=jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(specs, ROW_SPEC),
        out_specs=(ROW_SPEC, tuple(specs[i] for i in law.floats)),
    )

    def of_donated(first, rest, cotangent):
        return sharded([first, *rest], cotangent)

    first, *rest = map(jnp.array, given)  # the buffers of others stay
    with jaxsoft.use_cpu_kernels(False):  # which JAX does not serialise
        exported = export.export(jax.jit(of_donated, donate_argnums=0))(
            first, rest, cotangent
        )
    # An effect would send every call by way of Python.
    assert not exported.ordered_effects
    assert not exported.unordered_effects
    again = quickly(export.deserialize(exported.serialize()).call, donate_argnums=0)
    result = again(first, rest, cotangent)
    assert first.is_deleted()
    wanted = program(value_and_pullback, law, form, as_promised(law))(given, cotangent)
    for actual, correct in zip(jax.tree.leaves(result), jax.tree.leaves(wanted)):
        assert_close(actual, np.asarray(correct), 4, f"{law.name}, exported")


@every_law
def test_shapes_and_dtypes(law: Law, form):
    """Those of 64 bits: where their derivatives are. A trace serves the numbers too."""
    arguments, cotangent = problem(law)[1:]
    for dtype in ("bfloat16", "float16", "float32"):
        what = f"{law.name}, {dtype}"
        given = law.cast(arguments, dtype)
        of = jax.ShapeDtypeStruct(cotangent.shape, law.result_dtype(dtype))
        if dtype == "bfloat16":
            both = program(value_and_tangent, law, form).shapes(given, given)
            assert [*map(described, both)] == [described(of)] * 2, what
            continue
        compiled = as_promised(law) if dtype == "float32" else quickly
        both = program(value_and_pullback, law, form, compiled)
        result, gradients = both.shapes(given, of)
        assert described(result) == described(of), what
        moving = [given[i] for i in law.floats]
        assert [*map(described, gradients)] == [*map(described, moving)], what


def described(array):
    return array.shape, jnp.dtype(array.dtype)
