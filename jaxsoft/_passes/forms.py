"""Which form of a pass runs where, by the platform and by static shapes.

A pass has up to four forms: "plain", the textbook form, the maximum first; "merged",
one reduction by the merge; "in_block", the textbook form for rows that stay on the
chip; "native", the compiled kernels of a CPU.

Passes over the logits, counted in programs compiled with JAX 0.10.2 for 65536 rows of
128 classes in float32; in brackets 8192 rows of 32768:

                        merged      in_block     plain        best peer
    H200   summary      1.0 (1.0)   1.0 (2.0)    2.1 (2.0)    2.1 (2.0)
           softmax      3.1 (3.0)   2.0 (4.0)    4.1 (4.0)    2.0 (4.0)
           softmax_pull 5.1 (5.0)   3.0 (7.0)    8.2 (8.8)    3.0 (7.0)
           divergence   4.3 (4.1)   2.0 (11.1)   11.4 (11.1)  2.0 (6.0)
           and its pull 7.4 (7.1)   5.0 (24.2)   14.4 (14.1)  10.0 (8.0)
    v5e    summary      1.0 (1.0)   2.0 (2.0)    2.0 (2.0)    2.0 (2.0)
           softmax      3.0 (3.0)   3.0 (4.0)    3.0 (4.0)    3.0 (4.0)
           softmax_pull 5.0 (5.0)   4.0 (7.0)    6.0 (8.5)    4.0 (7.0)
           divergence   3.0 (4.0)   4.0 (6.0)    3.0 (6.0)    4.0 (6.0)
           and its pull 4.0 (7.0)   4.0 (15.0)   4.0 (9.0)    5.0 (9.0)

log_softmax and its pull are as softmax and its pull. A summary that a gradient uses too
ends the one kernel of a block (8.2 passes for value and gradient of the entropy): so it
is merged there, and the entropy and the divergence, which have passes of their own,
reduce a block anew for their gradients (3.0 for the entropy). Without kernels a CPU
runs the textbook form: of the merge XLA makes a loop over single numbers.
"""

import os
from typing import Any

import jax
import numpy as np

from jaxsoft._passes import library

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# A GPU holds a row in a block, padded to a power of 2. Of 257, 300, 5000 and 10000
# classes, which fill less than two thirds of it, XLA makes several kernels (9 to 15
# passes for the pull); of 32, 100, 128, 200, 500, 1000, 8192 and 16384 one.
MOST_CLASSES_IN_A_BLOCK = 16384
FEWEST_CLASSES_IN_A_BLOCK = 32
LEAST_FILLED = 0.75

# A TPU prefetches arrays into its vector memory and reads them there again; measured
# on a v5e up to 32 MiB. 8192 rows of 8192 classes in float32 are too many (7 passes).
MOST_BYTES_IN_VECTOR_MEMORY = 32 * 2**20
# In vector memory a form with two reductions costs no pass more than one with one.
HELD_BY_A_TPU = ("softmax_pull", "log_softmax_pull", "log_softmax_push")

# What a CPU runs: "native" or "plain", and in tests the forms of accelerators. JAX's
# caches know it, and trace anew where it changes.
cpu_form = jax.make_user_context(
    "plain" if os.environ.get("JAXSOFT_CPU_KERNELS") == "0" else "native"
)


def on_cpu() -> str:
    """What a CPU runs where it can."""
    form = cpu_form.value
    return "plain" if form == "native" and not library.is_loaded() else form


def chosen(platform: str | None, name: str, classes: int, x: Any, of_cpu: str) -> str:
    """The form in which a platform runs the pass on x, with rows of so many classes."""
    if platform == "cpu":
        return of_cpu
    if platform in ("cuda", "rocm"):
        return "in_block" if _fills_a_block(name, classes) else "merged"
    if platform == "tpu":
        held = x.size * x.dtype.itemsize <= MOST_BYTES_IN_VECTOR_MEMORY
        return "in_block" if held and name in HELD_BY_A_TPU else "merged"
    return "plain"


def _fills_a_block(name: str, classes: int) -> bool:
    if not FEWEST_CLASSES_IN_A_BLOCK <= classes <= MOST_CLASSES_IN_A_BLOCK:
        return False
    if name == "log_softmax":  # one kernel of all counts above
        return True
    if name == "summary":  # which a gradient may use too
        return False
    padded = 2 ** int(np.ceil(np.log2(classes)))
    return classes >= LEAST_FILLED * padded
