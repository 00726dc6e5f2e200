"""The notebooks run, and are stored as they ran: with figures, without errors."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

import jaxsoft

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# What the notebooks import, and what executes them.
IMPORTED = ("IPython", "ipykernel", "matplotlib", "nbclient", "nbformat", "optax")
IMPORTED += ("sklearn", "tqdm")

TIMEOUT_SECONDS = 300
LARGEST_BYTES = 600_000

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.slow  # the first of README's commands
@pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in IMPORTED),
    reason="needs jaxsoft[notebooks]",
)
def test_notebook_executes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # The kernel must import the jaxsoft that is under test, installed or not.
    package_folder = str(Path(jaxsoft.__file__).parent.parent)
    search_path = [package_folder, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search_path)))

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()

    assert images(notebook) == images(json.loads(path.read_text("utf-8")))


def test_notebook_is_stored_executed(path: Path) -> None:
    assert path.stat().st_size < LARGEST_BYTES
    notebook = json.loads(path.read_text("utf-8"))
    code = code_cells(notebook)
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not run once from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
    assert sum(images(notebook)) >= 1
    for cell, count in zip(code, images(notebook), strict=True):
        assert count or "plt.show()" not in source(cell)
    last_lines = source(code[-1]).splitlines()
    assert any(line.lstrip().startswith("assert ") for line in last_lines)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def images(notebook: Any) -> list[int]:
    """How many figures each code cell shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        for cell in code_cells(notebook)
    ]


def source(cell: Any) -> str:
    """The file format allows a list of lines as well as a string."""
    return "".join(cell["source"])
