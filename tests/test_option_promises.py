"""What the losses promise, through every option: neutral values that change no bit, the
digits of a sure model, ignored rows, invalid labels, narrow labels.

A row is a row, whatever the others are: labels, extremes and NaN of all kinds are rows
of one batch, and pass through one program for every loss and its options.
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
from laws import as_users_have_it

import jaxsoft


def alone_slow(cases: Any, fast: Any) -> list[Any]:
    """The cases, of which those that are not fast are marked slow."""
    return [
        case if case in fast else pytest.param(case, marks=pytest.mark.slow)
        for case in cases
    ]


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
ALL = "all of them"
# With all together a change by one of them shows: alone they run with what is slow.
TOGETHER = {
    "all scalars": {
        n: v[n] for n, v in NEUTRAL.items() if " " not in n and np.ndim(v[n]) == 0
    },
    ALL: {name: v for case in NEUTRAL.values() for name, v in case.items()},
}
NEUTRAL |= TOGETHER


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
    return as_users_have_it(loss_and_gradient)(*logits_and_labels(kind), {})


@pytest.mark.parametrize("case", alone_slow(NEUTRAL, TOGETHER))
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_neutral_option_changes_no_bit(kind, case):
    options = jax.tree.map(jnp.asarray, NEUTRAL[case])
    options.pop("temperature", None)  # a program divides by it, and rounds
    both = as_users_have_it(loss_and_gradient)
    given = both(*logits_and_labels(kind), options)
    jax.tree.map(np.testing.assert_array_equal, given, without_options(kind))


def test_neutral_numbers_leave_the_very_program():
    nothing = ("softcap", "where", "class_weight", "sample_weight")
    numbers = {"label_smoothing": 0.0, "temperature": 1, "z_loss": 0.0}
    numbers |= {"ignore_index": -100, **dict.fromkeys(nothing)}
    for kind in ("indices", "probabilities"):
        given = logits_and_labels(kind)
        with_numbers, without = (
            jax.jit(lambda x, labels, o=options: loss_and_gradient(x, labels, o))
            .lower(*given)
            .as_text()
            for options in (numbers, {})
        )
        assert with_numbers == without, kind


OF_OTHERS: dict[str, dict[str, Any]] = {
    "kl_divergence": {"where": True, "temperature": 1.0, "sample_weight": 1.0},
    "binary_cross_entropy": {"pos_weight": 1.0, "sample_weight": 1.0},
    "multilabel_cross_entropy": {"where": True},
    "circle_loss": {"where_positive": True, "where_negative": True},
    "jensen_shannon": {"where": True, "temperature": 1.0, "sample_weight": 1.0},
}


@pytest.mark.parametrize("function", alone_slow(OF_OTHERS, [*OF_OTHERS][1:]))
def test_neutral_options_of_the_other_losses_change_no_bit(function):
    """Operation by operation: compiled, a sum of two products is rounded once or twice,
    as XLA fuses them into the program at hand."""
    x, y = logits_and_labels("probabilities")

    def both(options):
        f = functools.partial(getattr(jaxsoft, function), **options)
        value, pull = jax.vjp(f, x, y)
        return value, pull(jnp.ones_like(value))

    with jax.disable_jit():
        neutral = both(jax.tree.map(jnp.asarray, OF_OTHERS[function]))
        jax.tree.map(np.testing.assert_array_equal, neutral, both({}))


# A model that is sure of its answer keeps its digits through every option.

GAPS = np.tile(np.arange(5, 85, 5), 2)
BEST = np.arange(len(GAPS)) % 3
SURE = np.where(BEST[:, None] == np.arange(3), GAPS[:, None], 0).astype(np.float32)
# The label is the best class in the first half of the rows, and another in the second.
OF_SURE = ((BEST + (np.arange(len(GAPS)) >= len(GAPS) // 2)) % 3).astype(np.int32)
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
# Then its part of the gradient at that class is its p - 1.
ONE_CLASS_WEIGHS = "smoothing of which one class weighs"
KEEPS_DIGITS[ALL] = {
    name: value
    for case, options in KEEPS_DIGITS.items()
    for name, value in options.items()
    if case != "temperature"
}
KEEPS_DIGITS[ONE_CLASS_WEIGHS] = {
    "label_smoothing": np.float32(0.1),
    "class_weight": np.array([1, 0, 0], np.float32),
}


FAST = ["label_smoothing", "temperature", "softcap", ALL, ONE_CLASS_WEIGHS]


@pytest.mark.parametrize(
    "kind", ["indices", pytest.param("one-hot", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", alone_slow(KEEPS_DIGITS, FAST))
def test_a_sure_model_keeps_its_digits(case, kind, record_property):
    labels = OF_SURE if kind == "indices" else np.eye(3, dtype=np.float32)[OF_SURE]
    options = KEEPS_DIGITS[case]

    def meaning(x):
        return oracle.cross_entropy(x, labels, **options)

    traced = jax.tree.map(jnp.asarray, options)
    both = as_users_have_it(loss_and_gradient)
    value, gradient = both(SURE, labels, traced)
    wanted = oracle.pullback(meaning, [SURE], np.ones(len(SURE)), [True])[0]
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


# Ignored rows and invalid labels under every option, of the losses that have labels.

FEW = 5
IGNORED = -100
INVALID = [FEW, FEW + 1, -1, -FEW, -99, -101, 2**31 - 1, -(2**31)]
GOOD = np.resize(np.array([0, 1, 2, 1, 4], np.int32), 2 * len(INVALID))
COUNT = len(GOOD)
ODD = np.arange(COUNT) % 2 == 1  # the rows that are invalid or ignored
JUNK = np.array([np.nan, np.inf, -np.inf, 1e30, 0], np.float32)
ROW_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "where": {"where": np.arange(FEW) != 3},
    "class_weight": {"class_weight": np.arange(1, FEW + 1, dtype=np.float32)},
    "sample_weight": {"sample_weight": np.linspace(1, 2, COUNT, dtype=np.float32)},
    "label_smoothing": {"label_smoothing": np.float32(0.1)},
    "temperature": {"temperature": np.linspace(1, 2, COUNT, dtype=np.float32)[:, None]},
    "softcap": {"softcap": np.float32(5)},
    "z_loss": {"z_loss": np.float32(0.1)},
}
ROW_OPTIONS[ALL] = {
    name: value for options in ROW_OPTIONS.values() for name, value in options.items()
}


def loss_of_labels(function: str, x: Any, labels: Any, **options: Any) -> jax.Array:
    """Of a linear head, that of the identity, which is then an option."""
    if function == "cross_entropy":
        return jaxsoft.cross_entropy(x, labels, **options)
    head = options.pop("vocab_weight", None)
    head = jnp.eye(x.shape[-1], dtype=x.dtype) if head is None else head
    return jaxsoft.linear_cross_entropy(x, head, labels, **options)


@functools.cache
def of_rows(function: str, case: str, reduction: str) -> Any:
    """(logits, labels) to the loss, and its gradients in the logits and the options."""
    moving = jax.tree.map(jnp.asarray, ROW_OPTIONS[case])
    where = moving.pop("where", None)
    if function == "linear_cross_entropy":
        moving["vocab_weight"] = jnp.eye(FEW)

    @jax.jit
    def value_and_gradients(x, labels):
        def loss(x, moving):
            fixed = {"where": where, "reduction": reduction}
            return loss_of_labels(function, x, labels, **fixed, **moving)

        value, pull = jax.vjp(loss, x, moving)
        return value, *pull(jnp.ones_like(value))

    return value_and_gradients


@pytest.mark.parametrize(
    ("function", "case", "reduction"),
    [
        *(("cross_entropy", case, "none") for case in ROW_OPTIONS),
        ("cross_entropy", ALL, "mean"),
        ("linear_cross_entropy", "none", "none"),
        ("linear_cross_entropy", ALL, "none"),
        ("linear_cross_entropy", "z_loss", "mean"),
    ],
)
def test_ignored_rows_and_invalid_labels(function, case, reduction, rng):
    """An ignored row is exactly 0, whatever its logits are, and a row with an invalid
    label is NaN; neither changes a bit of the others."""
    both = of_rows(function, case, reduction)
    x = np.float32(2 * rng.normal(size=(COUNT, FEW)))
    spoiled = x.copy()
    spoiled[ODD] = np.resize([*JUNK, *[np.nan] * FEW], (len(INVALID), FEW))
    ignored, invalid = GOOD.copy(), GOOD.copy()
    ignored[ODD], invalid[ODD] = IGNORED, INVALID

    value, gradient, in_options = given = both(spoiled, ignored)
    np.testing.assert_array_equal(gradient[ODD], 0)
    if reduction == "none":
        np.testing.assert_array_equal(value[ODD], 0)
    per_row = {"sample_weight", "temperature"} & in_options.keys()
    for name in per_row:
        np.testing.assert_array_equal(in_options[name][ODD], 0, name)
    chex.assert_tree_all_finite(given)
    jax.tree.map(np.testing.assert_array_equal, given, both(x, ignored))

    value, gradient, in_options = both(x, invalid)
    wanted, wanted_gradient, wanted_in_options = both(x, GOOD)
    if reduction != "none":
        assert np.isnan(value)
        return
    np.testing.assert_array_equal(np.isnan(value), ODD)
    included = ROW_OPTIONS[case].get("where", np.ones(FEW, bool))
    if function == "linear_cross_entropy":  # a product has met the NaN
        included = np.ones(FEW, bool)
    np.testing.assert_array_equal(np.isnan(gradient), ODD[:, None] & included)
    np.testing.assert_array_equal(value[~ODD], wanted[~ODD])
    np.testing.assert_array_equal(gradient[~ODD], wanted_gradient[~ODD])
    for name in per_row:
        entries, others = in_options[name], wanted_in_options[name]
        assert np.all(np.isnan(entries[ODD])), name
        np.testing.assert_array_equal(entries[~ODD], others[~ODD], name)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("cross_entropy", {}),
        ("cross_entropy", ROW_OPTIONS[ALL]),
        ("linear_cross_entropy", {}),
    ],
)
def test_checkify_names_function_label_and_range(function, options, rng):
    """Also under vmap and grad, where every row is a call of its own."""
    x = jnp.asarray(rng.normal(size=(COUNT, FEW)), jnp.float32)
    options = jax.tree.map(jnp.asarray, options) | {"check_labels": True}

    def loss(x, labels):
        return loss_of_labels(function, x, labels, **options)

    def gradient(x, labels):
        of = jax.vmap(loss) if len(options) == 1 else loss
        return jax.grad(lambda x: jnp.sum(of(x, labels)))(x)

    checked = jax.jit(checkify.checkify(gradient))
    for label in (-3, FEW + 2, IGNORED):
        error, _ = checked(x, jnp.asarray(GOOD).at[4].set(label))
        if label == IGNORED:
            assert error.get() is None
            continue
        message = str(error.get())
        assert f"{function}: labels must lie in [0, {FEW}) or equal" in message
        assert f"got label {label}" in message


MANY = 300
# dtype, ignore_index, and some labels, to which the extremes of the dtype are added.
# An ignore_index that fits no label ignores nothing: neither 156 nor 2^32 - 100 is
# -100, and 2^32 is not 0.
Width = tuple[str, int | None, list[int]]
NARROW: list[Width] = [
    ("int8", IGNORED, [0, 17, 100, -100]),
    ("uint8", IGNORED, [0, 17, 156, 7]),
    ("uint32", IGNORED, [0, 17, 2**32 - 100, 7]),
    ("int64", 2**62, [2**62, 2**32, 3, -100]),
]
WIDTHS: list[Width] = [
    *NARROW,
    *(
        (f"{sign}int{bits}", 7, [0, 17, 100, 7])
        for bits in (8, 16, 32, 64)
        for sign in ("", "u")
    ),
    ("uint32", 2**32 - 100, [2**32 - 100, 3, 0, 7]),
    ("int64", IGNORED, [2**32, 2**32 + 1, -(2**32), 2**62]),
    ("int32", None, [-100, 5, 0, 7]),
]


@pytest.mark.parametrize(
    ("function", "widths"),
    [
        pytest.param("cross_entropy", NARROW, id="cross_entropy"),
        pytest.param("linear_cross_entropy", NARROW, id="linear_cross_entropy"),
        pytest.param("cross_entropy", WIDTHS, marks=pytest.mark.slow, id="every width"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_labels_mean_what_they_say_in_every_width(function, widths, rng):
    """The extremes of a dtype are the class of that number or none, never another."""
    batches = [
        [*numbers, *(int(n) for n in (np.iinfo(d).min, np.iinfo(d).max))]
        for d, _, numbers in widths
    ]
    xs = [rng.normal(size=(len(batch), MANY)).astype(np.float32) for batch in batches]
    w = rng.uniform(1, 2, MANY).astype(np.float32)

    @jax.jit
    def losses_and_gradients(xs, batches):
        results = []
        for x, labels, (_, ignore_index, _) in zip(xs, batches, widths, strict=True):
            options = {"class_weight": jnp.asarray(w), "ignore_index": ignore_index}
            loss = functools.partial(loss_of_labels, function, **options)
            if len(results) >= len(NARROW):  # the gradients are alike in all of them
                results.append((loss(x, labels), None))
                continue
            value, pull = jax.vjp(lambda x, f=loss, y=labels: f(x, y), x)
            results.append((value, pull(jnp.ones_like(value))[0]))
        return results

    labels = [np.array(batch, d) for batch, (d, _, _) in zip(batches, widths)]
    results = losses_and_gradients(xs, labels)
    for x, batch, case, (value, gradient) in zip(xs, batches, widths, results):
        log_p = np.asarray(jax.nn.log_softmax(x))
        for row, number in enumerate(batch):
            what = f"{function}, {case[:2]}: label {number}"
            if number == case[1]:
                assert value[row] == 0, what
                assert gradient is None or np.all(gradient[row] == 0), what
            elif 0 <= number < MANY:
                expected = -w[number] * log_p[row, number]
                np.testing.assert_allclose(value[row], expected, 1e-5, err_msg=what)
                assert gradient is None or np.argmin(gradient[row]) == number, what
            else:
                assert np.isnan(value[row]), what
                assert gradient is None or np.all(np.isnan(gradient[row])), what


@pytest.mark.parametrize("classes", [5, 5000])
def test_smoothing_keeps_its_digits_over_many_classes(classes, rng, record_property):
    """p_c - eps / C is as good as its two terms, however small these are."""
    x = (3 * rng.normal(size=(20, classes))).astype(np.float32)
    x[::4, 0] += 40  # some sure of their answer
    labels, eps = np.arange(20) % classes, np.float32(0.1)

    def loss(x):
        return jaxsoft.cross_entropy(x, labels, label_smoothing=eps)

    gradient = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(loss(x))))(x), np.float64)
    e = np.exp(x.astype(float))
    p = e / np.sum(e, axis=-1, keepdims=True)
    hit = labels[:, None] == np.arange(classes)
    subtracted = (1 - float(eps)) * hit + float(eps) / classes
    expected, terms = p - subtracted, p + subtracted
    roundings = np.max(np.abs(gradient - expected) / terms) / np.finfo(np.float32).eps
    record_property("worst", f"{roundings:.1f} roundings of a term")
    assert roundings <= 64


def test_z_loss_beyond_the_range_of_floats():
    """1e20 squared is no float32: the loss is infinite, its derivatives are not."""
    x = jnp.array([[1e20, 0.0], [1.0, 2.0]])
    labels, z_loss = jnp.array([0, 1]), jnp.float32(0.1)

    def total(x, z_loss):
        return jnp.sum(jaxsoft.cross_entropy(x, labels, z_loss=z_loss))

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(x, z_loss)
    assert value == jnp.inf
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[0][0], 0)
    assert np.all(gradients[0][1] != 0)
