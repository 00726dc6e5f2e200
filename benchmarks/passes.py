"""Count what programs for an accelerator move through its memory, without one.

    python -m benchmarks.passes --target v5e       a TPU v5e; needs libtpu
    python -m benchmarks.passes --target h200      an NVIDIA H200; needs its compiler
    python -m benchmarks.passes --target v5e --only entropy --shape 1024x1000 --kernels

A pass is one read or write of all logits. What a compiled program moves, over the bytes
of its logits, is its number of passes: exact, and on an accelerator most of the time
that these functions take. Beside jaxsoft stand its peers, in their users' own words; of
the linear head the bytes are counted in gigabytes. Nothing is run, and nothing timed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks import hlo, targets
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax")
COMPILERS = {
    "v5e": ("libtpu",),
    "h200": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}
SHAPES = ("8192x32768", "65536x128", "1024x1000")
DTYPES = ("float32", "bfloat16")
HEAD = "linear_cross_entropy, gradient"
TOKENS, FEATURES, CLASSES = 8192, 4096, 131072


class Operation(NamedTuple):
    """The letters are its arguments: x and t logits, g a cotangent, y labels."""

    arguments: str
    jaxsoft: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]


def mean_gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The value and the gradient in the first argument."""
    return jax.value_and_grad(lambda x, *rest: jnp.mean(loss(x, *rest)))


def pullback(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, g: jax.vjp(f, x)[1](g)[0]


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def optax_labels(x, y):
    return optax.softmax_cross_entropy_with_integer_labels(wide(x), y)


def optax_one_hot(x, y):
    return optax.softmax_cross_entropy(wide(x), jax.nn.one_hot(y, x.shape[-1]))


def jax_nn_entropy(x):
    log_p = jax.nn.log_softmax(wide(x))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def optax_kl(x, target):
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(wide(x)), jax.nn.log_softmax(wide(target))
    )


def mean_of(operation: Operation) -> Operation:
    """As a training step takes it."""

    def averaged(loss):
        return lambda *given: jnp.mean(loss(*given))

    arguments, ours, peers = operation
    peers = {peer: averaged(f) for peer, f in peers.items()}
    return Operation(arguments, averaged(ours), peers)


def with_gradient(name: str, operation: Operation) -> dict[str, Operation]:
    arguments, ours, peers = operation
    gradients = {peer: mean_gradient(f) for peer, f in peers.items()}
    gradient = Operation(arguments, mean_gradient(ours), gradients)
    return {name: operation, f"{name}, gradient": gradient}


def with_pullback(name: str, ours: Callable[..., Any], peer: Any) -> Any:
    return {
        name: Operation("x", ours, {"jax.nn": peer}),
        f"{name}, vjp": Operation("xg", pullback(ours), {"jax.nn": pullback(peer)}),
    }


CROSS_ENTROPY = Operation(
    "xy",
    jaxsoft.cross_entropy,
    {"optax": optax_labels, "optax, one-hot": optax_one_hot},
)

OPERATIONS: dict[str, Operation] = {
    **with_gradient(
        "logsumexp",
        Operation(
            "x",
            lambda x: jaxsoft.logsumexp(x, -1),
            {"jax.nn": lambda x: jax.nn.logsumexp(x, -1)},
        ),
    ),
    **with_pullback("softmax", jaxsoft.softmax, jax.nn.softmax),
    **with_pullback("log_softmax", jaxsoft.log_softmax, jax.nn.log_softmax),
    **with_gradient(
        "entropy", Operation("x", jaxsoft.entropy, {"jax.nn": jax_nn_entropy})
    ),
    "cross_entropy, per row": CROSS_ENTROPY,
    **with_gradient("cross_entropy", mean_of(CROSS_ENTROPY)),
    **with_gradient(
        "kl_divergence", Operation("xt", jaxsoft.kl_divergence, {"optax": optax_kl})
    ),
}


def head_gradients(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The value and both gradients of the loss of every token."""
    return jax.value_and_grad(lambda h, w, y: jnp.sum(loss(h, w, y)), (0, 1))


def optax_head(hidden, vocab_weight, labels):
    logits = jnp.matmul(hidden, vocab_weight.T, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def counted(f: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    program = jax.jit(f).lower(*arguments).compile()
    kernels = hlo.kernels(program.as_text())
    return {
        "bytes": hlo.bytes_moved(kernels),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "kernels": kernels,
    }


def cell(device: Any, name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """One operation, of one shape and dtype, by everybody who has it."""
    operation = OPERATIONS[name]
    logits = targets.argument(device, shape, jnp.dtype(dtype))
    labels = targets.argument(device, shape[:1], jnp.int32)
    arguments = tuple(labels if k == "y" else logits for k in operation.arguments)
    everybody = {"jaxsoft": operation.jaxsoft, **operation.peers}
    of_logits = math.prod(shape) * jnp.dtype(dtype).itemsize
    return _compared(name, shape, dtype, everybody, arguments, of_logits)


def head_cell(device: Any) -> dict[str, Any]:
    arguments = (
        targets.argument(device, (TOKENS, FEATURES), jnp.bfloat16),
        targets.argument(device, (CLASSES, FEATURES), jnp.bfloat16),
        targets.argument(device, (TOKENS,), jnp.int32),
    )
    everybody = {
        "jaxsoft": head_gradients(jaxsoft.linear_cross_entropy),
        "optax": head_gradients(optax_head),
    }
    shape = (TOKENS, FEATURES, CLASSES)
    return _compared(HEAD, shape, "bfloat16", everybody, arguments, None)


def _compared(name, shape, dtype, everybody, arguments, of_logits):
    contestants = {who: counted(f, arguments) for who, f in everybody.items()}
    for contestant in contestants.values():
        if of_logits:
            contestant["passes"] = contestant["bytes"] / of_logits
    best = min(c["bytes"] for who, c in contestants.items() if who != "jaxsoft")
    return {
        "operation": name,
        "shape": list(shape),
        "dtype": dtype,
        "of_the_best_peer": contestants["jaxsoft"]["bytes"] / best,
        "contestants": contestants,
    }


def cells(device: Any, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in options.shape or SHAPES:
        dims = tuple(map(int, shape.split("x")))
        for dtype in options.dtype or DTYPES:
            for name in OPERATIONS:
                if options.only in name:
                    yield cell(device, name, dims, dtype)
    if options.only in HEAD and not (options.shape or options.dtype):
        yield head_cell(device)


def line(row: dict[str, Any]) -> str:
    ours = row["contestants"]["jaxsoft"]
    moved = "; ".join(
        f"{who} {size_moved(contestant)}"
        for who, contestant in row["contestants"].items()
    )
    return (
        f"{row['operation']:31}{'x'.join(map(str, row['shape'])):18}{row['dtype']:9}"
        f"{row['of_the_best_peer']:5.2f}  {moved}; {kernel_count(ours)} kernels, "
        f"{ours['temporary_bytes'] / 1e6:.1f} MB of temporaries"
    )


def kernel_count(contestant: dict[str, Any]) -> int:
    return sum(kernel.trips for kernel in contestant["kernels"])


def size_moved(contestant: dict[str, Any]) -> str:
    if "passes" in contestant:
        return f"{contestant['passes']:.2f}"
    return f"{contestant['bytes'] / 1e9:.1f} GB"


def geometric_mean(rows: list[dict[str, Any]]) -> float:
    """Of the shares of the best peer, over the cells that count passes."""
    shares = [row["of_the_best_peer"] for row in rows if row["operation"] != HEAD]
    return math.exp(sum(map(math.log, shares)) / max(len(shares), 1))


def stored(row: dict[str, Any]) -> dict[str, Any]:
    contestants = {
        who: {**contestant, "kernels": kernel_count(contestant)}
        for who, contestant in row["contestants"].items()
    }
    return {**row, "contestants": contestants}


def markdown(report: dict[str, Any], shape: str) -> str:
    """A table of one shape: jaxsoft's passes, and those of the best peer."""
    lines = ["| operation | " + " | ".join(DTYPES) + " |", "|---|---|---|"]
    for name in OPERATIONS:
        found = []
        for dtype in DTYPES:
            (row,) = (
                row
                for row in report["cells"]
                if (row["operation"], row["dtype"]) == (name, dtype)
                and "x".join(map(str, row["shape"])) == shape
            )
            passes = {who: c["passes"] for who, c in row["contestants"].items()}
            best = min(v for who, v in passes.items() if who != "jaxsoft")
            found.append(f"{passes['jaxsoft']:.1f} / {best:.1f}")
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    install = "\n".join(f"    {name}: {line}" for name, line in targets.INSTALL.items())
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.passes",
        description=f"{__doc__}\nThe compilers:\n{install}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--target", choices=targets.NAMES, required=True)
    result.add_argument("--only", default="", help="part of an operation's name")
    result.add_argument("--shape", action="append", help="rows x classes, as 1024x1000")
    result.add_argument("--dtype", action="append", choices=DTYPES)
    result.add_argument("--kernels", action="store_true", help="list the large ones")
    result.add_argument(
        "--output",
        type=Path,
        help="default: results/passes_<target>.json, of all cells",
    )
    return result


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    try:
        device = targets.device(options.target)
    except targets.MissingCompilerError as error:
        sys.exit(str(error))
    rows = []
    for row in cells(device, options):
        rows.append(stored(row))
        print(line(row), flush=True)
        for kernel in (
            row["contestants"]["jaxsoft"]["kernels"] if options.kernels else ()
        ):
            if kernel.bytes > 1e6:
                print(
                    f"    {kernel.name:40} reads {kernel.read / 1e6:9.2f} MB, writes "
                    f"{kernel.written / 1e6:9.2f} MB, {kernel.trips} times"
                )
    print(f"geometric mean: {geometric_mean(rows):.2f} of the best peer's passes")
    is_whole = not (options.only or options.shape or options.dtype)
    output = options.output
    if output is None and is_whole:
        output = RESULTS / f"passes_{options.target}.json"
    if output is None:
        return
    packages = (*PACKAGES, *COMPILERS[options.target])
    report = {
        **provenance("benchmarks.passes", arguments, packages),
        "target": options.target,
        "geometric_mean": geometric_mean(rows),
        "cells": rows,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
