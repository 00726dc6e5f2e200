"""A linear head in chunks of its classes, and the tokens that count."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.batching import largest_of_batch
from jaxsoft._core.dtypes import accumulation_dtype, clip_tangent
from jaxsoft._core.mesh import varying_like
from jaxsoft._losses.nll import Asked


class Head(NamedTuple):
    """The arrays of a linear head, or their cotangents; None is absent."""

    weight: Any  # (V, D), or (D, V) with vocab_axis 1
    bias: Array | None  # (V,)
    uniform_weight: Array | None  # (V,), the weights in RowTerms.uniform_nll
    softcap: Array | None  # ()


class Tokens(NamedTuple):
    """What is known of each token beside its hidden state."""

    labels: Any  # RowLabels, (N,), or (N, K) for K labels each
    temperature: Array | None  # (N,)
    where: Array | None  # (N, V), or 1 in place of N


class VocabularyPlan(NamedTuple):
    """Static facts of a pass over the vocabulary."""

    vocab_axis: int
    chunk: int  # classes in a chunk
    chunk_on_gpu: int
    may_skip: bool  # tokens that do not count
    asked: Asked
    entropy_moves: bool = False  # whether the entropy is differentiated
    mesh_names: tuple[Any, ...] = ()  # mesh axes over which the classes are split
    is_on_gpu: bool = False


class Chunk(NamedTuple):
    """C classes of a head."""

    classes: Array  # (1, C), their indices
    fresh: Array | None  # (1, C), False in a class that an earlier chunk had
    weight: Array
    bias: Array | None
    uniform_weight: Array | None


def has_narrow_range(dtype):
    """Whether 1e-8 is 0 there, as in float16; bfloat16 has the range of float32. What
    is scaled by a cotangent must not be narrowed to it before."""
    return jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp


def narrowed(dx, dtype):
    """The gradient of the logits in the inputs' dtype, for matrix units that sum in
    float32. At a temperature of 1e-6 float16 does not hold it, and an infinity times a
    weight 0 would be NaN."""
    if has_narrow_range(dtype):
        dx = clip_tangent(dx, dtype)
    return dx.astype(dtype)


def matrix_product(a, b, contracted, dtype):
    """Matrix product over one axis of each, summed in dtype."""
    common = jnp.promote_types(a.dtype, b.dtype)
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        a.astype(common), b.astype(common), dimensions, preferred_element_type=dtype
    )


def without_infinities(v):
    """What is not finite as 0, in a product with a factor that is 0 there: a cotangent
    of a token that does not count, or of a class that is excluded."""
    return jnp.where(jnp.isfinite(v), v, 0)


def head_logits(hidden, head, vocab_axis):
    """hidden w + b in the accumulation dtype, for a head or a chunk of one."""
    common = jnp.promote_types(hidden.dtype, head.weight.dtype)
    dtype = accumulation_dtype(common)
    x = matrix_product(hidden, head.weight, (1, 1 - vocab_axis), dtype)
    return x if head.bias is None else x + head.bias.reshape(1, -1).astype(dtype)


def head_products(
    dx: Array,
    hidden: Array,
    tokens: Any,
    chunk: Any,
    plan: Any,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Any, Any]:
    """The cotangents of the hidden states and of a chunk's weights, for that of its
    logits: a matrix product each, or None for one that is not wanted."""
    dhidden = dweight = None
    factors = narrowed(dx, jnp.promote_types(hidden.dtype, chunk.weight.dtype))
    classes_axis, weight = plan.vocab_axis, chunk.weight
    if wanted[0]:
        weight = weight if tokens.where is None else without_infinities(weight)
        dhidden = matrix_product(factors, weight, (1, classes_axis), dx.dtype)
    if wanted[1]:
        pair = (factors, hidden) if classes_axis == 0 else (hidden, factors)
        dweight = matrix_product(*pair, (0, 0), dx.dtype)
    return dhidden, dweight


def column(v: Any) -> Any:
    return v[:, None] if v.ndim == 1 else v


def chunk_count(head, plan):
    return -(-head.weight.shape[plan.vocab_axis] // plan.chunk)


def chunk_at(position, head, plan, size=None):
    """The classes from position * C on. The last chunk of a vocabulary that C does not
    divide starts earlier, at V - C, and has classes that are not fresh. With `size`,
    only the first classes of the vocabulary are cut in chunks."""
    size = head.weight.shape[plan.vocab_axis] if size is None else size
    chunk = plan.chunk
    start = jnp.minimum(position * chunk, size - chunk)
    classes = start + jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
    fresh = None if size % chunk == 0 else classes >= position * chunk

    def row(v):
        if v is None:
            return None
        return jax.lax.dynamic_slice_in_dim(v, start, chunk)[None]

    weight = jax.lax.dynamic_slice_in_dim(
        head.weight, start, chunk, axis=plan.vocab_axis
    )
    return Chunk(classes, fresh, weight, row(head.bias), row(head.uniform_weight))


def chunk_mask(chunk, tokens):
    """The classes that count; None for all. Ignored tokens, whose hidden states are 0,
    are left out afterwards, which costs less."""
    mask = chunk.fresh
    if tokens.where is not None:
        start, size = chunk.classes[0, 0], chunk.classes.shape[1]
        where = jax.lax.dynamic_slice_in_dim(tokens.where, start, size, axis=1)
        mask = where if mask is None else mask & where
    return mask


def chunk_label(chunk, tokens):
    """The label's index in the chunk; -1 where it is not one of its fresh classes."""
    index = tokens.labels.class_index - chunk.classes[:, :1]
    size = chunk.classes.shape[1]
    found = (index >= 0) & (index < size)
    if chunk.fresh is not None:
        first_fresh = size - jnp.sum(chunk.fresh, dtype=jnp.int32)
        found = found & (index >= first_fresh)
    return jnp.where(found, index, -1)


def room_for_chunks(head: Any, like: Array) -> Any:
    """Where the cotangents of chunks are written; they fill all of it, and add up in
    that of the cap."""
    room = jax.tree.map(lambda v: jax.lax.empty(v.shape, v.dtype), head)
    if head.softcap is not None:
        room = room._replace(softcap=jnp.zeros((), like.dtype))
    return jax.tree.map(lambda v: varying_like(v, like), room)


def with_chunk(
    dhead: Any, dchunk: Any, position: Array, classes: int, plan: Any
) -> Any:
    """The head's cotangent, with that of a chunk in its place.

    Of the last chunk, which is written first, the classes that are not fresh get theirs
    from the chunk before it.
    """
    start = jnp.minimum(position * plan.chunk, classes - plan.chunk)

    def written(whole, part, axis):
        if whole is None:
            return None
        part = part.astype(whole.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis)

    softcap = dhead.softcap
    return Head(
        written(dhead.weight, dchunk.weight, plan.vocab_axis),
        written(dhead.bias, dchunk.bias, 0),
        written(dhead.uniform_weight, dchunk.uniform_weight, 0),
        None if softcap is None else softcap + dchunk.softcap,
    )


def on_platform(f: Callable[..., Any], *arguments: Any, plan: Any) -> Any:
    """f(*arguments, plan), with the chunks of the platform that it is compiled for."""
    if plan.chunk_on_gpu == plan.chunk:
        return f(*arguments, plan)
    of_gpu = plan._replace(chunk=plan.chunk_on_gpu, is_on_gpu=True)
    on_gpu = functools.partial(_with_plan, f, of_gpu)
    return jax.lax.platform_dependent(
        *arguments,
        cuda=on_gpu,
        rocm=on_gpu,
        default=functools.partial(_with_plan, f, plan),
    )


def _with_plan(f, plan, *arguments):
    return f(*arguments, plan)


def is_counted(labels: Any) -> Array:
    """(N, 1): which tokens have a label that counts."""
    return jnp.any(labels.counted, 1, keepdims=True)


def over_counted_tokens(
    f: Callable[[Any], tuple[Any, Any]], counted: Array, rows: Any, nothing: Any
) -> tuple[Any, Any]:
    """f of the rows of the tokens that count.

    f returns what there is per token, and what the tokens share. It runs on a quarter
    of the rows, a half or all, the least that hold every token that counts. The results
    of a token that is left out are those in `nothing`.
    """
    tokens = len(counted)
    counted = counted.reshape(tokens)
    sizes = [-(-tokens // 4), -(-tokens // 2)]
    order = jnp.argsort(~counted)

    # Transposition would otherwise store what each branch gathers.
    @functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
    def of_first(size):
        index = order[:size]
        per_token, shared = f(rows_at(rows, index))
        per_token = jax.tree.map(
            lambda v, zero: zero.at[index].set(v, unique_indices=True),
            per_token,
            nothing,
        )
        return per_token, shared

    branches = [functools.partial(of_first, size) for size in sizes]
    enough = jnp.sum(jnp.sum(counted) > jnp.array(sizes))
    return jax.lax.switch(largest_of_batch(enough), [*branches, lambda: f(rows)])


def rows_at(tree: Any, index: Array) -> Any:
    """Rows; an array with one row for all tokens stays as it is."""
    return jax.tree.map(lambda v: v[index] if len(v) > 1 else v, tree)
