"""One table of what is tested everywhere: a function joins by adding a `Law`.

A law names a function that jaxsoft and the oracle both have, and how its arguments are
drawn. The tests of laws, stability, residuals and half precision run over the table.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxsoft
from jaxsoft._passes.forms import cpu_form

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


# For logits of half precision too.
FLOAT32_RESULTS = {
    *("entropy", "softargmax_options", "cross_entropy", "kl_divergence"),
    *("jensen_shannon", "linear_jensen_shannon", "circle_loss"),
    *("binary_cross_entropy", "multilabel_cross_entropy"),
    *("linear_cross_entropy", "linear_log_probs"),
}
# Differentiation changes no bit of the value, but of these: where a division by a
# temperature or a product with a weight meets a sum, XLA rounds the two together or
# apart, as it fuses them into the program at hand.
OTHER_BITS = {
    *("log_softmax_options", "entropy_options", "softargmax_options"),
    *("cross_entropy_options", "cross_entropy_mean", "binary_cross_entropy_options"),
    *("cross_entropy_probabilities_options", "linear_cross_entropy_options"),
    *("linear_cross_entropy_mean", "linear_log_probs"),
    *("jensen_shannon", "jensen_shannon_options"),  # the mixture
    "linear_jensen_shannon",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    name: str  # begins with that of the function
    positional: Sequence[str]
    keywords: dict[str, str] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_row: bool = True  # a row's result depends on that row alone
    elementwise: bool = False  # on arrays like the first
    # The function of arrays that jaxsoft's name gives, and its name in the oracle,
    # where these are others.
    made: Callable[[Any], Any] | None = None
    meaning_name: str = ""

    @functools.cached_property
    def function(self) -> str:
        return max(filter(self.name.startswith, jaxsoft.__all__), key=len)

    @property
    def same_bits(self) -> bool:
        return self.name not in OTHER_BITS

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
        wide = half and not FLOAT32_RESULTS.isdisjoint((self.name, self.function))
        return jnp.float32 if wide else logits_dtype

    @functools.cached_property
    def floats(self) -> tuple[int, ...]:
        """Positions of the arguments that are differentiated."""
        return tuple(i for i, a in enumerate(self.draw(0, 1, 2)) if oracle.is_float(a))

    @functools.cached_property
    def have_rows(self) -> tuple[bool, ...]:
        """Which arguments have a row for every row of logits."""
        two, three = (map(np.shape, self.draw(0, rows, 4)) for rows in (2, 3))
        return tuple(a != b for a, b in zip(two, three))


def in_segments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of segments as one of rows: every row is a segment, whose entries lie
    among those of the others."""

    def of_rows(x: Any, where: Any = None, temperature: Any = 1.0) -> Any:
        rows, classes = x.shape
        ids = jnp.tile(jnp.arange(rows), classes)
        result = function(
            x.T.ravel(),
            ids,
            rows,
            where=None if where is None else where.T.ravel(),
            temperature=temperature
            if jnp.ndim(temperature) == 0
            else temperature[:, 0],
        )
        if function is jaxsoft.segment_logsumexp:
            return result
        return result.reshape(classes, rows).T

    return of_rows


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
_WEIGHTS = {"class_weight": "class weight", "sample_weight": "sample weight"}
_LAST = {"axis": -1}
_HEAD = ["hidden", "vocab weight", "labels"]
_TWO = ["logits", "logits"]
_MEAN = {"reduction": "mean"}

LAWS = [
    Law("logsumexp", ["logits"], {}, _LAST),
    Law("logsumexp_options", ["logits"], _MASKED, _LAST),
    Law(
        "logsumexp_weights", ["logits"], {"b": "signed weights", **_TEMPERATURE}, _LAST
    ),
    Law("logmeanexp", ["logits"], _MASKED, _LAST),
    Law("softmax", ["logits"]),
    Law("softmax_options", ["logits"], _MASKED),
    Law("log_softmax", ["logits"]),
    Law("log_softmax_options", ["logits"], _MASKED),
    Law("entropy", ["logits"]),
    Law("entropy_options", ["logits"], _MASKED),
    Law("logcumsumexp", ["logits"], {}, {"axis": -1, "reverse": True}),
    Law("logcumsumexp_options", ["logits"], _MASKED, _LAST),
    *(
        Law(
            f"segment_{meaning}",
            ["logits"],
            _MASKED,
            made=in_segments,
            meaning_name=meaning,
        )
        for meaning in ("logsumexp", "softmax", "log_softmax")
    ),
    Law("cross_entropy", ["logits", "labels"]),
    Law("cross_entropy_options", ["logits", "labels"], _LOSS_OPTIONS),
    Law("cross_entropy_mean", ["logits", "labels"], _WEIGHTS, _MEAN, by_row=False),
    Law("cross_entropy_probabilities", ["logits", "probabilities"]),
    Law(
        "cross_entropy_probabilities_options",
        ["logits", "probabilities"],
        # Not where: the loss is infinite in a probability next to 0 of a masked class.
        {name: kind for name, kind in _LOSS_OPTIONS.items() if name != "where"},
        {"reduction": "sum"},
        by_row=False,
    ),
    Law("kl_divergence", _TWO),
    Law(
        "kl_divergence_options",
        _TWO,
        {**_MASKED, "sample_weight": "sample weight"},
        _MEAN,
        by_row=False,
    ),
    Law("jensen_shannon", _TWO),
    Law(
        "jensen_shannon_options",
        _TWO,
        {**_MASKED, "sample_weight": "sample weight"},
        {**_MEAN, "beta": 0.3},
        by_row=False,
    ),
    Law("binary_cross_entropy", ["logits", "probabilities"], elementwise=True),
    Law(
        "binary_cross_entropy_options",
        ["logits", "probabilities"],
        {
            "pos_weight": "class weight",
            "sample_weight": "weight per logit",
            "label_smoothing": "smoothing",
        },
        _MEAN,
        by_row=False,
        elementwise=True,
    ),
    Law("multilabel_cross_entropy", ["logits", "yes"], {"where": "mask"}),
    Law(
        "circle_loss",
        ["similarities", "similarities"],
        {"margin": "margin", "scale": "scale", "where_positive": "mask"},
        {"detach_weights": False},
    ),
    Law("smooth_max", ["logits"], _MASKED, _LAST),
    Law("smooth_min", ["logits"], _MASKED, _LAST),
    Law("boltzmann_max", ["logits"], _MASKED, _LAST),
    Law("softargmax", ["logits"]),
    Law("softargmax_options", ["logits"], {**_MASKED, "positions": "weight per logit"}),
    *(
        Law(name, ["logits"], _TEMPERATURE, elementwise=True)
        for name in ("softplus", "smooth_abs", "smooth_sign", "smooth_step")
    ),
    Law("smooth_maximum", _TWO, _TEMPERATURE, elementwise=True),
    Law("smooth_minimum", _TWO, _TEMPERATURE, elementwise=True),
    Law("smooth_clip", ["logits", "lower", "upper"], _TEMPERATURE, elementwise=True),
    Law(
        "straight_through",
        ["logits"],
        elementwise=True,
        made=lambda straight_through: straight_through(
            lambda x: jaxsoft.smooth_maximum(x, 0.0),
            lambda x: jaxsoft.softplus(x) + 3,  # of the same derivatives
        ),
        meaning_name="softplus",
    ),
    Law("linear_cross_entropy", _HEAD),
    Law(
        "linear_cross_entropy_options",
        _HEAD,
        {"vocab_bias": "vocab bias", **_LOSS_OPTIONS},
    ),
    Law("linear_cross_entropy_mean", _HEAD, _WEIGHTS, _MEAN, by_row=False),
    Law(
        "linear_jensen_shannon",
        ["hidden", "vocab weight"] * 2,
        {"vocab_bias": "vocab bias", **_TEMPERATURE, "sample_weight": "sample weight"},
        {"beta": 0.3},
    ),
    Law(
        "linear_log_probs",
        _HEAD,
        {"vocab_bias": "vocab bias", **_TEMPERATURE, "softcap": "softcap"},
    ),
]


def each(laws: Iterable[Law], slow: Sequence[Law] = ()) -> pytest.MarkDecorator:
    """A test for each law, next to the other tests of that law: they share programs."""

    def of(law: Law) -> Any:
        marks = [pytest.mark.xdist_group(law.name)]
        marks += [pytest.mark.slow] * (law in slow)
        return pytest.param(law, id=law.name, marks=marks)

    return pytest.mark.parametrize("law", [of(law) for law in laws])


every_law = each(LAWS)


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
    "linear_sample": "a draw: test_linear_sample.py",
    "LinearSample": "a result",
    "LogProbs": "a result",
    "linear_kl_divergence": "that of logits: test_linear_divergence.py",
    "loss_weight": "it has no logits: test_what_counts.py",
    "LossMetrics": "a result",
    "gumbel_softmax": "the softmax of logits with noise: test_gumbel.py",
    "shard_vocab": "it needs devices: test_sharding.py",
    **dict.fromkeys(("cpu_kernels", "use_cpu_kernels"), "no arrays: test_native.py"),
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


def extremes(law: Law) -> list[Any]:
    """Arguments for the oracle, with the rows far away and those with infinities."""
    arguments = law.draw(5, ROWS, CLASSES)
    arguments[0] = np.array(FAR_ROWS + INFINITE_ROWS)
    if law.function == "logcumsumexp":  # a prefix of -inf alone has the gradient 0
        for end in (0, -1):
            column = arguments[0][:, end]
            arguments[0][:, end] = np.where(np.isneginf(column), 0, column)
    if "temperature" in law.kinds:  # below 0, what counts is a minimum
        arguments[0] = arguments[0] * np.sign(arguments[law.kinds.index("temperature")])
    if law.function == "smooth_min":
        arguments[0] = -arguments[0]
    if "signed weights" in law.kinds:
        weights = law.kinds.index("signed weights")
        arguments[weights] = np.abs(arguments[weights])  # else some sums are negative
    return arguments


def oracle_pullback(
    law: Law, arguments: Sequence[Any], cotangent: Any, positions: Sequence[int] = ()
) -> list[np.ndarray]:
    """The gradients in the arguments of the positions: by default, of all floats."""
    arguments = [oracle.exact(a) for a in arguments]
    positions = positions or law.floats

    def f(*moving: Any) -> np.ndarray:
        every = dict(enumerate(arguments)) | dict(zip(positions, moving))
        return law.meaning(*every.values())

    moving = [arguments[i] for i in positions]
    have_rows = [law.by_row and law.have_rows[i] for i in positions]
    return oracle.pullback(f, moving, cotangent, have_rows)


FAR_ROWS = [
    [1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0],
    [-1000.0, -1000.0, -1000.0, -1000.0, -1000.0, -1000.0, -1000.0],
    [1000.0, -1000.0, 999.0, 0.0, -1000.0, 998.0, 0.0],
    [-1000.0, 1000.0, 1000.0, 0.0, -1000.0, 999.0, 1.0],
    [1e4, 1e4 - 1, -1e4, 1e4, 0.0, 1e4 - 3, -1e4],
    [88.0, 89.0, 88.0, 89.0, 87.0, 89.0, 88.0],
    [-104.0, -103.0, -88.0, -89.0, -87.0, -103.0, -104.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [-0.0, 0.0, 1e-30, -1e-30, 0.0, 1e-30, -0.0],
]
INFINITE_ROWS = [
    [-np.inf, 1.0, 2.0, 1.0, -np.inf, 0.0, 2.0],
    [1.0, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf],
    [1000.0, -1000.0, -np.inf, 0.0, 999.0, -np.inf, 0.0],
    [np.inf, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0],
    [np.inf, 1.0, np.inf, -np.inf, 0.0, np.inf, -np.inf],
    [np.inf, np.inf, np.inf, np.inf, np.inf, np.inf, np.inf],
    [-np.inf, 0.0, -np.inf, np.inf, 0.0, -np.inf, 1.0],
]
# Seven classes: of a width with a remainder for every vector unit.
ROWS, CLASSES = np.shape(FAR_ROWS + INFINITE_ROWS)


def rows_of(law: Law) -> int:
    """Where all rows meet in one number, the oracle takes its time."""
    return ROWS if law.by_row and law.kinds[0] != "hidden" else 4


@functools.cache
def problem(law: Law, seed: int = 1):
    """Arguments for jaxsoft, the same numbers for the oracle, and a cotangent."""
    arguments = law.draw(seed, rows_of(law), CLASSES)
    given = law.cast(arguments, jnp.float32)
    return given, [np.asarray(a) for a in given], cotangent_for(law, arguments, seed)


def assert_close(actual: Any, expected: Any, roundings: float, what: str) -> None:
    """Within so many roundings of the largest entry: the scale of the terms that an
    entry is a sum of. A wrong formula is off by a part of that in some entry."""
    actual, expected = np.asarray(actual), oracle.rounded(expected)
    scale = max(np.max(np.abs(expected), initial=0, where=np.isfinite(expected)), 1e-3)
    unit = float(jnp.finfo(actual.dtype).eps) * scale
    assert_within(actual, expected, roundings * unit, what, unit, "roundings")


def assert_within(
    actual: Any,
    expected: Any,
    tolerance: Any,
    what: str,
    unit: Any = 1,
    name_of_unit: str = "",
) -> None:
    """|actual - expected| <= tolerance in every entry, NaN and infinities the same; the
    message says where the error is the largest part of the tolerance, and how large."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, {expected.shape}"
    given, wanted = actual.astype(np.float64), expected.astype(np.float64)
    same = (given == wanted) | (np.isnan(given) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        error = np.abs(given - wanted)
    error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
    tolerance, unit = (np.broadcast_to(v, error.shape) for v in (tolerance, unit))
    bad = error > tolerance
    if np.any(bad):
        part = np.where(bad, error / np.maximum(tolerance, 1e-300), -1)
        at = np.unravel_index(np.argmax(part), error.shape)
        raise AssertionError(
            f"{what}: at {tuple(map(int, at))} {given[at]!r} in place of "
            f"{wanted[at]!r}, off by {error[at] / unit[at]:.4g} {name_of_unit} where "
            f"{tolerance[at] / unit[at]:.4g} are allowed; {np.sum(bad)} of {bad.size} "
            "entries are wrong"
        )


def assert_same_bits(actual: Any, expected: Any, what: str) -> None:
    assert_within(actual, expected, 0, what)


# How tests compile, and the processes that they start. XLA's older emitters take a
# third of the time of its new ones, which newer versions have alone.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
AS_USERS_HAVE_IT: dict[str, Any] = {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
    AS_USERS_HAVE_IT["xla_cpu_use_fusion_emitters"] = True
quickly = functools.partial(jax.jit, compiler_options=QUICKLY)
# For what is promised of the compiled program itself: its last bits, its memory.
as_users_have_it = functools.partial(jax.jit, compiler_options=AS_USERS_HAVE_IT)


# The forms in which the functions run, by name: a context in which a program is traced,
# lowered and compiled. Every program of a law is made in one of them.
FORMS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "as_here": contextlib.nullcontext,  # compiled kernels, if they are there
    "plain": lambda: cpu_form("plain"),
    # The forms of accelerators, lowered on a CPU.
    "merged": lambda: cpu_form("merged"),
    "in_block": lambda: cpu_form("in_block"),
}
THE_FORM = next(iter(FORMS))


@functools.cache
def program(
    of: Callable[[Law], Callable[..., Any]],
    law: Law,
    form: str = THE_FORM,
    compiled: Callable[..., Any] = quickly,
) -> Any:
    """of(law), compiled once in a session for each form, shape and dtype.

    `of` is a function of some module, not a closure: by it a program is found again.
    """
    jitted = compiled(of(law))

    def call(*arguments: Any) -> Any:
        with FORMS[form]():
            return jitted(*arguments)

    def shapes(*arguments: Any) -> Any:
        """Those of the results, and their dtypes; the trace is that of a call."""
        with FORMS[form]():
            return jitted.trace(*arguments).out_info

    call.shapes = shapes
    return call


def eager(f: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of jax.jit."""
    return f


def as_promised(law: Law) -> Callable[..., Any]:
    """How a law is compiled: as users have it where bits are promised."""
    return as_users_have_it if law.same_bits else quickly


def value(law: Law) -> Callable[..., Any]:
    return law.call


def value_and_tangent(law: Law) -> Callable[..., Any]:
    """Along tangents of the floats."""

    def both(arguments, tangents):
        f, moving = of_floats(law, arguments)
        return jax.jvp(f, moving, [tangents[i] for i in law.floats])

    return both


def value_and_pullback(law: Law):
    def both(arguments, cotangent):
        f, moving = of_floats(law, arguments)
        value, pull = jax.vjp(f, *moving)
        return value, pull(cotangent)

    return both
