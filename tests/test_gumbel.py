"""gumbel_softmax: the softmax of noisy logits, of which the laws hold; what it adds is
the noise, the one-hot value, and the distribution of the samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_same_bits, assert_within, quickly

import jaxsoft

KEY = jax.random.key(5)
LOGITS = np.array(
    [
        [0.3, -1.0, 2.0, 0.5],
        [-np.inf, 1.0, 0.0, -1.0],
        [-np.inf, -np.inf, -np.inf, -np.inf],
        [1000.0, -1000.0, 1000.0, 0.0],
        [np.inf, 0.0, np.inf, 1.0],
    ],
    np.float32,
)
WHERE = np.array([True, True, True, False])
TEMPERATURE = np.array([[0.5], [2.0], [1.0], [-0.7], [0.0]], np.float32)
COTANGENT = np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)


def both_ways(f):
    """Value, gradients and tangent in logits and temperature."""

    def of(x, temperature):
        value, pull = jax.vjp(f, x, temperature)
        return (
            value,
            pull(COTANGENT),
            jax.jvp(f, (x, temperature), (jnp.sin(x), x[:, :1]))[1],
        )

    return quickly(of)


@functools.cache
def results(hard: bool):
    def draw(x, temperature):
        return jaxsoft.gumbel_softmax(
            KEY, x, where=WHERE[None], temperature=temperature, hard=hard
        )

    return both_ways(draw)(np.nan_to_num(LOGITS, posinf=30.0), TEMPERATURE)


def test_relaxed_is_the_softmax_of_noisy_logits():
    noise = jax.random.gumbel(KEY, LOGITS.shape, jnp.float32, mode="high")

    def softmax(x, temperature):
        return jaxsoft.softmax(x + noise, where=WHERE[None], temperature=temperature)

    wanted = both_ways(softmax)(np.nan_to_num(LOGITS, posinf=30.0), TEMPERATURE)
    for a, b in zip(
        jax.tree.leaves(results(False)), jax.tree.leaves(wanted), strict=True
    ):
        assert_within(a, b, 1e-6, "relaxed sample")


def test_hard_is_one_hot_with_the_relaxed_derivatives():
    relaxed, hard = results(False), results(True)
    one_hot = np.asarray(hard[0])
    assert set(np.unique(one_hot)) == {0, 1}
    assert one_hot.sum(-1).tolist() == [1, 1, 1, 1, 1]
    assert np.all(np.argmax(one_hot, -1) == np.argmax(relaxed[0], -1))
    assert not one_hot[:, ~WHERE].any()
    for a, b in zip(
        jax.tree.leaves(hard[1:]), jax.tree.leaves(relaxed[1:]), strict=True
    ):
        assert_within(a, b, 1e-6, "derivatives of a hard sample")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
def test_edges(hard, dtype):
    """No class, infinities, NaN in its own row, several class axes, and no rows."""
    x = jnp.asarray(np.concatenate([LOGITS, LOGITS[:1]]), dtype).at[-1, 0].set(jnp.nan)
    draw = functools.partial(jaxsoft.gumbel_softmax, KEY, hard=hard)
    sample = np.asarray(draw(x), np.float32)
    assert draw(x).dtype == dtype
    assert np.all(sample[2] == 0)
    assert sample[1, 0] == 0
    np.testing.assert_allclose(sample[:5].sum(-1), [1, 1, 0, 1, 1], rtol=1e-2)
    assert sample[4, 0] + sample[4, 2] == 1
    assert np.all(np.isnan(sample[5]))
    gradient = jax.grad(lambda x: jnp.sum(draw(x)[:, 0]))(x[:5])
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[2] == 0)
    np.testing.assert_allclose(jnp.sum(draw(x[:2, None], axis=(0, 2))), 1, rtol=1e-2)
    assert draw(x[:0]).shape == (0, 4)
    assert draw(x[:, :0]).shape == (6, 0)


def test_at_temperature_0_it_is_the_hard_sample():
    x = LOGITS[:2]
    hard = jaxsoft.gumbel_softmax(KEY, x, hard=True)
    assert_same_bits(jaxsoft.gumbel_softmax(KEY, x, temperature=0.0), hard, "at 0")
    assert_within(
        jaxsoft.gumbel_softmax(KEY, x, temperature=1e-4), hard, 1e-6, "near 0"
    )


def test_samples_are_distributed_as_softmax():
    """Chi-square over 40000 draws, three degrees of freedom: 16.3 in one of 1000 cases.
    Of two infinities each is drawn as often."""
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0, 9.0], [0, np.inf, 0, np.inf, 9.0]])
    where = jnp.array([True, True, True, True, False])
    draws = 40_000

    def draw(key):
        return jaxsoft.gumbel_softmax(key, logits, where=where[None], hard=True)

    counts = jax.jit(lambda keys: jax.vmap(draw)(keys).sum(0))(
        jax.random.split(jax.random.key(11), draws)
    )
    expected = draws * np.asarray(jaxsoft.softmax(logits[0], where=where))
    assert counts[0, 4] == 0
    assert np.sum((counts[0, :4] - expected[:4]) ** 2 / expected[:4]) < 16.3
    assert abs(counts[1, 1] - draws / 2) < 3.3 * np.sqrt(draws / 4)
    assert counts[1, 1] + counts[1, 3] == draws
