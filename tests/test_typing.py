# pyright: strict
"""The types that an editor shows. `.ci/run` has pyright check them, which no test does;
running shows that they are true."""

from typing import assert_type

import jax
import jax.numpy as jnp
from jax import Array

import jaxsoft

x = jax.random.normal(jax.random.key(0), (3,))
labels = jax.random.randint(jax.random.key(0), (), 0, 3)


def test_return_sign_decides_what_logsumexp_returns():
    plain = assert_type(jaxsoft.logsumexp(x), Array)
    assert isinstance(plain, Array)
    pair = assert_type(jaxsoft.logsumexp(x, return_sign=True), tuple[Array, Array])
    assert len(pair) == 2
    without = assert_type(jaxsoft.logsumexp(x, return_sign=False), Array)
    assert isinstance(without, Array)
    flag = bool(labels < 3)
    either = assert_type(
        jaxsoft.logsumexp(x, return_sign=flag), Array | tuple[Array, Array]
    )
    assert isinstance(either, tuple)


def test_losses_return_arrays():
    assert isinstance(assert_type(jaxsoft.cross_entropy(x, labels), Array), Array)
    assert isinstance(assert_type(jaxsoft.softmax(x), Array), Array)


def test_log_probs_have_names():
    of = jaxsoft.linear_log_probs(x[None], x[None], labels[None] * 0)
    assert isinstance(assert_type(of, jaxsoft.LogProbs), jaxsoft.LogProbs)
    assert isinstance(assert_type(of.entropy, Array), Array)


def identity(v: Array) -> Array:
    return v


def test_straight_through_keeps_the_signature():
    hard = jaxsoft.straight_through(jaxsoft.smooth_sign, jaxsoft.smooth_step)
    assert isinstance(assert_type(hard(x), Array), Array)
    rounded = jaxsoft.straight_through(jnp.round, identity)
    assert isinstance(assert_type(rounded(x), Array), Array)
