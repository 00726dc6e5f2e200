"""Two linear heads in step: what a chunk of classes adds to the divergence of their
distributions, and to its gradient.

The letters are those of `compared`: x is the head whose distribution is p, y the one
whose distribution is q. A head is met three times. The first pass summarizes the
logits, the second compares them, and the third pulls the slopes of the divergence back,
which need the divergence of the whole row. Of KL(p || q) alone the slope in y does not,

    t dz_y = q - p

so that the second pass may pull it back, while the logits are there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits, shifted, zero_if_infinite
from jaxsoft._core.mesh import varying, varying_like
from jaxsoft._linear.chunks import (
    Chunk,
    Head,
    Tokens,
    VocabularyPlan,
    chunk_at,
    chunk_count,
    head_products,
    over_counted_tokens,
    room_for_chunks,
    with_chunk,
    without_infinities,
)
from jaxsoft._linear.forward import AXES, logits_of_chunk
from jaxsoft._losses.nll import Asked
from jaxsoft._passes.compared import (
    Compared,
    Divergence,
    change,
    compared,
    is_empty,
    reduced,
    slopes_over_t,
    terms,
)
from jaxsoft._passes.merge import Summary, merge, of_nothing
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import summarize
from jaxsoft._row import Row


class Model(NamedTuple):
    """Hidden states (N, D) and the Head above them, or their cotangents; None is not
    wanted."""

    hidden: Any
    head: Any


class Pair(NamedTuple):
    """Something of x, and the same of y."""

    x: Any
    y: Any


class PairPlan(NamedTuple):
    """Static facts of a pass over two vocabularies."""

    vocab_axes: Pair
    chunk: int  # classes in a chunk
    chunk_on_gpu: int
    may_skip: bool  # tokens of weight 0
    beta: float  # of `compared`, below 1
    is_summed: bool  # over the tokens
    mesh_names: tuple[Any, ...] = ()
    is_on_gpu: bool = False

    @property
    def of_heads(self) -> Pair:
        return Pair(
            *(
                VocabularyPlan(
                    vocab_axis,
                    self.chunk,
                    self.chunk_on_gpu,
                    self.may_skip,
                    Asked(),
                    mesh_names=self.mesh_names,
                    is_on_gpu=self.is_on_gpu,
                )
                for vocab_axis in self.vocab_axes
            )
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which cotangents of a Model are wanted; without any its head costs no product."""

    hidden: bool = False
    weight: bool = False
    others: bool = False  # bias, cap

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.others

    def of(self, model: Model) -> Model | None:
        """The part of a model, or of its cotangents, that is wanted."""
        if not self:
            return None
        head = model.head._replace(weight=model.head.weight if self.weight else None)
        if not self.others:
            head = head._replace(bias=None, softcap=None)
        return Model(model.hidden if self.hidden else None, head)


NOTHING = Wanted()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WantedOfAll:
    """Which cotangents are wanted of two models and their temperature."""

    x: Wanted
    y: Wanted
    temperature: bool


class Seen(NamedTuple):
    """A chunk of one head: its logits, and what takes a cotangent of them to that of
    h w + b and of the cap."""

    hidden: Array
    chunk: Chunk
    logits: Logits
    to_given: Callable[[Array], Any]


class Rows(NamedTuple):
    """What is known of the tokens, one entry each; numbers are (N, 1)."""

    hidden: Pair
    tokens: Tokens
    of: Any  # Pair of summaries, or the Divergence
    cotangent: Any = None  # of the divergence


# (rows, heads, position, plan) -> sums per row, and a Pair of cotangents of Models.
OfChunk = Callable[[Rows, Pair, Array, PairPlan], tuple[tuple[Array, ...], Pair]]


def zero_of_rows(hidden: Array, weight: Array, mesh_names: Any) -> Array:
    """(N, 1), in the dtype of sums, typed to vary as the tokens do."""
    dtype = accumulation_dtype(jnp.promote_types(hidden.dtype, weight.dtype))
    zero = varying_like(jnp.zeros((len(hidden), 1), dtype), hidden)
    return varying(zero, mesh_names)


def rows_of(pair: Pair, tokens: Tokens, of: Any, cotangent: Any = None) -> Rows:
    return Rows(Pair(pair.x.hidden, pair.y.hidden), tokens, of, cotangent)


def _over_rows(f: Callable[[Rows], Any], rows: Rows, counted: Any, nothing: Any) -> Any:
    """f of the rows that count; `counted` is None where all do."""
    if counted is None:
        return f(rows)
    return over_counted_tokens(f, counted, rows, nothing)


def _chunk_of_both(rows: Rows, heads: Pair, position: Array, plan: PairPlan) -> Pair:
    def seen(hidden, head, of_head):
        chunk = chunk_at(position, head, of_head)
        of_chunk = logits_of_chunk(hidden, rows.tokens, chunk, head.softcap, of_head)
        return Seen(hidden, chunk, *of_chunk)

    return Pair(*map(seen, rows.hidden, heads, plan.of_heads))


def _positions(heads: Pair, plan: PairPlan) -> Array:
    return jnp.arange(chunk_count(heads.x, plan.of_heads.x), dtype=jnp.int32)


# The first pass.
def summaries(plan: PairPlan, pair: Pair, tokens: Tokens, counted: Any) -> Pair:
    """Those of the classes that this device has."""
    zero = zero_of_rows(pair.x.hidden, pair.x.head.weight, plan.mesh_names)
    like = Summary(m=zero, s=zero)
    nothing = jax.tree.map(jnp.add, like, of_nothing(like))
    if tokens.temperature is not None:
        nothing = nothing._replace(temperature=zero + jnp.abs(tokens.temperature))
    heads = Pair(pair.x.head, pair.y.head)

    def of_rows(rows: Rows) -> Any:
        return _summaries_of_rows(rows, heads, plan), None

    start = Pair(nothing, nothing)
    return _over_rows(of_rows, rows_of(pair, tokens, start), counted, start)[0]


def _summaries_of_rows(rows: Rows, heads: Pair, plan: PairPlan) -> Pair:
    def merged(before: Summary, seen: Seen) -> Summary:
        summary = summarize(AXES, seen.logits)
        summary = summary._replace(temperature=before.temperature)
        return merge(before, summary, shifted)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add_chunk(so_far: Pair, position: Array) -> Any:
        seen = _chunk_of_both(rows, heads, position, plan)
        return Pair(*map(merged, so_far, seen)), None

    return jax.lax.scan(add_chunk, rows.of, _positions(heads, plan))[0]


# The second pass.
def sums_of_terms(
    plan: PairPlan, wanted: Wanted, pair: Pair, rows: Rows, counted: Any
) -> tuple[tuple[Array, ...], Pair]:
    """The sums of `compared.terms` over the classes that this device has; and what is
    wanted of the gradient in y of the sum over tokens of cotangent * KL(p || q)."""

    def of_chunk(rows, heads, position, plan):
        seen = _chunk_of_both(rows, heads, position, plan)
        (m, s, *_), (n, r, *_) = rows.of
        of = _compared(seen, (m, s), (n, r))[0]
        sums = tuple(jnp.sum(v, 1, keepdims=True) for v in terms(of, plan.beta))
        if not wanted:
            return sums, Pair(None, None)
        slope = jnp.where(is_empty(m, n, plan.beta), 0, change(of))
        return sums, Pair(None, _pulled(slope, seen.y, rows, plan.of_heads.y, wanted))

    count = 2 if plan.beta == 0 else 3
    of_both = Pair(NOTHING, wanted)
    return _over_classes(of_chunk, count, pair, rows, counted, plan, of_both)


# The third pass. With slopes t dz, t dt = -sum_i (t dz_x d_i + t dz_y b_i).
def pulled_back(
    plan: PairPlan, wanted: WantedOfAll, pair: Pair, rows: Rows, counted: Any
) -> tuple[tuple[Array, ...], Pair]:
    """The sums of t dz_x d_i + t dz_y b_i, and what is wanted of the cotangents, for a
    cotangent of every row's divergence."""

    def of_chunk(rows, heads, position, plan):
        seen = _chunk_of_both(rows, heads, position, plan)
        row: Divergence = rows.of
        of, shifts = _compared(seen, (row.m, row.s), (row.n, row.r), row.epsilon)
        slopes = slopes_over_t(of, row, plan.beta)
        d, b = map(zero_if_infinite, shifts)
        both = jnp.sum(slopes[0] * d + slopes[1] * b, 1, keepdims=True)
        cotangents = (
            _pulled(slope, seen, rows, of_head, wanted) if wanted else None
            for slope, seen, of_head, wanted in zip(
                slopes, seen, plan.of_heads, of_both
            )
        )
        return (both,), Pair(*cotangents)

    of_both = Pair(wanted.x, wanted.y)
    return _over_classes(of_chunk, 1, pair, rows, counted, plan, of_both)


def _compared(
    seen: Pair, of_x: Any, of_y: Any, epsilon: Any = 0
) -> tuple[Compared, Pair]:
    """The classes of a chunk, and their d and b."""
    x, y = (reduced(v.logits, *of) for v, of in zip(seen, (of_x, of_y)))
    return compared(x, y, seen.x.logits.temperature, epsilon), Pair(x.d, y.d)


def _pulled(
    slope: Array, seen: Seen, rows: Rows, plan: VocabularyPlan, wanted: Wanted
) -> Any:
    """The cotangents of a model, for the slope t dz of every row's divergence."""
    nothing: Any = None
    row, g = Row(AXES, seen.logits, nothing, nothing), rows.cotangent
    dx = row.to_x(product(g, slope * row.per_t))
    dx, dsoftcap = seen.to_given(dx)
    # A row with anything else has a cotangent of 0 or NaN (`two_heads`).
    hidden = without_infinities(seen.hidden)
    dhidden, dweight = head_products(
        dx, hidden, rows.tokens, seen.chunk, plan, (wanted.hidden, wanted.weight)
    )
    dbias = None if seen.chunk.bias is None else jnp.sum(dx, 0)
    return wanted.of(Model(dhidden, Head(dweight, dbias, None, dsoftcap)))


def _over_classes(
    of_chunk: OfChunk,
    count: int,
    pair: Pair,
    rows: Rows,
    counted: Any,
    plan: PairPlan,
    wanted: Pair,
) -> tuple[tuple[Array, ...], Pair]:
    """What of_chunk returns, over all chunks; of sums there are `count`."""
    heads = Pair(pair.x.head, pair.y.head)
    zero = zero_of_rows(pair.x.hidden, heads.x.weight, plan.mesh_names)
    # The sum over devices comes before the rounding.
    dtypes = [zero.dtype if plan.mesh_names else v.dtype for v in rows.hidden]

    def of_rows(rows: Rows) -> Any:
        sums, models = _scanned(of_chunk, count, heads, rows, plan, wanted)
        hidden = [
            v.hidden.astype(dtype) if w.hidden else None
            for v, dtype, w in zip(models, dtypes, wanted)
        ]
        heads_or_none = [v.head if w else None for v, w in zip(models, wanted)]
        return (sums, hidden), heads_or_none

    no_hidden = [
        jnp.zeros_like(v, dtype) + zero.astype(dtype) if w.hidden else None
        for v, dtype, w in zip(rows.hidden, dtypes, wanted)
    ]
    nothing = (zero,) * count, no_hidden
    (sums, hidden), dheads = _over_rows(of_rows, rows, counted, nothing)
    models = zip(wanted, hidden, dheads)
    return sums, Pair(*(Model(*of_model) if w else None for w, *of_model in models))


def _scanned(
    of_chunk: OfChunk,
    count: int,
    heads: Pair,
    rows: Rows,
    plan: PairPlan,
    wanted: Pair,
) -> Any:
    zero = zero_of_rows(rows.hidden.x, heads.x.weight, plan.mesh_names)
    classes = heads.x.weight.shape[plan.vocab_axes.x]

    # Who differentiates this would otherwise store arrays of N x V numbers.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_position(position: Array) -> Any:
        return of_chunk(rows, heads, position, plan)

    def room(model: Model, wanted: Wanted) -> Model | None:
        part = wanted.of(model)
        if part is None:
            return None
        hidden, head = part
        if hidden is not None:
            hidden = jnp.zeros_like(hidden, zero.dtype) + zero
        return Model(hidden, room_for_chunks(head, zero))

    def added(model: Any, more: Any, position: Array, of_head: VocabularyPlan) -> Any:
        if model is None:
            return None
        head = with_chunk(model.head, more.head, position, classes, of_head)
        return Model(jax.tree.map(jnp.add, model.hidden, more.hidden), head)

    def add_chunk(carry: Any, position: Array) -> Any:
        sums, models = carry
        more, cotangents = of_position(position)
        sums = jax.tree.map(jnp.add, sums, more)
        each = zip(models, cotangents, plan.of_heads)
        models = Pair(*(added(v, w, position, of_head) for v, w, of_head in each))
        return (sums, models), None

    models = map(Model, rows.hidden, heads)
    start = (zero,) * count, Pair(*map(room, models, wanted))
    return jax.lax.scan(add_chunk, start, _positions(heads, plan), reverse=True)[0]
