"""What a head without logits costs, from the compiled program: bytes and products.

Nothing of this size is run. The shapes are those of a small language model, for which
the logits would take a gigabyte, and their gradient as much again.
"""

import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import as_users_have_it

import jaxsoft
from jaxsoft._linear.inputs import SUM_BYTES, WIDE_CHUNK

TOKENS, FEATURES, CLASSES = 4096, 512, 65536
MATRIX_PRODUCT = 2 * TOKENS * FEATURES * CLASSES
BOTH, HIDDEN = (0, 1), (0,)
SLOW = pytest.mark.slow


def loss(hidden, vocab_weight, labels, cotangent, **options):
    per_token = jaxsoft.linear_cross_entropy(hidden, vocab_weight, labels, **options)
    return jnp.sum(cotangent * per_token)


def arguments(reduction: str, vocab_axis: int = 0, dtype: Any = jnp.float32):
    shape = (CLASSES, FEATURES) if vocab_axis == 0 else (FEATURES, CLASSES)
    return (
        jax.ShapeDtypeStruct((TOKENS, FEATURES), dtype),
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
        jax.ShapeDtypeStruct((TOKENS,) if reduction == "none" else (), jnp.float32),
    )


def compiled(reduction: str, moving: tuple[int, ...] = BOTH, vocab_axis: int = 0):
    f = functools.partial(loss, reduction=reduction, vocab_axis=vocab_axis)
    if moving:
        f = jax.value_and_grad(f, moving)
    lowered = as_users_have_it(f).lower(*arguments(reduction, vocab_axis))
    return lowered.compile()


# Flops.

PRODUCT = r"= \w+\[([\d,]*)\]\S* dot\(%([\w.-]+),.*lhs_contracting_dims=\{(\d+)\}"


def product_flops(program: str) -> float:
    """Flops of all matrix products of an HLO module; of branches, the costliest."""
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            current.append(line)

    @functools.cache
    def flops_of(name: str) -> float:
        lines = computations[name]
        shapes = dict(re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", "\n".join(lines)))

        def size(shape: str, axes: Any = None) -> int:
            dims = [int(n) for n in shape.split(",") if n]
            return math.prod(dims if axes is None else (dims[a] for a in axes))

        total = 0.0
        for line in lines:
            product = re.search(PRODUCT, line)
            if product:
                result, left, axis = product.groups()
                total += 2 * size(result) * size(shapes[left], [int(axis)])
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            if branches:
                names = branches[1].replace("%", "").split(", ")
                total += max(map(flops_of, names))
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", line):
                total += (int(trips[1]) if trips else 1) * flops_of(callee)
        return total

    return flops_of(entry)


# Bytes, and the products of the same programs.

LOGITS_OF_A_CHUNK = 4 * TOKENS * WIDE_CHUNK
HIDDEN_BYTES = 4 * TOKENS * FEATURES
NUMBERS_PER_TOKEN = 64 * TOKENS
CHUNK = LOGITS_OF_A_CHUNK + HIDDEN_BYTES


@pytest.mark.parametrize(
    ("reduction", "moving", "vocab_axis", "products", "most_bytes"),
    [
        # 4 N C + 4 N D bytes: a chunk of logits, and the gradient of hidden so far.
        # Beside them stand hidden with 0 at ignored tokens, and the gradient of a
        # branch that the choice among the branches copies.
        ("none", BOTH, 0, 4, CHUNK + 2 * HIDDEN_BYTES + NUMBERS_PER_TOKEN),
        ("mean", BOTH, 0, 3, 2.5 * SUM_BYTES),
        pytest.param(
            "none",
            BOTH,
            1,
            4,
            CHUNK + 2 * HIDDEN_BYTES + NUMBERS_PER_TOKEN,
            marks=SLOW,
        ),
        pytest.param("none", (), 0, 1, None, marks=SLOW),
        pytest.param("none", HIDDEN, 0, 2, None, marks=SLOW),
        pytest.param("mean", HIDDEN, 0, 2, None, marks=SLOW),
    ],
)
def test_bytes_and_products_of_a_program(
    reduction, moving, vocab_axis, products, most_bytes, record_property
):
    """Products: 4 for value and both gradients, 3 of a sum, 2 with a frozen head. And
    no array of tokens times classes."""
    program = compiled(reduction, moving, vocab_axis)
    temporary = program.memory_analysis().temp_size_in_bytes
    text = program.as_text()
    flops = product_flops(text) / MATRIX_PRODUCT
    record_property("temporaries", f"{temporary / 1e6:.0f} MB")
    record_property("4 N C + 4 N D", f"{CHUNK / 1e6:.0f} MB")
    record_property("budget of a sum", f"{SUM_BYTES / 1e6:.0f} MB")
    record_property("matrix products", f"{flops:.3f}")
    assert most_bytes is None or temporary < most_bytes
    if vocab_axis == 0:
        assert flops == pytest.approx(products, rel=1e-6)
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert CLASSES * FEATURES <= largest < TOKENS * CLASSES


# No array of N x V numbers, in any nesting.


def shapes_of(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Of everything that a jaxpr takes and computes, and the jaxprs in it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield getattr(variable.aval, "shape", ())
        for inner in inner_jaxprs(equation):
            yield from shapes_of(inner)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("moving", [BOTH, pytest.param(HIDDEN, marks=SLOW)])
def test_hessian_vector_products_hold_no_array_of_tokens_times_classes(
    reduction, moving
):
    """Reverse mode would show what it keeps of every chunk as one stacked array."""

    def products(*given):
        moved = tuple(given[i] for i in moving)
        positions = tuple(range(len(moving)))

        def of_moved(*moved):
            every = list(given)
            for i, argument in zip(moving, moved):
                every[i] = argument
            return loss(*every, reduction=reduction)

        def slope(*moved):
            return jax.jvp(of_moved, moved, moved)[1]

        forward_over_reverse = jax.jvp(jax.grad(of_moved, positions), moved, moved)
        return forward_over_reverse, jax.grad(slope, positions)(*moved)

    jaxpr = jax.make_jaxpr(products)(*arguments(reduction)).jaxpr
    largest = max(map(math.prod, shapes_of(jaxpr)))
    assert CLASSES * FEATURES <= largest < TOKENS * CLASSES


def test_residuals_are_the_arguments_and_numbers_per_token():
    """Of a loss per token: the closure of `jax.vjp` lives between the passes."""
    rows, features, classes = 211, 7, 101
    given = jnp.ones((rows, features)), jnp.ones((classes, features))
    labels = jnp.zeros(rows, jnp.int32)

    def f(hidden, vocab_weight):
        return jaxsoft.linear_cross_entropy(
            hidden,
            vocab_weight,
            labels,
            chunk_bytes=4 * rows * 10,
            label_smoothing=0.1,
            temperature=2.0,
        )

    leaves = jax.tree.leaves(
        jax.eval_shape(lambda *given: jax.vjp(f, *given)[1], *given)
    )
    numbers = sum(leaf.size for leaf in leaves)
    assert numbers <= sum(a.size for a in given) + classes + 32 * rows


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bfloat16_products_have_bfloat16_factors_and_float32_sums(reduction, platform):
    """A factor in float32 would run the matrix units at a fraction of their speed."""
    given = arguments(reduction, dtype=jnp.bfloat16)
    gradient = jax.grad(functools.partial(loss, reduction=reduction), BOTH)
    traced = jax.jit(gradient).trace(*given)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    dots = re.findall(r"dot_general .*", program)
    assert len(dots) >= 3
    for dot in dots:
        factors, result = re.findall(r": \((.*)\) -> (.*)", dot)[0]
        assert factors.count("xbf16>") == 2
        assert result.split()[0].endswith("xf32>")


@pytest.mark.slow  # it measures time
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_tokens_are_skipped(reduction, record_property):
    """Of 2048 tokens 1900 are ignored: both passes run on a quarter of the rows."""
    tokens, features, classes = 2048, 64, 4096
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, features)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(classes, features)), jnp.float32)
    labels = rng.integers(0, classes, tokens).astype(np.int32)
    mostly_ignored = np.where(rng.permutation(tokens) < 1900, -100, labels)
    step = as_users_have_it(
        jax.value_and_grad(functools.partial(loss, reduction=reduction), BOTH)
    )
    cotangent = jnp.ones(tokens if reduction == "none" else ())

    def seconds(labels) -> float:
        jax.block_until_ready(step(hidden, weight, labels, cotangent))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(step(hidden, weight, labels, cotangent))
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(jnp.asarray(mostly_ignored)) / seconds(jnp.asarray(labels))
    record_property("time with 1900 of 2048 tokens ignored", f"{ratio:.2f}")
    assert ratio < 0.6
