"""What is timed: operations, shapes, and who runs them.

A contestant is a function of no arguments that runs once and waits for the result. The
peers compute what jaxsoft computes, each in the way its users write it. The shapes are
those of a classifier's batches, of attention, and of vocabularies.
"""

import functools
import time
from collections.abc import Callable, Iterator
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

ROWS = (
    (8, 10),
    (128, 10),
    (1024, 10),
    (65536, 10),
    (32, 100),
    (128, 1000),
    (1024, 1000),
    (8192, 1000),
    (65536, 128),
    (64, 32000),
    (512, 50257),
    (4096, 8192),
    (256, 131072),
    (1, 1_000_000),
)
ROWS_IN_BFLOAT16 = ((1024, 10), (1024, 1000), (8192, 1000), (64, 32000), (4096, 8192))
# The classes come first, and rows lie side by side.
COLUMNS = ((100, 1024), (1000, 1024), (10, 65536))
ATTENTION = (8, 12, 256, 256)
HEAD = (1024, 512, 32768)  # tokens, features, classes
SMALLEST = ((8, 64), (4, 2, 16, 16), (16, 8, 96))
# Label probabilities and smoothed labels of more logits are arrays that nobody makes.
MOST_LABEL_PROBABILITIES = 3 * 10**7


class Contestant(NamedTuple):
    run: Callable[[], Any]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


class Cell(NamedTuple):
    operation: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], dict[str, Contestant]]


class Operation(NamedTuple):
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    peer: str
    arguments: tuple[str, ...]  # names of Arrays


def every_cell(smallest: bool = False) -> Iterator[Cell]:
    """All of them, or one of each kind."""
    if smallest:
        row, attention, head = SMALLEST
        yield from _row_cells(row, "float32")
    else:
        attention, head = ATTENTION, HEAD
        for shape in ROWS:
            yield from _row_cells(shape, "float32")
        for shape in ROWS_IN_BFLOAT16:
            yield from _row_cells(shape, "bfloat16")
        for shape in COLUMNS:
            yield from _row_cells(shape, "float32", axis=0)
    for operation in ("softmax, masked", "softmax, masked, vjp"):
        yield Cell(
            operation,
            attention,
            "float32",
            functools.partial(_attention, operation, attention),
        )
    for reduction in ("mean", "none"):
        for with_gradient in (False, True):
            yield Cell(
                _head_name(reduction, with_gradient),
                head,
                "float32",
                functools.partial(_head, reduction, with_gradient, head),
            )


def _row_cells(shape, dtype, axis=-1):
    for name in _operations(axis):
        of_probabilities = "probabilities" in name or "smoothed" in name
        if of_probabilities and (
            axis == 0 or np.prod(shape) > MOST_LABEL_PROBABILITIES
        ):
            continue
        title = name if axis == -1 else f"{name}, axis 0"
        make = functools.partial(_contestants_of_rows, name, shape, dtype, axis)
        yield Cell(title, shape, dtype, make)


def _operations(axis: int) -> dict[str, Operation]:
    operations = {}
    for name, arguments in (
        ("logsumexp", "xr"),
        ("softmax", "xg"),
        ("log_softmax", "xg"),
    ):
        ours, theirs = (
            functools.partial(getattr(library, name), axis=axis)
            for library in (jaxsoft, jax.nn)
        )
        operations[name] = Operation(ours, theirs, "jax.nn", ("x",))
        operations[f"{name}, vjp"] = Operation(
            _vjp(ours), _vjp(theirs), "jax.nn", tuple(arguments)
        )
    loss = functools.partial(jaxsoft.cross_entropy, axis=axis)
    of_indices = functools.partial(
        optax.softmax_cross_entropy_with_integer_labels, axis=axis
    )
    operations["cross_entropy"] = Operation(loss, of_indices, "optax", ("x", "y"))
    smoothed = functools.partial(loss, label_smoothing=0.1)
    for name, ours, theirs, labels in (
        ("cross_entropy", loss, of_indices, "y"),
        ("cross_entropy of probabilities", loss, optax.softmax_cross_entropy, "q"),
        ("cross_entropy of smoothed labels", smoothed, _smoothed_by_optax, "y"),
    ):
        operations[f"{name}, gradient"] = Operation(
            _mean_and_gradient(ours), _mean_and_gradient(theirs), "optax", ("x", labels)
        )
    return operations


def _vjp(f):
    return lambda x, g: jax.vjp(f, x)[1](g)[0]


def _mean_and_gradient(loss):
    return jax.value_and_grad(lambda x, labels: jnp.mean(loss(x, labels)))


def _smoothed_by_optax(x, y):
    one_hot = jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype)
    return optax.softmax_cross_entropy(x, optax.smooth_labels(one_hot, 0.1))


@functools.lru_cache(maxsize=1)
def _arrays(shape: tuple[int, ...], dtype: str, axis: int) -> dict[str, jax.Array]:
    """x logits, g and r cotangents of them and of rows, q probabilities, y labels."""
    rng = np.random.default_rng(0)
    rows = shape[:-1] if axis == -1 else shape[1:]
    normal = functools.partial(rng.standard_normal, dtype=np.float32)
    q = rng.random(shape, dtype=np.float32)
    q /= q.sum(axis, keepdims=True)
    arrays = {"x": 3 * normal(shape), "g": normal(shape), "r": normal(rows), "q": q}
    arrays = {name: jnp.asarray(v).astype(dtype) for name, v in arrays.items()}
    labels = rng.integers(0, shape[axis], rows)
    return {**arrays, "y": jnp.asarray(labels, jnp.int32)}


def _contestants_of_rows(name, shape, dtype, axis):
    arrays = _arrays(shape, dtype, axis)
    operation = _operations(axis)[name]
    arguments = [arrays[argument] for argument in operation.arguments]
    contestants = {
        "jaxsoft": of_jax(operation.ours, *arguments),
        operation.peer: of_jax(operation.theirs, *arguments),
    }
    if torch is not None and axis == -1:
        contestants["torch"] = _torch_rows(name, arrays)
    return contestants


def of_jax(f: Callable[..., Any], *arguments: Any) -> Contestant:
    jitted = jax.jit(f)
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Contestant(
        lambda: jax.block_until_ready(jitted(*arguments)),
        seconds,
        memory.temp_size_in_bytes,
    )


def _torch_rows(name: str, arrays: dict[str, jax.Array]) -> Contestant:
    cross_entropy = torch.nn.functional.cross_entropy
    x, y = as_torch(arrays["x"]), torch.from_numpy(np.array(arrays["y"])).long()
    if name == "cross_entropy":
        return Contestant(lambda: cross_entropy(x, y, reduction="none"))
    if name in ("logsumexp", "softmax", "log_softmax"):
        return Contestant(lambda: getattr(torch, name)(x, -1))
    x.requires_grad_(True)
    if name.endswith("vjp"):
        function = getattr(torch, name.split(",")[0])
        g = as_torch(arrays["r" if name.startswith("logsumexp") else "g"])
        return Contestant(lambda: torch.autograd.grad(function(x, -1), x, g))
    labels = as_torch(arrays["q"]) if "probabilities" in name else y
    smoothing = 0.1 if "smoothed" in name else 0.0

    def gradient():
        return torch.autograd.grad(
            cross_entropy(x, labels, label_smoothing=smoothing), x
        )

    return Contestant(gradient)


def as_torch(v: jax.Array) -> Any:
    tensor = torch.from_numpy(np.array(v.astype(jnp.float32)))
    return tensor.to(torch.bfloat16 if v.dtype == jnp.bfloat16 else torch.float32)


def _attention(operation, shape):
    """Scores of which every query sees those before it."""
    arrays = _arrays(shape, "float32", -1)
    x, g = arrays["x"], arrays["g"]
    where = jnp.tril(jnp.ones(shape[-2:], bool))
    ours, theirs = (
        functools.partial(library.softmax, where=where) for library in (jaxsoft, jax.nn)
    )
    arguments = [x]
    if operation.endswith("vjp"):
        ours, theirs, arguments = _vjp(ours), _vjp(theirs), [x, g]
    contestants = {
        "jaxsoft": of_jax(ours, *arguments),
        "jax.nn": of_jax(theirs, *arguments),
    }
    if torch is not None:
        contestants["torch"] = _torch_attention(operation, x, g, where)
    return contestants


def _torch_attention(operation, x, g, where):
    x, g = as_torch(x), as_torch(g)
    hidden = torch.from_numpy(~np.array(where))

    def softmax():
        return torch.softmax(x.masked_fill(hidden, -torch.inf), -1)

    if not operation.endswith("vjp"):
        return Contestant(softmax)
    x.requires_grad_(True)
    return Contestant(lambda: torch.autograd.grad(softmax(), x, g))


def _head_name(reduction: str, with_gradient: bool) -> str:
    name = "linear_cross_entropy, " + ("mean" if reduction == "mean" else "per token")
    return f"{name}, gradient" if with_gradient else name


def _head(reduction, with_gradient, shape):
    tokens, features, classes = shape
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(tokens, features)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(classes, features)) / features**0.5, jnp.float32)
    y = jnp.asarray(rng.integers(0, classes, tokens), jnp.int32)
    weights = jnp.linspace(0.5, 1.5, tokens)

    def of_logits(h, w):
        losses = optax.softmax_cross_entropy_with_integer_labels(h @ w.T, y)
        return jnp.mean(losses) if reduction == "mean" else losses

    def summed(loss):
        """A number, whose gradient can be taken."""
        return lambda h, w: (
            jnp.vdot(weights, loss(h, w)) if reduction == "none" else loss(h, w)
        )

    losses = {
        "jaxsoft": lambda h, w: jaxsoft.linear_cross_entropy(
            h, w, y, reduction=reduction
        ),
        "optax": of_logits,
    }
    if jax_cce is not None and reduction == "mean":  # it has no other
        losses["jax-cce"] = lambda h, w: jax_cce.linear_cross_entropy(h, w, y)
    if with_gradient:
        losses = {
            name: jax.value_and_grad(summed(loss), (0, 1))
            for name, loss in losses.items()
        }
    contestants = {name: of_jax(loss, h, w) for name, loss in losses.items()}
    if torch is not None:
        contestants["torch"] = _torch_head(h, w, y, weights, reduction, with_gradient)
    return contestants


def _torch_head(h, w, y, weights, reduction, with_gradient):
    h, w, weights = (as_torch(v) for v in (h, w, weights))
    y = torch.from_numpy(np.array(y)).long()

    def loss():
        logits = h @ w.T
        return torch.nn.functional.cross_entropy(logits, y, reduction=reduction)

    if not with_gradient:
        return Contestant(loss)
    h.requires_grad_(True)
    w.requires_grad_(True)

    def gradient():
        value = loss() if reduction == "mean" else loss() @ weights
        return torch.autograd.grad(value, (h, w))

    return Contestant(gradient)
