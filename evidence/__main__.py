"""Measure what the promises rest on, print it, and write it to a file and a page.

    python -m evidence                    everything, and docs/evidence.md
    python -m evidence --only softmax --dtype float32 --output /tmp/softmax.json

A page is written where everything was measured.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.provenance import machine, provenance
from evidence import page, precision, stability

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
PACKAGES = ("jax", "jaxlib", "optax", "mpmath", "numpy")


def measured(only: str, dtypes: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"rows": 0, "precision": [], "stability": []}
    for dtype in dtypes:
        print(f"{dtype}: a minute or two", file=sys.stderr)
        with jax.enable_x64(dtype == "float64"):
            rows = list(precision.rows_of(dtype))
            results["rows"] = sum(len(of_size.x) for of_size in rows)
            for function in precision.FUNCTIONS:
                if only in function.name:
                    results["precision"] += precision.measured(function, dtype, rows)
            for law in stability.LAWS:
                if only in law.name:
                    results["stability"] += stability.measured(law, dtype)
    return results


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--dtype", action="append", choices=precision.DTYPES)
    parser.add_argument("--output", type=Path, help="default: results/<device>.json")
    options = parser.parse_args(arguments)
    dtypes = options.dtype or list(precision.DTYPES)
    report = {
        **provenance("evidence", arguments, PACKAGES),
        **machine(),
        **measured(options.only, dtypes),
    }
    text = page.rendered(report)
    print(text)
    output = options.output or RESULTS / f"{jax.devices()[0].platform}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")
    if not arguments:
        PAGE.write_text(text)
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
