"""What reverse mode keeps in memory: the arguments and some numbers per row."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from laws import LAWS, Law, in_segments, of_floats

# Different from each other, and from every count of arrays.
ROWS, CLASSES = 211, 101
# Labels and their masks, weights, and the terms of a loss: all of one number per row.
NUMBERS_PER_ROW = 32
# An elementwise function has no rows, a circle loss makes logits of its similarities,
# a linear head has arguments of other sizes (test_linear_memory.py), and segments have
# an id for every entry (test_segments.py).
LAWS_OF_ROWS = [
    law
    for law in LAWS
    if law.kinds[0] == "logits" and not law.elementwise and law.made is not in_segments
]


class Saved(NamedTuple):
    shape: tuple[int, ...]
    origin: str


def saved_by(f, *arguments, capsys) -> list[Saved]:
    capsys.readouterr()
    print_saved_residuals(f, *arguments)
    lines = capsys.readouterr().out.splitlines()
    saved = []
    for line in lines:
        match = re.match(r"\w+\[([\d,]*)\] (.*)", line)
        assert match, line
        dims, origin = match.groups()
        saved.append(Saved(tuple(int(n) for n in dims.split(",") if n), origin))
    return saved


@pytest.mark.parametrize("law", LAWS_OF_ROWS, ids=lambda law: law.name)
def test_nothing_of_the_logits_size_is_saved_but_arguments(law: Law, capsys):
    """As many arrays of the logits' size as there are arguments of it: for softmax,
    which keeps its result and not its logits, that is the result."""
    given = law.cast(law.draw(0, ROWS, CLASSES), jnp.float32)
    f, moving = of_floats(law, given)
    saved = saved_by(lambda *moving: jnp.sum(f(*moving)), *moving, capsys=capsys)

    large = [s for s in saved if np.prod(s.shape, dtype=int) >= ROWS * CLASSES]
    large_arguments = [a for a in given if a.size >= ROWS * CLASSES]
    assert large, "the arguments at least"
    assert len(large) <= len(large_arguments), large
    small = sum(np.prod(s.shape, dtype=int) for s in saved if s not in large)
    assert small <= NUMBERS_PER_ROW * ROWS

    # The closure of `jax.vjp` is what a training step holds between its two passes.
    held = jax.tree.leaves(jax.eval_shape(lambda *m: jax.vjp(f, *m)[1], *moving))
    assert sum(leaf.size >= ROWS * CLASSES for leaf in held) <= len(large_arguments)


PER_ROW = {
    "logsumexp": 2,
    "log_softmax": 0,
    "entropy": 3,
    "jensen_shannon": 7,
    "kl_divergence": 6,
    "softmax": 0,
}


@pytest.mark.parametrize("name", PER_ROW)
def test_numbers_per_row_are_those_of_the_docstring(name, capsys):
    (law,) = (law for law in LAWS if law.name == name)
    given = law.cast(law.draw(0, ROWS, CLASSES), jnp.float32)
    saved = saved_by(lambda *given: jnp.sum(law.call(*given)), *given, capsys=capsys)
    per_row = [s for s in saved if s.shape == (ROWS, 1)]
    assert len(per_row) == PER_ROW[name]
    assert len(saved) <= len(given) + PER_ROW[name]
