"""The measured figures as a page of the site."""

from typing import Any

LIBRARIES = ("jaxsoft", "jax.nn", "optax")

HEAD = """# Evidence

Command: `{command}`

Machine: {device}, {machine}. Versions: Python {python}, JAX {jax}, optax {optax},
mpmath {mpmath}. Commit: {commit}.

The numbers are stored in `evidence/results/`; the points at which they were measured
are those of the tests, `evidence/points.py`.

"""

PRECISION = """## Digits

Errors against the formulas in 80-digit arithmetic (`tests/oracle.py`; 340 digits for
float64), on rows of 2, 3, 17 and 300 classes, of offsets from -1000 to 10000, of scales
from 0.1 to 100, and with one class above all others by 5 to 80: {rows} rows in all. A
cell is the worst and the median error in units in the last place of the logits' dtype,
whatever the dtype of the result, and the share of numbers that are wrong by more than
1e-5 of themselves and by more than one unit. Not counted is what the dtype holds with
few digits: numbers below 1e-36, in float16 below 6e-5, in float64 below 1e-300. A cell
is empty where a library has no such function. The gradients of entropy and KL
divergence are differences that cancel: `tests/test_precision.py` measures the former in
roundings of its terms.

"""

STABILITY = """## NaN

Every combination of three logits out of 0, ±0.001, ±1, ±1000, ±1e8 and ±inf, ties
included, with masks of any of the classes where a function takes them, at temperatures
0, 1e-38, 1e-6, 0.001, 1, 1000, -1e-38, -0.001 and -1 where it takes those (the linear
heads: finite logits). Values, gradients in logits and temperature, and tangents, in
float32, bfloat16, float16 and float64 together. A cell is the number of rows with a NaN
in any of these, and of those at temperature 1 alone. The peers have no temperature:
x / t stands for it. A name with `_options` has a mask and a temperature, and what else
its entry in `tests/laws.py` says.

"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


def ulp(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2g}" if value < 100 else f"{value:.1e}"


def precision_cell(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return ""
    worst, median = ulp(summary["worst_ulp"]), ulp(summary["median_ulp"])
    return f"{worst}, {median}; {100 * summary['wrong_share']:.2g} %"


def precision_tables(entries: list[dict[str, Any]]) -> str:
    text = ""
    cells = {(e["function"], e["dtype"], e["library"]): e for e in entries}
    for dtype in dict.fromkeys(e["dtype"] for e in entries):
        rows = []
        for function in dict.fromkeys(e["function"] for e in entries):
            for what in ("value", "gradient"):
                of = [
                    cells.get((function, dtype, library), {}).get(what)
                    for library in LIBRARIES
                ]
                if of[0] is not None:
                    rows.append([function, what, *map(precision_cell, of)])
        text += f"### {dtype}\n\n" + table(["function", "", *LIBRARIES], rows)
    return text


def stability_table(entries: list[dict[str, Any]]) -> str:
    rows = []
    for law in dict.fromkeys(e["law"] for e in entries):
        of_law = [e for e in entries if e["law"] == law]
        ours = [e for e in of_law if e["library"] == "jaxsoft"]
        row = [f"`{law}`"]
        row += [f"{sum(e[key] for e in ours)}" for key in ("rows", "numbers")]
        for library in LIBRARIES:
            of = [e for e in of_law if e["library"] == library]
            everywhere, at_1 = (
                sum(e[key] for e in of) for key in ("rows_with_nan", "of_them_with_nan")
            )
            row.append(f"{everywhere}, {at_1}" if of else "")
        rows.append(row)
    ours = [e for e in entries if e["library"] == "jaxsoft"]
    total = [f"{sum(e[key] for e in ours)}" for key in ("rows", "numbers")]
    nans = sum(e["rows_with_nan"] for e in ours)
    rows.append(["all", *total, f"{nans}", "", ""])
    return table(["function", "rows", "numbers", *LIBRARIES], rows)


def rendered(report: dict[str, Any]) -> str:
    head = HEAD.format(**report, **report["versions"])
    digits = PRECISION.format(rows=report["rows"])
    digits += precision_tables(report["precision"])
    nans = STABILITY + stability_table(report["stability"])
    return (head + digits + nans).rstrip() + "\n"
