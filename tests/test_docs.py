"""What docstrings, the README and the site print is what the code prints."""

import doctest
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoft

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE_FOLDER = pathlib.Path(jaxsoft.__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS

in_a_checkout = pytest.mark.skipif(not README.exists(), reason="not in a checkout")


def run(test: doctest.DocTest) -> doctest.TestResults:
    """With JAX as a reader has it: these examples are not for the strict."""
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = runner.run(test, out=output.append)
    assert results.failed == 0, "".join(output)
    return results


# A named tuple is a result.
FUNCTIONS = [n for n in jaxsoft.__all__ if not hasattr(getattr(jaxsoft, n), "_fields")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring(name):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(jaxsoft, name), name, globs={})
    assert run(test).attempted > 0


def run_page(page: str | pathlib.Path) -> None:
    """Its `>>>` blocks, in one session from top to bottom."""
    path = pathlib.Path(page)
    # The closing fence of a code block is no output.
    text = "\n".join(
        "" if line.startswith("```") else line for line in path.read_text().splitlines()
    )
    test = doctest.DocTestParser().get_doctest(text, {}, path.stem, str(path), 0)
    assert run(test).attempted == text.count("\n>>> ")


def code_blocks(path: pathlib.Path) -> list[tuple[str, str]]:
    """(language or directive, text) of every fenced block."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)^```$", path.read_text(), re.MULTILINE)


SLOW_PAGES = ("linear_head", "many_devices", "migrating", "numerics", "recipes")


@in_a_checkout
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW_PAGES))
        for path in PAGES
    ],
    ids=lambda path: path.stem,
)
def test_page(path):
    if "jax_num_cpu_devices" in path.read_text():
        run_page_in_new_process(path)
    else:
        run_page(path)


def run_page_in_new_process(path: pathlib.Path) -> None:
    """The number of devices is settled when JAX starts."""
    tests = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import test_docs; test_docs.run_page({path.name!r})"],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": f"{PACKAGE_FOLDER}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@in_a_checkout
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_code_block_is_executed(path):
    """Python as a session; the commands of the README run wherever these tests do."""
    for kind, text in code_blocks(path):
        if kind == "python":
            lines = text.splitlines()
            assert lines[0].startswith(">>> "), text
        elif kind == "":
            assert path == README
            assert text.startswith("python3 -m venv --clear /tmp/jaxsoft-")
        else:
            assert kind in ("{toctree}", "{eval-rst}"), text


@in_a_checkout
def test_the_readme_names_every_function():
    functions = README.read_text().split("## Functions")[1].split("##")[0]
    assert [name for name in FUNCTIONS if f"`{name}`" not in functions] == []


@in_a_checkout
def test_the_first_page_names_everything():
    tables = (ROOT / "docs/index.md").read_text().split("## Functions")[1]
    named = set(re.findall(r"`~jaxsoft\.(\w+)`", tables))
    assert named == set(jaxsoft.__all__)


@in_a_checkout
def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


@in_a_checkout
def test_every_name_has_a_page():
    listed = re.findall(r"^   (\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == jaxsoft.__all__


@in_a_checkout
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


# The table of the README that compares numbers. Those of PyTorch were computed once, by
# torch 2.13, which is not needed here.


def with_jax_nn(x, y):
    return -jax.nn.log_softmax(x)[y]


optax_loss = optax.softmax_cross_entropy_with_integer_labels
SURE, LARGE, NOTHING = [20.0, 0.0], [1e8] * 3, [-np.inf, -np.inf]


def in_jax(loss: Any, softmax: Any, logsumexp: Any) -> dict[str, Callable[[], Any]]:
    """The cells of a column, top to bottom, as far as it has the functions."""
    cells = {
        "loss of [20, 0], label 0": lambda: loss(jnp.array(SURE), 0),
        "its gradient at the label": lambda: jax.grad(loss)(jnp.array(SURE), 0)[0],
        "loss of [1e8, 1e8, 1e8]": lambda: loss(jnp.array(LARGE), 0),
    }
    if logsumexp is not None:
        cells |= {
            "softmax of [-inf, -inf]": lambda: softmax(jnp.array(NOTHING))[0],
            "gradient of logsumexp at [inf, 0]": lambda: jax.grad(logsumexp)(
                jnp.array([np.inf, 0.0])
            )[0],
            "logsumexp of 70000 zeros, float16": lambda: logsumexp(
                jnp.zeros(70_000, jnp.float16)
            ),
        }
    return cells


def of_label_minus_1(loss):
    return lambda: loss(jnp.array([[1.0, 2.0]]), jnp.array([-1]))[0]


def with_labels(x, y):
    return jaxsoft.cross_entropy(jnp.array(x), jnp.array(y), reduction="mean")


COLUMNS: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "jax.nn": lambda: in_jax(with_jax_nn, jax.nn.softmax, jax.nn.logsumexp),
    "optax": lambda: {
        **in_jax(optax_loss, None, None),
        "loss of [1, 2], label -1": of_label_minus_1(optax_loss),
    },
    "jaxsoft": lambda: {
        **in_jax(jaxsoft.cross_entropy, jaxsoft.softmax, jaxsoft.logsumexp),
        "loss of [1, 2], label -1": of_label_minus_1(jaxsoft.cross_entropy),
        "mean of ignored rows alone": lambda: with_labels([[1.0, 2.0]], [-100]),
        "gradient of an ignored row of NaN": lambda: jax.grad(jaxsoft.cross_entropy)(
            jnp.array([np.nan, 2.0]), -100
        )[0],
    },
}


def shown(cell: Callable[[], Any]) -> str:
    try:
        return f"{float(cell()) + 0.0:.8g}"
    except IndexError:
        return "IndexError"


def readme_table() -> dict[str, dict[str, str]]:
    """{column: {row: cell}} of the table that compares numbers."""
    section = README.read_text().split("## Where others differ")[1].split("##")[0]
    header, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    )
    return {c: {row[0]: row[i] for row in body} for i, c in enumerate(header) if c}


@in_a_checkout
@pytest.mark.parametrize("column", COLUMNS)
def test_the_numbers_of_the_readme(column):
    cells = {row: cell for row, cell in readme_table()[column].items() if cell}
    computed = {row: shown(cell) for row, cell in COLUMNS[column]().items()}
    assert computed.keys() == cells.keys()
    for row, cell in cells.items():
        if cell == "IndexError":
            assert computed[row] == cell
        else:  # the last of the digits may be another machine's
            np.testing.assert_allclose(
                float(computed[row]), float(cell), rtol=2e-7, err_msg=row
            )
