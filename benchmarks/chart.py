"""The charts of the site: python -m benchmarks.chart

The passes of compiled programs over their logits, and the speed on a CPU, of the files
that `python -m benchmarks.passes` and `python -m benchmarks` have written.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "_static"
TARGETS = {"h200": "NVIDIA H200", "v5e": "TPU v5e"}
LARGE = [8192, 32768]
# The colours are those of Okabe and Ito, which colour-blind people tell apart.
OURS, PEER = "#0072B2", "#E69F00"


def draw_passes(reports: dict[str, dict]) -> plt.Figure:
    """What programs for large float32 logits read and write, beside the best peer."""
    figure, axes = plt.subplots(
        1, len(reports), figsize=(9.5, 4.6), layout="constrained", sharey=True
    )
    for ax, (target, report) in zip(axes, reports.items(), strict=True):
        cells = [
            cell
            for cell in report["cells"]
            if cell["shape"] == LARGE and cell["dtype"] == "float32"
        ]
        for offset, color, label, passes in (
            (-0.2, PEER, "best of jax.nn and optax", [_of_peers(c) for c in cells]),
            (0.2, OURS, "jaxsoft", [_of_jaxsoft(c) for c in cells]),
        ):
            heights = [i + offset for i in range(len(cells))]
            bars = ax.barh(heights, passes, 0.4, color=color, label=label)
            ax.bar_label(bars, [f"{v:.0f}" for v in passes], padding=2, fontsize=8)
        ax.set_yticks(range(len(cells)), [cell["operation"] for cell in cells])
        ax.set_title(TARGETS[target])
        ax.set_xlabel("passes (bytes moved / bytes of the logits)")
        ax.set_xlim(0, 10.5)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure


def _of_jaxsoft(cell: dict) -> float:
    return cell["contestants"]["jaxsoft"]["passes"]


def _of_peers(cell: dict) -> float:
    contestants = cell["contestants"].items()
    return min(of["passes"] for name, of in contestants if name != "jaxsoft")


def draw_speed(report: dict) -> plt.Figure:
    """A dot per cell: how often the fastest peer's time holds ours."""
    cells = report["cells"]
    operations = list(dict.fromkeys(cell["operation"] for cell in cells))
    figure, ax = plt.subplots(
        figsize=(9.5, 0.32 * len(operations) + 1.4), layout="constrained"
    )
    for dtype, marker, color in (("float32", "o", OURS), ("bfloat16", "D", PEER)):
        shown = [cell for cell in cells if cell["dtype"] == dtype]
        if shown:
            ax.plot(
                [cell["times_the_fastest_peer"] for cell in shown],
                [operations.index(cell["operation"]) for cell in shown],
                marker,
                color=color,
                alpha=0.6,
                label=dtype,
            )
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(range(len(operations)), operations)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel(
        f"time of the fastest peer / time of jaxsoft, a dot per shape "
        f"({report['machine']})"
    )
    ax.legend(loc="lower right", fontsize=9)
    return figure


def main() -> None:
    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text())

    passes = draw_passes({target: read(f"passes_{target}") for target in TARGETS})
    PICTURES.mkdir(exist_ok=True)
    for name, figure in (("passes", passes), ("speed", draw_speed(read("cpu")))):
        figure.savefig(PICTURES / f"{name}.png", dpi=110)
        print(f"written to {PICTURES / name}.png")


if __name__ == "__main__":
    main()
