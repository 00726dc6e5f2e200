"""The rule behind the divergences of two linear heads, whose logits are never held.

Both vocabularies pass by in chunks of the same classes, twice for the value: the first
pass summarizes the rows, the second adds up the terms of their divergence, each a
matrix product per head. The backward pass recomputes both chunks, and takes two
products for every model that is differentiated: 8 in all for a student under a fixed
teacher. Of a sum over tokens of KL(p || q) the gradient in y is taken in the second
pass, and the backward pass has no product: 6.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.logits import (
    inverse_temperature,
    nan_where,
    sign_of,
    zero_if_infinite,
)
from jaxsoft._core.mesh import Axes, device_sum
from jaxsoft._linear.chunks import Tokens, column, has_narrow_range, on_platform
from jaxsoft._linear.pairs import (
    NOTHING,
    Model,
    Pair,
    Wanted,
    WantedOfAll,
    pulled_back,
    rows_of,
    summaries,
    sums_of_terms,
    zero_of_rows,
)
from jaxsoft._losses.per_row import weighted
from jaxsoft._passes.compared import divergence_of, is_empty
from jaxsoft._passes.divergence import both_of_all_devices
from jaxsoft._passes.product import product, scaled
from jaxsoft._passes.summary import without_nothing


class Kept(NamedTuple):
    """What the backward pass is given beside the arguments."""

    of: Any  # the Divergence of every row
    wanted: WantedOfAll
    gradient: Model | None  # of y, for a cotangent 1 of the sum


# Tokens of weight 0 are skipped where the weights are not differentiated: the
# derivative in a weight is the divergence, at 0 too.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def weighted_divergence(pair, tokens, weight, plan):
    """weight * divergence of the two Models of a Pair, (N,), or with plan.is_summed its
    sum. `tokens` are Tokens without labels; weight (N,), or None for 1."""
    return _result(weight, _plain(pair, tokens, weight, plan, NOTHING)[0], plan)


def _plain(pair, tokens, weight, plan, wanted):
    """The Divergence of every row, and what is wanted of the gradient of the sum."""
    tokens, v = jax.tree.map(column, tokens), _column_or_none(weight)
    counted = None if v is None or not plan.may_skip else v != 0
    of_rows = on_platform(_with_plan(summaries), pair, tokens, counted, plan=plan)
    here = without_nothing(of_rows.x), without_nothing(of_rows.y)
    axes = Axes((1,), plan.mesh_names)
    of_x, of_y = both_of_all_devices(axes, tokens.temperature, here)
    cotangent = None
    if wanted:
        ones = zero_of_rows(pair.x.hidden, pair.x.head.weight, ()) + 1
        cotangent = _of_whole_rows(ones if v is None else v, pair)
    rows = rows_of(pair, tokens, Pair(of_x, of_y), cotangent)
    second = _with_plan(sums_of_terms, wanted)
    sums, gradient = on_platform(second, pair, rows, counted, plan=plan)
    if plan.mesh_names:
        sums = tuple(device_sum(jnp.stack(sums), plan.mesh_names))
    empty = is_empty(of_x.m, of_y.m, plan.beta)
    return divergence_of(of_x, of_y, empty, sums, plan.beta), gradient.y


def _with_plan(f, *static):
    return lambda *arguments: f(arguments[-1], *static, *arguments[:-1])


def _column_or_none(v):
    return None if v is None else column(v)


def _result(weight, of, plan):
    divergence = of.mixed(plan.beta)[:, 0]
    if weight is not None:
        divergence = weighted(weight, divergence)
    return jnp.sum(divergence) if plan.is_summed else divergence


# The products see no infinity and no NaN of a hidden state, which 0 times would be NaN
# in the weights. A token that has one, and a cotangent that is not 0, gets NaN here.
def _of_whole_rows(cotangent, pair):
    finite = [jnp.all(jnp.isfinite(v.hidden), 1, keepdims=True) for v in pair]
    broken = ~(finite[0] & finite[1])
    return product(cotangent, 1 + nan_where(broken, cotangent.dtype))


def _fwd(pair, tokens, weight, plan):
    wanted = WantedOfAll(_wanted(pair.x), _wanted(pair.y), _moves(tokens.temperature))
    if _moves(weight):
        plan = plan._replace(may_skip=False)
    arguments = jax.tree.map(lambda v: v.value, (pair, tokens, weight))
    pair, tokens, weight = arguments
    dtype = jnp.promote_types(pair.y.hidden.dtype, pair.y.head.weight.dtype)
    in_value = plan.is_summed and plan.beta == 0 and not has_narrow_range(dtype)
    in_value = in_value and not (wanted.x or wanted.temperature)
    of_y = wanted.y if in_value else NOTHING
    of, gradient = _plain(pair, tokens, weight, plan, of_y)
    return _result(weight, of, plan), (arguments, Kept(of, wanted, gradient))


def _wanted(model):
    hidden, head = model
    return Wanted(
        _moves(hidden), _moves(head.weight), _moves(head.bias) or _moves(head.softcap)
    )


def _moves(leaf):
    return leaf is not None and leaf.perturbed


def _bwd(plan, residuals, g):
    (pair, tokens, weight), (of, wanted, gradient) = residuals
    if isinstance(g, SymbolicZero):
        aval: Any = g.aval
        g = jnp.zeros(aval.shape, aval.dtype)
    divergence = of.mixed(plan.beta)[:, 0]
    dweight = None
    if weight is not None:
        dweight = jnp.broadcast_to(g, weight.shape)
        dweight = product(dweight, zero_if_infinite(divergence))
    if gradient is not None:
        of_y = jax.tree.map(lambda v: scaled(v, g), gradient)
        return Pair(None, of_y), None, dweight
    of_rows = jnp.broadcast_to(g, divergence.shape)
    of_rows = column(of_rows if weight is None else product(of_rows, weight))
    given = pair, tokens, weight, of, of_rows
    return *_pulled_back(*given, plan, wanted), dweight


def _pulled_back(pair, tokens, weight, of, g, plan, wanted):
    tokens, v = jax.tree.map(column, tokens), _column_or_none(weight)
    counted = None if v is None or not plan.may_skip else v != 0
    g = _of_whole_rows(g, pair)
    rows = rows_of(pair, tokens, of, g)
    third = _with_plan(pulled_back, wanted)
    (both,), cotangents = on_platform(third, pair, rows, counted, plan=plan)
    cotangents = Pair(
        *(_over_devices(v, model, plan) for v, model in zip(cotangents, pair))
    )
    if not wanted.temperature:
        return cotangents, None
    factor = -sign_of(tokens.temperature) * inverse_temperature(tokens.temperature)
    both = device_sum(both, plan.mesh_names)
    dtemperature = product(g, factor * both)
    return cotangents, Tokens(None, jnp.squeeze(dtemperature, 1), None)


def _over_devices(cotangents, model, plan):
    if cotangents is None:
        return None
    hidden, head = cotangents
    if hidden is not None:
        hidden = device_sum(hidden, plan.mesh_names).astype(model.hidden.dtype)
    return Model(hidden, head)


weighted_divergence.defvjp(_fwd, _bwd, symbolic_zeros=True)
