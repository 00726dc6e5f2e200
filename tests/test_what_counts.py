"""What counts in a loss: rows that do not, whatever is in them, and the mean of those
that do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from laws import assert_close, quickly

import jaxsoft

X = np.array([[1, 2, 3], [3, 1, 1], [0, 1, 0], [2, 0, 2]], np.float32)
LABELS = np.array([2, 1, 0, 1], np.int32)
Q = np.array([[0.2, 0.3, 0.5], [0, 1, 0], [1, 0, 0], [0.5, 0.5, 0]], np.float32)
CLASS_WEIGHT = np.array([0.5, 1, 2], np.float32)
DEAD = np.array([False, True, False, True])
LIVE = ~DEAD

# Losses of logits and of what else there is in a row, and the latter.
LOSSES: dict[str, tuple[Any, Any]] = {
    "indices": (jaxsoft.cross_entropy, LABELS),
    "all options": (
        functools.partial(
            jaxsoft.cross_entropy,
            class_weight=CLASS_WEIGHT,
            label_smoothing=0.1,
            focal_gamma=0.5,
            z_loss=0.01,
            softcap=30.0,
            temperature=2.0,
        ),
        LABELS,
    ),
    "probabilities": (jaxsoft.cross_entropy, Q),
    "kl_divergence": (jaxsoft.kl_divergence, np.float32(2 * Q)),
    "jensen_shannon": (jaxsoft.jensen_shannon, np.float32(2 * Q)),
    "binary": (jaxsoft.binary_cross_entropy, Q),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def spoilt(name: str, bad: float) -> tuple[np.ndarray, np.ndarray]:
    """The dead rows with logits that are bad, and with labels that are invalid."""
    _, labels = LOSSES[name]
    x = np.where(DEAD[:, None], np.float32(bad), X)
    if labels.ndim == 1:
        return x, np.where(DEAD, -1, labels)
    return x, np.where(DEAD[:, None], np.float32(bad), labels)


def weights_for(name: str, weight: Any) -> np.ndarray:
    weight = np.asarray(weight)
    return np.tile(weight[:, None], 3) if name == "binary" else weight


@every_loss
def test_a_row_of_weight_0_counts_for_nothing(name):
    """Value and gradient, both modes, in a mean; booleans are weights."""
    loss, _ = LOSSES[name]

    @quickly
    def of(x, labels, weight):
        def mean(x):
            return loss(x, labels, sample_weight=weight, reduction="mean")

        rows = loss(x, labels, sample_weight=weight)
        tangent = jax.jvp(mean, (x,), (jnp.ones_like(x),))[1]
        return rows, jax.value_and_grad(mean)(x), tangent

    weight = weights_for(name, LIVE)
    wanted = of(X, LOSSES[name][1], weight)
    for bad in (np.nan, np.inf, -np.inf):
        found = of(*spoilt(name, bad), weight)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_array_equal(a, b, f"{name}, {bad}")
    assert np.all(np.asarray(wanted[1][1])[DEAD] == 0), name
    as_numbers = of(X, LOSSES[name][1], np.float32(weight))
    np.testing.assert_array_equal(as_numbers[1][0], wanted[1][0], name)


@every_loss
def test_the_derivative_in_a_weight_of_0_is_the_loss(name):
    loss, labels = LOSSES[name]

    @quickly
    def of(weight):
        return jax.grad(lambda w: jnp.sum(loss(X, labels, sample_weight=w)))(weight)

    zero, one = (weights_for(name, np.full(4, v, np.float32)) for v in (0, 1))
    np.testing.assert_array_equal(of(zero), of(one), name)
    np.testing.assert_allclose(of(zero), loss(X, labels), 1e-6, err_msg=name)


MASKED = {
    **LOSSES,
    "multilabel": (jaxsoft.multilabel_cross_entropy, np.float32(Q > 0.4)),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_row_without_any_class_counts_for_nothing(name):
    loss, labels = MASKED[name]

    @quickly
    def of(x, labels, where):
        def mean(x):
            return loss(x, labels, where=where, reduction="mean")

        return loss(x, labels, where=where), jax.value_and_grad(mean)(x)

    where = np.tile(LIVE[:, None], 3)
    rows, (mean, gradient) = of(X, labels, where)
    rest = of(X[LIVE], labels[LIVE], np.ones((2, 3), bool))
    assert np.all(np.asarray(rows)[DEAD] == 0), name
    assert np.all(np.asarray(gradient)[DEAD] == 0), name
    np.testing.assert_allclose(mean, rest[1][0], 1e-6, err_msg=name)
    assert_close(np.asarray(gradient)[LIVE], rest[1][1], 4, name)


def test_a_head_ignores_tokens_without_any_class():
    where, weight = np.tile(LIVE[:, None], 3), jnp.eye(3)
    for chunk_bytes in (None, 4):
        mean = jaxsoft.linear_cross_entropy(
            X, weight, LABELS, where=where, reduction="mean", chunk_bytes=chunk_bytes
        )
        rest = jaxsoft.cross_entropy(X[LIVE], LABELS[LIVE], reduction="mean")
        np.testing.assert_allclose(mean, rest, 1e-6)


@pytest.mark.parametrize("head", [False, True], ids=["dense", "head"])
def test_class_weights_do_not_rescale_the_z_loss(head):
    """Of a mean: its divisor there is that of the sample weights."""
    labels = np.where(np.arange(4) == 3, -100, LABELS)
    sample_weight = np.array([1, 0.5, 2, 1], np.float32)
    options = {"sample_weight": sample_weight, "reduction": "mean"}

    def of(**more):
        if not head:
            return jaxsoft.cross_entropy(X, labels, **options, **more)
        given = {"chunk_bytes": None, **options, **more}
        return jaxsoft.linear_cross_entropy(X, jnp.eye(3), labels, **given)

    lse = np.log(np.sum(np.exp(np.float64(X)), 1))
    part = 0.1 * np.sum((sample_weight * lse**2)[:3]) / np.sum(sample_weight[:3])
    more = [{}, {"chunk_bytes": 4}] if head else [{}]
    for chunks in more:
        for weight in (CLASS_WEIGHT, np.full(3, 1 / 3, np.float32)):
            whole = of(class_weight=weight, z_loss=0.1, **chunks)
            np.testing.assert_allclose(
                whole, of(class_weight=weight, **chunks) + part, 1e-6
            )
        nothing = of(class_weight=np.zeros(3, np.float32), z_loss=0.1, **chunks)
        np.testing.assert_allclose(nothing, part, 1e-6)
        neutral = of(class_weight=np.ones(3, np.float32), z_loss=0.1, **chunks)
        np.testing.assert_array_equal(neutral, of(z_loss=0.1, **chunks))


@pytest.mark.parametrize("labels", ["indices", "probabilities"])
def test_loss_weight_is_what_a_mean_divides_by(labels):
    """Over microbatches: the sum of all losses over the sum of all weights."""
    given = np.where(np.arange(4) == 2, -100, LABELS) if labels == "indices" else Q
    where = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    sample_weight = np.array([1, 0.5, 2, 1], np.float32)
    options = {"class_weight": CLASS_WEIGHT}
    loss = weight = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        some = {"where": where[rows], "sample_weight": sample_weight[rows], **options}
        loss += jaxsoft.cross_entropy(X[rows], given[rows], **some).sum()
        weight += jaxsoft.loss_weight(given[rows], **some).sum()
    every = {"where": where, "sample_weight": sample_weight, **options}
    mean = jaxsoft.cross_entropy(X, given, **every, reduction="mean")
    np.testing.assert_allclose(loss / weight, mean, 1e-6)
    along = jaxsoft.loss_weight(
        given if labels == "indices" else given.T,
        axis=0,
        where=where.T,
        sample_weight=sample_weight,
    )
    flat = jaxsoft.loss_weight(given, where=where, sample_weight=sample_weight)
    np.testing.assert_array_equal(along, flat)
    if labels == "indices":
        np.testing.assert_array_equal(jaxsoft.loss_weight(given), [1, 1, 0, 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_smoothing_over_the_smallest_logits_is_finite(dtype):
    """Two classes at -3.4e38 add up to more than the largest float32, but their share
    of the loss does not."""
    with jax.enable_x64(dtype == "float64"):
        least = float(jnp.finfo(dtype).min)
        x = jnp.array([[0, least, least, 1, 2]], dtype)
        wanted = -0.1 * 2 * (least / 5)
        labels = jnp.array([0], jnp.int32)
        dense = jaxsoft.cross_entropy(x, labels, label_smoothing=0.1)
        np.testing.assert_allclose(dense, [wanted], 1e-6)
        gradient = jax.grad(
            lambda x: jaxsoft.cross_entropy(x, labels, label_smoothing=0.1)[0]
        )(x)
        assert np.all(np.isfinite(np.asarray(gradient, np.float64)))
        for chunk_bytes in (None, 8):
            head = jaxsoft.linear_cross_entropy(
                jnp.array([[1, 0]], dtype),
                jnp.concatenate([x, 0 * x]).T,
                labels,
                label_smoothing=0.1,
                chunk_bytes=chunk_bytes,
            )
            np.testing.assert_allclose(head, [wanted], 1e-6)


def focal_by_its_formula(p: np.ndarray, gamma: float) -> np.ndarray:
    return -((1 - p) ** gamma) * np.log(p)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_losses(gamma):
    x = np.float32(np.random.default_rng(3).normal(size=(8, 3)) * 3)
    labels = np.arange(8, dtype=np.int32) % 3
    p = np.exp(np.float64(x)) / np.sum(np.exp(np.float64(x)), 1, keepdims=True)
    p = np.take_along_axis(p, labels[:, None], 1)[:, 0]
    loss = functools.partial(jaxsoft.cross_entropy, labels=labels)
    assert_close(loss(x, focal_gamma=gamma), focal_by_its_formula(p, gamma), 8, "value")
    given = {"focal_gamma": gamma, "class_weight": CLASS_WEIGHT}
    weighted = CLASS_WEIGHT[labels] * focal_by_its_formula(p, gamma)
    assert_close(loss(x, **given), weighted, 8, "with class weights")
    head = jaxsoft.linear_cross_entropy(x, jnp.eye(3), labels, focal_gamma=gamma)
    assert_close(head, focal_by_its_formula(p, gamma), 8, "head")
    yes = 1 / (1 + np.exp(-np.float64(x)))
    binary = jaxsoft.binary_cross_entropy(x, np.ones_like(x), focal_gamma=gamma)
    assert_close(binary, focal_by_its_formula(yes, gamma), 8, "yes")
    binary = jaxsoft.binary_cross_entropy(x, np.zeros_like(x), focal_gamma=gamma)
    assert_close(binary, focal_by_its_formula(1 - yes, gamma), 8, "no")


def test_a_focal_loss_of_a_sure_model():
    """With 1 - p = 3e-40 and below it, where p rounds to 1."""

    def loss(gap, gamma):
        x = jnp.stack([gap, jnp.zeros(())])
        return jaxsoft.cross_entropy(x, 0, focal_gamma=gamma)

    of, slopes_of = quickly(loss), quickly(jax.grad(loss, argnums=(0, 1)))

    for gap, gamma in ((20.0, 0.5), (20.0, 2.0), (3.0, 0.5)):
        rest = np.exp(-gap) / (1 + np.exp(-gap))
        nll = np.log1p(np.exp(-gap))
        np.testing.assert_allclose(of(gap, gamma), rest**gamma * nll, 1e-5)
        slope = -(rest**gamma) * rest - gamma * rest**gamma * (1 - rest) * nll
        slopes = slopes_of(gap, gamma)
        np.testing.assert_allclose(slopes[0], slope, 1e-5)
        np.testing.assert_allclose(slopes[1], rest**gamma * nll * np.log(rest), 1e-5)
    for gap in (200.0, 1000.0, -1000.0):
        for gamma in (0.0, 0.5, 1.0, 2.0):
            slopes = slopes_of(gap, gamma)
            assert np.all(np.isfinite(slopes)), (gap, gamma)
    np.testing.assert_array_equal(of(20.0, 0.0), jaxsoft.cross_entropy([20.0, 0.0], 0))


def test_binary_labels_outside_0_and_1():
    """NaN in loss and gradient, and an error where they are checked."""
    x = np.array([1, 2, 3, 4], np.float32)
    labels = np.array([0.5, 2, -0.1, 1], np.float32)
    bad = np.array([False, True, True, False])
    loss, gradient = jax.value_and_grad(
        lambda x: jnp.sum(jaxsoft.binary_cross_entropy(x, labels))
    )(x)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(gradient), bad)
    counted = jaxsoft.binary_cross_entropy(x, labels, where=~bad, reduction="mean")
    good = jaxsoft.binary_cross_entropy(x[~bad], labels[~bad], reduction="mean")
    np.testing.assert_allclose(counted, good, 1e-6)
    checked = checkify.checkify(
        functools.partial(jaxsoft.binary_cross_entropy, check_labels=True)
    )
    assert checked(x, np.abs(np.float32(bad)))[0].get() is None
    message = str(checked(x, labels)[0].get())
    assert "labels must lie in [0, 1]; got label 2" in message


def test_labels_are_checked_only_where_it_is_asked_for():
    """A check is an effect, with which JAX calls a jitted function through Python."""
    loss = functools.partial(jaxsoft.cross_entropy, X)
    assert not jax.make_jaxpr(loss)(LABELS).effects
    checking = functools.partial(loss, check_labels=True)
    assert jax.make_jaxpr(checking)(LABELS).effects


def test_results_of_several_arrays_are_serialized():
    """By `jax.export`, which must know every kind of tuple."""

    def results(x, labels):
        metrics = jaxsoft.cross_entropy(x, labels, with_metrics=True)
        return metrics, jaxsoft.linear_log_probs(x, jnp.eye(3), labels)

    with jaxsoft.use_cpu_kernels(False):
        stored = jax.export.export(jax.jit(results))(X, LABELS).serialize()
        wanted = jax.jit(results)(X, LABELS)
    found = jax.export.deserialize(stored).call(X, LABELS)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_array_equal(a, b)
