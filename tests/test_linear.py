"""The losses of a linear head against the same losses of its logits.

Derivatives in forward mode and of second order: the tests of the laws. What is raised:
test_errors.py.

Comparisons are made in float64 where they can be: there a term that is wrong or missing
cannot pass for rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._linear import inputs as _linear

Draw = Callable[[np.random.Generator, tuple[int, ...], int], Any]

# Float arguments beside hidden and vocab_weight, by the option they are for.
DRAWS: dict[str, Draw] = {
    "vocab_bias": lambda rng, batch, classes: rng.normal(size=classes),
    "class_weight": lambda rng, batch, classes: rng.uniform(0.2, 2, classes),
    "sample_weight": lambda rng, batch, classes: rng.uniform(0.2, 2, batch),
    "label_smoothing": lambda rng, batch, classes: rng.uniform(0.1, 0.5),
    "temperature": lambda rng, batch, classes: (
        rng.choice([-1, 1]) * rng.uniform(0.5, 2, (*batch, 1))
    ),
    "softcap": lambda rng, batch, classes: rng.uniform(1, 5),
    "z_loss": lambda rng, batch, classes: rng.uniform(0.1, 0.5),
}
ALL = tuple(DRAWS)
# Smoothing needs the head's gradient of its own.
WITHOUT_SMOOTHING = tuple(name for name in DRAWS if name != "label_smoothing")
OF_HEAD = ("vocab_weight", "vocab_bias", "softcap")


@dataclasses.dataclass(frozen=True)
class Case:
    """A head, its tokens and its options; `draw` fills in the numbers."""

    options: tuple[str, ...] = ()
    batch: tuple[int, ...] = (7,)
    features: int = 5
    classes: int = 13
    chunk: int | None = 4  # classes in a chunk; None leaves all to the function
    vocab_axis: int = 0
    where: str = ""  # "", "per token" or "shared"
    ignored: float = 0.3
    reduction: str = "none"
    ignore_index: int | None = -100
    constant: tuple[str, ...] = ()  # arguments that are not differentiated

    def but(self, **changes: Any) -> Any:
        return dataclasses.replace(self, **changes)

    def layout(self) -> dict[str, Any]:
        tokens = max(int(np.prod(self.batch, dtype=int)), 1)
        chunk_bytes = self.chunk and 4 * tokens * self.chunk
        return {"vocab_axis": self.vocab_axis, "chunk_bytes": chunk_bytes}

    def draw(self, seed: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """(float arguments, labels and mask, cotangent of the loss), float64."""
        rng = np.random.default_rng(seed)
        weight = rng.normal(size=(self.classes, self.features))
        floats = {
            "hidden": rng.normal(size=(*self.batch, self.features)),
            "vocab_weight": weight if self.vocab_axis == 0 else weight.T,
        }
        for name in self.options:
            floats[name] = DRAWS[name](rng, self.batch, self.classes)
        labels = rng.integers(0, self.classes, self.batch)
        others: dict[str, Any] = {}
        if self.where == "per token":
            mask = rng.random((*self.batch, self.classes)) < 0.7
            others["where"] = mask | (labels[..., None] == np.arange(self.classes))
        if self.where == "shared":
            others["where"] = np.arange(self.classes) % 5 != 4
            labels = np.where(labels % 5 == 4, 0, labels)
        if self.ignore_index is not None:
            is_ignored = rng.random(self.batch) < self.ignored
            labels = np.where(is_ignored, self.ignore_index, labels)
        others["labels"] = labels.astype(np.int32)
        cotangent = rng.normal(size=self.batch if self.reduction == "none" else ())
        return floats, others, cotangent

    def arguments(self, seed: int, dtype: Any = float) -> tuple[Any, Any, Any]:
        floats, others, cotangent = self.draw(seed)
        return as_dtype(floats, dtype), others, as_dtype(cotangent, dtype)

    def head(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        """linear_cross_entropy of the drawn arguments."""
        return jaxsoft.linear_cross_entropy(
            **floats,
            **others,
            **self.layout(),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def of_logits(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        """cross_entropy of the logits of the same arguments."""
        logits, options = logits_of(floats, self.vocab_axis)
        return jaxsoft.cross_entropy(
            logits,
            **others,
            **options,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


@dataclasses.dataclass(frozen=True)
class LogProbsCase(Case):
    """The differentiable outputs of linear_log_probs, stacked: for each of the labels
    the log-probability, logsumexp and entropy."""

    labels: int = 0  # 0: one per token, without an axis of their own

    def draw(self, seed: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
        floats, others, _ = Case.draw(self, seed)
        rng = np.random.default_rng(seed + 1)
        if self.labels:
            given = np.repeat(others["labels"][..., None], self.labels, -1)
            drawn = rng.integers(0, self.classes, given.shape)
            is_drawn = rng.random(given.shape) < 0.7
            is_drawn[..., 0] = False
            if "where" in others:
                shape = (*self.batch, self.classes)
                mask = np.broadcast_to(others["where"], shape)
                is_drawn &= np.take_along_axis(mask, drawn, -1)
            others["labels"] = np.where(is_drawn, drawn, given).astype(np.int32)
        cotangent = rng.normal(size=(max(self.labels, 1) + 2, *self.batch))
        return floats, others, cotangent

    def head(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        result = jaxsoft.linear_log_probs(
            **floats, **others, **self.layout(), ignore_index=self.ignore_index
        )
        log_prob = result.log_prob
        log_prob = jnp.moveaxis(log_prob, -1, 0) if self.labels else log_prob[None]
        return jnp.stack([*log_prob, result.logsumexp, result.entropy])

    def of_logits(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        x, options = logits_of(floats, self.vocab_axis)
        t = options.get("temperature", 1.0)
        if "softcap" in options:
            x = options["softcap"] * jnp.tanh(x / options["softcap"])
        where, labels = others.get("where"), jnp.asarray(others["labels"])
        labels = labels if self.labels else labels[..., None]
        is_ignored = labels == self.ignore_index
        log_p = jaxsoft.log_softmax(x, where=where, temperature=t)
        of_label = jnp.take_along_axis(log_p, jnp.where(is_ignored, 0, labels), -1)
        of_label = jnp.moveaxis(jnp.where(is_ignored, 0, of_label), -1, 0)
        lse = jaxsoft.logsumexp(x, -1, where=where, temperature=t, keepdims=True) / t
        entropy = jaxsoft.entropy(x, where=where, temperature=t)
        of_token = jnp.stack([lse[..., 0], entropy])
        of_token = jnp.where(jnp.all(is_ignored, -1), 0, of_token)
        return jnp.concatenate([of_label, of_token])


def logits_of(floats: dict[str, Any], vocab_axis: int) -> tuple[Any, dict[str, Any]]:
    """The logits, and what is left of the arguments."""
    options = dict(floats)
    weight = options.pop("vocab_weight")
    logits = options.pop("hidden") @ (weight if vocab_axis == 1 else weight.T)
    bias = options.pop("vocab_bias", jnp.zeros((), logits.dtype))
    return logits + jnp.broadcast_to(bias, logits.shape), options


def as_dtype(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), tree)


def value_and_pullback(f: Callable[..., Any], constant: Sequence[str] = ()) -> Any:
    """A function of (floats, others, cotangent), for f of (floats, others)."""

    @jax.jit
    def both(floats, others, cotangent):
        fixed = {name: floats[name] for name in constant}
        moving = {name: v for name, v in floats.items() if name not in constant}
        value, pull = jax.vjp(lambda moving: f({**fixed, **moving}, others), moving)
        return value, pull(cotangent)[0]

    return both


def head_and_logits(case: Case) -> tuple[Any, Any]:
    """Value and gradients by both ways, compiled."""
    linear = value_and_pullback(case.head, case.constant)
    return linear, value_and_pullback(case.of_logits, case.constant)


# Sums of some ten terms, each a few operations long, in float64: 1e-13. A wrong term is
# off by about 1.
ROUNDINGS = 2000


def assert_close(actual, expected, roundings: float = ROUNDINGS, what: str = ""):
    """Up to so many roundings of numbers as large as the largest expected one."""
    actual, expected = jnp.asarray(actual), np.asarray(expected, np.float64)
    if jnp.issubdtype(actual.dtype, jnp.integer):
        assert np.all(np.asarray(actual) == expected), what
        return
    finite = np.abs(expected)
    scale = max(1.0, np.max(finite, where=np.isfinite(finite), initial=0.0))
    tolerance = roundings * float(jnp.finfo(actual.dtype).eps) * scale
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance, err_msg=what
    )


def assert_same(actual: Any, expected: Any, roundings: float = ROUNDINGS) -> None:
    """Trees of the same structure and of close numbers."""
    leaves, tree = jax.tree.flatten_with_path(actual)
    assert tree == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(leaves, jax.tree.leaves(expected)):
        assert leaf.shape == wanted.shape
        assert_close(leaf, wanted, roundings, jax.tree_util.keystr(path))


def check_against_logits(case: Case, seeds: Sequence[int]) -> None:
    """With labels of which some are ignored, and at last all."""
    linear, dense = head_and_logits(case)
    for seed in (*seeds, -1):
        drawn = case if seed >= 0 else case.but(ignored=1.0)
        arguments = drawn.arguments(abs(seed))
        expected = dense(*arguments)
        assert not any(np.any(np.isnan(v)) for v in jax.tree.leaves(expected))
        assert_same(linear(*arguments), expected)


MEAN = Case(("class_weight", "sample_weight"), chunk=None, reduction="mean")
SUM = Case(ALL, chunk=None, where="per token", reduction="sum")
OF_LOG_PROBS = ("vocab_bias", "temperature", "softcap")
CASES: dict[str, Case] = {
    "no options": Case(),
    "every option": Case(ALL, where="per token"),
    "every option, transposed": Case(
        ALL, batch=(2, 3), vocab_axis=1, where="shared", ignore_index=None
    ),
    "no tokens": Case(("vocab_bias",), batch=(0,)),
    "fewer classes than a chunk": Case(("vocab_bias",), classes=3, chunk=100),
    "frozen head": Case(WITHOUT_SMOOTHING, where="per token", constant=OF_HEAD),
    "frozen head, smoothed": Case(
        ("label_smoothing",), vocab_axis=1, constant=OF_HEAD[:1]
    ),
    "mean": MEAN,
    "mean of no tokens": MEAN.but(batch=(2, 0)),
    "sum, transposed, frozen head but for its bias": SUM.but(
        batch=(2, 3), where="shared", vocab_axis=1, constant=OF_HEAD[:1]
    ),
    "log_probs": LogProbsCase(OF_LOG_PROBS, batch=(2, 3), vocab_axis=1),
    "log_probs of four labels": LogProbsCase(OF_LOG_PROBS, where="shared", labels=4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("x64")
def test_value_and_every_gradient_are_those_of_the_logits(case: Case):
    check_against_logits(case, seeds=range(2))


def random_case(seed: int, kind: type[Case] = Case) -> Case:
    rng = np.random.default_rng(seed)
    classes = int(rng.choice([2, 7, 11, 17, 24, 31]))
    reduction = str(rng.choice(["none", "sum", "mean"]))
    chunk = int(rng.integers(1, classes + 3))
    case = Case(
        options=tuple(name for name in DRAWS if rng.random() < 0.5),
        batch=tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 4))),
        features=int(rng.integers(1, 8)),
        classes=classes,
        chunk=chunk if reduction == "none" or rng.random() < 0.5 else None,
        vocab_axis=int(rng.integers(2)),
        where=str(rng.choice(["", "per token", "shared"])),
        ignored=float(rng.choice([0, 0.3, 0.8])),
        reduction=reduction,
        ignore_index=[-100, None, 1][rng.integers(3)],
        constant=OF_HEAD[:1] if rng.random() < 0.2 else (),
    )
    if kind is Case:
        return case
    options = tuple(name for name in case.options if name in OF_LOG_PROBS)
    case = case.but(options=options, chunk=chunk, reduction="none")
    return LogProbsCase(**vars(case), labels=int(rng.choice([0, 1, 3, 7])))


@pytest.mark.parametrize(
    "seed", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 3, 4))]
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [Case, LogProbsCase])
def test_random_combinations(seed: int, kind: type[Case]):
    check_against_logits(random_case(seed, kind), seeds=(seed, seed + 100))


# From 512 tokens on, a pass runs over the tokens that count: on a quarter of the rows,
# a half or all.
MANY = Case(
    ("vocab_bias", "label_smoothing", "temperature"),
    batch=(601,),
    features=3,
    classes=11,
    where="per token",
)
MANY_CASES = {
    "none": MANY,
    "mean": MANY.but(chunk=None, reduction="mean"),
    "log_probs": LogProbsCase(
        **vars(MANY.but(options=("temperature",), where="shared")), labels=3
    ),
}


@pytest.mark.parametrize("case", MANY_CASES.values(), ids=MANY_CASES)
@pytest.mark.usefixtures("x64")
def test_tokens_that_count(case: Case):
    """Ignored labels lie anywhere; at last they are all there is."""
    linear, dense = head_and_logits(case)
    for ignored in (0.0, 0.3, 0.6, 0.8, 1.0):
        arguments = case.but(ignored=ignored).arguments(1)
        assert_same(linear(*arguments), dense(*arguments))


@pytest.mark.parametrize(
    "reduction", ["none", pytest.param("mean", marks=pytest.mark.slow)]
)
def test_tokens_are_skipped_under_vmap(reduction, rng):
    """By the element in which most count: one of the two runs on half of the rows."""
    hidden = jnp.asarray(rng.normal(size=(2, 600, 4)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)
    ignored = rng.random((2, 600)) < np.array([[0.9], [0.6]])
    labels = jnp.asarray(np.where(ignored, -100, rng.integers(0, 9, (2, 600))))

    def total(hidden, labels):
        loss = jaxsoft.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
        return jnp.sum(loss)

    def of_logits(hidden, labels):
        logits = hidden @ weight.T
        return jnp.sum(jaxsoft.cross_entropy(logits, labels, reduction=reduction))

    program = jax.jit(jax.vmap(jax.value_and_grad(total))).lower(hidden, labels)
    compiled = program.compile()
    assert "conditional(" in compiled.as_text()
    values, gradients = compiled(hidden, labels)
    wanted, expected = jax.jit(jax.vmap(jax.value_and_grad(of_logits)))(hidden, labels)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradients, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_sum_over_a_part_of_the_tokens(monkeypatch):
    """A large head leaves room for 131 tokens of 150. No other test has this shape, or
    a program compiled for the whole budget would serve here."""
    monkeypatch.setattr(_linear, "SUM_BYTES", 4 * 11 * (131 + 3))
    options = ("vocab_bias", "temperature")
    case = MANY.but(options=options, batch=(150,), chunk=None, reduction="sum")
    check_against_logits(case.but(ignore_index=None), seeds=range(2))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hessian_vector_product_over_tokens_that_count():
    case = MANY.but(options=("vocab_bias",), where="", batch=(513,))
    floats, others, cotangent = case.arguments(1)

    @functools.partial(jax.jit, static_argnums=0)
    def product(f, floats, tangents):
        gradient = jax.grad(lambda floats: jnp.vdot(cotangent, f(floats, others)))
        return jax.jvp(gradient, (floats,), (tangents,))[1]

    tangents = case.arguments(2)[0]
    expected = product(case.of_logits, floats, tangents)
    assert_same(product(case.head, floats, tangents), expected)


# What heads without logits have got wrong.


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_no_column_is_counted_that_is_not_there(vocab_axis):
    """Logits near -50, next to which a column of zeros would be all there is, and equal
    ones, of which one counted twice would show."""
    weight = jnp.full((13, 1) if vocab_axis == 0 else (1, 13), -50.0)

    @jax.jit
    def of_chunks(weight):
        labels, hidden = jnp.array([0, 9, 12]), jnp.ones((3, 1))
        layouts = [{"vocab_axis": vocab_axis, "chunk_bytes": 12 * n} for n in (5, 12)]
        return [
            jaxsoft.linear_log_probs(hidden, weight, labels, **layout)
            for layout in layouts
        ]

    for log_probs in of_chunks(weight):
        np.testing.assert_allclose(log_probs.log_prob, -np.log(13), rtol=1e-6)
        np.testing.assert_allclose(log_probs.entropy, np.log(13), rtol=1e-6)
        np.testing.assert_allclose(log_probs.logsumexp, np.log(13) - 50, rtol=1e-6)
        np.testing.assert_array_equal(log_probs.top_label, 0)


@pytest.mark.usefixtures("x64")
def test_the_cotangent_of_one_output_counts_alone():
    case = LogProbsCase(ignored=0)
    linear, dense = head_and_logits(case)
    floats, others, cotangent = case.arguments(0)
    for output in range(3):
        alone = jnp.where(jnp.arange(3)[:, None] == output, cotangent, 0)
        _, gradients = linear(floats, others, alone)
        assert np.all(np.any(gradients["hidden"] != 0, -1))
        assert_same(gradients, dense(floats, others, alone)[1])


@pytest.mark.parametrize(
    ("reduction", "vocab_axis"),
    [("none", 1), pytest.param("mean", 0, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("x64")
def test_bfloat16_gradients_are_accumulated_in_float32(vocab_axis, reduction):
    """Over 1000 tokens and over 50 chunks. A sum in bfloat16 stalls after 256 terms.

    All terms of a weight's gradient have one sign. A logit's gradient is rounded to
    bfloat16 before the products, and their result after them: together by one eps.
    """
    rng = np.random.default_rng(1)
    shape = (201, 3) if vocab_axis == 0 else (3, 201)
    floats = as_dtype(
        {
            "hidden": rng.uniform(0.5, 1, (1000, 3)),
            "vocab_weight": rng.uniform(-1, 1, shape),
        },
        jnp.bfloat16,
    )
    others = {"labels": jnp.zeros(1000, jnp.int32)}
    case = Case(batch=(1000,), vocab_axis=vocab_axis, reduction=reduction)
    linear, dense = head_and_logits(case)
    cotangent = np.ones((1000,) if reduction == "none" else ())
    value, gradients = linear(floats, others, jnp.asarray(cotangent, jnp.float32))
    assert value.dtype == jnp.float32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(jnp.bfloat16)}
    expected = dense(as_dtype(floats, float), others, jnp.asarray(cotangent))[1]
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for name, relative in [("vocab_weight", True), ("hidden", False)]:
        actual, wanted = (np.asarray(g[name], float) for g in (gradients, expected))
        # In hidden, and at the label, the terms have both signs.
        scale = np.abs(wanted) if relative else np.max(np.abs(wanted))
        counted = np.moveaxis(np.abs(actual - wanted) / scale, vocab_axis, 0)
        assert np.max(counted[1:]) < eps


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_float16_gradient_out_of_range_meets_no_weight_0(reduction):
    """At a tie it is 1/(2 temperature) = 5e5, and infinity times 0 would be NaN."""
    hidden, weight = jnp.zeros((2, 2), jnp.float16), jnp.eye(2, dtype=jnp.float16)

    def loss(hidden, weight):
        options = {"temperature": 1e-6, "reduction": reduction}
        return jnp.sum(
            jaxsoft.linear_cross_entropy(hidden, weight, jnp.array([0, 1]), **options)
        )

    slopes = jax.jit(jax.grad(loss, (0, 1)))(hidden, weight)
    assert not any(np.any(np.isnan(slope)) for slope in slopes)
    np.testing.assert_array_equal(np.sign(slopes[0]), [[-1, 1], [1, -1]])


@pytest.mark.usefixtures("x64")
def test_bfloat16_logsumexp_is_that_of_a_float32_head():
    """On the same bfloat16 inputs: kept in bfloat16, it would be off by 0.05."""
    case = LogProbsCase(batch=(64,), features=32, classes=997, chunk=100)
    floats, others, _ = case.arguments(2, jnp.bfloat16)
    expected = case.of_logits(as_dtype(floats, float), others)
    for dtype in (jnp.bfloat16, jnp.float32):
        actual = jax.jit(case.head)(as_dtype(floats, dtype), others)
        assert actual.dtype == jnp.float32
        # Products of bfloat16 numbers are exact in float32; their sum is not.
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-5)
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("reduction", "hidden_dtype", "weight_dtype"),
    [("none", "float32", "bfloat16"), ("mean", "float16", "float32")],
)
def test_gradients_have_the_dtype_of_their_argument(
    reduction, hidden_dtype, weight_dtype
):
    """Whoever mixes dtypes has allowed it."""
    case = Case(ALL, chunk=None, reduction=reduction)
    floats, others, cotangent = case.arguments(0, jnp.float32)
    floats["hidden"] = floats["hidden"].astype(hidden_dtype)
    for name in ("vocab_weight", "vocab_bias"):
        floats[name] = floats[name].astype(weight_dtype)
    with jax.numpy_dtype_promotion("standard"):
        value, gradients = jax.eval_shape(
            value_and_pullback(case.head), floats, others, cotangent
        )
    assert value.dtype == jnp.float32
    for name, gradient in gradients.items():
        assert gradient.dtype == floats[name].dtype
        assert gradient.shape == floats[name].shape


# Edge cases.


@pytest.mark.parametrize("chunk", [1, 4])
def test_top_label_is_the_first_of_the_best(chunk):
    """Whichever chunks the ties lie in; the worst at a temperature below 0."""
    x = jnp.array(
        [
            [0.0, 3.0, 1.0, 3.0, 3.0, -2.0],
            [5.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            [-1.0, -1.0, -1.0, -1.0, -1.0, 2.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-7.0, 2.0, -7.0, 2.5, 2.0, -7.0],
        ]
    )

    @jax.jit
    def top_labels(temperature):
        options = {"temperature": temperature, "chunk_bytes": 4 * 5 * chunk}
        labels = jnp.zeros(5, jnp.int32)
        return jaxsoft.linear_log_probs(jnp.eye(5), x.T, labels, **options).top_label

    for temperature, expected in [(1.0, x.argmax(-1)), (-1.0, x.argmin(-1))]:
        top_label = top_labels(temperature)
        assert top_label.dtype == jnp.int32
        np.testing.assert_array_equal(top_label, expected)


def test_temperature_zero_is_the_hard_limit():
    x = jnp.array([[1.0, 3.0, 0.0, 3.0, 3.0], [2.0, 1.0, 0.0, -1.0, 1.0]])

    def both(temperature, hidden):
        arguments = hidden, x.T, jnp.array([3, 1])
        options: dict[str, Any] = {"temperature": temperature, "chunk_bytes": 16}
        loss = jaxsoft.linear_cross_entropy(*arguments, **options)
        log_probs = jaxsoft.linear_log_probs(*arguments, **options)
        return loss, log_probs.log_prob, log_probs.entropy

    @jax.jit
    def with_gradients(*given):
        values, pull = jax.vjp(both, *given)
        return values, pull((jnp.ones(2),) * 3)

    (loss, log_prob, entropy), gradients = with_gradients(0.0, jnp.eye(2))
    of_temperature, of_hidden = gradients
    np.testing.assert_allclose(loss, [np.log(3), np.inf], rtol=1e-6)
    np.testing.assert_array_equal(log_prob, -loss)
    np.testing.assert_allclose(entropy, [np.log(3), 0], rtol=1e-6)
    assert np.isfinite(of_temperature)
    np.testing.assert_array_equal(of_hidden, np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("chunk_bytes", "reduction"), [(4, "none"), (8, "none"), (None, "mean")]
)
def test_a_sure_model_keeps_its_digits(chunk_bytes, reduction):
    """The loss of [20, 0, 0] and its gradient, whatever chunks they are in."""

    def loss(hidden, weight):
        options = {"chunk_bytes": chunk_bytes, "reduction": reduction}
        label = jnp.array([0])
        return jnp.sum(jaxsoft.linear_cross_entropy(hidden, weight, label, **options))

    value, (dhidden, dweight) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        jnp.array([[20.0]]), jnp.array([[1.0], [0.0], [0.0]])
    )
    tail = 2 * np.exp(-20.0)
    p = tail / (1 + tail)
    np.testing.assert_allclose(value, np.log1p(tail), rtol=1e-6)
    np.testing.assert_allclose(dhidden, [[-p]], rtol=1e-6)
    np.testing.assert_allclose(dweight[:, 0], [-20 * p, 10 * p, 10 * p], rtol=1e-6)


INFINITE_BIASES = {
    "first chunk at -inf": [-np.inf] * 4 + [0.0] * 7,
    "first two chunks at -inf": [-np.inf] * 9 + [0.0] * 2,
    "last chunk at -inf": [0.0] * 7 + [-np.inf] * 4,
    "all but the label at -inf": [-np.inf] * 5 + [1.0] + [-np.inf] * 5,
    "all at -inf": [-np.inf] * 11,
    "one at inf": [0.0] * 5 + [np.inf] + [0.0] * 5,
    "another than the label at inf": [0.0] * 10 + [np.inf],
    "two at inf": [np.inf] + [0.0] * 4 + [np.inf] + [-np.inf] * 5,
    "far away": [1000.0] * 4 + [-1000.0] * 7,
    "all far below 0": [-1e4] * 11,
}
INFINITE_CASES = {
    "linear_cross_entropy": Case(
        ("vocab_bias", "class_weight", "temperature", "z_loss")
    ),
    "linear_log_probs": LogProbsCase(("vocab_bias", "temperature")),
}


@pytest.mark.parametrize("function", INFINITE_CASES)
@pytest.mark.usefixtures("x64")
def test_infinite_logits(function):
    """As in the functions of logits: whole chunks may count for nothing."""
    case = INFINITE_CASES[function].but(batch=(2,), classes=11)
    linear, dense = head_and_logits(case)
    for sign in (1, -1):
        for name, bias in INFINITE_BIASES.items():
            floats, others, cotangent = case.arguments(1)
            others["labels"] = np.array([5, 0], np.int32)
            floats["vocab_bias"] = sign * jnp.array(bias)
            floats["temperature"] = sign * jnp.array([[2.0], [0.5]])
            value, gradients = linear(floats, others, cotangent)
            wanted, of_logits = dense(floats, others, cotangent)
            assert_same(value, wanted)
            for argument, expected in of_logits.items():
                # At a loss inf, some derivatives are inf by the formula, 0 by choice.
                finite = jnp.isfinite(expected)
                assert not np.any(np.isnan(gradients[argument]))
                actual = jnp.where(finite, gradients[argument], 0)
                expected = jnp.where(finite, expected, 0)
                assert_close(actual, expected, what=f"{name}: {argument}")


@pytest.mark.usefixtures("x64")
def test_masked_chunks_and_masked_labels():
    """A label that is masked costs inf; a token without a class counts as ignored."""
    case = Case(("vocab_bias", "temperature"), batch=(5,), classes=11)
    mask = np.ones((5, 11), bool)
    mask[0, :4] = False  # the first chunk
    mask[1, 7:] = False  # the last one
    mask[2, :] = False
    mask[3, 1:] = False
    mask[4, 5] = False
    others = {"labels": jnp.array([5, 5, 5, 0, 5], jnp.int32), "where": mask}
    floats, _, cotangent = case.arguments(1)
    linear, dense = head_and_logits(case)
    value, gradients = linear(floats, others, cotangent)
    assert_same((value, gradients), dense(floats, others, cotangent))
    np.testing.assert_array_equal(np.isinf(value), [False, False, False, False, True])
    assert value[2] == value[3] == 0
    np.testing.assert_array_equal(gradients["hidden"][2], np.zeros(5))


# Labels that are no class, and ignored ones, of the loss: test_option_promises.py.


@pytest.mark.usefixtures("x64")
def test_invalid_labels_of_log_probs():
    """-1 does not wrap, and no label is found in the columns behind the last class."""
    floats, _, _ = Case(batch=(8,)).arguments(1)
    labels = jnp.array([-1, 13, 3, 14, 15, -100, 2**31 - 1, 12], jnp.int32)
    invalid = np.array([True, True, False, True, True, False, True, False])
    of_labels = functools.partial(jaxsoft.linear_log_probs, chunk_bytes=4 * 8 * 4)
    log_probs = jax.jit(of_labels)(floats["hidden"], floats["vocab_weight"], labels)
    np.testing.assert_array_equal(np.isnan(log_probs.log_prob), invalid)
    assert not np.any(np.isnan(log_probs.logsumexp + log_probs.entropy))
    ignored = jax.tree.map(lambda v: v[5], log_probs)
    assert ignored == (0, 0, 0, -1)


# Tokens and classes that do not count, whatever they hold.

BROKEN = (np.nan, np.inf)
DEAD_CASES = {
    "none": Case(("vocab_bias", "softcap"), batch=(6,)),
    "mean": Case(("sample_weight",), batch=(6,), chunk=None, reduction="mean"),
    "frozen head": Case(batch=(6,), constant=OF_HEAD[:1]),
    "log_probs": LogProbsCase(("temperature",), batch=(6,)),
    "log_probs of three labels": LogProbsCase(("vocab_bias",), batch=(6,), labels=3),
}


@pytest.mark.parametrize("case", DEAD_CASES.values(), ids=DEAD_CASES.keys())
@pytest.mark.usefixtures("x64")
def test_dead_tokens_have_no_gradient(case: Case):
    """Ignored, of weight 0 or of cotangent 0: the gradients are those of the others,
    whatever a dead token's label and hidden state."""
    floats, others, cotangent = case.but(ignored=0).arguments(3)
    dead = np.array([False, True, False, True, False, False])
    ignored = np.array([False, False, False, False, True, False])
    linear, dense = head_and_logits(case)
    labels = np.array(others["labels"])
    labels[ignored] = -100
    expected = dense(
        {**floats, "hidden": np.where((dead | ignored)[:, None], 0, floats["hidden"])},
        {
            **others,
            "labels": np.where(
                np.reshape(dead, (6, *[1] * (labels.ndim - 1))), -100, labels
            ),
        },
        jnp.where(dead, 0, cotangent) if cotangent.ndim else cotangent,
    )[1]
    labels[dead] = -1
    for broken in BROKEN:
        hidden = jnp.where((dead | ignored)[:, None], broken, floats["hidden"])
        given = {**floats, "hidden": hidden}
        if cotangent.ndim:
            cotangent = jnp.where(dead, 0, cotangent)
        else:
            given["sample_weight"] = jnp.where(dead, 0, floats["sample_weight"])
        gradients = linear(given, {**others, "labels": labels}, cotangent)[1]
        gradients.pop("sample_weight", None)
        assert_same(gradients, {name: expected[name] for name in gradients})
        assert np.all(np.asarray(gradients["hidden"])[dead | ignored] == 0)


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("case", DEAD_CASES.values(), ids=DEAD_CASES.keys())
@pytest.mark.usefixtures("x64")
def test_classes_that_are_excluded_may_hold_anything(case: Case, broken):
    """As rows of padding do: value and gradients are those of the other classes."""
    floats, others, cotangent = case.arguments(3)
    kept = np.arange(case.classes) < case.classes - 3
    others = {"labels": np.minimum(others["labels"], case.classes - 4), "where": kept}
    linear, dense = head_and_logits(case)
    expected = dense(floats, others, cotangent)
    padded = {
        **floats,
        "vocab_weight": jnp.where(kept[:, None], floats["vocab_weight"], broken),
    }
    if "vocab_bias" in floats:
        padded["vocab_bias"] = jnp.where(kept, floats["vocab_bias"], broken)
    assert_same(linear(padded, others, cotangent), expected)


def test_a_live_token_with_a_broken_hidden_state_is_nan():
    hidden = jnp.array([[1.0, jnp.inf], [1.0, 2.0]])
    labels = jnp.array([0, 1])

    def loss(hidden, weight):
        return jnp.sum(jaxsoft.linear_cross_entropy(hidden, weight, labels))

    dhidden, dweight = jax.jit(jax.grad(loss, (0, 1)))(hidden, jnp.eye(2) + 1)
    np.testing.assert_array_equal(np.isnan(dhidden), [[True, True], [False, False]])
    assert np.all(np.isnan(dweight))


# Metrics.


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.usefixtures("x64")
def test_metrics_are_those_of_log_probs_and_change_no_bit(reduction):
    options = ("class_weight", "label_smoothing", "temperature", "z_loss")
    chunk = 4 if reduction == "none" else None
    case = Case(
        options, (2, 3), where="shared", chunk=chunk, reduction=reduction, ignored=0.5
    )
    floats, others, _ = case.arguments(2)
    asked: dict[str, Any] = {**case.layout(), "reduction": reduction}

    def with_metrics(floats):
        loss, metrics = jaxsoft.linear_cross_entropy(
            **floats, **others, **asked, with_metrics=True
        )
        return jnp.sum(loss), metrics

    def of_logits(floats):
        logits, rest = logits_of(floats, 0)
        loss, metrics = jaxsoft.cross_entropy(
            logits, **others, **rest, reduction=reduction, with_metrics=True
        )
        return jnp.sum(loss), metrics

    plain = jax.jit(
        jax.value_and_grad(lambda floats: jnp.sum(case.head(floats, others)))
    )
    (value, metrics), gradients = jax.jit(
        jax.value_and_grad(with_metrics, has_aux=True)
    )(floats)
    assert_same((value, gradients), plain(floats), 4)
    (_, of_dense), _ = jax.jit(jax.value_and_grad(of_logits, has_aux=True))(floats)
    assert_same(metrics._asdict(), of_dense._asdict())
    of = jaxsoft.linear_log_probs(
        floats["hidden"],
        floats["vocab_weight"],
        others["labels"],
        where=others["where"],
        temperature=floats["temperature"],
    )
    expected = {
        "nll": -of.log_prob,
        "logsumexp": of.logsumexp,
        "z_loss": floats["z_loss"] * of.logsumexp**2,
        "entropy": of.entropy,
        "top_label": of.top_label,
    }
    assert_same(metrics._asdict(), expected)
    ignored = others["labels"] == -100
    np.testing.assert_array_equal(metrics.top_label == -1, ignored)
    assert np.any(ignored)


def test_float16_does_not_hold_what_is_scaled_later():
    """The mean does not depend on the scale of the weights, nor does its gradient."""
    hidden = jnp.ones((4, 2), jnp.float16)
    weight = jnp.array([[1, 0], [0, 1], [1, 1]], jnp.float16)
    labels = jnp.array([0, 1, 2, 0])

    def loss(hidden, weight, scale):
        v = jnp.broadcast_to(scale, (4,))
        return jaxsoft.linear_cross_entropy(
            hidden, weight, labels, sample_weight=v, reduction="mean"
        )

    def of_logits(hidden, weight):
        logits = hidden.astype(jnp.float32) @ weight.astype(jnp.float32).T
        return jaxsoft.cross_entropy(logits, labels, reduction="mean")

    @jax.jit
    def slopes(*given):
        return *jax.grad(loss, (0, 1))(*given), jax.grad(loss)(*given)

    in_hidden, in_weight = jax.jit(jax.grad(of_logits, (0, 1)))(hidden, weight)
    for scale in (1e-8, 1.0, 1e6):
        given = slopes(hidden, weight, scale)
        for actual, wanted in zip(given, (in_hidden, in_weight, in_hidden)):
            np.testing.assert_allclose(
                actual, wanted, rtol=3e-3, atol=1e-4, err_msg=f"scale {scale}"
            )


def test_float16_under_a_frozen_head_and_a_loss_scale():
    hidden = jnp.array([[1, 0, 0]], jnp.float16)
    weight = jnp.diag(jnp.array([20, 10, 10], jnp.float16))

    def loss(hidden):
        label = jnp.array([0])
        return 2**16 * jnp.sum(jaxsoft.linear_cross_entropy(hidden, weight, label))

    p = np.exp(-20.0)
    expected = 2**16 * np.array([[-40 * p, 10 * p, 10 * p]])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(hidden), expected, rtol=5e-3)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_features(reduction):
    """Their product is 0: the bias alone is left."""
    labels = jnp.array([1, 2])

    def loss(bias):
        hidden, weight = jnp.zeros((2, 0)), jnp.zeros((4, 0))
        return jnp.mean(
            jaxsoft.linear_cross_entropy(
                hidden, weight, labels, vocab_bias=bias, reduction=reduction
            )
        )

    def of_logits(bias):
        logits = jnp.broadcast_to(bias, (2, 4))
        return jnp.mean(jaxsoft.cross_entropy(logits, labels))

    bias = jnp.arange(4.0)
    for actual, wanted in zip(
        *(jax.jit(jax.value_and_grad(f))(bias) for f in (loss, of_logits))
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)
