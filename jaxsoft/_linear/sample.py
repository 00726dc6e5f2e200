"""linear_sample: draws from a linear head, without its logits."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export
from jax.typing import ArrayLike

from jaxsoft._checks import (
    AxisName,
    as_axes,
    as_key,
    as_mask,
    as_softcap,
    as_temperature,
    check_split,
)
from jaxsoft._core.mesh import Axes, match_varying, with_automatic_axes
from jaxsoft._hints import with_hints
from jaxsoft._linear.chunks import Head, VocabularyPlan
from jaxsoft._linear.draw import drawn
from jaxsoft._linear.inputs import (
    checked_head,
    chunks_of,
    dtype_of_sums,
    flat_rows,
    flat_tokens,
)
from jaxsoft._losses.nll import Asked


class LinearSample(NamedTuple):
    """What `linear_sample` returns, one entry per token."""

    token: Array
    """The class drawn, int32; -1 where there is none to draw."""
    log_prob: Array
    """Its log-probability, in nats; 0 where there is none to draw."""


export.register_namedtuple_serialization(
    LinearSample, serialized_name="jaxsoft.LinearSample"
)


@with_hints
def linear_sample(
    key: Array,
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    *,
    vocab_bias: ArrayLike | None = None,
    vocab_axis: int = 0,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    softcap: ArrayLike | None = None,
    chunk_bytes: int | None = None,
    axis_name: AxisName = None,
) -> LinearSample:
    """A draw from a linear head and its log-probability, in one pass without logits.

    For each token, with ``x = hidden @ vocab_weight.T + vocab_bias`` and
    ``p = softmax(x / temperature)``: a class c with probability ``p_c``, and
    ``log p_c``. What rollouts and evaluation loops need; the logits are never stored.

    Args:
        key: a key of `jax.random`; every token gets noise of its own. Or one key per
            token, of shape (*batch): then a token's draw is made of its own key alone,
            whichever tokens stand beside it.
        hidden, vocab_weight, vocab_bias, vocab_axis, where, chunk_bytes: as in
            `linear_cross_entropy`. The logits of a chunk take half of its bytes here;
            the class drawn does not depend on it.
        temperature: in the units of the logits, broadcastable to (*batch, 1); larger
            is more random. At 0 the most probable class is drawn, the first of tied
            ones; below 0 the less likely classes are drawn more often.
        softcap: c > 0 replaces the logits by ``c * tanh(logits / c)`` first.
        axis_name: as in `linear_cross_entropy`. The key is the same on all devices of
            these axes. On 2, 4 or 8 devices the draw is that of one, and on others if
            each holds a multiple of 16 classes. Of an even number of classes that is no
            multiple of 128 the noise costs more: up to that for every class.

    Returns:
        A `LinearSample` of shape (*batch): token, int32, and log_prob, float32 for
        half-precision inputs. On a mesh with explicit axes, split as the batch axes of
        ``hidden``.

    Raises:
        TypeError: ``key`` is neither one key nor one per token; other arguments not
            real, ``where`` not boolean.
        ValueError: as `linear_cross_entropy`.

    Gradient:
        The token has none. That of log_prob is the score, the gradient of
        `linear_log_probs` with the token as the label, with respect to every float
        argument: what a policy gradient multiplies by the reward. The logits are then
        recomputed: 4 products of 2 N D V flops with the value's. Residuals: the
        arguments and O(N) numbers.

    Edge cases:
        A class that ``where`` excludes, or with logit -inf, is never drawn. A token
        with no other class gets token -1, log_prob 0 and gradient 0, as in
        `linear_log_probs` with ``ignore_index=-1``. Logits +inf are drawn equally
        often. At temperature 0 log_prob is -log k for k tied classes. A NaN among the
        logits that count gives token -1 and log_prob NaN.

        The draw is the same for every size of chunk as far as the logits are: a matrix
        product of another shape may round them otherwise, and about one draw in a
        million lies that close to another class. With keys of another kind than
        JAX's default, threefry, the noise may also depend on the chunks; every draw
        has the right distribution.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> hidden, vocab_weight = jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.eye(2)
        >>> draw = jaxsoft.linear_sample(jax.random.key(0), hidden, vocab_weight)
        >>> of = jaxsoft.linear_log_probs(hidden, vocab_weight, draw.token)
        >>> print(draw.token, draw.log_prob, of.log_prob)
        [1 0] [-0.3132617  -0.04858735] [-0.3132617  -0.04858735]

    References:
        C. J. Maddison, D. Tarlow, T. Minka, "A* sampling", NeurIPS 2014.
    """
    name = "linear_sample"
    inputs = checked_head(name, hidden, vocab_weight, vocab_bias, vocab_axis)
    batch = inputs.hidden.shape[:-1]
    dtype = dtype_of_sums(inputs.hidden, inputs.vocab_weight)
    keys = token_keys(name, key, batch)
    logits = jax.ShapeDtypeStruct((*batch, inputs.classes), dtype)
    axes = as_axes(name, -1, logits.ndim, axis_name)
    check_split(name, axes, {"vocab_weight": inputs.vocab_weight}, {"key": keys})
    plan = VocabularyPlan(
        vocab_axis,
        *chunks_of(name, [inputs], chunk_bytes),
        may_skip=False,
        asked=Asked(),
        mesh_names=axes.mesh_names,
    )
    softcap = as_softcap(name, softcap, dtype)
    return _linear_sample(
        keys,
        inputs.hidden,
        Head(inputs.vocab_weight, inputs.vocab_bias, None, softcap),
        as_mask(name, "where", where, logits.shape),
        as_temperature(name, temperature, logits, axes),
        plan=plan,
    )


def token_keys(function: str, key: Array, batch: tuple[int, ...]) -> Array:
    """A key for each token, from one for all or as they are given."""
    keys = as_key(function, key, batch)
    if keys.shape == batch:
        return keys
    numbers = jnp.arange(math.prod(batch), dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.fold_in(keys, i))(numbers).reshape(batch)


@functools.partial(jax.jit, static_argnames="plan")
def _linear_sample(keys, hidden, head, where, temperature, plan):
    sample = functools.partial(_sample, plan=plan)
    arguments = keys, hidden, head, where, temperature
    ndims = LinearSample(hidden.ndim - 1, hidden.ndim - 1)
    return with_automatic_axes(sample, arguments, hidden, ndims)


def _sample(keys, hidden, head, where, temperature, *, plan):
    batch, classes = hidden.shape[:-1], head.weight.shape[plan.vocab_axis]
    tokens = flat_tokens(hidden, None, temperature, where, classes)
    rows = keys.reshape(-1), flat_rows(hidden), tokens
    axes = Axes((len(batch),), plan.mesh_names)
    head, (keys, hidden, tokens) = match_varying(axes, head, rows)
    index, log_prob = drawn(hidden, head, keys, tokens, plan)
    return LinearSample(index.reshape(batch), log_prob.reshape(batch))
