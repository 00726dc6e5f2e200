"""Programs for TPU v5e, compiled ahead of time on a machine without a TPU.

    pip install libtpu
    python -m benchmarks.tpu            all programs, to benchmarks/results/tpu_v5e.json
    python -m benchmarks.tpu --quick    one program, printed alone

For every program: the temporary memory of a device, and what the devices send to one
another; what stands in a loop is counted once. Nothing is run, so nothing is timed.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxsoft
from benchmarks.provenance import provenance
from benchmarks.targets import tpu_topology

RESULTS = Path(__file__).parent / "results" / "tpu_v5e.json"
TOKENS, FEATURES = 8192, 4096
DENSE_ROWS = 4096


class Case(NamedTuple):
    name: str
    topology: str
    mesh: tuple[int, int]  # devices along the tokens, and along the vocabulary
    classes: int
    reduction: str = "none"


LINEAR, SHARDED, DENSE = "linear head, jit", "linear head, shard_vocab", "dense, jit"
CASES = (
    Case(LINEAR, "v5e:2x2", (1, 1), 131072),
    Case(LINEAR, "v5e:2x2", (1, 1), 128256),
    Case(SHARDED, "v5e:2x2", (1, 4), 131072),
    Case(SHARDED, "v5e:2x2", (2, 2), 131072),
    Case(SHARDED, "v5e:4x4", (4, 4), 131072),
    Case(DENSE, "v5e:2x2", (1, 4), 131072),
    Case(LINEAR, "v5e:2x2", (1, 4), 131072),
    Case(LINEAR, "v5e:2x2", (1, 1), 131072, "mean"),
    Case(SHARDED, "v5e:4x4", (4, 4), 128256, "mean"),
)


def mesh_of(topology: str, tokens: int, vocabulary: int) -> Mesh:
    devices = tpu_topology(topology).devices
    devices = np.array(devices[: tokens * vocabulary]).reshape(tokens, vocabulary)
    return Mesh(devices, ("tokens", "vocab"), axis_types=(AxisType.Auto,) * 2)


def placed(mesh: Mesh, shape, dtype, *spec) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def head(case: Case, mesh: Mesh):
    """The value and both gradients of linear_cross_entropy in bfloat16."""
    loss = jaxsoft.linear_cross_entropy
    if case.name == SHARDED:
        loss = jaxsoft.shard_vocab(loss, mesh, "vocab", tokens="tokens")

    def total(hidden, vocab_weight, labels):
        return jnp.sum(loss(hidden, vocab_weight, labels, reduction=case.reduction))

    arguments = (
        placed(mesh, (TOKENS, FEATURES), jnp.bfloat16, "tokens"),
        placed(mesh, (case.classes, FEATURES), jnp.bfloat16, "vocab"),
        placed(mesh, (TOKENS,), jnp.int32, "tokens"),
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    gradients = tuple(argument.sharding for argument in arguments[:2])
    program = jax.jit(
        jax.value_and_grad(total, (0, 1)), out_shardings=(everywhere, gradients)
    )
    return program, arguments


def dense(case: Case, mesh: Mesh):
    """The gradient of cross_entropy in float32, which jit alone splits."""

    def total(logits, labels):
        return jnp.sum(jaxsoft.cross_entropy(logits, labels))

    shape = (DENSE_ROWS, case.classes)
    logits = placed(mesh, shape, jnp.float32, "tokens", "vocab")
    labels = placed(mesh, shape[:1], jnp.int32, "tokens")
    return jax.jit(jax.grad(total)), (logits, labels)


ELEMENTS = re.compile(r"([a-z]+\d*)\[([0-9,]*)\]")
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)


def collectives(text: str) -> list[str]:
    """What is sent, as the compiled program says it: `all-reduce f32[8192]`."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = [f"{kind}[{size}]" for kind, size in ELEMENTS.findall(match[1])]
            # A start returns its operand beside its result.
            shapes = shapes[len(shapes) // 2 :] if match[3] else shapes
            found.append(f"{match[2]} {' '.join(shapes)}")
    return sorted(found)


def entries_sent(found: list[str]) -> int:
    return sum(
        math.prod(int(n) for n in size.split(",") if n)
        for line in found
        for _, size in ELEMENTS.findall(line)
    )


def compiled(case: Case) -> dict:
    mesh = mesh_of(case.topology, *case.mesh)
    program, arguments = (dense if case.name == DENSE else head)(case, mesh)
    start = time.perf_counter()
    program = program.lower(*arguments).compile()
    found = collectives(program.as_text())
    return {
        **case._asdict(),
        "temporary_megabytes": program.memory_analysis().temp_size_in_bytes / 1e6,
        "collectives": found,
        "numbers_in_collectives": entries_sent(found),
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu")
    parser.add_argument("--quick", action="store_true", help="one program, not stored")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    report = {
        **provenance("benchmarks.tpu", arguments, ("jax", "jaxlib", "libtpu")),
        "tokens": TOKENS,
        "features": FEATURES,
        "dense_rows": DENSE_ROWS,
        "programs": [],
    }
    for case in CASES[:1] if options.quick else CASES:
        row = compiled(case)
        report["programs"].append(row)
        print(
            f"{case.topology}  {'x'.join(map(str, case.mesh))}  {case.classes}  "
            f"{case.name:26}{case.reduction:6}{row['temporary_megabytes']:8.1f} MB  "
            f"{'; '.join(row['collectives']) or 'nothing sent'}",
            flush=True,
        )
        if not options.quick:
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
