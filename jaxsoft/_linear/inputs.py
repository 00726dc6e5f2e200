"""What the losses of a linear head are given: checked, flattened, and cut in chunks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._checks import as_array, as_index_labels, as_integer, as_real
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._linear.accumulate import TokenPlan
from jaxsoft._linear.chunks import Head, Tokens, VocabularyPlan, has_narrow_range
from jaxsoft._losses.nll import METRICS
from jaxsoft._losses.per_row import RowLabels

# A chunk of 4096 classes is wide enough for matrix units, and a small one stays in a
# CPU's cache: at 1024 tokens, 512 features and 32768 classes on two cores, value and
# both gradients take 800 ms in chunks of 16 MiB, and 850 ms in chunks of 64.
# For 8192 tokens and 4096 features a TPU v5e takes 1.57 of three ideal products with
# chunks of 4096 classes, and 1.71 with 2048.
DEFAULT_CHUNK_BYTES = 128 * 2**20
SMALL_CHUNK_BYTES = 16 * 2**20
WIDE_CHUNK = 4096
# On a GPU the gradient of the hidden states is read and written once for every chunk:
# of 8192 tokens, 4096 features and 131072 classes 17 GB of 66, and in these 2 of 39.
GPU_CHUNK_BYTES = 512 * 2**20
SUM_BYTES = 256 * 2**20
# Fewer tokens are not worth sorting.
FEWEST_TO_SKIP = 512


def dtype_of_sums(hidden: Array, vocab_weight: Array) -> jnp.dtype:
    return accumulation_dtype(jnp.promote_types(hidden.dtype, vocab_weight.dtype))


class HeadInputs(NamedTuple):
    hidden: Array
    vocab_weight: Array
    vocab_bias: Array | None
    classes: int


class Inputs(NamedTuple):
    hidden: Array
    vocab_weight: Array
    vocab_bias: Array | None
    classes: int
    labels: Array
    dtype: jnp.dtype
    chunks: tuple[int, int]  # classes in a chunk, and in one on a GPU


def checked_head(
    name: str,
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    vocab_bias: ArrayLike | None,
    vocab_axis: int,
    of: str = "",
) -> HeadInputs:
    """One head, whose arguments have names that begin with `of`."""
    names = [f"{of}{v}" for v in ("hidden", "vocab_weight", "vocab_bias", "vocab_axis")]
    hidden = as_real(name, names[0], hidden)
    vocab_weight = as_real(name, names[1], vocab_weight)
    if as_integer(vocab_axis) not in (0, 1):
        raise ValueError(f"{name}: {names[3]} must be 0 or 1; got {vocab_axis!r}")
    if hidden.ndim < 1 or vocab_weight.ndim != 2:
        raise ValueError(
            f"{name}: {names[0]} must be (*batch, features) and {names[1]} a matrix; "
            f"got shapes {hidden.shape} and {vocab_weight.shape}"
        )
    classes, features = (
        vocab_weight.shape[vocab_axis],
        vocab_weight.shape[1 - vocab_axis],
    )
    if hidden.shape[-1] != features or classes == 0:
        layout = ("(classes, features)", "(features, classes)")[vocab_axis]
        hint = ""
        if hidden.shape[-1] == classes != 0:
            hint = f". Write {names[3]}={1 - vocab_axis}"
        raise ValueError(
            f"{name}: {names[0]} must be (*batch, features) and {names[1]} {layout} "
            f"with the same features and at least one class; got shapes {hidden.shape} "
            f"and {vocab_weight.shape} with {names[3]}={vocab_axis}{hint}"
        )
    if vocab_bias is not None:
        vocab_bias = as_real(name, names[2], vocab_bias)
        if vocab_bias.shape != (classes,):
            raise ValueError(
                f"{name}: {names[2]} must have one entry per class, shape "
                f"({classes},); got {vocab_bias.shape}"
            )
    return HeadInputs(hidden, vocab_weight, vocab_bias, classes)


def checked_inputs(
    name: str,
    hidden: ArrayLike,
    vocab_weight: ArrayLike,
    labels: ArrayLike,
    vocab_bias: ArrayLike | None,
    vocab_axis: int,
    chunk_bytes: int | None,
    several_labels: bool = False,
) -> Inputs:
    head = checked_head(name, hidden, vocab_weight, vocab_bias, vocab_axis)
    labels = _checked_labels(name, labels, head.hidden.shape[:-1], several_labels)
    return Inputs(
        *head,
        labels,
        dtype_of_sums(head.hidden, head.vocab_weight),
        chunks_of(name, [head], chunk_bytes),
    )


def _checked_labels(name, labels, batch, several):
    what = "the shape of hidden without features"
    labels = as_array(name, "labels", labels)
    if several and labels.ndim == len(batch) + 1 and labels.shape[-1] > 0:
        batch, what = (*batch, labels.shape[-1]), f"{what}, and labels behind it,"
    return as_index_labels(name, labels, batch, what)


def chunks_of(
    name: str, heads: list[HeadInputs], chunk_bytes: int | None
) -> tuple[int, int]:
    """Classes in a chunk, and in one on a GPU, where the logits of all heads lie beside
    each other."""
    tokens = math.prod(heads[0].hidden.shape[:-1])
    size, on_gpu = (
        _chunk_classes(len(heads) * tokens, heads[0].classes, size)
        for size in _chunk_sizes(name, len(heads) * tokens, chunk_bytes)
    )
    return size, on_gpu


def _chunk_sizes(name: str, tokens: int, chunk_bytes: int | None) -> tuple[int, int]:
    """Bytes of a chunk, and of one on a GPU."""
    if chunk_bytes is None:
        wide = max(SMALL_CHUNK_BYTES, 4 * WIDE_CHUNK * tokens)
        return min(DEFAULT_CHUNK_BYTES, wide), GPU_CHUNK_BYTES
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"{name}: chunk_bytes must be an int; got {chunk_bytes!r}")
    if chunk_bytes <= 0:
        raise ValueError(f"{name}: chunk_bytes must be positive; got {chunk_bytes}")
    return chunk_bytes, chunk_bytes


def _chunk_classes(tokens: int, classes: int, chunk_bytes: int) -> int:
    """Classes in a chunk: at most chunk_bytes of float32 logits, and a multiple of 128
    where they are so many. If possible the chunks divide the classes, or nearly: the
    last one repeats what it lacks."""
    most = min(classes, max(chunk_bytes // (4 * max(tokens, 1)), 1))
    if most == classes:
        return classes
    step = 128 if most >= 128 else 1
    most -= most % step
    for chunk in range(most, most // 2, -step):
        if classes % chunk == 0:
            return chunk
    per_chunk = -(-classes // -(-classes // most))
    return -(-per_chunk // step) * step


def token_chunks(hidden: Array, head: Head, plan: VocabularyPlan) -> TokenPlan | None:
    """How to sum a loss with its gradient taken in the forward pass; None where the
    logits of a chunk and the float32 gradient of the weights exceed the budget, and
    where the inputs do not hold a gradient that is scaled later."""
    if has_narrow_range(hidden.dtype):
        return None
    tokens, features = hidden.shape
    classes = head.weight.shape[plan.vocab_axis]
    most = SUM_BYTES // 4 // classes - features
    chunk = min(tokens, most)
    if chunk < min(tokens, 128) or tokens == 0:
        return None
    return TokenPlan(plan.vocab_axis, chunk, plan.may_skip, plan.asked == METRICS)


def flat_rows(hidden: Array) -> Array:
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])


def flat_tokens(
    hidden: Array,
    labels: RowLabels | None,
    temperature: Array | None,
    where: Array | None,
    classes: int,
) -> Tokens:
    """(N,), or of several labels (N, K)."""
    batch = hidden.shape[:-1]
    if temperature is not None:
        temperature = jnp.broadcast_to(temperature, (*batch, 1)).reshape(-1)
    if where is not None:
        shared = all(n == 1 for n in where.shape[:-1])
        of_tokens = (1,) * len(batch) if shared else batch
        where = jnp.broadcast_to(where, (*of_tokens, classes)).reshape(-1, classes)
    tokens = math.prod(batch)
    labels = jax.tree.map(lambda v: v.reshape(tokens, *v.shape[len(batch) :]), labels)
    return Tokens(labels, temperature, where)
