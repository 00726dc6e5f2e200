"""Which form of a pass runs where.

A row is reduced by the merge, in one pass, or in the textbook form, the maximum first.
An accelerator runs the merge, but for rows that XLA holds on the chip in the textbook
form, which then reads a row once for everything. A CPU runs the textbook form: of the
merge XLA makes a loop over single numbers.
"""

import jax

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# The tests lower the form of an accelerator on a CPU, by the platform's name.
cpu_form = jax.make_user_context("plain")


def on_cpu() -> str:
    """What a CPU runs: "plain", or the form of the accelerator with this name."""
    return cpu_form.value


def chosen(platform: str | None, name: str, classes: int, dtype: object) -> str:
    """The form in which a platform runs the pass on rows of so many classes."""
    if platform in ("cuda", "rocm", "tpu"):
        return "merged"
    return "plain"
