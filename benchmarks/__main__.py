"""Measure jaxsoft beside its peers, print a table, and write it to a file.

    python -m benchmarks                  every cell
    python -m benchmarks --only logsumexp --dtype float32
    python -m benchmarks --smallest       one small cell of each kind

A ratio above 1 means that jaxsoft is faster than the fastest peer. The floor is one
read of the input, a read and a write, or the matrix products alone, in the same run.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks import cells
from benchmarks.provenance import machine, provenance
from benchmarks.timing import measured

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "jax-cce", "torch")


def every_cell(smallest: bool, only: str, dtypes: list[str]):
    rows, linear = cells.ROW_SHAPES, cells.LINEAR_SHAPES
    if smallest:
        rows, linear = cells.SMALLEST[:1], cells.SMALLEST[1:]
    wanted = [
        *((cells.row_cell, cells.ROW_OPERATIONS, shape) for shape in rows),
        *((cells.linear_cell, cells.LINEAR_OPERATIONS, shape) for shape in linear),
    ]
    return [
        (make, operation, shape, dtype)
        for make, operations, shape in wanted
        for operation in operations
        for dtype in dtypes
        if only in operation
    ]


def line(result: dict) -> str:
    shape = " x ".join(map(str, result["shape"]))
    times = ", ".join(f"{k} {v:.2f}" for k, v in result["milliseconds"].items())
    return (
        f"{result['operation']:32} {shape:18} {result['dtype']:9} "
        f"{result['times_the_fastest_peer']:5.2f}  {times}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="part of an operation's name")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--device", help="a JAX platform: cpu, gpu, tpu")
    parser.add_argument("--output", type=Path, help="default: results/<device>.json")
    options = parser.parse_args(arguments)
    if options.device:
        jax.config.update("jax_platforms", options.device)
    dtypes = options.dtype or ["float32", "bfloat16"]
    results = []
    for make, operation, shape, dtype in tqdm(
        every_cell(options.smallest, options.only, dtypes), unit="cell"
    ):
        results.append(measured(make(operation, shape, dtype), options.rounds))
        tqdm.write(line(results[-1]))
    ratios = [result["times_the_fastest_peer"] for result in results]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean over {len(ratios)} cells: {mean:.2f} times the fastest peer")
    device = jax.devices()[0].platform
    output = options.output or RESULTS / f"{device}.json"
    report = {
        **provenance("benchmarks", arguments, PACKAGES),
        **machine(),
        "geometric_mean": mean,
        "cells": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
