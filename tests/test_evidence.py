"""The evidence command runs, and what is published is what it measured."""

import json
import pathlib
import re

import jax
import pytest

from evidence import page

ROOT = pathlib.Path(__file__).parent.parent
PROMISES = ROOT / "docs" / "promises.md"
STORED = ROOT / "evidence" / "results" / "cpu.json"


def test_one_function(tmp_path, capsys, monkeypatch):
    command = pytest.importorskip("evidence.__main__")
    monkeypatch.setattr("evidence.precision.SIZES", (3,))
    output = tmp_path / "results.json"
    only = ["--only", "log_softmax", "--dtype", "float32"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        command.main([*only, "--output", str(output)])
    report = json.loads(output.read_text())
    assert report["command"].startswith("python -m evidence --only log_softmax")
    ours, theirs = report["precision"]
    assert (ours["library"], theirs["library"]) == ("jaxsoft", "jax.nn")
    for what in ("value", "gradient"):
        assert ours[what]["worst_ulp"] < 64
        assert ours[what]["wrong_share"] == 0
        assert theirs[what]["wrong_share"] > 0
    for entry in report["stability"]:
        is_ours = entry["library"] == "jaxsoft"
        assert (entry["rows_with_nan"] == 0) == is_ours
        assert (sum(entry["nans"].values()) == 0) == is_ours
    assert {entry["rows"] for entry in report["stability"]} == {1331, 9 * 1331}
    assert page.rendered(report) in capsys.readouterr().out


def test_the_page_shows_the_stored_numbers():
    report = json.loads(STORED.read_text())
    assert report["command"].strip() == "python -m evidence"
    assert (ROOT / "docs" / "evidence.md").read_text() == page.rendered(report)


def test_the_promised_figures_are_those_of_the_evidence():
    report = json.loads(STORED.read_text())
    text = PROMISES.read_text()
    ours = [
        entry
        for entry in report["precision"]
        if entry["library"] == "jaxsoft" and entry["dtype"] == "float32"
    ]

    def largest(figure: str, function: str) -> float:
        of = [entry for entry in ours if entry["function"].startswith(function)]
        return max(e[what][figure] for e in of for what in ("value", "gradient"))

    worst, median = (largest(f, "cross_entropy,") for f in ("worst_ulp", "median_ulp"))
    assert f"worst {worst:.1f} ulp, median {median:.1f} ulp" in text
    assert f"softmax {largest('worst_ulp', 'softmax'):.0f} ulp" in text
    tempered = largest("worst_ulp", "cross_entropy at temperature 0.75")
    assert f"a loss at temperature 0.75 {tempered:.0f} ulp" in text
    stability = [e for e in report["stability"] if e["library"] == "jaxsoft"]
    assert all(entry["rows_with_nan"] == 0 for entry in stability)
    rows = sum(entry["rows"] for entry in stability)
    numbers = sum(entry["numbers"] for entry in stability)
    assert f"{rows} rows, {numbers} numbers" in text


def test_every_promise_has_a_command():
    table = PROMISES.read_text().split("| promise |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) >= 9
    for row in rows:
        command = row.strip("|").split("|")[-1]
        assert re.search(r"`(python -m|jupyter execute) [^`]*`", command), row
        for path in re.findall(r"(?:tests|notebooks)/\w+\.\w+", command):
            assert (ROOT / path).exists(), path
