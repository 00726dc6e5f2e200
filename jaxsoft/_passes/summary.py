"""The summary of every row, in three forms.

- `by_merge`: all of it in one reduction, which reads the logits once.
- `maximum_first`: the textbook form, the maximum and then the sums about it. JAX and a
  CPU do nothing else well.
- `in_block`: the same, written so that XLA makes one kernel of it and of what follows
  for rows that a block of a GPU holds: beside the maximum, only differences from it.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsoft._core.logits import (
    NEAR,
    Logits,
    exp_shifted,
    is_hard,
    is_maximum,
    masked_logits,
    override_primal,
    shifted,
    size_of,
    times,
)
from jaxsoft._core.mesh import Axes, class_index, device_sum, is_class, row_sum
from jaxsoft._passes import native
from jaxsoft._passes.merge import Summary, merge, of_nothing, seen_from
from jaxsoft._passes.primitive import Form, Pass


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "labels", "coefficients", "values"),
    meta_fields=("with_e_d", "with_top"),
)
@dataclasses.dataclass(frozen=True)
class Riders:
    """What rides along with m and s; the arrays broadcast to the logits.

    The results have the names of `Summary`.
    """

    weights: Array | None = None  # b
    labels: Array | None = None  # the class whose logit is wanted; -1 is none
    coefficients: tuple[Array, ...] = ()  # q
    values: Array | None = None  # v
    with_e_d: bool = False
    with_top: bool = False


NO_RIDERS = Riders()
LAST = np.iinfo(np.int32).max  # of the indices of classes


class Reduced(NamedTuple):
    """A row in one of the three forms."""

    summary: Summary
    d: Array | None
    is_empty: Array | None  # no logit above -inf


def by_merge(axes: Axes, logits: Logits, riders: Riders) -> Reduced:
    z, t = masked_logits(logits), size_of(logits.temperature)
    numbers = _of_each_number(z, t, axes, riders)
    leaves, tree = jax.tree.flatten(numbers)
    reduced = jax.lax.reduce(
        leaves,
        jax.tree.leaves(of_nothing(numbers)),
        lambda a, b: jax.tree.leaves(merge(tree.unflatten(a), tree.unflatten(b))),
        axes.from_the_start(z.ndim).dims,
    )
    summary = tree.unflatten([jnp.expand_dims(v, sorted(axes.dims)) for v in reduced])
    return _about(z, t, without_nothing(summary))


def _about(z: Array, t: Array | None, summary: Summary) -> Reduced:
    return Reduced(summary, shifted(z, summary.m, t), jnp.isneginf(summary.m))


def without_nothing(summary: Summary) -> Summary:
    """In a row without a logit above -inf all are tied, and none has a tail."""
    empty = jnp.isneginf(summary.m)
    below = (
        jnp.where(empty & (q > 0), -jnp.inf, w)
        for q, w in zip(summary.total, summary.below)
    )
    s = jnp.where(empty, 0, summary.s)
    return summary._replace(s=s, below=tuple(below), temperature=None)


def _of_each_number(z, t, axes, riders):
    def spread(v):
        return None if v is None else jnp.broadcast_to(v, z.shape).astype(z.dtype)

    zero, b, v = jnp.zeros_like(z), spread(riders.weights), spread(riders.values)
    q = tuple(map(spread, riders.coefficients))
    return Summary(
        m=z if b is None else jnp.where(b == 0, -jnp.inf, z),
        s=zero,
        temperature=spread(t),
        weight=b,
        e_d=zero if riders.with_e_d else None,
        logit=_at_label(z, axes, riders),
        total=q,
        below=tuple(zero for _ in q),
        value=v,
        deviation=None if v is None else zero,
        others=None if v is None else zero,
        top=_indices(z, axes) if riders.with_top else None,
    )


def _indices(z, axes):
    return jnp.broadcast_to(class_index(z, axes), z.shape)


def _top(z, axes):
    """The index of the maximum, the first of tied ones."""
    # XLA may compute logits anew for every reduction, and not to the last bit. Behind
    # the barrier they are the same for both.
    z = jax.lax.optimization_barrier(z)
    m = jnp.max(z, axes.dims, keepdims=True, initial=-jnp.inf)
    index = jnp.where(z < m, LAST, _indices(z, axes))
    return jnp.min(index, axes.dims, keepdims=True, initial=LAST)


def _at_label(z, axes, riders):
    if riders.labels is None:
        return None
    return jnp.where(is_class(riders.labels, z, axes), z, 0)


def maximum_first(axes: Axes, logits: Logits, riders: Riders) -> Reduced:
    z, t = masked_logits(logits), size_of(logits.temperature)
    m = jnp.max(_weighted_logits(z, riders), axes.dims, keepdims=True, initial=-jnp.inf)
    gap = jnp.where(z == jnp.inf, 0, z - jnp.where(jnp.isneginf(m), 0, m))
    d = gap if t is None else shifted(z, m, t)
    return _textbook(axes, m, z, gap, d, riders)


def in_block(axes: Axes, logits: Logits, riders: Riders) -> Reduced:
    z, t = masked_logits(logits), size_of(logits.temperature)
    largest = float(jnp.finfo(z.dtype).max)
    counting = _weighted_logits(z, riders)
    finite = jnp.minimum(counting, largest)
    top = jnp.max(finite, axes.dims, keepdims=True, initial=-largest)
    gap = jnp.minimum(z, largest) - top
    d = gap
    if t is not None:
        # Not by `over_temperature`, whose one choice more ends XLA's one kernel: a pull
        # in bfloat16 then takes 16 passes.
        hard, infinite = is_hard(t), jnp.isneginf(gap)
        d = jnp.where(infinite, gap, gap / jnp.where(hard, 1, t))
        d = jnp.where(hard & (gap < 0), -jnp.inf, d)
    m = jnp.max(counting, axes.dims, keepdims=True, initial=-jnp.inf)
    return _textbook(axes, m, z, gap, d, riders, gap == 0)


def _weighted_logits(z, riders):
    return z if riders.weights is None else jnp.where(riders.weights == 0, -jnp.inf, z)


def _textbook(axes, m, z, gap, d, riders, is_near=None):
    """The sums about the maximum, of which its own terms are left out.

    It is not looked for by equality, unless all is one kernel: XLA may compute logits
    anew for every sum, and not to the last bit. It is the one class above NEAR, if
    these add up to one.
    """
    total = functools.partial(jnp.sum, axis=axes.dims, keepdims=True)
    e, b, v = jnp.exp(d), riders.weights, riders.values
    is_near = e > NEAR if is_near is None else is_near
    is_near = is_near if b is None else is_near & (b != 0)
    near = total(jnp.where(is_near, e, 0))
    is_single = near < 1 + NEAR / 2

    def of_others(terms, own=0.0):
        of_near = total(jnp.where(is_near, terms, 0))
        return total(jnp.where(is_near, 0, terms)) + jnp.where(
            is_single, 0, of_near - own
        )

    tail, weight = of_others(e, 1), None
    is_empty = near + tail == 0
    if b is not None:
        # Found by equality, a maximum leaves the digits of small weights near it alone.
        is_top = jnp.where(is_single, is_near, (gap == 0) & (b != 0))
        tail = total(jnp.where(is_top, 0, _weighted(riders, e)))
        weight = total(jnp.where(is_top, b, 0))
    at_label, q = _at_label(z, axes, riders), _coefficients(z, riders)
    sums = Summary(
        m=m,
        s=tail,
        weight=weight,
        e_d=of_others(e * jnp.where(e == 0, 0, d)) if riders.with_e_d else None,
        logit=None if at_label is None else total(at_label),
        total=tuple(map(total, q)),
        below=tuple(of_others(_finite_product(q, gap)) for q in q),
        top=_top(z, axes) if riders.with_top else None,
    )
    if v is not None:
        # About the value of a class with most of the probability, or about 0. That the
        # tail decides which it is keeps the values out of the sums before: XLA has then
        # fetched them, where a TPU holds the rows in its vector memory.
        is_sure = is_maximum(d, tail) & (tail < 0.5)
        value = total(jnp.where(is_sure, v, 0))
        rest = jnp.where(is_sure, 0, v)
        sums = sums._replace(
            value=value,
            deviation=total(times(rest, e)) - times(value, tail),
            others=total(rest),
        )
    # Of 512 numbers or more, the maximum that XLA finds on a CPU may ignore NaN (jaxlib
    # 0.10.2). Until it does not, a sum tells.
    return Reduced(sums._replace(m=jnp.where(jnp.isnan(tail), tail, m)), d, is_empty)


def _coefficients(z, riders):
    return [jnp.broadcast_to(q, z.shape).astype(z.dtype) for q in riders.coefficients]


def _finite_product(q, gap):
    """q gap with 0 infinity = 0."""
    return q * jnp.where((q == 0) & jnp.isinf(gap), 0, gap)


def _weighted(riders: Riders, e: Array) -> Array:
    """b e. Where b is 0, z may lie far above m."""
    if riders.weights is None:
        return e
    return riders.weights * jnp.minimum(e, jnp.finfo(e.dtype).max)


def of_all_devices(axes: Axes, logits: Logits, row: Reduced) -> Reduced:
    """A row whose classes lie on several devices, from what each has reduced."""
    if not axes.mesh_names:
        return row
    t = size_of(logits.temperature)
    summary = row.summary._replace(temperature=t)
    summary = without_nothing(over_devices(axes.mesh_names, summary))
    return _about(masked_logits(logits), t, summary)


def over_devices(names: tuple[Hashable, ...], summary: Summary) -> Summary:
    """One message for the maximum, one for the sums seen from it, and one for those
    that do not wait for it; for the value at the maximum one more.

    Every device adds what it is seen to have from the maximum. Those that hold it add
    their tails, and but for one of them the 1 that is the maximum's own term.
    """
    m = jax.lax.pmax(jax.lax.stop_gradient(summary.m), names)
    holds = summary.m == m
    value = None
    if summary.value is not None:
        own = jnp.stack([jnp.where(holds, summary.value, 0), holds.astype(m.dtype)])
        value, holders = device_sum(own, names)
        value = value / jnp.maximum(holders, 1)
    parts = seen_from(summary, m, value, shifted)
    weight = summary.weight
    parts = parts._replace(
        m=holds.astype(m.dtype),
        s=jnp.where(holds, summary.s, parts.s),
        temperature=None,
        weight=None if weight is None else jnp.where(holds, weight, 0),
        value=None,
        top=None,
    )
    at_once = _sum_in_one_message((parts.logit, parts.total), names)
    sums = _sum_in_one_message(parts._replace(logit=None, total=()), names)
    sums = sums._replace(logit=at_once[0], total=at_once[1])
    s = sums.s if weight is not None else sums.s + (sums.m - 1)
    others = None if value is None else sums.others - value
    top = summary.top
    if top is not None:
        top = jax.lax.pmin(jnp.where(holds, top, LAST), names)
    return sums._replace(m=m, s=s, value=value, others=others, top=top)


def _sum_in_one_message(tree: Any, names: tuple[Hashable, ...]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree
    return structure.unflatten(device_sum(jnp.stack(leaves), names))


Reduction = Callable[[Axes, Logits, Riders], Reduced]


def of_forms(form: Callable[[Reduction], Form]) -> dict[str, Any]:
    """The forms of a pass, made of the three reductions."""
    reductions = {"plain": maximum_first, "merged": by_merge, "in_block": in_block}
    return {name: form(reduction) for name, reduction in reductions.items()}


def _summary_in(reduce):
    def form(axes, fixed, _):
        logits, riders = fixed
        row = of_all_devices(axes, logits, reduce(axes, logits, riders))
        return row.summary

    return form


def _native_summary(axes, fixed, _):
    logits, riders = fixed
    here = native.summary(axes, logits, riders)
    if here is None:
        return None
    if riders.with_top:
        here = here._replace(top=_top(masked_logits(logits), axes))
    return of_all_devices(axes, logits, Reduced(here, None, None)).summary


# With m held fixed, and the maximum's own term in s: a derivative sees it too.
def _smooth(axes, fixed, _, results):
    logits, riders = fixed
    z, m, t = masked_logits(logits), results.m, size_of(logits.temperature)
    gap, d, e = shifted(z, m, None), shifted(z, m, t), exp_shifted(z, m, t)
    at_label, q = _at_label(z, axes, riders), _coefficients(z, riders)
    total = functools.partial(row_sum, axes=axes)
    return Summary(
        m=m,
        s=total(_weighted(riders, e)),
        weight=results.weight,
        e_d=total(e * jnp.where(e == 0, 0, d)) if riders.with_e_d else None,
        logit=None if at_label is None else total(at_label),
        total=tuple(map(total, q)),
        below=tuple(total(_finite_product(q, gap)) for q in q),
        top=results.top,
        **_smooth_values(z, d, e, riders.values, results, total),
    )


# Linear in v, and about the value that the results are about.
def _smooth_values(z, d, e, v, results, total):
    if v is None:
        return {}
    v = jnp.broadcast_to(v, z.shape)
    is_sure = is_maximum(d, results.s) & (results.s < 0.5)
    of_sure = total(jnp.where(is_sure, v, 0))
    value = override_primal(results.value, True, of_sure)
    return {
        "value": value,
        "deviation": total(e * (v - value)),
        "others": total(v) - value,
    }


_summary = Pass(
    "summary",
    **of_forms(_summary_in),
    native=_native_summary,
    smooth=_smooth,
)


def summarize(axes: Axes, logits: Logits, riders: Riders = NO_RIDERS) -> Summary:
    """The summary of every row; its arrays keep the class axes with size 1."""
    return _summary(axes, (logits, riders))
