"""Every option of cross_entropy with every other, in value and in all gradients.

Those of the other losses, which are few: test_laws.py and test_binary.py.

The reference is float64 NumPy written from the definitions. Its derivatives are complex
steps: f(a + ih) = f(a) + ih f'(a) for h = 1e-30, with all digits of float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

H = 1e-30

# The reference. Floats may be complex; classes lie along the last axis.


def log_softmax(u: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log p_c, 0 outside of where; and log sum_c exp(u_c)."""
    e = np.where(where, np.exp(np.where(where, u, 0)), 0)
    lse = np.log(np.sum(e, axis=-1, keepdims=True))
    return np.where(where, u - lse, 0), lse[..., 0]


def reduced(loss: np.ndarray, weight: np.ndarray, reduction: str) -> np.ndarray:
    if reduction == "none":
        return loss
    total = np.sum(loss)
    return total / np.sum(weight) if reduction == "mean" else total


def classes_last(x: Any, axis: Any, ndim: int) -> np.ndarray:
    """Of shape (..., classes), the classes flattened in the order of axis."""
    axes = [a % ndim for a in (range(ndim) if axis is None else np.ravel(axis))]
    rows = [i for i in range(ndim) if i not in axes]
    moved = np.transpose(x, (*rows, *axes))
    return moved.reshape([*moved.shape[: len(rows)], -1])


def per_row(v: Any, axis: Any, shape: tuple[int, ...]) -> np.ndarray:
    """One number for every row of an array that broadcasts to the reduced logits."""
    kept = np.sum(np.zeros(shape), axis=axis, keepdims=True).shape
    return classes_last(np.broadcast_to(v, kept), axis, len(shape))[..., 0]


def cross_entropy(
    logits,
    labels,
    *,
    axis=-1,
    where=True,
    class_weight=1.0,
    sample_weight=1.0,
    ignore_index=-100,
    label_smoothing=0.0,
    temperature=1.0,
    softcap=None,
    z_loss=0.0,
    reduction="none",
):
    shape = logits.shape
    x = classes_last(logits, axis, len(shape))
    if softcap is not None:
        x = softcap * np.tanh(x / softcap)
    included = classes_last(np.broadcast_to(where, shape), axis, len(shape))
    u = x / per_row(temperature, axis, shape)[..., None]
    log_p, lse = log_softmax(u, included)

    w = np.broadcast_to(class_weight, x.shape)
    v = np.broadcast_to(sample_weight, x.shape[:-1])
    counted = np.ones(x.shape[:-1], bool)
    weight_in_mean = v
    if labels.dtype.kind in "iu":
        counted = labels != ignore_index
        q = (labels[..., None] == np.arange(x.shape[-1])).astype(float)
        weight_in_mean = np.where(counted, v * np.sum(q * w, axis=-1), 0)
    else:
        q = classes_last(labels, axis, len(shape))
    loss = (1 - label_smoothing) * np.sum(-q * w * log_p, axis=-1)
    spread = np.sum(np.where(included, -w * log_p, 0), axis=-1)
    loss = loss + label_smoothing / np.sum(included, axis=-1) * spread
    v = np.where(counted, v, 0)
    # In a mean, class weights do not rescale the z-loss.
    return reduced(v * loss, weight_in_mean, reduction) + reduced(
        v * z_loss * lse**2, v, reduction
    )


def complex_steps(
    f: Callable[..., np.ndarray], moving: dict[str, np.ndarray], cotangent: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradient of sum(cotangent f) in every entry of every moving argument."""
    gradients = {}
    for name, argument in moving.items():
        gradient = np.empty(argument.shape)
        for index in np.ndindex(argument.shape):
            moved = argument.astype(complex)
            moved[index] += 1j * H
            step = f(**{**moving, name: moved})
            gradient[index] = np.sum(cotangent * np.imag(step)) / H
        gradients[name] = gradient
    return gradients


# Random calls.


@dataclasses.dataclass(frozen=True)
class Call:
    """Arrays of floats move, and have gradients; the rest stays."""

    moving: dict[str, np.ndarray]
    staying: dict[str, Any]

    def __repr__(self) -> str:
        moving = {name: v.shape for name, v in self.moving.items()}
        return f"cross_entropy({moving}, {self.staying})"


class Draw:
    """Draws one call. Floats are those of float32, so that both precisions see them."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.moving: dict[str, np.ndarray] = {}
        self.staying: dict[str, Any] = {}

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def move(self, name: str, values: Any) -> None:
        self.moving[name] = np.asarray(values, np.float32).astype(np.float64)

    def uniform(self, name: str, low: float, high: float, *shapes: Any) -> None:
        """With even odds nothing, or an array of one of the shapes."""
        if self.chance():
            self.move(name, self.rng.uniform(low, high, self.one_of(*shapes)))

    def scalar(self, name: str, low: float, high: float) -> None:
        """With even odds nothing; else a Python number or an array."""
        if self.chance():
            value = float(np.float32(self.rng.uniform(low, high)))
            if self.chance(0.3):
                self.staying[name] = value
            else:
                self.move(name, value)


Layout = tuple[tuple[int, ...], Any]
ROWS_AND_CLASSES: Layout = ((4, 5), -1)
# Of several class axes: out of order, and all of them.
OTHER_LAYOUTS: list[Layout] = [((5, 4), 0), ((2, 3, 2), (2, 0)), ((2, 3), None)]


def draw_call(seed: int, layout: Layout = ROWS_AND_CLASSES) -> Call:
    rng = np.random.default_rng([seed, 2511])
    draw = Draw(rng)
    shape, axis = layout
    draw.staying["axis"] = axis
    draw.move("logits", 2 * rng.normal(size=shape))
    places = np.arange(np.prod(shape)).reshape(shape)
    by_row = classes_last(places, axis, len(shape))
    rows, classes = by_row.shape[:-1], by_row.shape[-1]
    labels = np.asarray(rng.integers(0, classes, rows))
    of_labels = np.take_along_axis(by_row, labels[..., None], axis=-1)
    if draw.chance():  # a mask for all rows, or of its own for each, with every label
        mask = np.isin(places, of_labels) | (rng.random(shape) < 0.7)
        shared = len(shape) == 2 and draw.chance(0.2)
        draw.staying["where"] = np.any(mask, axis=0) if shared else mask
    if draw.chance(0.6):
        ignore_index = draw.one_of(-100, -100, int(labels.flat[-1]), None)
        if ignore_index == -100:
            labels.flat[1:][rng.random(labels.size - 1) < 0.3] = -100
        elif not np.all(labels == ignore_index):
            draw.staying["ignore_index"] = ignore_index
        draw.staying["labels"] = labels.astype(np.int32)
    else:
        # Not normalised; some are 0, as all of masked classes have to be.
        q = rng.uniform(0.1, 0.5, shape) * (rng.random(shape) < 0.8)
        draw.move("labels", np.where(draw.staying.get("where", True), q, 0))
    draw.uniform("class_weight", 0.5, 2, classes)
    if "class_weight" in draw.moving and draw.chance(0.2):
        draw.moving["class_weight"][(labels.flat[0] + 1) % classes] = 0
    draw.uniform("sample_weight", 0.5, 2, rows, ())
    draw.scalar("label_smoothing", 0.05, 0.4)
    if draw.chance():  # above 0 and below, one for all or one per row
        kept = np.sum(places, axis=axis, keepdims=True).shape
        t = rng.uniform(0.5, 2, draw.one_of((), kept))
        draw.move("temperature", t * rng.choice([-1, 1, 1], t.shape))
    draw.scalar("softcap", 3, 6)
    draw.scalar("z_loss", 0.01, 0.1)
    draw.staying["reduction"] = draw.one_of("none", "sum", "mean")
    return Call(draw.moving, draw.staying)


def value_and_gradients(
    call: Call, moving: dict[str, Any], cotangent: Any
) -> tuple[Any, dict[str, Any]]:
    def loss(moving):
        return jaxsoft.cross_entropy(
            **jax.tree.map(jnp.asarray, arrays), **rest, **moving
        )

    arrays = {n: v for n, v in call.staying.items() if isinstance(v, np.ndarray)}
    rest = {n: v for n, v in call.staying.items() if n not in arrays}
    value, pull = jax.vjp(loss, moving)
    return value, pull(jnp.asarray(cotangent, value.dtype))[0]


# The definitions subtract what the library does not, and sums of derivatives cancel.
REFERENCE_ROUNDINGS = 64


def check_call(call: Call, dtype: Any, run: Callable[..., Any]) -> None:
    """Value and all gradients, to some roundings of the largest number in each."""

    def meaning(**moving: Any) -> np.ndarray:
        return cross_entropy(**call.staying, **moving)

    expected = np.asarray(meaning(**call.moving))
    normal = np.random.default_rng(0).normal(size=expected.shape)
    cotangent = normal.astype(np.float32).astype(np.float64)
    gradients = complex_steps(meaning, call.moving, cotangent)
    moving = {name: jnp.asarray(v, dtype) for name, v in call.moving.items()}
    value, given = run(call, moving, cotangent)
    assert value.dtype == dtype
    of_loss = np.max(np.abs(expected))
    for name, a, b in [
        ("value", value, expected),
        *((name, given[name], gradients[name]) for name in gradients),
    ]:
        scale = max(np.max(np.abs(b)), of_loss)
        error = np.max(np.abs(np.asarray(a, np.float64) - b)) / scale
        roundings = error / np.finfo(dtype).eps
        assert roundings <= REFERENCE_ROUNDINGS, f"{name}: {roundings} in {call}"


def options_of(call: Call) -> tuple[Any, ...]:
    """What sets one combination apart from another."""
    kinds = {
        name: v if isinstance(v, str | bool) or v is None else type(v).__name__
        for name, v in call.staying.items()
    }
    shapes = {name: v.shape for name, v in call.moving.items()}
    return tuple(sorted(kinds.items(), key=str)), tuple(sorted(shapes.items()))


THOROUGH = hypothesis.settings.get_current_profile_name() == "thorough"
# A sweep, and the long one, which has its calls too.
SWEEPS = [14, pytest.param(2000 if THOROUGH else 320, marks=pytest.mark.slow)]


@pytest.mark.parametrize("calls", SWEEPS)
@pytest.mark.usefixtures("x64")
def test_random_options_against_the_definition(calls, record_property):
    """Operation by operation: to compile as many programs takes minutes.

    `HYPOTHESIS_PROFILE=thorough` has more.
    """
    seen = set()
    for seed in range(calls):
        call = draw_call(seed)
        seen.add(options_of(call))
        with jax.disable_jit():
            check_call(call, jnp.float64, value_and_gradients)
    assert len(seen) > 15 / 16 * calls
    record_property("calls", f"{calls}, {len(seen)} combinations")


@pytest.mark.parametrize(
    "seeds", [[2], pytest.param(range(20), marks=pytest.mark.slow)]
)
def test_random_options_compiled_in_float32(seeds):
    """In all layouts, with all float options traced."""

    def compiled(call, moving, cotangent):
        both = jax.jit(functools.partial(value_and_gradients, call))
        return both(moving, cotangent.astype(np.float32))

    layouts = [ROWS_AND_CLASSES, *OTHER_LAYOUTS]
    for seed in seeds:
        call = draw_call(1000 + seed, layouts[seed % len(layouts)])
        check_call(call, jnp.float32, compiled)
