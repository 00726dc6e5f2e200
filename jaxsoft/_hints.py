"""What to write in place of an argument that other libraries have."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# The names here that an argument of another library may stand for.
HERE = {
    "weight": ("class_weight", "sample_weight", "pos_weight", "b"),
    "weights": ("class_weight", "sample_weight", "pos_weight", "b"),
    "mask": ("where", "sample_weight"),
    "padding_mask": ("sample_weight", "ignore_index"),
    "dim": ("axis",),
    "axes": ("axis",),
    "keepdim": ("keepdims",),
    "smoothing": ("label_smoothing",),
    "gamma": ("focal_gamma",),
    "tau": ("temperature",),
    "T": ("temperature",),
    "alpha": ("beta",),
    "beta": ("temperature",),
    "soft_cap": ("softcap",),
    "logit_cap": ("softcap",),
    "lse_square_scale": ("z_loss",),
    "label": ("labels",),
    "target": ("labels", "target_logits", "target_hidden"),
    "targets": ("labels", "target_logits", "target_hidden"),
    "targets_logits": ("target_logits",),
    "labels": ("target_logits", "target_hidden", "sample_weight"),
    "teacher_logits": ("target_logits",),
    "student_logits": ("logits",),
    **dict.fromkeys(("student_input", "student_hidden"), ("hidden",)),
    **dict.fromkeys(("teacher_input", "teacher_hidden"), ("target_hidden",)),
    "student_weight": ("vocab_weight",),
    "teacher_weight": ("target_vocab_weight",),
    "student_bias": ("vocab_bias",),
    "teacher_bias": ("target_vocab_bias",),
    "ignore_index": ("sample_weight",),
    "input": ("logits", "x", "a"),
    "inputs": ("logits", "x", "a"),
    "bias": ("vocab_bias",),
    "reduce": ("reduction",),
    "ignore_label": ("ignore_index",),
}
FROM_LOGITS = "the losses take logits, never probabilities"


def with_hints(function: Callable[P, R]) -> Callable[P, R]:
    """The function; of an argument that it does not have, its error says which of its
    own is meant."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                hint = _hint(name, names)
                raise TypeError(
                    f"{function.__name__}: there is no argument {name!r}{hint}"
                )
        return function(*args, **kwargs)

    return call


def _hint(name: str, names: tuple[str, ...]) -> str:
    if name == "from_logits":
        return f": {FROM_LOGITS}"
    here = [known for known in HERE.get(name, ()) if known in names]
    if here:
        return f"; here it is {' or '.join(here)}"
    return f"; the arguments are {', '.join(names)}"
