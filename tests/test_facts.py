"""Known values: computed at 60 digits, or printed in the texts that explain them.

Those of the peers' own tests, and of PyTorch, are in test_peers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft

INF, NAN = np.inf, np.nan
LOG3 = 1.0986122886681098

# Printed numbers are good to half a unit of their last digit; all others to a few
# roundings of float32.
FLOAT32 = 5e-7


def assert_is(actual, expected, rtol=FLOAT32, atol=0.0):
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol
    )


def f32(values):
    return jnp.asarray(values, jnp.float32)


def test_logsumexp_gradient_under_a_mask():
    @jax.jit
    def masked(mask):
        x = f32([0.0, 100.0])
        return jax.value_and_grad(jaxsoft.logsumexp)(x, where=mask)

    assert_is(masked(jnp.array([True, False]))[1], [1, 0])
    value, gradient = masked(jnp.array([False, False]))
    assert_is(value, -INF)
    assert_is(gradient, [0, 0])


def test_logsumexp_of_complex_numbers():
    x = jnp.array([1 + 1j, 2 - 1j, -2 + 3j], jnp.complex64)
    log_sum, sign = jax.jit(lambda x: jaxsoft.logsumexp(x, return_sign=True))(x)
    assert_is(log_sum, 1.8883877619655816)
    assert_is(sign, 0.8060636458466385 - 0.5918288594217295j)


def test_logsumexp_bounds_and_symmetry(rng):
    """max <= L <= max + t log n, and L(x; -t) = -L(-x; t), to the bit."""
    x = f32(rng.normal(size=(20, 7)) * 5)
    hard = jnp.max(x, axis=-1)

    @jax.jit
    def smoothed(x, temperature):
        return jaxsoft.logsumexp(x, axis=-1, temperature=temperature)

    for temperature in (1e-3, 0.1, 1.0, 10.0, 1e3):
        smooth = smoothed(x, temperature)
        roundings = 4 * np.finfo(np.float32).eps * np.abs(smooth)
        assert np.all(smooth >= hard), temperature
        highest = hard + temperature * np.log(7) + roundings
        assert np.all(smooth <= highest), temperature
        np.testing.assert_array_equal(smoothed(-x, -temperature), -smooth)


def test_softmax():
    """Printed numbers, and those of logits that exp alone would not survive."""
    of_rows = jax.jit(jax.vmap(jaxsoft.softmax))
    p = of_rows(f32([[1.0, 3.0, 6.0], [2.0, 3.0, 4.0]]))
    printed = [[0.0064, 0.0471, 0.9465], [0.0900, 0.2447, 0.6652]]
    assert_is(p, printed, rtol=0, atol=5e-5)
    assert_is(of_rows(f32([[1000.0] * 3, [-1000.0] * 3])), 1 / 3)


NOTHING = [
    (jaxsoft.softmax, [0, 0, 0]),
    (jaxsoft.log_softmax, [-INF, -INF, -INF]),
    (jaxsoft.entropy, 0),
    (jaxsoft.softargmax, 0),
    (lambda x, where: jaxsoft.smooth_max(x, -1, where), -INF),
    (lambda x, where: jaxsoft.smooth_min(-x, -1, where), INF),
    (lambda x, where: jaxsoft.boltzmann_max(x, -1, where), -INF),
    (lambda x, where: jaxsoft.logmeanexp(x, -1, where), -INF),
    (lambda x, where: jaxsoft.logsumexp(x, -1, where=where), -INF),
    (lambda x, where: jaxsoft.kl_divergence(2 * x, x, where=where), 0),
]


def test_nothing_included():
    """The same for masked logits and for logits that are all -inf."""

    @jax.jit
    def values_and_jacobians(x, mask):
        functions = [functools.partial(f, where=mask) for f, _ in NOTHING]
        return [(f(x), jax.jacrev(f)(x), jax.jacfwd(f)(x)) for f in functions]

    for x, mask in ((f32([1.0, 2.0, 3.0]), False), (f32([-INF] * 3), True)):
        results = values_and_jacobians(x, jnp.full(3, mask))
        for (_, expected), (value, backward, forward) in zip(NOTHING, results):
            assert_is(value, expected)
            assert_is(backward, 0)
            assert_is(forward, 0)


def test_log_softmax_jacobian_at_an_infinite_logit():
    for jacobian in (jax.jacfwd, jax.jacrev):
        of = jax.jit(jacobian(jaxsoft.log_softmax))
        assert_is(of(f32([1.0, -INF])), [[0, 0], [-1, 1]])


def test_infinite_logits_share():
    gradient = jax.grad(jaxsoft.logsumexp)
    functions = (jaxsoft.softmax, jaxsoft.log_softmax, gradient, jaxsoft.entropy)
    results = jax.jit(lambda x: [f(x) for f in functions])(f32([INF, 1.0, INF]))
    share, log2 = [0.5, 0, 0.5], np.log(2)
    for actual, expected in zip(results, (share, [-log2, -INF, -log2], share, log2)):
        assert_is(actual, expected)


def test_temperature_zero():
    """The exact hard limit, with ties sharing equally; static or traced."""

    def of(x, tau):
        return (
            jaxsoft.logsumexp(x, -1, temperature=tau),
            jaxsoft.logmeanexp(x, -1, temperature=tau),
            jaxsoft.softmax(x, temperature=tau),
            jaxsoft.log_softmax(x, temperature=tau),
            jaxsoft.entropy(x, temperature=tau),
            jaxsoft.cross_entropy(
                jnp.stack([x, x]), jnp.array([1, 0]), temperature=tau
            ),
        )

    x, log2 = f32([5.0, 7.0, 7.0]), np.log(2)
    expected = (7, 7, [0, 0.5, 0.5], [-INF, -log2, -log2], log2, [log2, INF])
    static = [jax.jit(functools.partial(of, tau=tau)) for tau in (0.0, -0.0)]
    traced = jax.jit(of)
    for results in (
        *(f(x) for f in static),
        *(traced(x, tau) for tau in (0.0, jnp.zeros(()), jnp.zeros(1))),
    ):
        for actual, wanted in zip(results, expected, strict=True):
            assert_is(actual, wanted)


def test_a_subnormal_temperature_is_the_limit_from_its_side():
    """Processors take it for 0 in a comparison."""

    @jax.jit
    def of(x, tau):
        return (
            jaxsoft.logsumexp(x, temperature=tau),
            jaxsoft.softmax(x, temperature=tau),
            jaxsoft.softargmax(x, temperature=tau),
            jaxsoft.softplus(x - 2, temperature=tau),
            jaxsoft.smooth_step(x - 2, temperature=tau),
            jaxsoft.smooth_maximum(x, 2.0, temperature=tau),
        )

    x, step = f32([1.0, 3.0, 2.0]), [0, 1, 0.5]
    above = (3, [0, 1, 0], 1, [0, 1, 0], step, [2, 3, 2])
    below = (1, [1, 0, 0], 0, [-1, 0, 0], np.subtract(1, step), [1, 2, 2])
    for tau, expected in ((1e-45, above), (1e-40, above), (0.0, above), (-0.0, above)):
        for actual, wanted in zip(of(x, f32(tau)), expected, strict=True):
            assert_is(actual, wanted)
    for tau in (-1e-45, -1e-40):
        for actual, wanted in zip(of(x, f32(tau)), below, strict=True):
            assert_is(actual, wanted)


def test_derivative_in_temperature_is_the_entropy():
    x = f32([1.0, 2.0, 3.0])

    @jax.jit
    def slope_and_entropy(x, tau):
        slope = jax.grad(lambda t: jaxsoft.logsumexp(x, temperature=t))(tau)
        return slope, jaxsoft.entropy(x, temperature=tau)

    for tau in (0.3, 1.0, 4.0):
        assert_is(*slope_and_entropy(x, tau), rtol=2e-6)
    for result in slope_and_entropy(x, 1.0):
        assert_is(result, 0.83239558183993887)
    for tau in (1.0, 1e-3, 1e-38, 0.0):  # a tie of two
        assert_is(slope_and_entropy(f32([3.0, 3.0, -INF]), tau)[0], np.log(2))


CROSS_ENTROPY = [
    ([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]], [0, 1], [0.2761297055455, 2.95179879585]),
    ([[1e8] * 3, [1000.0] * 3, [-1000.0] * 3], [0, 2, 1], [LOG3] * 3),
    ([[20.0, 0.0]], [0], [2.0611536203143807e-9]),
    (
        [[4.0, 2.0, 1.0], [0.0, 5.0, 1.0]],
        [[1.0, 0.0, 0.0], [0.0, 0.8, 0.2]],
        [0.16984601955628565, 0.82474489013882265],
    ),
]


def test_cross_entropy():
    for logits, labels, expected in CROSS_ENTROPY:
        losses = jax.jit(jaxsoft.cross_entropy)(f32(logits), jnp.array(labels))
        np.testing.assert_allclose(losses, expected, FLOAT32, err_msg=str(logits))


@jax.jit
def every_reduction(logits, labels):
    def total(x, reduction):
        return jnp.sum(jaxsoft.cross_entropy(x, labels, reduction=reduction))

    return [
        jax.value_and_grad(total)(logits, reduction)
        for reduction in ("none", "sum", "mean")
    ]


def test_all_rows_ignored():
    logits = f32([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 0.0, 0.0]])
    for loss, gradient in every_reduction(logits, np.full(3, -100)):
        assert_is(loss, 0)
        assert_is(gradient, 0)


def test_cross_entropy_over_two_axes():
    logits = jnp.arange(24.0).reshape(1, 2, 3, 4)
    labels = jnp.array([[6, 11]])
    loss = functools.partial(jaxsoft.cross_entropy, axis=(2, 3))
    losses = jax.jit(loss)(logits, labels)
    # Printed by float32 arithmetic at logits of 23, whose roundings are 1e-6.
    assert_is(losses, [[5.4586687, 0.4586697]], rtol=0, atol=1e-6)
    # log sum_{k < 12} exp(-k), and 5 above it.
    assert_is(losses, [[5.45866900116, 0.45866900116]])


def test_a_sure_model_still_learns():
    """The gradient at the label is minus the other probabilities, not p - 1 = 0."""
    gradient = jax.jit(jax.grad(jaxsoft.cross_entropy))(f32([20.0, 0.0]), 0)
    assert_is(gradient, [-2.0611536181902037e-9, 2.0611536181902037e-9])


def test_circle_loss_at_scale_256():
    """The naive form overflows in float32."""
    positives, negatives = f32([0.1, 0.9]), f32([0.8, -0.2])
    a_p, a_n = 1.25 - positives, jnp.maximum(negatives + 0.25, 0)
    naive = jnp.log1p(
        jnp.sum(jnp.exp(256 * a_n * (negatives - 0.25)))
        * jnp.sum(jnp.exp(-256 * a_p * (positives - 0.75)))
    )
    assert np.isposinf(naive)
    # 256 (1.05 * 0.55 + 1.15 * 0.65): the other pairs are out of sight.
    expected = 256 * (1.05 * 0.55 + 1.15 * 0.65)
    assert_is(jax.jit(jaxsoft.circle_loss)(positives, negatives), expected)
    for nothing in ((positives, negatives[:0]), (positives[:0], negatives)):
        assert_is(jaxsoft.circle_loss(*nothing), 0)
