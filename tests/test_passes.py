"""What programs for accelerators move through memory: `python -m benchmarks.passes`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

command = pytest.importorskip("benchmarks.passes", reason="the peers need optax")
from benchmarks import hlo, targets  # noqa: E402

ROOT = Path(__file__).parent.parent

# 1024 numbers of 4 bytes are 4096 bytes. A loop of three trips reads the slice of a row
# and writes one; of the two branches the dearer one counts; a result of the first
# fusion lies in vector memory.
PROGRAM = """\
HloModule example

%row (slice_of: f32[8,1024], index: s32[]) -> f32[1,1024] {
  %slice_of = f32[8,1024]{1,0} parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,1024]{1,0} dynamic-slice(%slice_of, %index, %zero)
}

%condition (state.1: (s32[], f32[8,1024])) -> pred[] {
  %state.1 = (s32[], f32[8,1024]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

%body (state: (s32[], f32[8,1024])) -> (s32[], f32[8,1024]) {
  %state = (s32[], f32[8,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x.1 = f32[8,1024]{1,0} get-tuple-element(%state), index=1
  %one_row = f32[1,1024]{1,0} fusion(%x.1, %i), kind=kLoop, calls=%row
  ROOT %next = (s32[], f32[8,1024]{1,0}) tuple(%i, %x.1)
}

%cheap (a: f32[1024]) -> f32[1024] {
  ROOT %a = f32[1024]{0} parameter(0)
}

%dear (b: f32[1024]) -> f32[1024] {
  %b = f32[1024]{0} parameter(0)
  ROOT %copy = f32[1024]{0} copy(%b)
}

%halves (c: f32[8,1024]) -> (f32[1024], bf16[1024]) {
  %c = f32[8,1024]{1,0} parameter(0)
  %first = f32[1024]{0:T(256)S(1)} reduce(%c), dimensions={0}
  %second = bf16[1024]{0:T(256)} convert(%first)
  ROOT %both = (f32[1024]{0:T(256)S(1)}, bf16[1024]{0:T(256)}) tuple(%first, %second)
}

ENTRY %main (x: f32[8,1024], which: pred[]) -> f32[1024] {
  %x = f32[8,1024]{1,0} parameter(0)
  %which = pred[] parameter(1)
  %start = s32[] constant(0)
  %begin = (s32[], f32[8,1024]{1,0}) tuple(%start, %x)
  %loop = (s32[], f32[8,1024]{1,0}) while(%begin), condition=%condition, body=%body
  %sums = (f32[1024]{0:T(256)S(1)}, bf16[1024]{0:T(256)}) fusion(%x), kind=kLoop, calls=%halves
  %sum = f32[1024]{0:T(256)S(1)} get-tuple-element(%sums), index=0
  ROOT %out = f32[1024]{0} conditional(%which, %sum, %sum), true_computation=%dear, false_computation=%cheap
}
"""  # noqa: E501, as XLA writes it


def test_the_bytes_of_a_program():
    kernels = {kernel.name: kernel for kernel in hlo.kernels(PROGRAM)}
    row = 4 * 1024
    assert kernels["one_row"] == ("one_row", row + 4, row, 3)
    assert kernels["sums"] == ("sums", 8 * row, row / 2, 1)
    assert kernels["copy"] == ("copy", row, row, 1)
    assert len(kernels) == 3
    moved = 3 * (2 * row + 4) + 8.5 * row + 2 * row
    assert hlo.bytes_moved(hlo.kernels(PROGRAM)) == moved


def count(tmp_path: Path, *arguments: str) -> list[dict]:
    """The cells of the command, in a process of its own: it tells JAX which compiler to
    load before JAX runs anything."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no program is compiled for a TPU")
    output = tmp_path / "cells.json"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.passes", "--target", "v5e"),
            *(*arguments, "--output", str(output)),
        ],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=True,
        capture_output=True,
    )
    return json.loads(output.read_text())["cells"]


def test_a_logsumexp_reads_the_logits_once(tmp_path):
    only = "--only", "logsumexp", "--shape", "1024x1000", "--dtype", "float32"
    value, gradient = count(tmp_path, *only)
    assert value["operation"] == "logsumexp"
    assert value["contestants"]["jaxsoft"]["passes"] < 1.05
    assert value["of_the_best_peer"] < 1.05
    assert gradient["of_the_best_peer"] < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["8192x32768", "65536x128"])
def test_no_cell_is_behind_its_peers(shape, tmp_path):
    for row in count(tmp_path, "--shape", shape):
        assert row["of_the_best_peer"] < 1.05, row


@pytest.mark.parametrize("target", targets.NAMES)
def test_a_missing_compiler(target, monkeypatch):
    def none(**_):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", none)
    monkeypatch.setattr(targets.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit, match="To install it: pip install"):
        command.main(["--target", target])


@pytest.mark.parametrize("target", targets.NAMES)
def test_the_site_shows_what_is_stored(target):
    report = json.loads((command.RESULTS / f"passes_{target}.json").read_text())
    page = (ROOT / "docs" / "passes.md").read_text()
    for shape in command.SHAPES:
        assert command.markdown(report, shape) in page
