"""What the losses promise, through every option: neutral values that change no bit, the
digits of a sure model, ignored rows, invalid labels, narrow labels, half precision.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import checkify

import jaxsoft

# An option at its neutral value.

ROWS, CLASSES = 6, 37
INDICES = np.array([3, 0, 36, -100, 17, 36], np.int32)

NEUTRAL: dict[str, dict[str, Any]] = {
    "where": {"where": np.array(True)},
    "where per class": {"where": np.ones(CLASSES, bool)},
    "where per logit": {"where": np.ones((ROWS, CLASSES), bool)},
    "class_weight": {"class_weight": np.ones(CLASSES, np.float32)},
    "sample_weight": {"sample_weight": np.float32(1)},
    "sample_weight per row": {"sample_weight": np.ones(ROWS, np.float32)},
    "label_smoothing": {"label_smoothing": np.float32(0)},
    "temperature": {"temperature": np.float32(1)},
    "temperature per row": {"temperature": np.ones((ROWS, 1), np.float32)},
    "z_loss": {"z_loss": np.float32(0)},
}
NEUTRAL["all of them"] = {
    name: value for case in NEUTRAL.values() for name, value in case.items()
}


def logits_and_labels(kind: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    x = jnp.asarray(3 * rng.normal(size=(ROWS, CLASSES)), jnp.float32)
    if kind == "indices":
        return x, jnp.asarray(INDICES)
    return x, jnp.asarray(rng.dirichlet(np.ones(CLASSES), ROWS), jnp.float32)


def loss_and_gradient(x, labels, options: dict[str, Any], **static: Any):
    def loss(x):
        return jaxsoft.cross_entropy(x, labels, **options, **static)

    value, pull = jax.vjp(loss, x)
    return value, pull(jnp.ones_like(value))[0]


@functools.cache
def without_options(kind: str):
    # The logits are arguments: XLA computes with constants by other means.
    return jax.jit(loss_and_gradient)(*logits_and_labels(kind), {})


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "concrete"])
@pytest.mark.parametrize("case", NEUTRAL)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_neutral_option_changes_no_bit(kind, case, traced):
    options = jax.tree.map(jnp.asarray, NEUTRAL[case])
    if traced:
        given = jax.jit(loss_and_gradient)(*logits_and_labels(kind), options)
    else:
        concrete = jax.jit(functools.partial(loss_and_gradient, options=options))
        given = concrete(*logits_and_labels(kind))
    jax.tree.map(np.testing.assert_array_equal, given, without_options(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_neutral_option_changes_no_bit_of_the_mean(kind):
    """Operation by operation: XLA sums the rows of another program in another order."""
    with jax.disable_jit():
        given = logits_and_labels(kind)
        plain = loss_and_gradient(*given, {}, reduction="mean")
        for case, options in NEUTRAL.items():
            options = jax.tree.map(jnp.asarray, options)
            same = functools.partial(np.testing.assert_array_equal, err_msg=case)
            neutral = loss_and_gradient(*given, options, reduction="mean")
            jax.tree.map(same, neutral, plain)


def test_neutral_numbers_and_an_unused_ignore_index_change_no_bit():
    """Python numbers leave the very program; so does an index that ignores nothing."""
    numbers = {
        "label_smoothing": 0.0,
        "temperature": 1,
        "z_loss": 0.0,
        "softcap": None,
        "where": None,
        "class_weight": None,
        "sample_weight": None,
        "ignore_index": -100,
    }
    for kind in ("indices", "probabilities"):
        compiled = jax.jit(functools.partial(loss_and_gradient, options=numbers))
        given = compiled(*logits_and_labels(kind))
        jax.tree.map(np.testing.assert_array_equal, given, without_options(kind))
    x, labels = logits_and_labels("indices")
    in_use = labels != -100
    expected = without_options("indices")[0][in_use]
    for ignore_index in (None, -1, 99):
        loss = functools.partial(jaxsoft.cross_entropy, ignore_index=ignore_index)
        given = jax.jit(loss)(x, jnp.where(in_use, labels, 0))
        np.testing.assert_array_equal(given[in_use], expected)


@pytest.mark.parametrize(
    "case",
    [
        ("kl_divergence", {"where": True, "temperature": 1.0, "sample_weight": 1.0}),
        (
            "binary_cross_entropy",
            {"pos_weight": 1.0, "sample_weight": 1.0, "label_smoothing": 0.0},
        ),
        ("multilabel_cross_entropy", {"where": True}),
        ("circle_loss", {"where_positive": True, "where_negative": True}),
    ],
    ids=lambda case: case[0],
)
def test_neutral_options_of_the_other_losses_change_no_bit(case):
    """Operation by operation: compiled, a sum of two products is rounded once or twice,
    as XLA fuses them into the program at hand."""
    function, options = case
    x, y = logits_and_labels("probabilities")

    def both(options):
        f = functools.partial(getattr(jaxsoft, function), **options)
        value, pull = jax.vjp(f, x, y)
        return value, pull(jnp.ones_like(value))

    with jax.disable_jit():
        plain = both({})
        for name, value in options.items():
            value = jnp.asarray(value, bool if value is True else jnp.float32)
            jax.tree.map(np.testing.assert_array_equal, both({name: value}), plain)


# A model that is sure of its answer keeps its digits through every option.

GAPS = np.arange(5, 85, 5)
SURE = np.zeros((len(GAPS), 3), np.float32)
SURE[np.arange(len(GAPS)), np.arange(len(GAPS)) % 3] = GAPS
PER_ROW = np.linspace(0.3, 3, len(GAPS)).astype(np.float32)

KEEPS_DIGITS: dict[str, dict[str, Any]] = {
    "class_weight": {"class_weight": np.array([0.3, 1.7, 5], np.float32)},
    "label_smoothing": {"label_smoothing": np.float32(0)},
    "temperature": {"temperature": np.float32(2)},
    "temperature per row": {"temperature": PER_ROW[:, None]},
    "softcap": {"softcap": np.float32(30)},
    "z_loss": {"z_loss": np.float32(0)},
    "sample_weight": {"sample_weight": PER_ROW},
    "where": {"where": SURE >= 0},
}
KEEPS_DIGITS["all of them"] = {
    name: value
    for case, options in KEEPS_DIGITS.items()
    for name, value in options.items()
    if case != "temperature"
}


@functools.cache
def of_sure_rows(case: str):
    options = jax.tree.map(jnp.asarray, KEEPS_DIGITS[case])

    @jax.jit
    def both(x, labels):
        def loss(x):
            return jaxsoft.cross_entropy(x, labels, **options)

        value, pull = jax.vjp(loss, x)
        return value, pull(jnp.ones_like(value))[0]

    return both


@pytest.mark.parametrize("label", ["best", "other", "one-hot"])
@pytest.mark.parametrize("case", KEEPS_DIGITS)
def test_a_sure_model_keeps_its_digits(case, label, record_property):
    best = np.argmax(SURE, axis=-1)
    labels = ((best + 1) % 3 if label == "other" else best).astype(np.int32)
    if label == "one-hot":
        labels = np.eye(3, dtype=np.float32)[best]
    options = KEEPS_DIGITS[case]

    def meaning(x):
        return oracle.cross_entropy(x, labels, **options)

    value, gradient = of_sure_rows(case)(SURE, labels)
    wanted = oracle.pullback(meaning, [SURE], np.ones(len(SURE)))[0]
    worst = {}
    for name, given, expected in [
        ("loss", value, oracle.rounded(meaning(SURE))),
        ("gradient", gradient, oracle.rounded(wanted)),
    ]:
        # Below, float32 has few digits left, and processors flush to 0.
        shows = np.abs(expected) >= 1e-36
        given, expected = np.asarray(given, np.float64)[shows], expected[shows]
        np.testing.assert_allclose(given, expected, rtol=1e-5, err_msg=name)
        place = np.spacing(np.abs(expected).astype(np.float32))
        worst[name] = np.max(np.abs(given - expected) / place)
    record_property(
        "worst", ", ".join(f"{n} {ulp:.1f} ulp" for n, ulp in worst.items())
    )
    assert max(worst.values()) <= 64


# Ignored rows and invalid labels under every option.

FEW = 5
JUNK = np.array([np.nan, np.inf, -np.inf, 1e30, 0], np.float32)
ROW_OPTIONS: dict[str, dict[str, Any]] = {
    "where": {"where": np.arange(FEW) != 3},
    "class_weight": {"class_weight": np.arange(1, FEW + 1, dtype=np.float32)},
    "sample_weight": {"sample_weight": np.linspace(1, 2, ROWS, dtype=np.float32)},
    "label_smoothing": {"label_smoothing": np.float32(0.1)},
    "temperature": {"temperature": np.linspace(1, 2, ROWS, dtype=np.float32)[:, None]},
    "softcap": {"softcap": np.float32(5)},
    "z_loss": {"z_loss": np.float32(0.1)},
}
ROW_OPTIONS["all of them"] = {
    name: value for options in ROW_OPTIONS.values() for name, value in options.items()
}
GOOD = np.array([0, 1, 2, 1, 4, 0], np.int32)


@functools.cache
def of_rows(case: str, reduction: str = "none"):
    """(logits, labels) to the loss, and its gradients in the logits and the options."""
    options = jax.tree.map(jnp.asarray, ROW_OPTIONS[case])
    where = options.pop("where", None)

    @jax.jit
    def value_and_gradients(x, labels):
        def loss(x, options):
            return jaxsoft.cross_entropy(
                x, labels, where=where, reduction=reduction, **options
            )

        value, pull = jax.vjp(loss, x, options)
        return value, *pull(jnp.ones_like(value))

    return value_and_gradients


@pytest.fixture
def few_logits(rng):
    return 2 * rng.normal(size=(ROWS, FEW)).astype(np.float32)


@pytest.mark.parametrize(
    ("case", "reduction"),
    [*((case, "none") for case in ROW_OPTIONS), ("all of them", "mean")],
)
def test_an_ignored_row_is_exactly_0_under_every_option(case, reduction, few_logits):
    both = of_rows(case, reduction)
    labels = GOOD.copy()
    labels[[1, 4]] = -100
    spoiled = few_logits.copy()
    spoiled[1], spoiled[4] = JUNK, np.nan
    value, gradient, in_options = both(spoiled, labels)
    np.testing.assert_array_equal(gradient[np.array([1, 4])], 0)
    if reduction == "none":
        np.testing.assert_array_equal(value[np.array([1, 4])], 0)
    for name in ("sample_weight", "temperature"):
        if name in in_options:
            np.testing.assert_array_equal(in_options[name][np.array([1, 4])], 0)
    given = (value, gradient, in_options)
    chex.assert_tree_all_finite(given)
    jax.tree.map(np.testing.assert_array_equal, given, both(few_logits, labels))


@pytest.mark.parametrize("label", [FEW, -1])
@pytest.mark.parametrize("case", ROW_OPTIONS)
def test_an_invalid_label_is_nan_in_its_row_alone(case, label, few_logits):
    both = of_rows(case)
    labels = GOOD.copy()
    labels[2] = label
    value, gradient, in_options = both(few_logits, labels)
    wanted, wanted_gradient, wanted_in_options = both(few_logits, GOOD)
    others = np.arange(ROWS) != 2
    assert np.isnan(value[2])
    included = ROW_OPTIONS[case].get("where", np.ones(FEW, bool))
    np.testing.assert_array_equal(np.isnan(gradient[2]), included)
    np.testing.assert_array_equal(value[others], wanted[others])
    np.testing.assert_array_equal(gradient[others], wanted_gradient[others])
    for name in {"sample_weight", "temperature"} & in_options.keys():
        assert np.all(np.isnan(in_options[name][2])), name
        np.testing.assert_array_equal(
            in_options[name][others], wanted_in_options[name][others]
        )


@pytest.mark.parametrize("case", ["class_weight", "all of them"])
def test_checkify_names_function_label_and_range(case, few_logits):
    options = jax.tree.map(jnp.asarray, ROW_OPTIONS[case])
    checked = checkify.checkify(
        jax.jit(lambda x, y: jaxsoft.cross_entropy(x, y, **options))
    )
    error, _ = checked(few_logits, jnp.asarray(GOOD).at[4].set(-3))
    message = error.get()
    assert message is not None
    assert "cross_entropy: labels must lie in [0, 5)" in message
    assert "got label -3" in message
    error, _ = checked(few_logits, jnp.asarray(GOOD).at[4].set(-100))
    assert error.get() is None


MANY = 300
WIDTHS = (8, 16, 32, 64)


@pytest.mark.parametrize(
    "dtype", [f"{u}int{bits}" for bits in WIDTHS for u in ("", "u")]
)
@pytest.mark.usefixtures("x64")
def test_labels_mean_what_they_say_in_every_width(dtype, rng):
    """The extremes of a dtype are the class of that number or none, never another."""
    limits = np.iinfo(dtype)
    numbers = [0, 100, int(limits.max), int(limits.min), int(limits.max) // 2, 7]
    x = jnp.asarray(rng.normal(size=(len(numbers), MANY)), jnp.float32)
    w = jnp.asarray(rng.uniform(1, 2, MANY), jnp.float32)
    labels = jnp.asarray(np.array(numbers, dtype))

    def loss(x):
        return jaxsoft.cross_entropy(x, labels, class_weight=w, ignore_index=7)

    value, pull = jax.vjp(loss, x)
    (gradient,) = pull(jnp.ones_like(value))
    log_p = np.asarray(jax.nn.log_softmax(x))
    for row, number in enumerate(numbers):
        if number == 7:
            assert value[row] == 0
        elif 0 <= number < MANY:
            expected = -w[number] * log_p[row, number]
            np.testing.assert_allclose(value[row], expected, rtol=1e-5)
            assert np.argmin(gradient[row]) == number
        else:
            assert np.isnan(value[row])
            assert np.all(np.isnan(gradient[row]))


@pytest.mark.parametrize("classes", [5, 5000])
def test_smoothing_keeps_its_digits_over_many_classes(classes, rng, record_property):
    """p_c - eps / C is as good as its two terms, however small these are."""
    x = (3 * rng.normal(size=(20, classes))).astype(np.float32)
    x[::4, 0] += 40  # some sure of their answer
    labels, eps = np.arange(20) % classes, np.float32(0.1)

    def loss(x):
        return jaxsoft.cross_entropy(x, labels, label_smoothing=eps)

    value, pull = jax.vjp(loss, jnp.asarray(x))
    gradient = np.asarray(pull(jnp.ones_like(value))[0], np.float64)
    expected = exact_gradient(x.astype(float), labels, label_smoothing=float(eps))
    hit = labels[:, None] == np.arange(classes)
    share = float(eps) / classes
    # p_c and what is subtracted from it, which the gradient is the difference of.
    subtracted = (1 - float(eps)) * hit + share
    terms = expected + 2 * subtracted
    roundings = np.max(np.abs(gradient - expected) / terms) / np.finfo(np.float32).eps
    record_property("worst", f"{roundings:.1f} roundings of a term")
    assert roundings <= 64


# Half precision.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"temperature": 0.7, "class_weight": np.linspace(0.5, 2, MANY)},
        {"where": np.arange(MANY) % 3 > 0},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_rows_of_a_bfloat16_gradient_sum_to_0_as_well_as_can_be(
    options, rng, record_property
):
    """No better than the exact gradient, every entry of which is rounded to 8 bits."""
    rows = 200
    x = jnp.asarray(3 * rng.normal(size=(rows, MANY)), jnp.bfloat16)
    labels = (1 + 3 * rng.integers(0, MANY // 3, rows)).astype(np.int32)
    single = {name: in_float32(value) for name, value in options.items()}

    def loss(x):
        named = {name: jnp.asarray(v) for name, v in single.items()}
        return jaxsoft.cross_entropy(x, jnp.asarray(labels), **named)

    value, pull = jax.vjp(loss, x)
    (gradient,) = pull(jnp.ones_like(value))
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)

    seen = np.asarray(x, np.float64)
    exact = exact_gradient(seen, labels, **single)
    best = exact.astype(jnp.bfloat16).astype(np.float64)
    ours, theirs = (
        np.abs(np.sum(g, axis=-1)) for g in (np.asarray(gradient, np.float64), best)
    )
    unlike = np.mean(np.asarray(gradient, np.float64) != best)
    record_property("entries rounded to the other side", f"{unlike:.1e}")
    record_property("mean row sum", f"{np.mean(ours):.2e}, exact {np.mean(theirs):.2e}")
    assert unlike < 1e-3
    assert np.mean(ours) <= 1.01 * np.mean(theirs)
    assert np.max(ours) <= 1.01 * np.max(theirs)


def in_float32(value: Any) -> np.ndarray:
    """The option as the loss sees it."""
    value = np.asarray(value)
    return value if value.dtype == bool else value.astype(np.float32)


def exact_gradient(
    x, labels, *, where=True, class_weight=1.0, label_smoothing=0.0, temperature=1.0
):
    """sum_c a_c (p_i - [i = c]) / t with a_c the weight of -log p_c in the loss."""
    class_weight, label_smoothing, temperature = (
        np.asarray(v, np.float64) for v in (class_weight, label_smoothing, temperature)
    )
    included = np.broadcast_to(where, x.shape)
    e = np.where(included, np.exp(x / temperature), 0)
    p = e / np.sum(e, axis=-1, keepdims=True)
    w = np.where(included, class_weight, 0)
    hit = labels[:, None] == np.arange(x.shape[-1])
    share = label_smoothing / np.sum(included, axis=-1, keepdims=True)
    a = ((1 - label_smoothing) * hit + share) * w
    return (np.sum(a, axis=-1, keepdims=True) * p - a) / temperature


def test_z_loss_beyond_the_range_of_floats():
    """1e20 squared is no float32: the loss is infinite, its derivatives are not."""
    x = jnp.array([[1e20, 0.0], [1.0, 2.0]])
    labels, z_loss = jnp.array([0, 1]), jnp.float32(0.1)

    def total(x, z_loss):
        return jnp.sum(jaxsoft.cross_entropy(x, labels, z_loss=z_loss))

    value, gradients = jax.value_and_grad(total, (0, 1))(x, z_loss)
    assert value == jnp.inf
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[0][0], 0)
    assert np.all(gradients[0][1] != 0)
