"""The benchmark command runs, and writes what its chart and its readers need."""

import json

import pytest

chart = pytest.importorskip("benchmarks.chart", reason="benchmarks need matplotlib")
command = pytest.importorskip("benchmarks.__main__", reason="benchmarks need tqdm")


@pytest.mark.parametrize("operation", ["cross_entropy", "linear mean"])
def test_smallest_cells(operation, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.cells.ROW_OPERATIONS", ("cross_entropy gradient, donated",)
    )
    monkeypatch.setattr("benchmarks.cells.LINEAR_OPERATIONS", ("linear mean",))
    output = tmp_path / "results.json"
    arguments = ["--smallest", "--rounds", "1", "--dtype", "float32"]
    command.main([*arguments, "--only", operation, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    (cell,) = report["cells"]
    assert cell["operation"].startswith(operation)
    assert cell["milliseconds"].keys() >= {"jaxsoft", "optax", "floor"}
    assert all(value > 0 for value in cell["milliseconds"].values())
    times = cell["milliseconds"]
    peers = {
        name: t
        for name, t in times.items()
        if name != "floor" and not name.startswith("jaxsoft")
    }
    assert cell["fastest_peer"] == min(peers, key=peers.__getitem__)
    assert cell["times_the_fastest_peer"] == pytest.approx(
        min(peers.values()) / times["jaxsoft"], rel=0.02, abs=0.002
    )
    assert cell["times_the_floor"] == pytest.approx(
        times["jaxsoft"] / times["floor"], rel=0.02, abs=0.01
    )
    assert cell["compiled"]["jaxsoft"]["temporary_bytes"] >= 0
    assert "times the fastest peer" in capsys.readouterr().out
    axes = chart.draw(report).axes[0]
    assert len(axes.patches) == 1
