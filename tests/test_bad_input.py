"""Calls with one thing wrong: a TypeError or a ValueError that names the function.

Every call is a valid one, drawn at random, in which one argument is then broken. What
may be broken about an argument stands in one table, since a word means the same in
every function. Each call is made twice: with the arrays, and with tracers for them.
"""

import dataclasses
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

CALLS_PER_FUNCTION = 80
FEATURES = 11


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """To shorten a traceback takes JAX four times as long as all the rest."""
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", filtering)


@dataclasses.dataclass(frozen=True)
class Frame:
    """The logits of a call. All sizes differ and exceed 1: nothing fits by chance."""

    shape: tuple[int, ...]
    axis: int

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def per_class(self) -> tuple[int, ...]:
        return (self.classes,)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(self.shape) if i != self.axis)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(1 if i == self.axis else n for i, n in enumerate(self.shape))

    @property
    def hidden(self) -> tuple[int, ...]:
        return (*self.rows, FEATURES)

    @property
    def head(self) -> tuple[int, ...]:
        return (self.classes, FEATURES)

    @property
    def negatives(self) -> tuple[int, ...]:
        return (*self.rows, 3)


Draw = Callable[[np.random.Generator, Frame], Any]


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def one_of(*values: Any) -> Draw:
    return lambda rng, frame: values[rng.integers(len(values))]


def larger(shape: tuple[int, ...]) -> Draw:
    """A shape that does not broadcast to the given one, or would enlarge it."""

    def draw(rng: np.random.Generator, frame: Frame) -> tuple[int, ...]:
        position = rng.integers(-1, len(shape))
        if position < 0:
            return (2, *shape)
        return (*shape[:position], shape[position] + 1, *shape[position + 1 :])

    return draw


def misfit(of: str, dtype: Any = np.float32) -> Draw:
    """An array of a shape that does not fit to a shape of the frame."""

    def draw(rng: np.random.Generator, frame: Frame) -> np.ndarray:
        return np.ones(larger(getattr(frame, of))(rng, frame), dtype)

    return draw


def typed(of: str, dtype: Any) -> Draw:
    """An array of a shape of the frame, in a dtype."""
    return lambda rng, frame: np.ones(getattr(frame, of), dtype)


def sized(size: Callable[[Frame], tuple[int, ...]]) -> Draw:
    return lambda rng, frame: floats(*size(frame))


NO_ARRAYS = one_of(
    "logits",
    b"logits",
    object(),
    {},
    {1.0},
    len,
    ...,
    slice(1),
    2**70,
    [[1.0], [1.0, 2.0]],
    ["yes", "no"],
    [None],
    np.array("a"),
    np.array([object()]),
    np.array([1.0, None]),
    np.array([1], "datetime64[s]"),
    np.zeros(2, [("a", np.float32)]),
    jax.random.key(0),
)
NO_NUMBERS = one_of(None, True, False, 1j, "1", "", b"1", [[]], {}, np.array(True))


def not_real(of: str) -> tuple[Draw, Draw]:
    return typed(of, bool), typed(of, np.complex64)


def index_misfit(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    """Integers that are not of the rows' shape."""
    shapes = [frame.shape, frame.kept, (1, *frame.rows), larger(frame.rows)(rng, frame)]
    return np.zeros(shapes[rng.integers(len(shapes))], np.int32)


def index_misfit_of_segments(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    entries = frame.shape[0]
    shapes = [(entries + 1,), (1, entries), (entries, 1), ()]
    return np.zeros(shapes[rng.integers(len(shapes))], np.int32)


def probability_misfit(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    shapes = [
        frame.rows,
        frame.kept,
        (1, *frame.shape),
        larger(frame.shape)(rng, frame),
    ]
    return floats(*shapes[rng.integers(len(shapes))])


def label_draw(rng: np.random.Generator, frame: Frame) -> np.ndarray:
    if rng.random() < 0.5:
        return rng.integers(0, frame.classes, frame.rows).astype(np.int32)
    return floats(*frame.shape) / frame.classes


def axis_out_of_range(rng: np.random.Generator, frame: Frame) -> Any:
    ndim = len(frame.shape)
    wrong = (ndim, -ndim - 1, 2**70, (0, ndim), [ndim], np.int64(ndim))
    return wrong[rng.integers(len(wrong))]


def axis_repeated(rng: np.random.Generator, frame: Frame) -> Any:
    ndim = len(frame.shape)
    wrong = ((0, 0), (0, -ndim), [ndim - 1, -1])
    return wrong[rng.integers(len(wrong))]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an argument is drawn, and what breaks it."""

    valid: Draw
    breaks: tuple[Draw, ...]


def array_kind(of: str, *breaks: Draw) -> Kind:
    return Kind(typed(of, np.float32), (NO_ARRAYS, one_of(None), *breaks))


def mask_kind(of: str) -> Kind:
    other_dtypes = (np.float32, np.int8, np.complex64)
    return Kind(
        typed(of, bool),
        (NO_ARRAYS, misfit(of, bool), *(typed(of, dtype) for dtype in other_dtypes)),
    )


def temperature_kind(of: str) -> Kind:
    return Kind(typed(of, np.float32), (NO_ARRAYS, NO_NUMBERS, misfit(of)))


def number_kind(valid: float, *wrong: Any) -> Kind:
    """A scalar; a vector of one number is none."""
    breaks = (NO_ARRAYS, NO_NUMBERS, one_of(floats(1), floats(2), [valid]))
    return Kind(one_of(valid, np.float32(valid)), (*breaks, one_of(*wrong or (None,))))


def choice_kind(valid: Draw, *wrong: Any) -> Kind:
    return Kind(valid, (one_of(*wrong),))


FLAG = choice_kind(one_of(True, False), None, 0, 1, "yes", 1.0, floats(), [True])
REAL = not_real("shape")
ENLARGED = sized(lambda frame: tuple(n + 1 for n in frame.shape))
BOUND = Kind(typed("shape", np.float32), (NO_ARRAYS, NO_NUMBERS, misfit("shape")))

KINDS: dict[str, Kind] = {
    "anything": array_kind("shape"),
    "numbers": array_kind("shape", typed("shape", bool)),
    "real": array_kind("shape", *REAL),
    "partner": array_kind("shape", *REAL, misfit("shape")),
    "broadcast partner": array_kind("shape", *REAL, ENLARGED),
    "factor": Kind(typed("shape", np.float32), (NO_ARRAYS, ENLARGED)),
    "yes": Kind(
        typed("shape", bool),
        (NO_ARRAYS, one_of(None), REAL[1], misfit("shape", bool)),
    ),
    "axis": Kind(
        lambda rng, frame: frame.axis,
        (
            axis_out_of_range,
            axis_repeated,
            one_of(1.0, "0", b"0", True, (0, "1"), (True,), ((0,),), [0.5], {0}),
            one_of(object(), slice(1), np.array([0, 1]), np.float32(0), (0, None), {}),
        ),
    ),
    "where": mask_kind("shape"),
    "temperature": temperature_kind("kept"),
    "temperature of each": temperature_kind("shape"),
    "axis_name": choice_kind(
        one_of(None), "nowhere", ("nowhere",), ["a", "b"], {}, 0, floats(2), object()
    ),
    "reduction": choice_kind(
        one_of("none", "sum", "mean"),
        *("avg", "Mean", "", b"mean", None, 0, True, ["mean"], {"mean"}),
        *(floats(2), np.array(["mean", "sum"]), jnp.ones(2)),
    ),
    "flag": FLAG,
    "labels": Kind(
        label_draw,
        (
            *(NO_ARRAYS, one_of(None), index_misfit, probability_misfit),
            *(typed("rows", bool), *REAL, typed("rows", np.float32)),
        ),
    ),
    "indices": Kind(
        typed("rows", np.int32),
        (
            *(NO_ARRAYS, one_of(None), index_misfit),
            *(typed("rows", dtype) for dtype in (bool, np.float32, np.complex64)),
        ),
    ),
    "class_weight": Kind(
        typed("per_class", np.float32),
        (
            *(NO_ARRAYS, one_of(1.0, floats(1)), *not_real("per_class")),
            *(misfit("per_class"), sized(lambda frame: (1, frame.classes))),
        ),
    ),
    "weight of each": Kind(
        typed("shape", np.float32), (NO_ARRAYS, REAL[1], misfit("shape"))
    ),
    "sample_weight": Kind(
        typed("rows", np.float32),
        (NO_ARRAYS, misfit("rows"), typed("rows", np.complex64)),
    ),
    "ignore_index": choice_kind(
        one_of(-100, 0, None, 2**70, np.int8(3)),
        *(-1.0, "0", True, [0], (), {0}, {}, object(), np.array([0, 1]), np.float32(0)),
    ),
    "label_smoothing": number_kind(0.1, -0.1, 1.1, 2, -1, np.nan, np.inf, 2**70),
    "softcap": Kind(
        one_of(30.0, 1, np.float32(2)),
        (
            NO_ARRAYS,
            one_of(0, 0.0, -1, -0.5, np.nan, -np.inf, True, False, 1j, "30"),
            one_of(floats(1), [30.0], np.array(True), np.complex64(1)),
        ),
    ),
    "number": number_kind(0.5),
    "hidden": array_kind("hidden", one_of(1.0), *not_real("hidden"), misfit("hidden")),
    "vocab_weight": array_kind(
        "head",
        one_of(1.0, floats(FEATURES), floats(0, FEATURES)),
        *not_real("head"),
        sized(lambda frame: (*frame.head, 1)),
        sized(lambda frame: (frame.classes, FEATURES + 1)),
        sized(lambda frame: (FEATURES, frame.classes)),
    ),
    "vocab_bias": Kind(
        typed("per_class", np.float32),
        (
            *(NO_ARRAYS, misfit("per_class"), one_of(0.0, floats(1))),
            sized(lambda frame: (frame.classes, 1)),
        ),
    ),
    "vocab_axis": choice_kind(
        one_of(0),
        *(1, 2, -1, 0.0, "0", None, True, False, [0], (0,), {0}, {}),
        floats(2),
    ),
    "beta": choice_kind(
        one_of(0, 0.5, 1),
        *(-0.1, 1.1, 2, np.nan, np.inf, None, True, "1", [0.5], {}, 1j, object()),
        *(floats(2), floats(), np.float32(0.5)),
    ),
    "chunk_bytes": choice_kind(
        one_of(None, 64, 2**20), *(0, -1, 0.5, 64.0, "64", True, [64], {}), floats(2)
    ),
    "key": choice_kind(
        one_of(jax.random.key(0), jax.random.PRNGKey(0)),
        *(None, 0, "key", floats(2), np.zeros(2, np.int32), np.zeros(3, np.uint32)),
        jax.random.split(jax.random.key(0)),
    ),
    # The one axis of a prefix.
    "one axis": choice_kind(
        lambda rng, frame: frame.axis,
        *(None, 3, -4, 2**70, 1.0, "0", True, (0,), [0], (), np.float32(0), object()),
    ),
    "segment_ids": Kind(
        lambda rng, frame: np.zeros(frame.shape[0], np.int32),
        (
            *(NO_ARRAYS, one_of(None), one_of(0), index_misfit_of_segments),
            sized(lambda frame: (frame.shape[0],)),
            lambda rng, frame: np.ones(frame.shape[0], bool),
        ),
    ),
    # One segment, so that what fits to the rows along the first axis fits to it.
    "num_segments": choice_kind(
        one_of(1), *(-1, 1.0, "1", True, [1], (), {}, object()), floats(2), np.ones(2)
    ),
    "positions": Kind(
        typed("per_class", np.float32),
        (
            *(NO_ARRAYS, *REAL, misfit("shape"), one_of(floats(1))),
            sized(lambda frame: (frame.classes + 1,)),
        ),
    ),
    # The valid upper bound is 1.
    "lower": dataclasses.replace(BOUND, breaks=(*BOUND.breaks, one_of(3, 2.5))),
    "upper": Kind(one_of(2.0), BOUND.breaks),
    "negatives": array_kind(
        "negatives",
        one_of(1.0),
        *not_real("negatives"),
        sized(lambda frame: (2, *frame.negatives)),
    ),
    "where_negative": Kind(
        typed("negatives", bool),
        (
            *(NO_ARRAYS, typed("negatives", np.float32)),
            lambda rng, frame: np.ones((*frame.rows, 4), bool),
        ),
    ),
}

# These take functions, and have their cases in test_errors.py.
OF_FUNCTIONS = {"shard_vocab", "straight_through", "with_jvp"}
# So has this one, whose labels tell less of the logits than a loss knows.
OF_LABELS = {"loss_weight"}
# Not together with label probabilities.
NOT_DRAWN = {("cross_entropy", "focal_gamma")}
WITHOUT_ARRAYS = {"cpu_kernels", "use_cpu_kernels"}  # test_native.py
RESULTS = {"LinearSample", "LogProbs", "LossMetrics"}
# An argument is of the kind of its name, or of this one, or of that of its function.
BY_NAME = {
    **dict.fromkeys(("keepdims", "return_sign", "detach_weights"), "flag"),
    **dict.fromkeys(("check_labels", "with_metrics"), "flag"),
    **dict.fromkeys(("z_loss", "focal_gamma", "margin", "scale"), "number"),
    **dict.fromkeys(("logits", "x", "y", "positives"), "real"),
    "target_logits": "partner",
    "where_positive": "where",
    **{
        f"target_{name}": name
        for name in ("hidden", "vocab_weight", "vocab_bias", "vocab_axis", "softcap")
    },
    **dict.fromkeys(("indices_are_sorted", "reverse", "hard"), "flag"),
    "pos_weight": "weight of each",
    "a": "anything",
    "b": "factor",
}
ELEMENTWISE = ("softplus", "smooth_abs", "smooth_sign", "smooth_step")
ELEMENTWISE += ("smooth_maximum", "smooth_minimum", "smooth_clip")
BY_FUNCTION = {
    **{(name, "temperature"): "temperature of each" for name in ELEMENTWISE},
    ("logmeanexp", "x"): "anything",
    ("logcumsumexp", "axis"): "one axis",
    ("softmax", "x"): "numbers",
    ("log_softmax", "x"): "numbers",
    ("kl_divergence", "logits"): "partner",
    ("jensen_shannon", "logits"): "partner",
    ("binary_cross_entropy", "logits"): "partner",
    ("binary_cross_entropy", "labels"): "yes",
    ("binary_cross_entropy", "sample_weight"): "weight of each",
    ("multilabel_cross_entropy", "logits"): "partner",
    ("multilabel_cross_entropy", "labels"): "yes",
    ("linear_cross_entropy", "labels"): "indices",
    ("linear_log_probs", "labels"): "indices",
    ("smooth_maximum", "x"): "broadcast partner",
    ("smooth_minimum", "y"): "broadcast partner",
}
# The kind of every argument of every function.
FUNCTIONS: dict[str, dict[str, str]] = {
    name: {
        argument: BY_FUNCTION.get((name, argument), BY_NAME.get(argument, argument))
        for argument in inspect.signature(getattr(jaxsoft, name)).parameters
        if (name, argument) not in NOT_DRAWN
    }
    for name in jaxsoft.__all__
    if name not in {*OF_FUNCTIONS, *OF_LABELS, *WITHOUT_ARRAYS, *RESULTS}
}
LAST_AXIS = {"circle_loss", "linear_cross_entropy", "linear_log_probs", "linear_sample"}
LAST_AXIS |= {"linear_kl_divergence", "linear_jensen_shannon"}
FIRST_AXIS = {"segment_logsumexp", "segment_softmax", "segment_log_softmax"}


def is_required(name: str, argument: str) -> bool:
    parameter = inspect.signature(getattr(jaxsoft, name)).parameters[argument]
    return parameter.default is inspect.Parameter.empty


def valid_call(rng: np.random.Generator, name: str) -> tuple[Frame, dict[str, Any]]:
    """The required arguments, the class axis, and some of the options."""
    shape = (5, 7, 13)[: rng.integers(1, 4)]
    axis = -1 if name in LAST_AXIS else int(rng.integers(-len(shape), len(shape)))
    axis = 0 if name in FIRST_AXIS else axis
    frame = Frame(shape, axis % len(shape))
    return frame, {
        argument: KINDS[kind].valid(rng, frame)
        for argument, kind in FUNCTIONS[name].items()
        if is_required(name, argument)
        or kind
        in ("axis", "one axis", "num_segments")  # which tracers of ids do not tell
        or rng.random() < 0.3
    }


def is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and (
        jnp.issubdtype(value.dtype, np.number) or value.dtype == bool
    )


def traced(function: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The shapes of the result, for tracers in place of all arrays."""
    arrays = {n: v for n, v in call.items() if is_numeric(v)}
    static = {n: v for n, v in call.items() if n not in arrays}
    return jax.eval_shape(lambda arrays: function(**arrays, **static), arrays)


def complaint(thunk: Callable[[], Any], names: tuple[str, ...]) -> str | None:
    """What is wrong with the error of a call; None if nothing is."""
    try:
        result = thunk()
    except (TypeError, ValueError) as error:
        kind, text = type(error), str(error)
        if kind not in (TypeError, ValueError):
            return f"raises {kind.__name__}: {text[:80]}"
        if not text.startswith(tuple(f"{name}: " for name in names)):
            return f"does not name the function: {text[:80]}"
        return None if "; got " in text else f"does not say what it got: {text}"
    except Exception as error:
        return f"raises {type(error).__name__}: {error!s:.80}"
    return f"returns {jax.tree.map(jnp.shape, result)}"


def broken_calls(name: str):
    """(the call, the argument that is broken)"""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    kinds = FUNCTIONS[name]
    for _ in range(CALLS_PER_FUNCTION):
        frame, call = valid_call(rng, name)
        argument = list(kinds)[rng.integers(len(kinds))]
        breaks = KINDS[kinds[argument]].breaks
        broken = breaks[rng.integers(len(breaks))](rng, frame)
        yield {**call, argument: broken}, argument


def shown(value: Any) -> str:
    return f"{value.dtype}{value.shape}" if is_numeric(value) else repr(value)


def test_every_argument_has_a_kind():
    assert {kind for kinds in FUNCTIONS.values() for kind in kinds.values()} == {*KINDS}
    assert CALLS_PER_FUNCTION * len(FUNCTIONS) > 1800


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unbroken_calls_are_valid(name):
    """Otherwise a broken one might be wrong in more than what is broken."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(3):
        traced(getattr(jaxsoft, name), valid_call(rng, name)[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_broken_calls(name):
    function = getattr(jaxsoft, name)
    complaints = []
    for call, broken in broken_calls(name):
        for how, thunk in {
            "": functools.partial(function, **call),
            "traced, ": functools.partial(traced, function, call),
        }.items():
            text = complaint(thunk, (name,))
            if text:
                complaints.append(f"{how}{broken} = {shown(call[broken])}: {text}")
    assert not complaints, "\n".join(complaints)


STATIC = {
    *("axis", "one axis", "axis_name", "reduction", "flag"),
    *("ignore_index", "vocab_axis", "chunk_bytes", "num_segments", "beta"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tracer_in_place_of_what_is_static(name):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    complaints = []
    for argument, kind in FUNCTIONS[name].items():
        if kind not in STATIC:
            continue
        _, call = valid_call(rng, name)

        def with_tracer(value, call=call, argument=argument):
            return getattr(jaxsoft, name)(**{**call, argument: value})

        text = complaint(lambda f=with_tracer: jax.eval_shape(f, jnp.int32(0)), (name,))
        if text:
            complaints.append(f"{argument}: {text}")
    assert not complaints, "\n".join(complaints)


SHARDED = [name for name, kinds in FUNCTIONS.items() if "axis_name" in kinds]


@pytest.mark.parametrize("name", SHARDED)
def test_broken_calls_under_shard_vocab(name):
    mesh = jax.make_mesh((1,), ("vocab",))
    function = jaxsoft.shard_vocab(getattr(jaxsoft, name), mesh, "vocab")
    complaints = []
    for call, broken in itertools.islice(broken_calls(name), 40):
        text = complaint(functools.partial(function, **call), (name, "shard_vocab"))
        if text:
            complaints.append(f"{broken} = {shown(call[broken])}: {text}")
    assert not complaints, "\n".join(complaints)
