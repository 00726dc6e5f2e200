"""A bar chart: `python -m benchmarks.chart benchmarks/results/cpu.json`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def draw(report: dict, dtype: str = "float32") -> plt.Figure:
    cells = [cell for cell in report["cells"] if cell["dtype"] == dtype]
    names = [
        f"{cell['operation']}, {' x '.join(map(str, cell['shape']))}" for cell in cells
    ]
    ratios = [cell["times_the_fastest_peer"] for cell in cells]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(cells) + 1.2), layout="tight")
    colors = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    axes.barh(names, ratios, color=colors)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4], ["½", "1", "2", "4"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the fastest peer ({dtype}, {report['machine']})")
    return figure


def main(path: str) -> None:
    report = json.loads(Path(path).read_text())
    output = Path(path).with_suffix(".png")
    draw(report).savefig(output, dpi=120)
    print(f"written to {output}")


if __name__ == "__main__":
    main(sys.argv[1])
