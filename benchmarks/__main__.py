"""Time jaxsoft beside its peers, print a table, and write it to a file.

    python -m benchmarks                  every cell, in a quarter of an hour
    python -m benchmarks --only logsumexp --dtype float32
    python -m benchmarks --smallest       one small cell of each kind

A ratio above 1 means that jaxsoft is faster than that peer.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
from tqdm import tqdm

import jaxsoft
from benchmarks import cells, timing
from benchmarks.provenance import machine, provenance

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "jax-cce", "torch")
OF_JAX = ("jax.nn", "optax", "jax-cce")


def line(result: dict) -> str:
    shape = " x ".join(map(str, result["shape"]))
    times = ", ".join(f"{k} {v:.3g}" for k, v in result["milliseconds"].items())
    compiled = ", ".join(f"{v:.2g}" for v in result["compile_seconds"].values())
    return (
        f"{result['operation']:42} {shape:20} {result['dtype']:9}"
        f"{result['times_the_fastest_peer']:5.2f}  {times} ms, compiled in {compiled} s"
    )


def geometric_mean(ratios: Iterable[float]) -> float | None:
    logs = [math.log(ratio) for ratio in ratios]
    return round(math.exp(sum(logs) / len(logs)), 3) if logs else None


def means(results: list[dict]) -> dict[str, float | None]:
    """Peers' times over ours: the fastest of JAX, torch, and the fastest of all."""
    of_jax = [
        min(time for name, time in result["times"].items() if name in OF_JAX)
        for result in results
    ]
    of_torch = [r["times"]["torch"] for r in results if "torch" in r["times"]]
    of_all = [result["times_the_fastest_peer"] for result in results]
    return {
        "jax": geometric_mean(of_jax),
        "torch": geometric_mean(of_torch),
        "fastest": geometric_mean(of_all),
    }


def compile_seconds(results: list[dict]) -> dict[str, float]:
    """Of all cells: ours, and those of the first JAX peer of each."""
    ours = sum(result["compile_seconds"]["jaxsoft"] for result in results)
    theirs = 0.0
    for result in results:
        theirs += next(v for k, v in result["compile_seconds"].items() if k in OF_JAX)
    return {"jaxsoft": round(ours, 1), "peers": round(theirs, 1)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="part of an operation's name")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.8, help="of a cell")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--device", help="a JAX platform: cpu, gpu, tpu")
    parser.add_argument("--output", type=Path, help="default: results/<device>.json")
    options = parser.parse_args(arguments)
    if options.device:
        jax.config.update("jax_platforms", options.device)
    wanted = [
        cell
        for cell in cells.every_cell(options.smallest)
        if options.only in cell.operation
        and (options.dtype is None or cell.dtype in options.dtype)
    ]
    results = []
    for cell in tqdm(wanted, unit="cell"):
        results.append(timing.measured(cell, options.seconds))
        tqdm.write(line(results[-1]))
    device = jax.devices()[0].platform
    output = options.output or RESULTS / f"{device}.json"
    report = {
        **provenance("benchmarks", arguments, PACKAGES),
        **machine(),
        "cpu_kernels": jaxsoft.cpu_kernels(),
        "geometric_mean": means(results),
        "compile_seconds": compile_seconds(results),
        "cells": results,
    }
    print(f"geometric means over {len(results)} cells: {report['geometric_mean']}")
    print(f"compiled in {report['compile_seconds']} s")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
