"""binary, multi-label and circle loss: labels, edges, weights, detached weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxsoft

ROUNDINGS = 32 * np.finfo(np.float32).eps


@pytest.fixture
def logits(rng):
    return jnp.asarray(3 * rng.normal(size=(4, 5)), jnp.float32)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "int32", "float16"])
def test_labels_of_every_dtype(logits, rng, dtype):
    yes = jnp.asarray(rng.random((4, 5)) < 0.5)
    for loss in (jaxsoft.binary_cross_entropy, jaxsoft.multilabel_cross_entropy):
        given = loss(logits, yes.astype(dtype))
        np.testing.assert_array_equal(given, loss(logits, yes.astype(jnp.float32)))


def test_binary_keeps_the_digits_of_a_sure_model():
    """Loss and gradient are exp(-|x|) where the label is right, not 0."""
    x = np.linspace(20, 85, 14).astype(np.float32)
    for sign, label in ((1, 1.0), (-1, 0.0)):
        loss, gradient = jax.vmap(
            jax.value_and_grad(jaxsoft.binary_cross_entropy), (0, None)
        )(sign * x, jnp.float32(label))
        expected = np.exp(-x.astype(np.float64))
        np.testing.assert_allclose(loss, expected, rtol=ROUNDINGS)
        np.testing.assert_allclose(gradient, -sign * expected, rtol=ROUNDINGS)


def test_binary_is_the_softmax_loss_of_two_classes(logits, rng):
    q = jnp.asarray(rng.random((4, 5)), jnp.float32)
    two = jnp.stack([jnp.zeros_like(logits), logits], axis=-1)
    of_two = jaxsoft.cross_entropy(two, jnp.stack([1 - q, q], axis=-1))
    binary = jaxsoft.binary_cross_entropy(logits, q)
    chex.assert_trees_all_close(binary, of_two, rtol=ROUNDINGS)


def test_binary_against_optax(logits, rng):
    q = jnp.asarray(rng.random((4, 5)), jnp.float32)
    theirs = optax.sigmoid_binary_cross_entropy(logits, q)
    ours = jaxsoft.binary_cross_entropy(logits, q)
    chex.assert_trees_all_close(ours, theirs, rtol=ROUNDINGS)


def test_binary_weights_and_means(logits, rng):
    """pos_weight multiplies the yes part, and never enters the mean's divisor."""
    yes = jnp.asarray(rng.random((4, 5)) < 0.5)
    v = jnp.asarray(rng.uniform(0.5, 2, (4, 1)), jnp.float32)
    w = jnp.arange(1.0, 6)
    plain = jaxsoft.binary_cross_entropy(logits, yes)
    options = {"pos_weight": w, "sample_weight": v}
    rows = jaxsoft.binary_cross_entropy(logits, yes, **options)
    expected = v * jnp.where(yes, w[None], 1) * plain
    chex.assert_trees_all_close(rows, expected, rtol=ROUNDINGS)
    mean = jaxsoft.binary_cross_entropy(logits, yes, reduction="mean", **options)
    expected = jnp.sum(rows) / jnp.sum(jnp.broadcast_to(v, (4, 5)))
    chex.assert_trees_all_close(mean, expected, rtol=ROUNDINGS)
    nothing = jaxsoft.binary_cross_entropy(
        logits, yes, sample_weight=0.0, reduction="mean"
    )
    assert nothing == 0


def test_a_weight_of_0_removes_an_infinite_loss():
    x = jnp.array([-jnp.inf, 1.0])
    loss = jaxsoft.binary_cross_entropy(
        x, jnp.ones(2), pos_weight=jnp.array([0.0, 1.0])
    )
    assert loss[0] == 0


def test_multilabel_axes_and_masks(logits, rng):
    yes = jnp.asarray(rng.random((4, 5)) < 0.5)
    loss = jaxsoft.multilabel_cross_entropy(logits, yes)
    along_0 = jaxsoft.multilabel_cross_entropy(logits.T, yes.T, axis=0)
    chex.assert_trees_all_close(along_0, loss, rtol=ROUNDINGS)
    where = jnp.arange(5) != 2
    compressed = jaxsoft.multilabel_cross_entropy(logits[:, where], yes[:, where])
    masked = jaxsoft.multilabel_cross_entropy(logits, yes, where=where)
    chex.assert_trees_all_close(masked, compressed, rtol=ROUNDINGS)
    mean = jaxsoft.multilabel_cross_entropy(logits, yes, reduction="mean")
    chex.assert_trees_all_close(mean, jnp.mean(loss), rtol=ROUNDINGS)


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


def test_circle_weights_are_detached(similarities):
    """By default they are constants of the derivative, as in the paper."""
    m, gamma = 0.25, 8.0
    loss, pull = jax.vjp(
        lambda p, n: jaxsoft.circle_loss(p, n, margin=m, scale=gamma), *similarities
    )
    seen = [np.asarray(s) for s in similarities]
    weights = oracle.circle_weights(*seen, m)

    def meaning(p, n):
        return oracle.circle_loss(p, n, margin=m, scale=gamma, weights=weights)

    np.testing.assert_allclose(loss, oracle.rounded(meaning(*seen)), rtol=ROUNDINGS)
    expected = oracle.pullback(meaning, seen, np.ones(3))
    for gradient, wanted in zip(pull(jnp.ones(3)), expected, strict=True):
        np.testing.assert_allclose(
            gradient, oracle.rounded(wanted), rtol=ROUNDINGS, atol=ROUNDINGS
        )


def test_circle_masks_compress(similarities):
    positives, negatives = similarities
    keep_p, keep_n = jnp.arange(4) != 1, jnp.arange(6) < 4

    def value_and_gradients(positives, negatives, **masks):
        loss, pull = jax.vjp(
            lambda *sets: jaxsoft.circle_loss(*sets, **masks), positives, negatives
        )
        return loss, *pull(jnp.ones_like(loss))

    expected = value_and_gradients(positives[:, keep_p], negatives[:, keep_n])
    for junk in (0.0, jnp.nan, jnp.inf):
        loss, *gradients = value_and_gradients(
            jnp.where(keep_p, positives, junk),
            jnp.where(keep_n, negatives, junk),
            where_positive=keep_p,
            where_negative=keep_n,
        )
        kept = [g[:, keep] for g, keep in zip(gradients, (keep_p, keep_n))]
        chex.assert_trees_all_close((loss, *kept), expected, rtol=ROUNDINGS)
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
        loss, pull = jax.vjp(
            lambda p, n: jaxsoft.circle_loss(p, n, **options),  # noqa: B023
            *sets,
        )
        np.testing.assert_array_equal(loss, 0)
        for gradient in pull(jnp.ones(3)):
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("x", "label"), [(20.0, 0.0), (-20.0, 1.0), (12.0, 0.5)])
def test_the_second_derivative_keeps_its_digits(x, label):
    """p (1 - p), whichever of the two is small."""

    def loss(x):
        return jaxsoft.binary_cross_entropy(x, label)

    small = np.exp(-abs(x)) / (1 + np.exp(-abs(x)))
    second = jax.grad(jax.grad(loss))(x)
    np.testing.assert_allclose(second, small * (1 - small), rtol=1e-6)
