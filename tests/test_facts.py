"""Known values: computed at 60 digits, or printed in the texts that explain them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


LOGSUMEXP = [
    ([1.0, 3.0, 6.0], 6.0549849),
    ([1000.0, 1000.0], 1000.6931471805599),
    ([1000.0] * 3, 1000 + LOG3),
    ([-1000.0] * 3, -1000 + LOG3),
    ([10000.0] * 1000, 10006.907755278982),
    ([], -INF),
    ([1.0, INF], INF),
    ([INF, -INF], INF),
    ([INF, INF], INF),
    ([NAN, 1.0], NAN),
]


@pytest.mark.parametrize(("x", "expected"), LOGSUMEXP)
def test_logsumexp(x, expected):
    assert_is(jaxsoft.logsumexp(f32(x)), expected)


def test_logsumexp_along_an_axis():
    assert_is(jaxsoft.logsumexp(jnp.zeros((2, 0)), axis=1), [-INF, -INF])
    x = f32([[1e10, 1e-10], [-1e10, -INF]])
    assert_is(jaxsoft.logsumexp(x, axis=-1), [1e10, -1e10])


WEIGHTED = [
    ([1.0, 1.0, 1.0], [1.0, -1.0, -1.0], 1.0, -1.0),
    ([1.0, 1.0], [1.0, -1.0], -INF, 0.0),
    ([1.0, 10000.0], [1.0, 0.0], 1.0, 1.0),
    ([-1000.0, -2.0], [1.0, 0.0], -1000.0, 1.0),
    ([INF, 2.0], [0.0, 1.0], 2.0, 1.0),
    (
        [3.06409428, 0.37251854, 3.87471931],
        [1.88190708, 2.84174795, -0.85016884],
        1.2452165157907419,
        1.0,
    ),
]


@pytest.mark.parametrize(("a", "b", "expected", "sign"), WEIGHTED)
@pytest.mark.usefixtures("x64")
def test_logsumexp_with_weights(a, b, expected, sign):
    a, b = jnp.array(a, jnp.float64), jnp.array(b, jnp.float64)
    log_sum, its_sign = jaxsoft.logsumexp(a, b=b, return_sign=True)
    assert_is(log_sum, expected, rtol=1e-13)
    assert_is(its_sign, sign)
    # Without the sign, the logarithm of a negative sum is not a number.
    assert_is(jaxsoft.logsumexp(a, b=b), NAN if sign < 0 else expected, rtol=1e-13)


def test_logsumexp_gradient_under_a_mask():
    x = f32([0.0, 100.0])

    def masked(mask):
        return jax.value_and_grad(jaxsoft.logsumexp)(x, where=jnp.array(mask))

    assert_is(masked([True, False])[1], [1, 0])
    value, gradient = masked([False, False])
    assert_is(value, -INF)
    assert_is(gradient, [0, 0])


def test_logsumexp_of_complex_numbers():
    x = jnp.array([1 + 1j, 2 - 1j, -2 + 3j], jnp.complex64)
    log_sum, sign = jaxsoft.logsumexp(x, return_sign=True)
    assert_is(log_sum, 1.8883877619655816)
    assert_is(sign, 0.8060636458466385 - 0.5918288594217295j)


def test_logmeanexp():
    assert_is(jaxsoft.logmeanexp(f32([1.0, 2.0, 3.0])), 2.3089936757762706)


def test_logsumexp_hessian():
    hessian = jax.hessian(jaxsoft.logsumexp)(f32([0.0, 1.0]))
    p = 0.19661193324148185
    assert_is(hessian, [[p, -p], [-p, p]])


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_logsumexp_bounds_and_symmetry(rng, temperature):
    """max <= L <= max + t log n, and L(x; -t) = -L(-x; t), to the bit."""
    x = f32(rng.normal(size=(20, 7)) * 5)
    smooth = jaxsoft.logsumexp(x, axis=-1, temperature=temperature)
    hard = jnp.max(x, axis=-1)
    roundings = 4 * np.finfo(np.float32).eps * np.abs(smooth)
    assert np.all(smooth >= hard)
    assert np.all(smooth <= hard + temperature * np.log(7) + roundings)
    mirrored = jaxsoft.logsumexp(-x, axis=-1, temperature=-temperature)
    np.testing.assert_array_equal(mirrored, -smooth)


SOFTMAX = [
    ([1.0, 3.0, 6.0], [0.0064, 0.0471, 0.9465], 5e-5),
    ([2.0, 3.0, 4.0], [0.0900, 0.2447, 0.6652], 5e-5),
    ([1000.0] * 3, [1 / 3] * 3, 0),
    ([-1000.0] * 3, [1 / 3] * 3, 0),
]
ARANGE4 = [
    0.03205860328008499,
    0.08714431874203256,
    0.23688281808991013,
    0.6439142598879722,
]


@pytest.mark.parametrize(("x", "expected", "printed"), SOFTMAX)
def test_softmax(x, expected, printed):
    rtol = 0 if printed else FLOAT32
    assert_is(jaxsoft.softmax(f32(x)), expected, rtol=rtol, atol=printed)


@pytest.mark.parametrize("shift", [0, 100])
def test_softmax_of_integers(shift):
    assert_is(jaxsoft.softmax(jnp.arange(4) + shift), ARANGE4)
    assert_is(jaxsoft.softmax(jnp.arange(4.0) + shift), ARANGE4)


@pytest.mark.usefixtures("x64")
def test_softmax_of_far_logits_in_float64():
    x = jnp.array([[-25.0, 0.0, 25.0, 50.0], [1.0, 325.0, 749.0, 750.0]], jnp.float64)
    expected = [
        [
            2.678636961770877e-33,
            1.9287498479371314e-22,
            1.3887943864771144e-11,
            0.999999999986112,
        ],
        [0, 1.9444526359919372e-185, 0.2689414213699951, 0.7310585786300048],
    ]
    # exp(-749) = 5e-326 is no normal number, and may be flushed.
    assert_is(jaxsoft.softmax(x), expected, rtol=1e-14, atol=1e-300)


def test_log_softmax():
    assert_is(jaxsoft.log_softmax(f32([1000.0, 1.0])), [0, -999])


@pytest.mark.usefixtures("x64")
def test_log_softmax_keeps_a_small_tail():
    log_p = jaxsoft.log_softmax(jnp.array([0.0, -40.0], jnp.float64))
    assert_is(log_p, [-4.248354255291589e-18, -40], rtol=1e-15)


@pytest.mark.parametrize("function", [jaxsoft.softmax, jaxsoft.log_softmax])
def test_one_included_class_has_no_gradient(function):
    x = f32([36.0, 10000.0])
    gradient = jax.grad(lambda x: function(x, where=x < 1000)[0])(x)
    assert_is(gradient, [0, 0])


def test_a_mask_compresses():
    x, mask = f32([5.5, 1.3, -4.2, 0.9]), np.array([True, False, True, True])
    p = jaxsoft.softmax(x, where=jnp.array(mask))
    assert_is(p[mask], jaxsoft.softmax(x[mask]))
    assert_is(p[1], 0)
    log_p = jaxsoft.log_softmax(x, where=jnp.array(mask))
    assert_is(log_p[mask], jaxsoft.log_softmax(x[mask]))
    assert_is(log_p[1], -INF)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jaxsoft.softmax, [0, 0, 0]),
        (jaxsoft.log_softmax, [-INF, -INF, -INF]),
        (jaxsoft.entropy, 0),
        (lambda x, where: jaxsoft.logmeanexp(x, -1, where), -INF),
        (lambda x, where: jaxsoft.logsumexp(x, -1, where=where), -INF),
        (lambda x, where: jaxsoft.cross_entropy(x, 1, where=where), INF),
        (lambda x, where: jaxsoft.kl_divergence(x, 2 * x, where=where), 0),
    ],
)
def test_nothing_included(function, expected):
    """The same for masked logits and for logits that are all -inf."""
    for x, mask in ((f32([1.0, 2.0, 3.0]), False), (f32([-INF] * 3), True)):
        mask = jnp.full(3, mask)

        @jax.jit
        def value_and_jacobians(x, mask):
            f = functools.partial(function, where=mask)
            return f(x), jax.jacrev(f)(x), jax.jacfwd(f)(x)

        value, backward, forward = value_and_jacobians(x, mask)
        assert_is(value, expected)
        assert_is(backward, 0)
        assert_is(forward, 0)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_log_softmax_jacobian_at_an_infinite_logit(jacobian):
    assert_is(jacobian(jaxsoft.log_softmax)(f32([1.0, -INF])), [[0, 0], [-1, 1]])


def test_infinite_logits_share():
    x = f32([INF, 1.0, INF])
    assert_is(jaxsoft.softmax(x), [0.5, 0, 0.5])
    assert_is(jaxsoft.log_softmax(x), [-np.log(2), -INF, -np.log(2)])
    assert_is(jax.grad(jaxsoft.logsumexp)(x), [0.5, 0, 0.5])
    assert_is(jaxsoft.entropy(x), np.log(2))


def test_temperature_zero():
    """The exact hard limit, with ties sharing equally; static or traced."""
    x = f32([5.0, 7.0, 7.0])
    for tau in (0.0, jnp.zeros(()), jnp.zeros(1)):
        assert_is(jaxsoft.logsumexp(x, -1, temperature=tau), 7)
        assert_is(jaxsoft.logmeanexp(x, -1, temperature=tau), 7)
        assert_is(jaxsoft.softmax(x, temperature=tau), [0, 0.5, 0.5])
        log_p = jaxsoft.log_softmax(x, temperature=tau)
        assert_is(log_p, [-INF, -np.log(2), -np.log(2)])
        assert_is(jaxsoft.entropy(x, temperature=tau), np.log(2))
        losses = jaxsoft.cross_entropy(
            jnp.stack([x, x]), jnp.array([1, 0]), temperature=tau
        )
        assert_is(losses, [np.log(2), INF])
    assert_is(jaxsoft.logsumexp(x, temperature=-0.0), 7)
    in_jit = jax.jit(lambda x, tau: jaxsoft.logsumexp(x, temperature=tau))
    assert_is(in_jit(x, 0.0), 7)


def test_derivative_in_temperature_is_the_entropy():
    x = f32([1.0, 2.0, 3.0])

    def slope(x, tau):
        return jax.grad(lambda t: jaxsoft.logsumexp(x, temperature=t))(f32(tau))

    for tau in (0.3, 1.0, 4.0):
        assert_is(slope(x, tau), jaxsoft.entropy(x, temperature=tau), rtol=2e-6)
    assert_is(slope(x, 1.0), 0.83239558183993887)
    assert_is(jaxsoft.entropy(x), 0.83239558183993887)
    for tau in (1.0, 1e-3, 1e-38, 0.0):  # a tie of two
        assert_is(slope(f32([3.0, 3.0]), tau), np.log(2))


def test_cross_entropy_of_the_articles():
    x = f32([2.0, 3.0, 4.0])
    loss, gradient = jax.value_and_grad(jaxsoft.cross_entropy)(x, 1)
    assert_is(loss, 1.4076, rtol=0, atol=5e-5)
    assert_is(gradient, [0.0900, -0.7553, 0.6652], rtol=0, atol=5e-5)
    probabilities = f32([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1], [0.4, 0.6, 0.0]])
    losses = jaxsoft.cross_entropy(jnp.log(probabilities), jnp.array([1, 1, 1]))
    assert_is(losses, [0.3567, 0.3567, 0.5108], rtol=0, atol=5e-5)


def test_softmax_with_squared_error():
    z, y = f32([1.0, 2.0, 3.0, 0.0, 1.0]), jax.nn.one_hot(3, 5)
    gradient = jax.grad(lambda z: jnp.mean((jaxsoft.softmax(z) - y) ** 2))(z)
    expected = [-0.00969502, -0.01434905, 0.0496989, -0.01595981, -0.00969502]
    # Half a unit of the last printed digit, and as much for float32.
    assert_is(gradient, expected, rtol=0, atol=1e-8)


CROSS_ENTROPY = [
    (
        [[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]],
        np.array([0, 1]),
        [0.27612970554553754, 2.9517987958544252],
    ),
    (
        [[10.0, 1.0, -2.0], [1.0, 4.0, 0.2]],
        np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], np.float32),
        [9.0001297, 3.0696733],
    ),
    (
        [[4.0, 2.0, 1.0], [0.0, 5.0, 1.0]],
        np.array([[1.0, 0.0, 0.0], [0.0, 0.8, 0.2]], np.float32),
        [0.16984601955628565, 0.82474489013882265],
    ),
    ([[1e8] * 3], np.array([0]), [LOG3]),
    ([[1000.0] * 3], np.array([2]), [LOG3]),
    ([[-1000.0] * 3], np.array([1]), [LOG3]),
    ([[20.0, 0.0]], np.array([0]), [2.0611536203143807e-9]),
]


@pytest.mark.parametrize(("logits", "labels", "expected"), CROSS_ENTROPY)
def test_cross_entropy(logits, labels, expected):
    assert_is(jaxsoft.cross_entropy(f32(logits), labels), expected)


class TestPyTorchRules:
    logits = np.array([[1, 2, 3], [1, 2, 3], [3, 0, 0]], np.float32)
    labels = np.array([0, -100, 2])
    TABLE = (
        ({}, [2.4076059644443803, 0, 3.0949229564209609], 2.7512644604326706),
        (
            {"class_weight": np.array([1, 2, 4], np.float32)},
            [2.4076059644443803, 0, 12.379691825683844],
            2.9574595580256448,
        ),
        (
            {"label_smoothing": 0.1},
            [2.3076059644443803, 0, 2.9949229564209609],
            2.6512644604326706,
        ),
    )

    @pytest.mark.parametrize(("options", "none", "mean"), TABLE)
    def test_reductions(self, options, none, mean):
        def loss(reduction):
            return jaxsoft.cross_entropy(
                self.logits, self.labels, reduction=reduction, **options
            )

        assert_is(loss("none"), none)
        assert_is(loss("sum"), np.sum(none))
        assert_is(loss("mean"), mean)

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_all_rows_ignored(self, reduction):
        labels = np.full(3, -100)

        def loss(x):
            return jaxsoft.cross_entropy(x, labels, reduction=reduction)

        assert_is(loss(self.logits), 0)
        assert_is(jax.grad(lambda x: jnp.sum(loss(x)))(self.logits), 0)


def test_cross_entropy_over_two_axes():
    logits = jnp.arange(24.0).reshape(1, 2, 3, 4)
    labels = jnp.array([[6, 11]])
    losses = jaxsoft.cross_entropy(logits, labels, axis=(2, 3))
    # Printed by float32 arithmetic at logits of 23, whose roundings are 1e-6.
    assert_is(losses, [[5.4586687, 0.4586697]], rtol=0, atol=1e-6)
    # log sum_{k < 12} exp(-k), and 5 above it.
    assert_is(losses, [[5.45866900116, 0.45866900116]])


def test_cross_entropy_softcap():
    loss, gradient = jax.value_and_grad(
        lambda x: jaxsoft.cross_entropy(x, 0, softcap=30.0)
    )(f32([1.0, 2.0, 3.0]))
    assert_is(loss, 2.4005999247358114)
    expected = [-0.90832682844883666, 0.24472293644884848, 0.65693299119290055]
    assert_is(gradient, expected)


def test_cross_entropy_temperature():
    loss = jaxsoft.cross_entropy(f32([1.0, 2.0, 3.0]), 0, temperature=2.0)
    assert_is(loss, 1.6802696706417346)


def test_cross_entropy_hessian():
    x = f32([1.0, 2.0, 3.0])
    p = jaxsoft.softmax(x)
    hessian = jax.hessian(jaxsoft.cross_entropy)(x, 0)
    assert_is(hessian, jnp.diag(p) - jnp.outer(p, p), rtol=2e-6)


def test_a_sure_model_still_learns():
    """The gradient at the label is minus the other probabilities, not p - 1 = 0."""
    gradient = jax.grad(jaxsoft.cross_entropy)(f32([20.0, 0.0]), 0)
    assert_is(gradient, [-2.0611536181902037e-9, 2.0611536181902037e-9])


BINARY = [(-INF, 0.0, 0.0), (INF, 0.0, INF), (-INF, 1.0, INF), (INF, 1.0, 0.0)]


@pytest.mark.parametrize(("logit", "label", "expected"), [*BINARY, (50.0, 0.5, 25.0)])
def test_binary_cross_entropy(logit, label, expected):
    assert_is(jaxsoft.binary_cross_entropy(f32(logit), f32(label)), expected)


def test_kl_divergence():
    target, logits = jnp.log(f32([0.2, 0.8])), f32([1.0, 2.0])
    # The logarithms are float32, so that the targets are 0.2 and 0.8 to a rounding.
    kl = jaxsoft.kl_divergence(target, logits)
    assert_is(kl, 0.012859263980034955, rtol=2e-6)
    optax_order = jaxsoft.kl_divergence(target, jaxsoft.log_softmax(logits))
    assert_is(optax_order, 0.012859263980034955, rtol=2e-6)


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
    assert_is(jaxsoft.circle_loss(positives, negatives), expected)
    for nothing in ((positives, negatives[:0]), (positives[:0], negatives)):
        assert_is(jaxsoft.circle_loss(*nothing), 0)
