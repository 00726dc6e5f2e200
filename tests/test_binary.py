"""binary, multi-label and circle loss: labels, edges, weights, detached weights."""

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

ROUNDINGS = 32 * np.finfo(np.float32).eps


@pytest.fixture
def logits(rng):
    return jnp.asarray(3 * rng.normal(size=(4, 5)), jnp.float32)


DTYPES = ["float32", "bool", "int8", "uint32", "int32", "float16"]


@pytest.mark.parametrize("name", ["binary_cross_entropy", "multilabel_cross_entropy"])
def test_labels_of_every_dtype(logits, rng, name):
    yes = jnp.asarray(rng.random((4, 5)) < 0.5)
    loss = getattr(jaxsoft, name)
    expected, *others = jax.jit(lambda x, labels: [loss(x, y) for y in labels])(
        logits, [yes.astype(dtype) for dtype in DTYPES]
    )
    for dtype, given in zip(DTYPES[1:], others):
        np.testing.assert_array_equal(given, expected, f"{name}, {dtype}")


def test_binary_keeps_the_digits_of_a_sure_model():
    """Loss and gradient are exp(-|x|) where the label is right, not 0."""
    x = np.linspace(20, 85, 14).astype(np.float32)
    value_and_gradient = jax.value_and_grad(jaxsoft.binary_cross_entropy)
    of_many = as_users_have_it(jax.vmap(value_and_gradient, (0, None)))
    for sign, label in ((1, 1.0), (-1, 0.0)):
        loss, gradient = of_many(sign * x, jnp.float32(label))
        expected = np.exp(-x.astype(np.float64))
        np.testing.assert_allclose(loss, expected, rtol=ROUNDINGS)
        np.testing.assert_allclose(gradient, -sign * expected, rtol=ROUNDINGS)


def test_binary_weights_and_means(logits, rng):
    """pos_weight multiplies the yes part, and never enters the mean's divisor."""
    yes = jnp.asarray(rng.random((4, 5)) < 0.5)
    v = jnp.asarray(rng.uniform(0.5, 2, (4, 1)), jnp.float32)
    w = jnp.arange(1.0, 6)

    @jax.jit
    def everything(logits):
        loss = functools.partial(jaxsoft.binary_cross_entropy, logits, yes)
        weighted = functools.partial(loss, pos_weight=w, sample_weight=v)
        nothing = loss(sample_weight=0.0, reduction="mean")
        return loss(), weighted(), weighted(reduction="mean"), nothing

    plain, rows, mean, nothing = everything(logits)
    expected = v * jnp.where(yes, w[None], 1) * plain
    np.testing.assert_allclose(rows, expected, rtol=ROUNDINGS)
    expected = jnp.sum(rows) / jnp.sum(jnp.broadcast_to(v, (4, 5)))
    np.testing.assert_allclose(mean, expected, rtol=ROUNDINGS)
    assert nothing == 0


def test_a_weight_of_0_removes_an_infinite_loss():
    x = jnp.array([-jnp.inf, 1.0])
    loss = jaxsoft.binary_cross_entropy(
        x, jnp.ones(2), pos_weight=jnp.array([0.0, 1.0])
    )
    assert loss[0] == 0


def test_multilabel_edges():
    """A right class out of sight adds 0, a wrong one is infinite, none is 0."""
    inf = jnp.inf
    loss = jax.jit(jaxsoft.multilabel_cross_entropy)
    np.testing.assert_allclose(
        loss(jnp.array([[inf, -inf], [-inf, -inf]]), jnp.array([[1, 0], [1, 0]])),
        [0, inf],
    )
    no_yes = loss(jnp.array([[0.0, 0.0]]), jnp.array([[0, 0]]))
    np.testing.assert_allclose(no_yes, [np.log(3)], rtol=ROUNDINGS)


SETS = {"positives": (3, 4), "negatives": (3, 6)}


@pytest.fixture
def similarities(rng):
    return [jnp.asarray(rng.uniform(-0.9, 0.9, s), jnp.float32) for s in SETS.values()]


@jax.jit
def circle_gradients(positives, negatives, **options):
    loss, pull = jax.vjp(
        lambda *sets: jaxsoft.circle_loss(*sets, **options), positives, negatives
    )
    return loss, pull(jnp.ones_like(loss))


def test_circle_weights_are_detached(similarities):
    """By default they are constants of the derivative, as in the paper."""
    m, gamma = 0.25, 8.0
    loss, gradients = circle_gradients(*similarities, margin=m, scale=gamma)
    seen = [np.asarray(s) for s in similarities]
    weights = oracle.circle_weights(*seen, m)

    def meaning(p, n):
        return oracle.circle_loss(p, n, margin=m, scale=gamma, weights=weights)

    np.testing.assert_allclose(loss, oracle.rounded(meaning(*seen)), rtol=ROUNDINGS)
    expected = oracle.pullback(meaning, seen, np.ones(3))
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(
            gradient, oracle.rounded(wanted), rtol=ROUNDINGS, atol=ROUNDINGS
        )


def test_circle_masks_compress(similarities):
    positives, negatives = similarities
    keep_p, keep_n = jnp.arange(4) != 1, jnp.arange(6) < 4
    expected = circle_gradients(positives[:, keep_p], negatives[:, keep_n])
    for junk in (0.0, jnp.nan, jnp.inf):
        loss, gradients = circle_gradients(
            jnp.where(keep_p, positives, junk),
            jnp.where(keep_n, negatives, junk),
            where_positive=keep_p,
            where_negative=keep_n,
        )
        kept = tuple(g[:, keep] for g, keep in zip(gradients, (keep_p, keep_n)))
        chex.assert_trees_all_close((loss, kept), expected, rtol=ROUNDINGS)
        for gradient, keep in zip(gradients, (keep_p, keep_n)):
            np.testing.assert_array_equal(gradient[:, ~keep], 0)


@pytest.mark.parametrize("empty", ["positives", "negatives"])
def test_circle_without_positives_or_negatives(similarities, empty):
    """0 with gradient 0, whether they are absent or masked."""
    positives, negatives = similarities
    absent = {"positives": positives, "negatives": negatives}
    absent[empty] = absent[empty][:, :0]
    mask = {f"where_{empty.removesuffix('s')}": jnp.zeros((3, 1), bool)}
    for sets, options in ((list(absent.values()), {}), (similarities, mask)):
        loss, gradients = circle_gradients(*sets, **options)
        np.testing.assert_array_equal(loss, 0)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


def test_the_second_derivative_keeps_its_digits():
    """p (1 - p), whichever of the two is small."""
    x, labels = np.float32([20, -20, 12]), np.float32([0, 1, 0.5])
    second = jax.vmap(jax.grad(jax.grad(jaxsoft.binary_cross_entropy)))
    second = as_users_have_it(second)(x, labels)
    small = np.exp(-abs(np.float64(x))) / (1 + np.exp(-abs(np.float64(x))))
    np.testing.assert_allclose(second, small * (1 - small), rtol=1e-6)


@pytest.mark.parametrize("detach_weights", [True, False])
def test_a_circle_loss_of_infinite_similarities_has_no_nan(detach_weights):
    """Value and both modes, in all combinations of two positives and two negatives."""
    values = [-np.inf, -1e30, -2.0, -0.25, 0.0, 0.75, 1.25, 1e30, np.inf]
    points = np.array(list(itertools.product(values, repeat=4)), np.float32)

    @jax.jit
    def everything(positives, negatives):
        def of(positives, negatives):
            return jaxsoft.circle_loss(
                positives, negatives, detach_weights=detach_weights
            )

        given = positives, negatives
        both = jax.jvp(of, given, jax.tree.map(jnp.ones_like, given))
        value, pull = jax.vjp(of, *given)
        return *both, *pull(jnp.ones_like(value))

    for result in everything(points[:, :2], points[:, 2:]):
        bad = np.isnan(np.asarray(result)).reshape(len(points), -1).any(1)
        assert not np.any(bad), points[bad][:3]
