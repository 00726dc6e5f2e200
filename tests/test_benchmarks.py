"""The benchmark command runs, and writes what its chart and its readers need."""

import json

import pytest

chart = pytest.importorskip("benchmarks.chart", reason="benchmarks need matplotlib")
command = pytest.importorskip("benchmarks.__main__", reason="benchmarks need tqdm")


@pytest.mark.parametrize(
    "operation", ["cross_entropy, gradient", "softmax, masked, vjp", "per token, grad"]
)
def test_smallest_cells(operation, tmp_path, capsys):
    output = tmp_path / "results.json"
    arguments = ["--smallest", "--seconds", "0.1", "--only", operation]
    command.main([*arguments, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    cell = report["cells"][-1]
    times = cell["milliseconds"]
    assert operation in cell["operation"]
    assert all(value > 0 for value in times.values())
    peers = {name: t for name, t in times.items() if name != "jaxsoft"}
    assert peers.keys() & {"jax.nn", "optax"}
    assert cell["fastest_peer"] == min(peers, key=peers.__getitem__)
    assert cell["times_the_fastest_peer"] == pytest.approx(
        min(peers.values()) / times["jaxsoft"], rel=0.02, abs=0.002
    )
    assert cell["temporary_bytes"]["jaxsoft"] >= 0
    assert cell["compile_seconds"]["jaxsoft"] > 0
    assert "geometric means over" in capsys.readouterr().out
    dots, one = chart.draw_speed(report).axes[0].lines
    assert len(dots.get_xdata()) == len(report["cells"])
    assert set(one.get_xdata()) == {1}


def test_every_kind_of_cell_is_among_the_smallest():
    def operations(smallest):
        every = command.cells.every_cell(smallest)
        return {cell.operation for cell in every if "axis 0" not in cell.operation}

    assert operations(smallest=True) == operations(smallest=False)


def test_the_chart_of_passes_shows_every_operation():
    reports = {
        target: json.loads((chart.RESULTS / f"passes_{target}.json").read_text())
        for target in chart.TARGETS
    }
    axes = chart.draw_passes(reports).axes
    assert len(axes) == 2
    for ax, report in zip(axes, reports.values(), strict=True):
        large = [
            cell
            for cell in report["cells"]
            if cell["shape"] == chart.LARGE and cell["dtype"] == "float32"
        ]
        assert len(ax.patches) == 2 * len(large) > 0


def test_the_readme_says_what_was_measured():
    readme = chart.RESULTS.parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("not in a checkout")
    report = json.loads((chart.RESULTS / "cpu.json").read_text())
    behind = sum(
        min(time for name, time in cell["times"].items() if name != "torch") < 0.9
        for cell in report["cells"]
    )
    text = " ".join(readme.read_text().split())
    assert f"{report['geometric_mean']['jax']:.2f} times as fast" in text
    assert f"over {len(report['cells'])} cells" in text
    assert f"behind by more than a tenth in {behind}" in text
