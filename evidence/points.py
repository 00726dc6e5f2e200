"""The points at which promises are measured: one definition for tests and evidence.

Precision: rows of every offset and scale, and rows of which one class is above all
others. Stability: every combination of awkward numbers, at every temperature.
"""

import itertools
from typing import Any

import jax
import numpy as np

OFFSETS = (0.0, 88.0, -88.0, 1000.0, -1000.0, 1e4)
SCALES = (0.1, 1.0, 10.0, 100.0)
SIZES = (2, 3, 17, 300)
GAPS = range(5, 81, 5)


def adversarial_rows(size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of every offset and scale, and of one class above all others by a gap."""
    spread = [
        offset + scale * rng.normal(size=size) for offset in OFFSETS for scale in SCALES
    ]
    sure = np.zeros((len(GAPS), size))
    sure[np.arange(len(GAPS)), rng.integers(0, size, len(GAPS))] = GAPS
    return np.concatenate([np.array(spread), sure]).astype(np.float32)


def best_and_other(x: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The class of the maximum of each row, and any other class."""
    best = np.argmax(x, axis=-1)
    return best, (best + rng.integers(1, x.shape[-1], len(x))) % x.shape[-1]


LOGITS = (0.0, 1e-3, -1e-3, 1.0, -1.0, 1e3, -1e3, 1e8, -1e8, np.inf, -np.inf)
TEMPERATURES = (0.0, 1e-38, 1e-6, 1e-3, 1.0, 1e3, -1e-38, -1e-3, -1.0)
CLASSES = 3
# Every combination of logits, ties included, at every temperature.
ROWS = np.array(list(itertools.product(LOGITS, repeat=CLASSES)))
# A product with a weight 0 makes NaN of an infinite hidden state, as it should.
HIDDEN = ROWS[np.all(np.isfinite(ROWS), axis=-1)]
# Any class may be masked, and all.
MASKS = np.array(list(itertools.product((True, False), repeat=CLASSES)))

ON_GRID = ("logits", "similarities", "hidden", "temperature")


def grid_arguments(law: Any, dtype: str) -> list[jax.Array]:
    """Logits, masks and temperatures of the grid; the other arguments are drawn."""
    rows = HIDDEN if "hidden" in law.kinds else ROWS
    temperatures = TEMPERATURES if "temperature" in law.kinds else (1.0,)
    logits = np.tile(rows, (len(temperatures), 1))
    rng = np.random.default_rng(8)
    arguments = []
    for kind, argument in zip(law.kinds, law.draw(8, len(logits), CLASSES)):
        if kind == "temperature":
            argument = np.repeat(temperatures, len(rows))[:, None]
        if kind in ("logits", "similarities"):
            argument, logits = logits, rng.permuted(logits, axis=0)
        if kind == "hidden":
            argument = np.clip(logits, *limits(dtype))
        if kind == "vocab weight":
            argument = np.eye(CLASSES)  # the logits are the hidden states
        if kind == "mask":
            argument = MASKS[rng.integers(0, len(MASKS), len(logits))]
        if kind == "signed weights":
            argument = np.abs(argument)  # a negative sum has no logarithm
        arguments.append(argument)
    return law.cast(arguments, dtype)


def limits(dtype: str) -> tuple[float, float]:
    """Between which all products with weights up to 1 are finite."""
    largest = float(jax.numpy.finfo(dtype).max) / 4
    return -largest, largest
