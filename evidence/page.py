"""The measured figures as a page of the site."""

from typing import Any

PEERS = ("jax.nn", "optax")
LIBRARIES = ("jaxsoft", *PEERS)

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
from 0.1 to 100, and with one class above all others by 5 to 80: {rows} rows in all.

- **worst** and **median**: the error in units in the last place (ulp) of the logits'
  dtype, whatever the dtype of the result. In float32 one ulp is about 1e-7 of the
  number, and 1.7e+07 ulp are a number without one right digit.
- **wrong**: of how many numbers in a hundred the error is more than 1e-5 of the
  number, and more than one ulp.
- An empty cell: the library has no such function.

Not counted is what the dtype holds with few digits: numbers below 1e-36, in float16
below 6e-5, in float64 below 1e-300. The gradients of entropy and KL divergence are
differences that cancel: `tests/test_precision.py` measures the former in roundings of
its terms.

"""

STABILITY = """## NaN

Every combination of three logits out of 0, ±0.001, ±1, ±1000, ±1e8 and ±inf, ties
included, with masks of any of the classes where a function takes them, at temperatures
0, 1e-38, 1e-6, 0.001, 1, 1000, -1e-38, -0.001 and -1 where it takes those (the linear
heads: finite logits). Values, gradients in logits and temperature, and tangents, in
float32, bfloat16, float16 and float64 together. A name with `_options` has a mask and a
temperature, and what else its entry in `tests/laws.py` says.

- **rows**, **numbers**: how many rows were tried, and how many numbers came out.
- **jaxsoft**, **jax.nn**, **optax**: the rows with a NaN in any of these numbers. The
  peers have no temperature: x / t stands for it.
- **at 1**: how many of the peer's rows are left at temperature 1.

"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


def ulp(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.2g}" if value < 100 else f"{value:.1e}"


def precision_tables(entries: list[dict[str, Any]]) -> str:
    text = ""
    of = {(e["function"], e["dtype"], e["library"]): e for e in entries}
    header = ["function", "", "jaxsoft, worst", "jaxsoft, median"]
    header += [f"{peer}, {what}" for peer in PEERS for what in ("worst", "wrong %")]
    for dtype in dict.fromkeys(e["dtype"] for e in entries):
        rows = []
        for function in dict.fromkeys(e["function"] for e in entries):
            for what in ("value", "gradient"):
                ours, *theirs = (
                    of.get((function, dtype, library), {}).get(what)
                    for library in LIBRARIES
                )
                if ours is None:
                    continue
                row = [function, what, ulp(ours["worst_ulp"]), ulp(ours["median_ulp"])]
                rows.append(row + [cell for peer in theirs for cell in of_peer(peer)])
        text += f"### {dtype}\n\n" + table(header, rows)
        text += f"Wrong numbers of jaxsoft: {wrong_numbers(entries, dtype)}.\n\n"
    return text


def of_peer(summary: dict[str, Any] | None) -> list[str]:
    if summary is None:
        return ["", ""]
    return [ulp(summary["worst_ulp"]), f"{100 * summary['wrong_share']:.2g}"]


def wrong_numbers(entries: list[dict[str, Any]], dtype: str) -> str:
    """The functions of jaxsoft with wrong numbers, and their share."""
    shares = {
        f"{e['function']}, {what}": e[what]["wrong_share"]
        for e in entries
        if e["library"] == "jaxsoft" and e["dtype"] == dtype
        for what in ("value", "gradient")
        if e.get(what) is not None
    }
    wrong = [f"{name} {100 * v:.2g} %" for name, v in shares.items() if v > 0]
    return "; ".join(wrong) or "none"


def stability_table(entries: list[dict[str, Any]]) -> str:
    rows = []
    for law in dict.fromkeys(e["law"] for e in entries):
        of_law = [e for e in entries if e["law"] == law]
        ours = [e for e in of_law if e["library"] == "jaxsoft"]
        row = [f"`{law}`", *sums(ours, "rows", "numbers", "rows_with_nan")]
        for peer in PEERS:
            theirs = [e for e in of_law if e["library"] == peer]
            row += sums(theirs, "rows_with_nan", "of_them_with_nan")
        rows.append(row)
    ours = [e for e in entries if e["library"] == "jaxsoft"]
    total = sums(ours, "rows", "numbers", "rows_with_nan")
    rows.append(["all", *total, *[""] * 2 * len(PEERS)])
    header = ["function", "rows", "numbers", "jaxsoft"]
    header += [name for peer in PEERS for name in (peer, f"{peer}, at 1")]
    return table(header, rows)


def sums(entries: list[dict[str, Any]], *keys: str) -> list[str]:
    """Empty where there is nothing to sum."""
    return [str(sum(e[key] for e in entries)) if entries else "" for key in keys]


def rendered(report: dict[str, Any]) -> str:
    head = HEAD.format(**report, **report["versions"])
    digits = PRECISION.format(rows=report["rows"])
    digits += precision_tables(report["precision"])
    nans = STABILITY + stability_table(report["stability"])
    return (head + digits + nans).rstrip() + "\n"
