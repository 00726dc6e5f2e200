"""Numbers of scipy's own tests, and of PyTorch: here they come out too. Beside optax
and jax.nn themselves: test_optax.py, test_drop_in.py.

Each table names its source. The numbers of PyTorch were computed once, by torch 2.13 in
float64; torch is not needed here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

INF, NAN = np.inf, np.nan
# float64 against float64, over a few operations each.
RTOL = 1e-13

pytestmark = pytest.mark.usefixtures("x64")


def f64(values):
    return jnp.asarray(values, jnp.float64)


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split()]


def assert_is(actual, expected, rtol=RTOL, atol=0.0):
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol
    )


# scipy 1.17, scipy/special/tests/test_logsumexp.py; sums in closed form are written as
# such.


LOGSUMEXP = [
    ([], None, -INF),
    ([INF], None, INF),
    ([-INF], None, -INF),
    ([-INF, -INF], None, -INF),
    ([NAN], None, NAN),
    (np.arange(200.0), None, 199 - np.log1p(-np.exp(-1.0))),
    (np.full(1000, 10000), None, 10000 + np.log(1000)),
    ([[1e10, 1e-10], [-1e10, -INF]], -1, [1e10, -1e10]),
    ([[1e10, 1e-10], [-1e10, -INF]], (-1, -2), 1e10),
    (np.full((2, 1_000_000), np.log(1e-40)), 1, [np.log(1e-34)] * 2),
    (np.full((2, 1_000_000), np.log(1e-40)), None, np.log(2e-34)),
    ([0.0, -40.0], None, 4.248354255291589e-18),
]


def test_logsumexp_of_scipy():
    arrays = [f64(a) for a, _, _ in LOGSUMEXP]
    axes = [axis for _, axis, _ in LOGSUMEXP]
    given = jax.jit(lambda arrays: [*map(jaxsoft.logsumexp, arrays, axes)])(arrays)
    for case, actual in zip(LOGSUMEXP, given, strict=True):
        np.testing.assert_allclose(actual, case[2], RTOL, err_msg=str(case))


@jax.jit
def with_and_without_sign(a, b):
    with_sign = jaxsoft.logsumexp(a, b=b, return_sign=True)
    return *with_sign, jaxsoft.logsumexp(a, b=b)


NEGATIVE_SUM = [3.06409428, 0.37251854, 3.87471931], [1.88190708, 2.84174795]
WEIGHTED = [
    # The derivative of the geometric series, at 1/e and with its end cut off.
    (np.arange(200.0), 200 - np.arange(200.0), 199 - 2 * np.log1p(-np.exp(-1.0)), 1),
    ([1000, 1000], [1.2, 1.2], 1000 + np.log(2.4), 1),
    (np.full(10**5, np.log(1e-40)), np.linspace(1, 1000, 10**5), np.log(5.005e-33), 1),
    ([2, 1], [1, -1], np.log(np.e**2 - np.e), 1),
    ([1, 1, 1], [1, -1, -1], 1.0, -1),
    ([1, 1], [1, -1], -INF, 0),
    ([1, 10000], [1, 0], 1.0, 1),
    ([INF], [-1.0], INF, -1),
    (NEGATIVE_SUM[0], [*NEGATIVE_SUM[1], -3.85016884], NAN, -1),
    (NEGATIVE_SUM[0], [*NEGATIVE_SUM[1], -0.85016884], 1.2452165157907419, 1),
    ([-1000, -2], [1, 0], -1000.0, 1),
    ([INF, 2], [0, 1], 2.0, 1),
]


@pytest.mark.parametrize(("a", "b", "expected", "sign"), WEIGHTED)
def test_weighted_logsumexp_of_scipy(a, b, expected, sign):
    log_abs, its_sign, log_sum = with_and_without_sign(f64(a), f64(b))
    assert_is(its_sign, sign)
    if not np.isnan(expected):
        assert_is(log_abs, expected)
    assert_is(log_sum, NAN if sign < 0 else expected)


# PyTorch 2.13 in float64.

X = [
    [0.3, -1.2, 2.5, 0.7, -0.4],
    [1.9, 0.0, -0.6, 3.1, 0.2],
    [-2.2, 4.0, 1.1, 0.5, 0.9],
    [0.8, 0.8, -3.0, 6.5, 1.7],
]
Y = [2, -100, 0, 4]
Q = [
    [0.1, 0.2, 0.4, 0.2, 0.1],
    [0.0, 0.0, 0.5, 0.5, 0.0],
    [1.0, 0.0, 0.0, 0.0, 0.0],
    [0.3, 0.3, 0.1, 0.1, 0.2],
]

# cross_entropy by case: the losses, their mean, a row of the gradient of the mean.
TORCH = """\
labels, row 0
0.3044276737951488 0.0 6.324250288053941 4.814885193565591 3.8145210518048938
0.027240785483196056 0.006078240827434558 -0.08748487661229978 0.04063847656697968
0.01352737373469454

labels, weighted, row 3
0.6088553475902976 0.0 3.1621251440269704 14.444655580696775 3.3119338313298257
0.0017981067069089203 0.0017981067069089203 4.022503491330068e-05 0.5373954781553089
-0.54103191660404

labels, weighted, smoothed, row 3
0.9206782406384917 0.0 3.334792675712904 13.841571653597594 3.2903713763543614
-0.00010398675759531397 -0.001922168575777132 -0.007234379406109926 0.5068624770535157
-0.4976019423140334

probabilities, row 1
1.9144276737951489 2.204866422131348 6.324250288053941 5.344885193565591
3.9471073943865074
0.05280439868820029 0.00789788100067564 -0.12066555100634327 0.05031677767962134
0.00964649363784603

probabilities, weighted, row 2
2.762305661761996 4.321016238729859 3.1621251440269704 7.365839270991828
4.4028215788776635
-0.12477596131715218 0.11039484614105619 0.006074279912312555 0.003333635496769332
0.004973199767014114

probabilities, weighted, smoothed, row 0
2.8587835233930203 4.341693242397889 3.334792675712904 7.47063697486314
4.501476604091739
0.019858319089893137 -0.04250097037915262 0.11331553347957514 -0.024862279535488824
-0.0658106026548268
"""
TORCH_CASES = [case.partition("\n")[::2] for case in TORCH.split("\n\n")]


def labels_and_options(case: str):
    """Of the words that name a case."""
    options = {}
    if "weighted" in case:
        options["class_weight"] = f64([0.5, 1.0, 2.0, 1.5, 3.0])
    if "smoothed" in case:
        options["label_smoothing"] = f64(0.1)
    return jnp.asarray(Y) if "labels" in case else f64(Q), options


def linear_cross_entropy(hidden, labels, **options):
    """From logits that are never held: the head is the identity, two classes a chunk"""
    head = jnp.eye(5, dtype=jnp.float64)
    options["chunk_bytes"] = 32
    return jaxsoft.linear_cross_entropy(hidden, head, labels, **options)


@pytest.mark.parametrize(
    ("function", "cases"),
    [(jaxsoft.cross_entropy, TORCH_CASES), (linear_cross_entropy, TORCH_CASES[2:3])],
    ids=["cross_entropy", "linear_cross_entropy"],
)
def test_cross_entropy_of_torch(function, cases):
    @jax.jit
    def of_cases(x, cases):
        results = []
        for labels, options in cases:
            f = functools.partial(function, labels=labels, **options)
            mean = jax.value_and_grad(functools.partial(f, reduction="mean"))
            results.append((f(x), f(x, reduction="sum"), *mean(x)))
        return results

    results = of_cases(f64(X), [labels_and_options(case) for case, _ in cases])
    for (case, text), (rows, total, mean, slope) in zip(cases, results, strict=True):
        of_torch, row = numbers(text), int(case[-1])
        for actual, expected in (
            (rows, of_torch[:4]),
            (total, np.sum(of_torch[:4])),
            (mean, of_torch[4]),
        ):
            np.testing.assert_allclose(actual, expected, RTOL, err_msg=case)
        # Theirs subtracts from probabilities of about 1.
        assert_is(slope[row], of_torch[5:], rtol=1e-11, atol=1e-17)
        if "labels" in case:
            np.testing.assert_array_equal(slope[1], 0, case)


def test_cross_entropy_of_images_of_torch():
    """Classes along axis 1, as PyTorch has them."""
    first = [[1.0, -0.5], [0.2, 2.2], [-1.3, 0.4]]
    images = f64([first, [[0.0, 3.0], [1.5, -2.0], [0.6, 0.6]]])
    losses = jaxsoft.cross_entropy(images, jnp.array([[0, 2], [-100, 1]]), axis=1)
    expected = [[0.43798896513959945, 2.009048197688038], [0.0, 5.092994683190394]]
    assert_is(losses, expected)


def test_kl_divergence_of_torch():
    """kl_div(log_softmax(x), log_softmax(target), log_target=True)"""
    x = f64(X)
    expected = [0.22579150838727075, 2.3694680731613356, 3.115493092927356]
    expected.append(5.601322993172717)
    assert_is(jax.jit(jaxsoft.kl_divergence)(x, x[:, ::-1]), expected)


def test_binary_cross_entropy_of_torch():
    """binary_cross_entropy_with_logits"""
    x, y = f64([-3.0, -0.5, 0.0, 1.2, 40.0, -750.0]), f64([0.0, 1.0, 0.3, 1.0, 0, 1.0])
    losses = numbers("""
        0.048587351573742055 0.48703849209005334 1.1090354888959124
        0.26328246733803123 40.0 1500.0""")
    gradient = numbers("""
        0.04742587317756678 -0.3112296656009273 -0.1
        -0.23147521650098246 1.0 -2.0""")

    @jax.jit
    def everything(x):
        pos_weight = f64([2.0, 0.5, 3.0, 1.0, 1.0, 2.0])
        f = functools.partial(
            jaxsoft.binary_cross_entropy, labels=y, pos_weight=pos_weight
        )
        return f(x), jax.grad(lambda x: jnp.sum(f(x)))(x), f(x, reduction="mean")

    # The mean is not divided by pos_weight.
    for actual, expected in zip(everything(x), (losses, gradient, 256.984657299983)):
        assert_is(actual, expected)
