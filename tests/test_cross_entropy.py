"""The policies of cross_entropy: labels, ignored rows, weights, axes, reductions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify

import jaxsoft

ROWS, CLASSES = 6, 5
ROUNDINGS = 16 * np.finfo(np.float32).eps  # a few of each of the sums


@pytest.fixture
def logits(rng):
    return jnp.asarray(2 * rng.normal(size=(ROWS, CLASSES)), jnp.float32)


def loss_and_gradient(logits, labels, ignore_index=-100, **options):
    return _loss_and_gradient(logits, jnp.asarray(labels), ignore_index, options)


@functools.partial(jax.jit, static_argnums=2)
def _loss_and_gradient(logits, labels, ignore_index, options):
    def loss(x):
        return jaxsoft.cross_entropy(x, labels, ignore_index=ignore_index, **options)

    value, pull = jax.vjp(loss, logits)
    return value, pull(jnp.ones_like(value))[0]


INVALID = [CLASSES, CLASSES + 1, -1, -CLASSES, -99, -101, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("label", INVALID)
def test_an_invalid_label_is_nan_in_its_row_alone(logits, label):
    good = jnp.array([0, 1, 2, 3, 4, 0], jnp.int32)
    bad = good.at[2].set(label)
    loss, gradient = loss_and_gradient(logits, bad)
    wanted_loss, wanted_gradient = loss_and_gradient(logits, good)
    others = np.arange(ROWS) != 2
    assert np.all(np.isnan(loss[2]))
    assert np.all(np.isnan(gradient[2]))
    np.testing.assert_array_equal(loss[others], wanted_loss[others])
    np.testing.assert_array_equal(gradient[others], wanted_gradient[others])


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 0.1},
        {"class_weight": jnp.array([1.0, 2.0, 0.0, 1.0, 1.0])},
        {"temperature": 2.0, "softcap": 5.0},
        {"where": jnp.arange(CLASSES) < 4},
    ],
    ids=lambda options: "+".join(options),
)
def test_an_invalid_label_is_nan_with_every_option(logits, options):
    labels = jnp.array([0, 1, 7, 3, 2, 0], jnp.int32)
    loss, gradient = loss_and_gradient(logits, labels, **options)
    invalid = np.arange(ROWS) == 2
    np.testing.assert_array_equal(np.isnan(loss), invalid)
    np.testing.assert_array_equal(np.isnan(gradient).any(axis=-1), invalid)
    masked = "where" in options
    np.testing.assert_array_equal(np.isnan(gradient[2]), [True] * 4 + [not masked])


def test_an_invalid_label_shows_in_the_mean(logits):
    labels = jnp.array([0, 1, -1, 3, 4, 0], jnp.int32)
    for reduction in ("sum", "mean"):
        assert np.isnan(jaxsoft.cross_entropy(logits, labels, reduction=reduction))


def test_checkify_names_the_label_and_the_range(logits):
    checked = checkify.checkify(jax.jit(jaxsoft.cross_entropy))
    error, _ = checked(logits, jnp.array([0, 1, 7, 3, -3, 0]))
    assert error.get() is not None
    assert (
        "cross_entropy: labels must lie in [0, 5) or equal ignore_index; got label 7"
        in error.get()
    )
    error, _ = checked(logits, jnp.array([0, 1, -100, 3, 4, 0]))
    assert error.get() is None


def test_checkify_under_vmap_and_grad(logits):
    checked = checkify.checkify(
        jax.jit(jax.grad(lambda x, y: jnp.sum(jax.vmap(jaxsoft.cross_entropy)(x, y))))
    )
    error, _ = checked(logits, jnp.array([0, 1, 2, 3, 4, 9]))
    assert "got label 9" in error.get()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
)
def test_labels_of_every_integer_dtype(rng, dtype):
    """300 classes do not fit into 8 bits, nor does ignore_index into unsigned ones."""
    logits = jnp.asarray(rng.normal(size=(3, 300)), jnp.float32)
    labels = np.array([0, 17, 120])
    expected = loss_and_gradient(logits, jnp.asarray(labels, jnp.int32))
    given = loss_and_gradient(logits, jnp.asarray(labels, dtype))
    jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_ignore_index_of_a_uint32_label_array(logits):
    """An ignore_index that fits no label ignores nothing; 2^32 - 100 is not -100."""
    labels = jnp.array([0, 1, 2, 3, 4, 2**32 - 100], jnp.uint32)
    loss, _ = loss_and_gradient(logits, labels)
    assert np.isnan(loss[5])
    assert np.all(np.isfinite(loss[:5]))
    loss, gradient = loss_and_gradient(logits, labels, ignore_index=2**32 - 100)
    assert loss[5] == 0
    np.testing.assert_array_equal(gradient[5], 0)


@pytest.mark.usefixtures("x64")
def test_labels_of_64_bits(logits):
    for label in (2**32, 2**32 + 1, -(2**32), 2**62):
        labels = jnp.array([0, 1, 2, 3, 4, label], jnp.int64)
        loss, _ = loss_and_gradient(logits, labels)
        np.testing.assert_array_equal(np.isnan(loss), np.arange(ROWS) == 5)
        loss, _ = loss_and_gradient(logits, labels, ignore_index=label)
        assert loss[5] == 0


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_an_ignored_row_is_exactly_0_whatever_its_logits(logits, ignore_index):
    """NaN and infinities too, with every option, in the value and in all gradients."""
    junk = [np.nan, np.inf, -np.inf, 1e30, 0.0]
    spoiled = logits.at[1].set(jnp.array(junk)).at[4].set(np.nan)
    labels = jnp.array([1, ignore_index, 2, 1, ignore_index, 2], jnp.int32)

    def loss(x, w, eps, t, z):
        return jaxsoft.cross_entropy(
            x,
            labels,
            ignore_index=ignore_index,
            class_weight=w,
            label_smoothing=eps,
            temperature=t,
            z_loss=z,
        )

    others = (jnp.arange(1.0, CLASSES + 1), 0.1, 2.0, 0.01)
    value, pull = jax.vjp(loss, spoiled, *others)
    gradients = pull(jnp.ones(ROWS))
    np.testing.assert_array_equal(value[jnp.array([1, 4])], 0)
    np.testing.assert_array_equal(gradients[0][jnp.array([1, 4])], 0)
    clean_value, pull = jax.vjp(loss, logits, *others)
    np.testing.assert_array_equal(value, clean_value)
    jax.tree.map(np.testing.assert_array_equal, gradients, pull(jnp.ones(ROWS)))


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_label_in_a_long_row(axis, z_loss, rng):
    """On a CPU its entry of the gradient is written over that of the formula."""
    labels = np.array([7, 8199, 0, -100, 8200, 3])
    rows, counted = np.arange(6), [0, 1, 2, 5]
    x = rng.normal(size=(6, 8200)).astype(np.float32)
    x[rows[:3], labels[:3]] += 30
    e = np.exp(np.float64(x))
    others = np.sum(np.where(np.arange(8200) == labels[:, None], 0, e), 1)
    total = np.sum(e, 1)
    p = e / total[:, None]
    of_lse = (2 * z_loss * np.log(total))[:, None] * p
    expected = p.copy()
    expected[counted, labels[counted]] = -(others / total)[counted]
    expected += of_lse
    expected[3], expected[4] = 0, np.nan

    def gradient(x):
        f = functools.partial(jaxsoft.cross_entropy, axis=axis, z_loss=z_loss)
        return jax.grad(lambda x: jnp.sum(f(x, labels)))(x)

    def oriented(v):
        return np.asarray(v) if axis else np.asarray(v).T

    x = jnp.asarray(oriented(x))
    given = oriented(jax.jit(gradient)(x))
    np.testing.assert_allclose(given, expected, rtol=2e-6)
    if z_loss:
        return
    t = rng.normal(size=(6, 8200)).astype(np.float32)
    curvature = p * (t - np.sum(p * t, 1, keepdims=True))
    forward = jax.jit(lambda x, t: jax.jvp(gradient, (x,), (t,))[1])
    reverse = jax.jit(lambda x, t: jax.vjp(gradient, x)[1](t)[0])
    for along in (forward, reverse):
        given = oriented(along(x, oriented(t)))
        np.testing.assert_allclose(given[counted], curvature[counted], atol=1e-7)
        np.testing.assert_array_equal(given[3], 0)


def test_ignore_index_none_ignores_nothing(logits):
    loss, _ = loss_and_gradient(
        logits, jnp.array([0, 1, 2, 3, 4, -100]), ignore_index=None
    )
    assert np.isnan(loss[5])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_are_those_of_the_rows(logits, reduction, rng):
    labels = np.array([1, -100, 2, 1, -100, 4])
    w = jnp.asarray(rng.uniform(0.5, 2, CLASSES), jnp.float32)
    v = jnp.asarray(rng.uniform(0.5, 2, ROWS), jnp.float32)
    options = {"class_weight": w, "sample_weight": v, "label_smoothing": 0.1}
    rows = jaxsoft.cross_entropy(logits, labels, **options)
    total = jaxsoft.cross_entropy(logits, labels, reduction=reduction, **options)
    counted = labels != -100
    divisor = 1.0
    if reduction == "mean":
        divisor = np.sum((v * w[labels])[counted])
    np.testing.assert_allclose(total, np.sum(rows) / divisor, rtol=ROUNDINGS)


def test_a_mean_without_weight_is_0(logits):
    def mean(x, v):
        return jaxsoft.cross_entropy(
            x, jnp.zeros(ROWS, jnp.int32), sample_weight=v, reduction="mean"
        )

    value, gradients = jax.value_and_grad(mean, (0, 1))(logits, jnp.zeros(ROWS))
    assert value == 0
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[0], 0)


def test_a_weight_of_0_removes_an_infinite_loss():
    logits = jnp.array([[0.0, -np.inf], [0.0, 0.0]])
    labels = jnp.array([1, 0])
    np.testing.assert_allclose(
        jaxsoft.cross_entropy(logits, labels), [np.inf, np.log(2)], rtol=ROUNDINGS
    )
    for weights in (
        {"sample_weight": jnp.array([0.0, 1.0])},
        {"class_weight": jnp.array([1.0, 0.0])},
    ):
        loss, gradient = loss_and_gradient(logits, labels, **weights)
        np.testing.assert_allclose(loss, [0, np.log(2)], rtol=ROUNDINGS)
        np.testing.assert_array_equal(gradient[0], 0)


@pytest.mark.parametrize("axis", [0, (2, 0), (-1, 1), None])
def test_axes_are_a_matter_of_layout(rng, axis):
    """A label of several axes is the flat index, in the order given."""
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    axes = range(3) if axis is None else np.atleast_1d(axis) % 3
    rows = [i for i in range(3) if i not in axes]
    flat = jnp.transpose(x, (*rows, *axes)).reshape(*[x.shape[i] for i in rows], -1)
    labels = jnp.asarray(rng.integers(0, flat.shape[-1], flat.shape[:-1]), jnp.int32)
    options = {
        "class_weight": jnp.asarray(rng.uniform(0.5, 2, flat.shape[-1]), jnp.float32),
        "label_smoothing": 0.1,
    }
    loss = jaxsoft.cross_entropy(x, labels, axis=axis, **options)
    expected = jaxsoft.cross_entropy(flat, labels, **options)
    chex.assert_shape(loss, labels.shape)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDINGS)
    probabilities = jax.nn.softmax(flat[..., ::-1])
    spread = probabilities.reshape([x.shape[i] for i in (*rows, *axes)])
    given = jnp.transpose(spread, np.argsort([*rows, *axes]))
    loss = jaxsoft.cross_entropy(x, given, axis=axis, **options)
    expected = jaxsoft.cross_entropy(flat, probabilities, **options)
    np.testing.assert_allclose(loss, expected, rtol=ROUNDINGS)


def test_label_probabilities_of_a_masked_class(logits, rng):
    """0 there, or NaN: nothing to say. More than 0: a loss of +inf."""
    mask = np.ones((ROWS, CLASSES), bool)
    mask[:, 3] = False
    q = rng.uniform(0.1, 0.5, (ROWS, CLASSES)).astype(np.float32)
    q[:, 3] = [0, np.nan, 0, np.nan, 0.1, 0]
    w = jnp.arange(1.0, CLASSES + 1)

    def loss(x, q, w):
        return jaxsoft.cross_entropy(x, q, where=jnp.asarray(mask), class_weight=w)

    value, pull = jax.vjp(loss, logits, jnp.asarray(q), w)
    assert np.isposinf(value[4])
    rest = np.arange(ROWS) != 4
    expected = oracle.cross_entropy(
        np.asarray(logits)[rest], np.where(mask, q, 0)[rest], where=mask[rest],
        class_weight=np.asarray(w),
    )  # fmt: skip
    np.testing.assert_allclose(value[rest], oracle.rounded(expected), rtol=ROUNDINGS)
    in_logits, in_q, in_w = pull(jnp.asarray(rng.uniform(1, 2, ROWS), jnp.float32))
    chex.assert_tree_all_finite(in_logits)
    np.testing.assert_array_equal(in_logits[:, 3], 0)
    for gradient in (in_q, in_w):
        assert not np.any(np.isnan(gradient))


def test_one_hot_probabilities_are_indices(logits):
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    from_indices = loss_and_gradient(logits, labels)
    from_one_hot = loss_and_gradient(logits, jax.nn.one_hot(labels, CLASSES))
    chex.assert_trees_all_close(from_indices, from_one_hot, rtol=ROUNDINGS)


def test_the_loss_is_never_negative(rng):
    sure = np.zeros((200, 3), np.float32)
    sure[:, 0] = np.linspace(0, 200, 200)
    for shift in (0, 1000, -1000):
        x = jnp.asarray(sure + shift, jnp.float32)
        loss = jaxsoft.cross_entropy(x, jnp.zeros(200, jnp.int32))
        assert np.all(loss >= 0)
        smoothed = jaxsoft.cross_entropy(
            x, jnp.zeros(200, jnp.int32), label_smoothing=1e-6
        )
        assert np.all(smoothed >= 0)


def test_float_options_may_be_arrays_or_numbers(logits):
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    options = {
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 9.0,
        "temperature": 2.0,
    }
    static = jaxsoft.cross_entropy(logits, labels, **options)
    traced = jax.jit(lambda x, options: jaxsoft.cross_entropy(x, labels, **options))(
        logits, options
    )
    chex.assert_trees_all_close(static, traced, rtol=ROUNDINGS)


def test_neutral_options_change_no_bit(logits):
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    neutral = {
        "where": True,
        "class_weight": jnp.ones(CLASSES),
        "sample_weight": 1.0,
        "label_smoothing": jnp.zeros(()),
        "temperature": jnp.ones(()),
        "z_loss": jnp.zeros(()),
    }
    plain = loss_and_gradient(logits, labels)
    for name, value in neutral.items():
        with_option = loss_and_gradient(logits, labels, **{name: value})
        # A factor of 1 and a term of 0 are exact; only the order of rounding may move.
        chex.assert_trees_all_close(plain, with_option, rtol=4 * ROUNDINGS / 16)


def test_options_do_not_retrace(logits):
    """Traced values are no static ones: a schedule does not compile at each step."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x, temperature, smoothing):
        return jaxsoft.cross_entropy(
            x, jnp.zeros(ROWS, jnp.int32), temperature=temperature,
            label_smoothing=smoothing, reduction="mean",
        )  # fmt: skip

    losses = [step(logits, 1.0 + i, 0.1 * i) for i in range(4)]
    assert len(set(map(float, losses))) == 4


class TestAgainstOptax:
    """At moderate logits, where its digits suffice."""

    def test_integer_labels(self, logits):
        labels = jnp.array([0, 1, 2, 3, 4, 0])
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        ours = jaxsoft.cross_entropy(logits, labels)
        chex.assert_trees_all_close(ours, theirs, rtol=4 * ROUNDINGS)

    def test_integer_labels_over_two_axes(self, rng):
        logits = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
        labels = jnp.array([6, 11])
        theirs = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels, axis=(1, 2)
        )
        ours = jaxsoft.cross_entropy(logits, labels, axis=(1, 2))
        chex.assert_trees_all_close(ours, theirs, rtol=4 * ROUNDINGS)

    def test_mask(self, logits):
        labels, where = jnp.array([0, 1, 2, 0, 1, 2]), jnp.arange(CLASSES) < 3
        where = jnp.broadcast_to(where, logits.shape)
        theirs = optax.softmax_cross_entropy_with_integer_labels(
            logits, labels, where=where
        )
        ours = jaxsoft.cross_entropy(logits, labels, where=where)
        chex.assert_trees_all_close(ours, theirs, rtol=4 * ROUNDINGS)

    def test_probabilities(self, logits, rng):
        q = jax.nn.softmax(jnp.asarray(rng.normal(size=logits.shape), jnp.float32))
        theirs = optax.softmax_cross_entropy(logits, q)
        chex.assert_trees_all_close(
            jaxsoft.cross_entropy(logits, q), theirs, rtol=4 * ROUNDINGS
        )

    def test_smoothing(self, logits):
        labels = jnp.array([0, 1, 2, 3, 4, 0])
        one_hot = jax.nn.one_hot(labels, CLASSES)
        theirs = optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.1))
        ours = jaxsoft.cross_entropy(logits, labels, label_smoothing=0.1)
        chex.assert_trees_all_close(ours, theirs, rtol=4 * ROUNDINGS)


@pytest.mark.slow
def test_logits_that_are_constants_of_the_program(rng):
    """XLA computes more of it beforehand, and must not compute something else."""
    for shape in ((4, 7), (5, 40), (64, 1000)):
        x = np.float32(3 * rng.normal(size=shape))
        labels = jnp.asarray(rng.integers(0, shape[1], shape[0]))

        @functools.partial(jax.grad, argnums=1)
        def gradient(scale, x, labels=labels):
            return scale * jnp.sum(jaxsoft.cross_entropy(x, labels))

        of_constant = jax.jit(lambda scale, x=x: gradient(scale, jnp.asarray(x)))(1.0)
        np.testing.assert_allclose(of_constant, jax.jit(gradient)(1.0, x), rtol=1e-6)


@pytest.mark.parametrize("classes", [10, 26, 52, 100, 1000])
def test_sure_rows_that_are_constants_of_the_program(classes):
    x = jnp.full((classes, 8), -40.0).at[3].set(5.0)
    expected = np.full(8, (classes - 1) * np.exp(-45.0))
    for logits, axis in ((x, 0), (x.T, 1)):
        loss = jax.jit(
            lambda x=logits, axis=axis: jaxsoft.cross_entropy(
                x, jnp.full(8, 3), axis=axis
            )
        )()
        np.testing.assert_allclose(np.float64(loss), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("classes", "axis"), [(3, 0), (3, 1), (25, 0), (25, 1), (33, 1), (128, 1)]
)
@pytest.mark.parametrize(
    "kind", ["indices", "probabilities", "log_softmax", "summed log_softmax", "entropy"]
)
def test_a_sure_loss_of_logits_made_in_the_same_program(kind, classes, axis, rng):
    """The label's logit may be computed anew, with other roundings than the maximum."""
    labels = rng.integers(0, classes, 256)
    h = np.float32(10 * rng.normal(size=(256, classes)))
    h[np.arange(256), labels] += 100
    h = h if axis == 1 else h.T.copy()
    index = jnp.expand_dims(labels, axis)

    def loss(z):
        if kind == "indices":
            return jaxsoft.cross_entropy(z, labels, axis=axis)
        one_hot = jax.nn.one_hot(labels, classes, axis=axis)
        if kind == "probabilities":
            return jaxsoft.cross_entropy(z, one_hot, axis=axis)
        if kind == "entropy":
            return jaxsoft.entropy(z, axis)
        log_p = jaxsoft.log_softmax(z, axis)
        if kind == "summed log_softmax":
            return -jnp.sum(jnp.where(one_hot > 0, log_p, 0), axis)
        return -jnp.squeeze(jnp.take_along_axis(log_p, index, axis), axis)

    def centred(h):
        return h - jnp.mean(h, axis, keepdims=True)

    def normalised(h):
        square = jnp.mean(centred(h) ** 2, axis, keepdims=True)
        return centred(h) * jax.lax.rsqrt(square + 1e-5) * 20

    def less_a_product(h):
        first, second = (jax.lax.slice_in_dim(h, i, i + 1, axis=axis) for i in (0, 1))
        return h - first * second / 64

    for make in (centred, normalised, less_a_product):
        value, pull = jax.jit(lambda h, make=make: jax.vjp(lambda z: loss(z), make(h)))(
            h
        )
        assert np.all(value >= 0)
        assert np.max(value) < 1e-9
        (gradient,) = pull(jnp.ones(256))
        of_label = np.take_along_axis(np.asarray(gradient), index, axis)
        assert np.all(of_label <= 0)
        assert np.max(np.abs(gradient)) < 1e-9


@pytest.mark.parametrize("kind", ["indices", "probabilities", "log_softmax"])
def test_the_temperature_of_sure_logits_made_in_the_same_program(kind, rng):
    h = np.float32(10 * rng.normal(size=(64, 3)))
    labels = np.argmax(h, 1)
    one_hot = np.eye(3, dtype=np.float32)[labels]
    h += 100 * one_hot

    def total(temperature, h, labels):
        z = h - jnp.mean(h, 1, keepdims=True)
        if kind == "log_softmax":
            return -jnp.sum(one_hot * jaxsoft.log_softmax(z, temperature=temperature))
        targets = labels if kind == "indices" else one_hot
        return jnp.sum(jaxsoft.cross_entropy(z, targets, temperature=temperature))

    for temperature in (1.0, 0.1, 0.01):
        assert abs(jax.jit(jax.grad(total))(temperature, h, labels)) < 1e-30


def test_a_label_out_of_range_is_the_label_of_no_class():
    x, labels = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([-1])
    slope = jax.grad(lambda w: jaxsoft.cross_entropy(x, labels, class_weight=w)[0])
    np.testing.assert_array_equal(slope(jnp.ones(3)), 0)
    assert jnp.isnan(jaxsoft.cross_entropy(x, labels, class_weight=jnp.ones(3)))[0]


def test_an_infinite_cap_is_none():
    x = jnp.array([[2.0, 1.0, -3.0], [np.inf, 1.0, 0.0], [1.0, -np.inf, 0.0]])
    labels = jnp.array([1, 0, 0])

    def value_and_gradients(softcap):
        loss = functools.partial(jaxsoft.cross_entropy, labels=labels)
        value, pull = jax.vjp(lambda x: loss(x, softcap=softcap), x)
        return value, pull(jnp.ones(3))[0]

    expected = value_and_gradients(None)
    for softcap in (float("inf"), jnp.float32(jnp.inf), 3e38):
        rows = slice(None) if softcap == jnp.inf else slice(1)
        for got, want in zip(value_and_gradients(softcap), expected):
            np.testing.assert_allclose(got[rows], want[rows], rtol=1e-6)
    slope = jax.grad(lambda c: jnp.sum(jaxsoft.cross_entropy(x, labels, softcap=c)))
    assert slope(jnp.inf) == 0


def test_forward_mode_at_a_temperature_whose_square_underflows():
    x, q = jnp.array([0.0, 0.0, -1.0]), jnp.array([0.2, 0.8, 0.0])
    for temperature in (1e-19, 1e-20, 1e-25, 1e-30):
        primal, tangent = jax.jvp(
            lambda t: jaxsoft.cross_entropy(x, q, temperature=t), (temperature,), (1.0,)
        )
        np.testing.assert_allclose(primal, np.log(2), rtol=1e-6)
        assert tangent == 0
