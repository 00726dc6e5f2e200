"""One table of what is tested everywhere: a function joins by adding a `Law`.

A law names a function that jaxsoft and the oracle both have, and how its arguments are
drawn. The tests of laws, stability, residuals and half precision run over the table.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxsoft

Draw = Callable[[np.random.Generator, int, int], Any]


def _labels(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Different ones in neighbouring rows, and never the last class."""
    first = rng.integers(0, classes)
    return ((first + np.arange(rows)) % max(classes - 1, 1)).astype(np.int32)


def _mask(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Every second row loses its last class, which is no label (unless it is alone)."""
    mask = np.ones((rows, classes), bool)
    mask[::2, max(classes - 1, 1) :] = False
    return mask


def _signed_weights(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Of a sum far from 0, with weights 0 and below 0 at the end of some rows."""
    b = rng.uniform(0.5, 1.5, (rows, classes))
    b[::2, max(classes - 1, 1) :] = 0
    b[1::2, max(classes - 1, 1) :] = -0.1
    return b


def _temperature(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Above 0 and below in turn."""
    signs = np.where(np.arange(rows) % 2, -1, 1)[:, None]
    return signs * rng.uniform(0.5, 2, (rows, 1))


def _probabilities(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Not normalised, which nothing demands, and 0 where `_mask` is False."""
    q = rng.uniform(0.1, 0.5, (rows, classes))
    return np.where(_mask(rng, rows, classes), q, 0)


DRAWS: dict[str, Draw] = {
    "logits": lambda rng, rows, classes: 2 * rng.normal(size=(rows, classes)),
    "labels": _labels,
    "mask": _mask,
    "signed weights": _signed_weights,
    "probabilities": _probabilities,
    "yes": lambda rng, rows, classes: rng.random((rows, classes)) < 0.5,
    "similarities": lambda rng, rows, classes: rng.uniform(-0.9, 0.9, (rows, classes)),
    "temperature": _temperature,
    "class weight": lambda rng, rows, classes: rng.uniform(0.5, 2, classes),
    "sample weight": lambda rng, rows, classes: rng.uniform(0.5, 2, rows),
    "weight per logit": lambda rng, rows, classes: rng.uniform(0.5, 2, (rows, classes)),
    "lower": lambda rng, rows, classes: rng.uniform(-3, -1, (rows, classes)),
    "upper": lambda rng, rows, classes: rng.uniform(1, 3, (rows, classes)),
    # Of a linear head, as many features as classes.
    "hidden": lambda rng, rows, classes: rng.normal(size=(rows, classes)),
    "vocab weight": lambda rng, rows, classes: rng.normal(size=(classes, classes)),
    "vocab bias": lambda rng, rows, classes: rng.normal(size=classes),
    "smoothing": lambda rng, rows, classes: rng.uniform(0.1, 0.3),
    "softcap": lambda rng, rows, classes: rng.uniform(3, 5),
    "z loss": lambda rng, rows, classes: rng.uniform(0.01, 0.1),
    "margin": lambda rng, rows, classes: rng.uniform(0.1, 0.3),
    "scale": lambda rng, rows, classes: rng.uniform(3, 5),
}


# These have the logits' dtype.
LIKE_LOGITS = (
    "logits",
    "signed weights",
    "similarities",
    "hidden",
    "vocab weight",
    "vocab bias",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    name: str
    function: str
    positional: Sequence[str]
    keywords: dict[str, str] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_row: bool = True  # a row's result depends on that row alone
    float32_result: bool = False  # for half-precision logits
    # Differentiation changes no bit of the value. Not where a division by a temperature
    # or a product with a weight meets a sum: XLA rounds the two together or apart, as
    # it fuses them into the program at hand.
    same_bits: bool = True
    elementwise: bool = False  # on arrays like the first
    # The function of arrays that jaxsoft's name gives, and its name in the oracle,
    # where these are others.
    made: Callable[[Any], Any] | None = None
    meaning_name: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.positional, *self.keywords.values())

    def _of(self, function: Any, arguments: Sequence[Any]) -> Any:
        positional = arguments[: len(self.positional)]
        options = arguments[len(self.positional) :]
        keywords = dict(zip(self.keywords, options, strict=True))
        return function(*positional, **keywords, **self.static)

    def call(self, *arguments: Any) -> jax.Array:
        """jaxsoft's function of the arguments of all kinds, in order."""
        function = getattr(jaxsoft, self.function)
        result = self._of(self.made(function) if self.made else function, arguments)
        if isinstance(result, jaxsoft.LogProbs):
            return jnp.stack(result[:3], axis=-1)  # the last is an index
        return result

    def meaning(self, *arguments: Any) -> np.ndarray:
        """The oracle's function of the same arguments."""
        return self._of(getattr(oracle, self.meaning_name or self.function), arguments)

    def draw(self, seed: int, rows: int, classes: int) -> list[Any]:
        """Arguments for the oracle: float64, int32 and bool."""
        rng = np.random.default_rng(seed)
        return [np.asarray(DRAWS[kind](rng, rows, classes)) for kind in self.kinds]

    def cast(self, arguments: Sequence[Any], dtype: Any) -> list[jax.Array]:
        """Arguments for jaxsoft: the logits in dtype, other floats never in half."""
        dtype = jnp.dtype(dtype)
        other = dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
        return [
            jnp.asarray(a).astype(dtype if kind in LIKE_LOGITS else other)
            if oracle.is_float(a)
            else jnp.asarray(a)
            for kind, a in zip(self.kinds, arguments, strict=True)
        ]

    def result_dtype(self, logits_dtype: Any) -> Any:
        half = jnp.dtype(logits_dtype).itemsize < 4
        return jnp.float32 if half and self.float32_result else logits_dtype

    @property
    def floats(self) -> tuple[int, ...]:
        """Positions of the arguments that are differentiated."""
        return tuple(i for i, a in enumerate(self.draw(0, 1, 2)) if oracle.is_float(a))


_TEMPERATURE = {"temperature": "temperature"}
_MASKED = {"where": "mask", **_TEMPERATURE}
_LOSS_OPTIONS = {
    "where": "mask",
    "class_weight": "class weight",
    "sample_weight": "sample weight",
    "label_smoothing": "smoothing",
    "temperature": "temperature",
    "softcap": "softcap",
    "z_loss": "z loss",
}
_LAST = {"axis": -1}
_HEAD = ["hidden", "vocab weight", "labels"]
_OF_A_MEAN: dict[str, Any] = {
    "keywords": {"class_weight": "class weight", "sample_weight": "sample weight"},
    "static": {"reduction": "mean"},
    "by_row": False,
    "float32_result": True,
    "same_bits": False,
}

LAWS = [
    Law("logsumexp", "logsumexp", ["logits"], static=_LAST),
    Law("logsumexp_options", "logsumexp", ["logits"], _MASKED, _LAST),
    Law(
        "logsumexp_weights",
        "logsumexp",
        ["logits"],
        {"b": "signed weights", "temperature": "temperature"},
        _LAST,
    ),
    Law("logmeanexp", "logmeanexp", ["logits"], _MASKED, _LAST),
    Law("softmax", "softmax", ["logits"]),
    Law("softmax_options", "softmax", ["logits"], _MASKED),
    Law("log_softmax", "log_softmax", ["logits"]),
    Law(
        "log_softmax_options",
        "log_softmax",
        ["logits"],
        _MASKED,
        same_bits=False,
    ),
    Law("entropy", "entropy", ["logits"], float32_result=True),
    Law(
        "entropy_options",
        "entropy",
        ["logits"],
        _MASKED,
        float32_result=True,
        same_bits=False,
    ),
    Law("cross_entropy", "cross_entropy", ["logits", "labels"], float32_result=True),
    Law(
        "cross_entropy_options",
        "cross_entropy",
        ["logits", "labels"],
        _LOSS_OPTIONS,
        float32_result=True,
        same_bits=False,
    ),
    Law("cross_entropy_mean", "cross_entropy", ["logits", "labels"], **_OF_A_MEAN),
    Law(
        "cross_entropy_probabilities",
        "cross_entropy",
        ["logits", "probabilities"],
        float32_result=True,
    ),
    Law(
        "cross_entropy_probabilities_options",
        "cross_entropy",
        ["logits", "probabilities"],
        # Not where: the loss is infinite in a probability next to 0 of a masked class.
        {name: kind for name, kind in _LOSS_OPTIONS.items() if name != "where"},
        {"reduction": "sum"},
        by_row=False,
        float32_result=True,
        same_bits=False,
    ),
    Law("kl_divergence", "kl_divergence", ["logits", "logits"], float32_result=True),
    Law(
        "kl_divergence_options",
        "kl_divergence",
        ["logits", "logits"],
        {**_MASKED, "sample_weight": "sample weight"},
        {"reduction": "mean"},
        by_row=False,
        float32_result=True,
    ),
    Law(
        "binary_cross_entropy",
        "binary_cross_entropy",
        ["logits", "probabilities"],
        float32_result=True,
        elementwise=True,
    ),
    Law(
        "binary_cross_entropy_options",
        "binary_cross_entropy",
        ["logits", "probabilities"],
        {
            "pos_weight": "class weight",
            "sample_weight": "weight per logit",
            "label_smoothing": "smoothing",
        },
        {"reduction": "mean"},
        by_row=False,
        float32_result=True,
        same_bits=False,
        elementwise=True,
    ),
    Law(
        "multilabel_cross_entropy",
        "multilabel_cross_entropy",
        ["logits", "yes"],
        {"where": "mask"},
        float32_result=True,
    ),
    Law(
        "circle_loss",
        "circle_loss",
        ["similarities", "similarities"],
        {"margin": "margin", "scale": "scale", "where_positive": "mask"},
        {"detach_weights": False},
        float32_result=True,
    ),
    Law("smooth_max", "smooth_max", ["logits"], _MASKED, _LAST),
    Law("smooth_min", "smooth_min", ["logits"], _MASKED, _LAST),
    Law("boltzmann_max", "boltzmann_max", ["logits"], _MASKED, _LAST),
    Law("softargmax", "softargmax", ["logits"], float32_result=True),
    Law(
        "softargmax_options",
        "softargmax",
        ["logits"],
        {**_MASKED, "positions": "weight per logit"},
        float32_result=True,
        same_bits=False,
    ),
    *(
        Law(name, name, arguments, _TEMPERATURE, elementwise=True)
        for name, arguments in {
            "softplus": ["logits"],
            "smooth_abs": ["logits"],
            "smooth_sign": ["logits"],
            "smooth_step": ["logits"],
            "smooth_maximum": ["logits", "logits"],
            "smooth_minimum": ["logits", "logits"],
            "smooth_clip": ["logits", "lower", "upper"],
        }.items()
    ),
    Law(
        "straight_through",
        "straight_through",
        ["logits"],
        elementwise=True,
        made=lambda straight_through: straight_through(
            lambda x: jaxsoft.smooth_maximum(x, 0.0),
            lambda x: jaxsoft.softplus(x) + 3,  # of the same derivatives
        ),
        meaning_name="softplus",
    ),
    Law("linear_cross_entropy", "linear_cross_entropy", _HEAD, float32_result=True),
    Law(
        "linear_cross_entropy_options",
        "linear_cross_entropy",
        _HEAD,
        {"vocab_bias": "vocab bias", **_LOSS_OPTIONS},
        float32_result=True,
        same_bits=False,
    ),
    Law("linear_cross_entropy_mean", "linear_cross_entropy", _HEAD, **_OF_A_MEAN),
    Law(
        "linear_log_probs",
        "linear_log_probs",
        _HEAD,
        {
            "vocab_bias": "vocab bias",
            "temperature": "temperature",
            "softcap": "softcap",
        },
        float32_result=True,
        same_bits=False,
    ),
]


def fullest(laws: Iterable[Law]) -> dict[str, Law]:
    """By function, the one of its laws that has the most arguments."""
    return {law.function: law for law in sorted(laws, key=_count_of_arguments)}


def plainest(laws: Iterable[Law]) -> dict[str, Law]:
    """By function, the one of its laws that has the fewest arguments."""
    by_count = sorted(laws, key=_count_of_arguments, reverse=True)
    return {law.function: law for law in by_count}


def _count_of_arguments(law: Law) -> int:
    return len(law.kinds)


# The public names that are in no law of their own, and why.
WITHOUT_LAW = {
    "LogProbs": "a result",
    "shard_vocab": "it needs devices: test_sharding.py",
    "cpu_kernels": "a setting: test_native.py",
    "use_cpu_kernels": "a setting: test_native.py",
    "with_jvp": "it is in every rule, and anybody's: test_autodiff.py",
}


def cotangent_for(law: Law, arguments: Sequence[Any], seed: int) -> np.ndarray:
    """In float32, so that no test rounds it."""
    shape = np.shape(law.meaning(*arguments))
    normal = np.random.default_rng(seed + 1000).normal(size=shape)
    return np.asarray(normal, np.float32)


def tangents_for(law: Law, arguments: Sequence[Any], seed: int) -> list[Any]:
    """One per argument; None where nothing can move."""
    rng = np.random.default_rng(seed + 2000)
    return [
        np.asarray(rng.normal(size=np.shape(a))) if i in law.floats else None
        for i, a in enumerate(arguments)
    ]


def of_floats(
    law: Law, arguments: Sequence[Any], f: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], list[Any]]:
    """jaxsoft's function of the differentiated arguments alone, and these."""

    def call(*moving: Any) -> Any:
        every = list(arguments)
        for position, value in zip(law.floats, moving, strict=True):
            every[position] = value
        return (f or law.call)(*every)

    return call, [arguments[i] for i in law.floats]


def assert_close(actual: Any, expected: Any, roundings: float, what: str) -> None:
    """Within so many roundings of the largest entry: the scale of the terms that an
    entry is a sum of. A wrong formula is off by a part of that in some entry."""
    actual = np.asarray(actual)
    expected = oracle.rounded(expected)
    assert actual.shape == expected.shape, what
    scale = max(np.max(np.abs(expected), initial=0, where=np.isfinite(expected)), 1e-3)
    tolerance = roundings * float(jnp.finfo(actual.dtype).eps) * scale
    np.testing.assert_allclose(
        actual.astype(np.float64), expected, rtol=0, atol=tolerance, err_msg=what
    )


# What is compiled for a few numbers need not be fast. XLA's older emitters take a third
# of the time of its new ones; newer versions no longer have them.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
quickly = functools.partial(jax.jit, compiler_options=QUICKLY)


def value_and_pullback(law: Law):
    def both(arguments, cotangent):
        f, moving = of_floats(law, arguments)
        value, pull = jax.vjp(f, *moving)
        return value, pull(cotangent)

    return both
