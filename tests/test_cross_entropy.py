"""The policies of cross_entropy: long rows, sure rows, weights, axes, probabilities.

What holds of the labels, and under every option, is in test_option_promises.py.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from laws import as_users_have_it

import jaxsoft

ROWS, CLASSES = 6, 5
ROUNDINGS = 16 * np.finfo(np.float32).eps  # a few of each of the sums
SLOW = pytest.mark.slow


@pytest.fixture
def logits(rng):
    return jnp.asarray(2 * rng.normal(size=(ROWS, CLASSES)), jnp.float32)


def loss_and_gradient(logits, labels, **options):
    def loss(x):
        return jaxsoft.cross_entropy(x, labels, **options)

    value, pull = jax.vjp(loss, logits)
    return value, pull(jnp.ones_like(value))[0]


@pytest.mark.parametrize(
    ("axis", "z_loss"),
    [
        (1, 0.0),
        (0, 0.3),
        pytest.param(0, 0.0, marks=SLOW),
        pytest.param(1, 0.3, marks=SLOW),
    ],
)
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
    given = oriented(as_users_have_it(gradient)(x))
    # In plain JAX the rounding of a shift is 64 ulp of its exponential at worst.
    rtol = 2e-6 if jaxsoft.cpu_kernels() else 64 * 2**-24
    np.testing.assert_allclose(given, expected, rtol=rtol)
    if z_loss:
        return
    t = rng.normal(size=(6, 8200)).astype(np.float32)
    curvature = p * (t - np.sum(p * t, 1, keepdims=True))

    @jax.jit
    def forward_and_reverse(x, t):
        reverse = jax.vjp(gradient, x)[1](t)[0]
        return jax.jvp(gradient, (x,), (t,))[1], reverse

    for given in map(oriented, forward_and_reverse(x, oriented(t))):
        np.testing.assert_allclose(given[counted], curvature[counted], atol=1e-7)
        np.testing.assert_array_equal(given[3], 0)


def test_a_mean_without_weight_is_0(logits):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def mean(x, v):
        return jaxsoft.cross_entropy(
            x, jnp.zeros(ROWS, jnp.int32), sample_weight=v, reduction="mean"
        )

    value, gradients = mean(logits, jnp.zeros(ROWS))
    assert value == 0
    chex.assert_tree_all_finite(gradients)
    np.testing.assert_array_equal(gradients[0], 0)


def test_a_weight_of_0_removes_an_infinite_loss():
    logits = jnp.array([[0.0, -np.inf], [0.0, 0.0]])
    labels = jnp.array([1, 0])
    weights = [
        {},
        {"sample_weight": jnp.array([0.0, 1.0])},
        {"class_weight": jnp.array([1.0, 0.0])},
    ]
    (without, _), *weighted = jax.jit(
        lambda x: [loss_and_gradient(x, labels, **options) for options in weights]
    )(logits)
    np.testing.assert_allclose(without, [np.inf, np.log(2)], rtol=ROUNDINGS)
    for options, (loss, gradient) in zip(weights[1:], weighted):
        what = next(iter(options))
        np.testing.assert_allclose(loss, [0, np.log(2)], rtol=ROUNDINGS, err_msg=what)
        np.testing.assert_array_equal(gradient[0], 0, what)


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
    probabilities = jax.nn.softmax(flat[..., ::-1])
    spread = probabilities.reshape([x.shape[i] for i in (*rows, *axes)])
    given = jnp.transpose(spread, np.argsort([*rows, *axes]))

    @jax.jit
    def losses(x, flat, options):
        f = functools.partial(jaxsoft.cross_entropy, **options)
        return (
            (f(x, labels, axis=axis), f(flat, labels)),
            (f(x, given, axis=axis), f(flat, probabilities)),
        )

    for loss, expected in losses(x, flat, options):
        chex.assert_shape(loss, labels.shape)
        np.testing.assert_allclose(loss, expected, rtol=ROUNDINGS)


def test_label_probabilities_of_a_masked_class(logits, rng):
    """0 there, or NaN: nothing to say. More than 0: a loss of +inf."""
    mask = np.ones((ROWS, CLASSES), bool)
    mask[:, 3] = False
    q = rng.uniform(0.1, 0.5, (ROWS, CLASSES)).astype(np.float32)
    q[:, 3] = [0, np.nan, 0, np.nan, 0.1, 0]
    w = jnp.arange(1.0, CLASSES + 1)
    cotangent = jnp.asarray(rng.uniform(1, 2, ROWS), jnp.float32)

    @jax.jit
    def value_and_gradients(*given):
        def loss(x, q, w):
            return jaxsoft.cross_entropy(x, q, where=jnp.asarray(mask), class_weight=w)

        value, pull = jax.vjp(loss, *given)
        return value, pull(cotangent)

    value, (in_logits, in_q, in_w) = value_and_gradients(logits, jnp.asarray(q), w)
    assert np.isposinf(value[4])
    rest = np.arange(ROWS) != 4
    expected = oracle.cross_entropy(
        np.asarray(logits)[rest],
        np.where(mask, q, 0)[rest],
        where=mask[rest],
        class_weight=np.asarray(w),
    )
    np.testing.assert_allclose(value[rest], oracle.rounded(expected), rtol=ROUNDINGS)
    chex.assert_tree_all_finite(in_logits)
    np.testing.assert_array_equal(in_logits[:, 3], 0)
    for gradient in (in_q, in_w):
        assert not np.any(np.isnan(gradient))


@pytest.mark.slow
def test_logits_that_are_constants_of_the_program(rng):
    """XLA computes more of it beforehand, and must not compute something else."""
    for shape in ((4, 7), (5, 40), (64, 1000)):
        x = np.float32(3 * rng.normal(size=shape))
        labels = jnp.asarray(rng.integers(0, shape[1], shape[0]))

        @functools.partial(jax.grad, argnums=1)
        def gradient(scale, x, labels=labels):
            return scale * jnp.sum(jaxsoft.cross_entropy(x, labels))

        of_constant = as_users_have_it(lambda s, x=x, f=gradient: f(s, jnp.asarray(x)))
        expected = as_users_have_it(gradient)(1.0, x)
        np.testing.assert_allclose(of_constant(1.0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "classes", [10, 52, *(pytest.param(n, marks=SLOW) for n in (26, 100, 1000))]
)
def test_sure_rows_that_are_constants_of_the_program(classes):
    x = jnp.full((classes, 8), -40.0).at[3].set(5.0)
    expected = np.full(8, (classes - 1) * np.exp(-45.0))
    for logits, axis in ((x, 0), (x.T, 1)):
        loss = as_users_have_it(
            lambda x=logits, axis=axis: jaxsoft.cross_entropy(
                x, jnp.full(8, 3), axis=axis
            )
        )()
        np.testing.assert_allclose(np.float64(loss), expected, rtol=1e-6)


def losses_by(kind, z, labels, axis):
    index, classes = jnp.expand_dims(labels, axis), z.shape[axis]
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


def centred(h, axis):
    return h - jnp.mean(h, axis, keepdims=True)


def normalised(h, axis):
    square = jnp.mean(centred(h, axis) ** 2, axis, keepdims=True)
    return centred(h, axis) * jax.lax.rsqrt(square + 1e-5) * 20


def less_a_product(h, axis):
    first, second = (jax.lax.slice_in_dim(h, i, i + 1, axis=axis) for i in (0, 1))
    return h - first * second / 64


SHAPES = [(3, 0), (3, 1), (25, 0), (25, 1), (33, 1), (128, 1)]
KINDS = ["indices", "probabilities", "log_softmax", "summed log_softmax", "entropy"]
MADE = [centred, normalised, less_a_product]


def marks_of(k: int, s: int, m: int):
    """Fast: of each kind two shapes, and of each shape a kind or two, made one way."""
    return () if (s - k) % 3 == 0 and m == (k + s // 3) % 3 else SLOW


@pytest.mark.parametrize(
    ("kind", "shape", "make"),
    [
        pytest.param(
            kind,
            shape,
            make,
            marks=marks_of(k, s, m),
            id=f"{kind}-{shape}-{make.__name__}",
        )
        for (k, kind), (s, shape), (m, make) in itertools.product(
            *map(enumerate, (KINDS, SHAPES, MADE))
        )
    ],
)
def test_a_sure_loss_of_logits_made_in_the_same_program(kind, shape, make, rng):
    """The label's logit may be computed anew, with other roundings than the maximum."""
    classes, axis = shape
    labels = rng.integers(0, classes, 256)
    h = np.float32(10 * rng.normal(size=(256, classes)))
    h[np.arange(256), labels] += 100
    h = h if axis == 1 else h.T.copy()

    @as_users_have_it
    def both(h):
        value, pull = jax.vjp(lambda z: losses_by(kind, z, labels, axis), make(h, axis))
        return value, pull(jnp.ones(256))[0]

    value, gradient = both(h)
    assert np.all(value >= 0)
    assert np.max(value) < 1e-9
    index = np.expand_dims(labels, axis)
    assert np.all(np.take_along_axis(np.asarray(gradient), index, axis) <= 0)
    assert np.max(np.abs(gradient)) < 1e-9


@pytest.mark.parametrize("kind", ["indices", "probabilities", "log_softmax"])
def test_the_temperature_of_sure_logits_made_in_the_same_program(kind, rng):
    h = np.float32(10 * rng.normal(size=(64, 3)))
    labels = np.argmax(h, 1)
    one_hot = np.eye(3, dtype=np.float32)[labels]
    h += 100 * one_hot

    @as_users_have_it
    @jax.grad
    def slope(temperature, h, labels):
        z = h - jnp.mean(h, 1, keepdims=True)
        if kind == "log_softmax":
            return -jnp.sum(one_hot * jaxsoft.log_softmax(z, temperature=temperature))
        targets = labels if kind == "indices" else one_hot
        return jnp.sum(jaxsoft.cross_entropy(z, targets, temperature=temperature))

    for temperature in (1.0, 0.1, 0.01):
        assert abs(slope(temperature, h, labels)) < 1e-30, temperature


def test_an_infinite_cap_is_none():
    x = jnp.array([[2.0, 1.0, -3.0], [np.inf, 1.0, 0.0], [1.0, -np.inf, 0.0]])
    labels = jnp.array([1, 0, 0])
    caps = (None, float("inf"), jnp.float32(jnp.inf), 3e38)

    @jax.jit
    def every_cap(x, infinity):
        def total(cap):
            return jnp.sum(jaxsoft.cross_entropy(x, labels, softcap=cap))

        of_caps = [loss_and_gradient(x, labels, softcap=cap) for cap in caps]
        return of_caps, jax.grad(total)(infinity)

    (expected, *given), slope = every_cap(x, jnp.inf)
    for cap, results in zip(caps[1:], given):
        rows = slice(None) if cap == jnp.inf else slice(1)
        for got, want in zip(results, expected):
            np.testing.assert_allclose(got[rows], want[rows], rtol=1e-6, err_msg=cap)
    assert slope == 0


def test_forward_mode_at_a_temperature_whose_square_underflows():
    x, q = jnp.array([0.0, 0.0, -1.0]), jnp.array([0.2, 0.8, 0.0])

    @jax.jit
    def forward(t):
        loss = functools.partial(jaxsoft.cross_entropy, x, q)
        return jax.jvp(lambda t: loss(temperature=t), (t,), (1.0,))

    for temperature in (1e-19, 1e-20, 1e-25, 1e-30):
        primal, tangent = forward(temperature)
        np.testing.assert_allclose(primal, np.log(2), rtol=1e-6)
        assert tangent == 0, temperature


@pytest.mark.usefixtures("x64")
def test_second_derivatives_of_a_sure_row(rng):
    """Of label probabilities, and in them: sums about the value at the maximum."""
    x, q = jnp.array([6.0, 0.0, 1.0, -2.0]), jnp.asarray(rng.uniform(size=4))

    def definition(x, q):
        return -jnp.sum(q * jax.nn.log_softmax(x))

    given, wanted = (
        jax.jit(jax.hessian(f, (0, 1)))(x, q)
        for f in (jaxsoft.cross_entropy, definition)
    )
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
