"""What is measured: operations, shapes, and who runs them.

A contestant is a function of no arguments that runs once and waits for the result. The
peers compute what jaxsoft computes, each in the way its users write it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft

try:
    import torch
except ImportError:
    torch = None
try:
    import jax_cce
except ImportError:
    jax_cce = None

ROW_SHAPES = (
    (256, 131072),
    (64, 131072),
    (4096, 8192),
    (65536, 128),
    (1, 1_000_000),
    (512, 50257),  # GPT-2, whose vocabulary no block divides
    (65536, 10),  # where what is done once per row counts
)
LINEAR_SHAPES = ((1024, 512, 32768),)
SMALLEST = ((8, 64), (16, 8, 96))
ROW_OPERATIONS = (
    "logsumexp",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "cross_entropy gradient",
    "cross_entropy gradient, donated",
)
LINEAR_OPERATIONS = (
    "linear mean",
    "linear mean gradient",
    "linear per token gradient",
)


class Contestant(NamedTuple):
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    compiled: Any = None


class Cell(NamedTuple):
    operation: str
    shape: tuple[int, ...]
    dtype: str
    contestants: dict[str, Contestant]


def of_jax(f: Callable[..., Any], *arguments: jax.Array) -> Contestant:
    jitted = jax.jit(f)
    compiled = jitted.lower(*arguments).compile()
    return Contestant(
        lambda: jax.block_until_ready(jitted(*arguments)), compiled=compiled
    )


def of_jax_donated(f: Callable[..., Any], x: jax.Array, y: jax.Array) -> Contestant:
    """Every run uses its logits up, so that a copy is made before the clock starts."""
    jitted = jax.jit(f, donate_argnums=0)
    copies: list[jax.Array] = []
    return Contestant(
        lambda: jax.block_until_ready(jitted(copies.pop(), y)),
        lambda: copies.append(jax.block_until_ready(x + 0)),
        jitted.lower(x, y).compile(),
    )


def row_cell(operation: str, shape: tuple[int, int], dtype: str) -> Cell:
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.normal(size=shape).astype(np.float32)).astype(dtype)
    y = jnp.asarray(rng.integers(0, shape[1], shape[0]), jnp.int32)
    contestants = {}
    ours, theirs, peer, per_row = _of_rows(operation)
    make = of_jax_donated if operation.endswith("donated") else of_jax
    contestants["jaxsoft"] = make(ours, x, y)
    contestants["jaxsoft, vmapped"] = make(per_row, x, y)
    contestants[peer] = make(theirs, x, y)
    if torch is not None:
        contestants["torch"] = _torch_rows(operation, x, y)
    contestants["floor"] = _floor(operation, x, y)
    return Cell(operation, shape, dtype, contestants)


def _of_rows(operation: str):
    """jaxsoft's function, the peer's, the peer's name, and ours vmapped over rows."""
    if operation in ("logsumexp", "softmax", "log_softmax"):
        f, g = getattr(jaxsoft, operation), getattr(jax.nn, operation)
        return (
            lambda x, y: f(x, axis=-1),
            lambda x, y: g(x, axis=-1),
            "jax.nn",
            lambda x, y: jax.vmap(lambda row: f(row, axis=-1))(x),
        )

    def per_row(x, y):
        return jax.vmap(jaxsoft.cross_entropy)(x, y)

    optax_loss = optax.softmax_cross_entropy_with_integer_labels
    losses = (jaxsoft.cross_entropy, optax_loss, per_row)
    if operation == "cross_entropy":
        ours, theirs, vmapped = losses
        return ours, theirs, "optax", vmapped
    ours, theirs, vmapped = (
        jax.grad(lambda x, y, f=f: jnp.mean(f(x, y))) for f in losses
    )
    return ours, theirs, "optax", vmapped


def _torch_rows(operation: str, x: jax.Array, y: jax.Array) -> Contestant:
    logits, labels = as_torch(x), as_torch(y).long()
    functional = torch.nn.functional
    loss = functools.partial(functional.cross_entropy, target=labels)
    if operation == "cross_entropy":
        return Contestant(lambda: loss(logits, reduction="none"))
    if "gradient" not in operation:
        f = getattr(torch, operation)
        return Contestant(lambda: f(logits, -1))
    logits.requires_grad_(True)

    def gradient():
        torch.autograd.grad(loss(logits), logits)

    return Contestant(gradient)


def as_torch(v: jax.Array) -> Any:
    tensor = torch.from_numpy(np.array(v.astype(jnp.float32)))
    return tensor.to(torch.bfloat16 if v.dtype == jnp.bfloat16 else torch.float32)


def _floor(operation: str, x: jax.Array, y: jax.Array) -> Contestant:
    """One read of the input; for a result of its size, a read and a write."""
    if operation in ("logsumexp", "cross_entropy"):
        return of_jax(lambda x: jnp.max(x, -1), x)
    if operation.endswith("donated"):
        return of_jax_donated(lambda x, y: x + 1, x, y)
    return of_jax(lambda x: x + 1, x)


def linear_cell(operation: str, shape: tuple[int, int, int], dtype: str) -> Cell:
    tokens, features, classes = shape
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(tokens, features)), dtype)
    w = jnp.asarray(rng.normal(size=(classes, features)) / features**0.5, dtype)
    y = jnp.asarray(rng.integers(0, classes, tokens), jnp.int32)
    per_token = operation.startswith("linear per token")

    def head(f):
        if operation == "linear mean":
            return lambda h, w: jnp.mean(f(h, w))
        weights = jnp.linspace(0.5, 1.5, tokens)

        def loss(h, w):
            losses = f(h, w)
            return jnp.vdot(weights, losses) if losses.ndim else losses

        return jax.value_and_grad(loss, (0, 1))

    reduction = "none" if per_token else "mean"

    def on_logits(h, w):
        logits = jnp.matmul(h, w.T, preferred_element_type=jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses if per_token else jnp.mean(losses)

    contestants = {
        "jaxsoft": of_jax(
            head(
                lambda h, w: jaxsoft.linear_cross_entropy(h, w, y, reduction=reduction)
            ),
            h,
            w,
        ),
        "optax": of_jax(head(on_logits), h, w),
    }
    if jax_cce is not None:  # it has the mean alone
        contestants["jax-cce"] = of_jax(
            head(lambda h, w: jax_cce.linear_cross_entropy(h, w, y)), h, w
        )
    products = 1 if operation == "linear mean" else 3
    contestants["floor"] = of_jax(functools.partial(_products, count=products), h, w)
    return Cell(operation, shape, dtype, contestants)


def _products(h, w, count):
    """Matrix products of the sizes of a head's, and nothing else."""
    total = jnp.zeros((), jnp.float32)
    for i in range(count):
        x = jnp.matmul(h * (1 + i), w.T, preferred_element_type=jnp.float32)
        total = total + x[0, 0] + x[-1, -1]
    return total
