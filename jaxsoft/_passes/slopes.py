"""Passes that take the derivative of a row's number to its classes, and back.

For a number f of every row whose derivatives in the logits are known, the slopes, a
cotangent g of f is pulled back to g times each of them. The transpose pushes tangents
of the logits forward to one of f. Each is a pass, so that a derivative of any order
runs in the form of its platform.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxsoft._core.logits import times
from jaxsoft._core.mesh import Axes
from jaxsoft._passes.primitive import Form, Pass

# (axes, *what the row is known by) -> arrays with a number for every class, and others
# with one per row, where f depends on those; None is an argument that is not there.
Slopes = Callable[..., tuple[Any, ...]]


def pull_and_push(name: str, slopes: Slopes, in_block: Slopes) -> tuple[Pass, Pass]:
    """The two passes, each the transpose of the other.

    With the classes on several devices, a number per row is that of the classes here:
    the caller adds them.
    """
    pull = Pass(
        f"{name}_pull",
        _pull(slopes),
        in_block=_pull(in_block),
        transpose=lambda axes, fixed, t, _: push(axes, fixed, t),
    )
    push = Pass(
        f"{name}_push",
        _push(slopes),
        in_block=_push(in_block),
        transpose=lambda axes, fixed, g, _: pull(axes, fixed, g),
    )
    return pull, push


def _pull(slopes: Slopes) -> Form:
    def form(axes: Axes, fixed: Any, g: Any) -> Any:
        of = slopes(axes, *fixed)
        return tuple(None if v is None else times(g, v) for v in of)

    return form


def _push(slopes: Slopes) -> Form:
    def form(axes: Axes, fixed: Any, tangents: Any) -> Any:
        pairs = [
            times(t, v)
            for t, v in zip(tangents, slopes(axes, *fixed), strict=True)
            if v is not None
        ]
        size = max(pair.size for pair in pairs)
        of_classes = sum(pair for pair in pairs if pair.size == size)
        of_rows = [pair for pair in pairs if pair.size < size]
        return sum(of_rows, jnp.sum(of_classes, axes.dims, keepdims=True))

    return form
