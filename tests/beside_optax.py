"""Losses that jaxsoft and optax both have: test_optax.py compares their numbers, and
test_memory.py what they allocate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoft

optax_indices = optax.softmax_cross_entropy_with_integer_labels
optax_probabilities = optax.softmax_cross_entropy
optax_binary = optax.sigmoid_binary_cross_entropy
EPS = 0.2


def smoothed(logits, labels):
    return optax_probabilities(logits, optax.smooth_labels(labels, EPS))


def smoothed_indices(logits, labels):
    return smoothed(
        logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    )


def smoothed_binary(logits, labels):
    return optax_binary(logits, (1 - EPS) * labels + EPS / 2)


def divergence(target_logits, logits):
    return optax.kl_divergence(
        jax.nn.log_softmax(logits), jax.nn.softmax(target_logits)
    )


def mean(loss):
    return lambda **given: jnp.mean(loss(**given))


Loss = Callable[..., Any]
ours, binary = jaxsoft.cross_entropy, jaxsoft.binary_cross_entropy
INDICES, PROBABILITIES, MASK = {"labels": "y"}, {"labels": "q"}, {"where": "where"}
# The arguments beside the logits: indices y, probabilities q, a mask, other logits x2.
LOSSES: dict[str, tuple[dict[str, str], Loss, Loss]] = {
    "indices": (INDICES, ours, optax_indices),
    "indices, mean": (INDICES, partial(ours, reduction="mean"), mean(optax_indices)),
    "indices, where": (INDICES | MASK, ours, optax_indices),
    "indices, smoothing": (
        INDICES,
        partial(ours, label_smoothing=EPS),
        smoothed_indices,
    ),
    "probabilities": (PROBABILITIES, ours, optax_probabilities),
    "probabilities, mean": (
        PROBABILITIES,
        partial(ours, reduction="mean"),
        mean(optax_probabilities),
    ),
    "probabilities, where": (PROBABILITIES | MASK, ours, optax_probabilities),
    "probabilities, smoothing": (
        PROBABILITIES,
        partial(ours, label_smoothing=EPS),
        smoothed,
    ),
    "binary": (PROBABILITIES, binary, optax_binary),
    "binary, smoothing": (
        PROBABILITIES,
        partial(binary, label_smoothing=EPS),
        smoothed_binary,
    ),
    "kl_divergence": ({"target_logits": "x2"}, jaxsoft.kl_divergence, divergence),
}
