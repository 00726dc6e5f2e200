"""The one rule behind the losses of given logits.

`row_terms` takes logits x and targets to three numbers a row, from which every option
of `cross_entropy` is made in `per_row`. With z, m, d, e, s, t of `numerics`, classes
c and targets q, which are the indicator of the label or probabilities,

    -log p_c  = log1p(s) - d_c
    nll       = sum_c q_c (-log p_c)
    logsumexp = m/t + log1p(s)
    spread    = sum_c w_c (-log p_c)      over the included classes

The rule is there for the label's entry of the gradient, p_y - 1: autodiff rounds it to
0 when the model is sure. It also saves no second array of the size of the logits, keeps
NaN out of ignored rows, and puts it into rows whose label is no class.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._autodiff import with_jvp
from jaxsoft._core.mesh import (
    class_count,
    device_sum,
    first_class,
    in_one_piece,
    local_index,
    row_sum,
    split_alike,
    split_by_type,
)
from jaxsoft._core.numerics import (
    counted_logits,
    exact_at_maximum,
    exp_about,
    exp_below,
    exp_shifted,
    inverse_temperature,
    is_hard,
    is_maximum,
    shifted,
    sum_over_others,
    times_log,
    with_value,
)
from jaxsoft._losses.per_row import RowLabels, RowTerms, times_loss
from jaxsoft._passes.cpu_sums import sum_of_choices
from jaxsoft._passes.max_and_tail import max_and_tail
from jaxsoft._passes.one_pass import label_and_tail

# Of a loop that LLVM vectorizes however it looks.
CLASSES_OF_A_LONG_LOOP = 32
# In shorter rows there is little to win, and the places of the labels take 15 bytes a
# row.
CLASSES_OF_A_LONG_ROW = 8192


class WeightedProbabilities(NamedTuple):
    """Label probabilities, and class weights that broadcast to them."""

    q: jax.Array
    class_weight: jax.Array | None


# With cotangents g, h, k of nll, logsumexp and spread, Q = sum_c q_c, W = sum_c w_c and
# U = -sum_c p_c d_c,
#     t dz_i = g (Q p_i - q_i) + h p_i + k (W p_i - w_i)
#     t dt   = g sum_c q_c (d_c + U) + h (U - m/t) + k sum_c w_c (d_c + U)
#     dq_c   = g (-log p_c)        dw_c = sum over rows of k (-log p_c)
# In the first, nothing is subtracted from a p_i that is nearly 1:
#     p_i - 1 = (e_i - 1 - s) / (1 + s),
# where e_i - 1 is exactly 0 at the maximum, and both terms are negative elsewhere.
@with_jvp
@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def row_terms(
    x, targets, spread_weight, where, temperature, softcap, axes, with_logsumexp
):
    """RowTerms over axes, which are kept with size 1.

    targets: RowLabels, or WeightedProbabilities. spread_weight: None, or class weights
    that broadcast to x. temperature: None or one per row.
    """
    return _plain(
        x, targets, spread_weight, where, temperature, softcap, axes, with_logsumexp
    )[0]


def _plain(x, targets, spread_weight, where, temperature, softcap, axes, with_lse):
    # For the split alone, an ignored row costs less when it is dropped afterwards.
    mask = _mask(where, targets)
    needed = where if spread_weight is None and softcap is None else mask
    z = counted_logits(x, mask, temperature, softcap)
    label_logit: Any = None
    if isinstance(targets, RowLabels):
        label_logit = _label_logit(x, targets, mask, temperature, softcap, axes)
    if _is_of_labels_alone(targets, spread_weight, temperature):
        index = targets.class_index
        m, s = label_and_tail(x, needed, softcap, index, label_logit, axes, with_lse)
    else:
        m, s = max_and_tail(x, needed, temperature, axes, softcap)
    m, s = _of_counted(targets, m, -jnp.inf), _of_counted(targets, s, 0)
    d = exact_at_maximum(shifted(z, m, temperature), s)
    nll_of_class = jnp.log1p(s) - d
    if isinstance(targets, RowLabels):
        at_maximum = is_maximum(shifted(label_logit, m, temperature), s)
        at_maximum = at_maximum & jnp.isfinite(label_logit)
        label_logit = with_value(m, at_maximum, label_logit)
        nll = jnp.log1p(s) - shifted(label_logit, m, temperature)
        nll = jnp.where(targets.counted, nll, 0)
        nll = jnp.where(targets.valid, nll, jnp.nan)
    else:
        nll = _expectation(_coefficients(targets, mask, z), nll_of_class, axes)
    lse = spread = None
    if with_lse:
        lse = logsumexp_over_temperature(m, s, temperature)
        if isinstance(targets, RowLabels):
            lse = jnp.where(targets.counted, lse, 0)
    if spread_weight is not None:
        w = included(spread_weight, mask, z)
        spread = _expectation(w, nll_of_class, axes)
    return RowTerms(nll, lse, spread), (m, s, label_logit)


def _fwd(x, targets, spread_weight, where, temperature, softcap, axes, with_lse):
    out, row_numbers = _plain(
        x, targets, spread_weight, where, temperature, softcap, axes, with_lse
    )
    return out, (x, targets, spread_weight, where, temperature, softcap, row_numbers)


def _bwd(axes, with_lse, residuals, cotangents):
    x, targets, spread_weight, where, temperature, softcap, row_numbers = residuals
    m, s, label_logit = row_numbers
    mask = _mask_of_classes(where, targets, x, axes)
    z, to_input = jax.vjp(
        lambda x, softcap: counted_logits(x, mask, temperature, softcap), x, softcap
    )
    d = shifted(z, m, temperature)
    of_labels_alone = _is_of_labels_alone(targets, spread_weight, temperature)
    if of_labels_alone:
        e = exp_about(z, m)
    else:
        e = exp_below(z, m, temperature)
        e, d = with_value(1, is_maximum(d, s), e), exact_at_maximum(d, s)
    nll_of_class = jnp.log1p(s) - d
    g, h, k = cotangents
    g = jnp.where(jnp.isneginf(m), 0, g)
    h = jnp.where(jnp.isneginf(m), 0, h) if with_lse else h
    per_sum = 1 / (1 + s)

    in_temperature, label_entry = [], None
    if isinstance(targets, RowLabels):
        g = row_cotangent(g, targets)
        e_of_label = exp_shifted(label_logit, m, temperature)
        # XLA computes quotients of a row before its loop over the classes. The loop is
        # short if these are few, and what makes the quotients would outweigh it.
        dz_of_label = label_cotangent(g, e_of_label, s) / (1 + s)
        dz = g / (1 + s) * e
        if with_lse:
            dz = dz + per_sum * h * e
            dz_of_label = dz_of_label + per_sum * h * e_of_label
        if of_labels_alone and where is None and softcap is None and z.dtype == x.dtype:
            label_entry = dz_of_label  # of dx, which is dz
        else:
            hit = _is_label(targets, x, axes)
            dz = jnp.where(hit, dz_of_label, dz)
            in_temperature = [(1, jnp.where(hit | ~targets.valid, g, 0))]
        dtargets = None
    else:
        q, to_targets = jax.vjp(lambda v: _coefficients(v, mask, z), targets)
        q_g = g * q
        dz = e * sum_over_others(q_g, z, m, s, axes) - q_g * (s + (1 - e))
        dz = dz * per_sum
        if with_lse:
            dz = dz + per_sum * h * e
        in_temperature = [(g, q)]
        dtargets = to_targets(times_nll(g, nll_of_class))[0]
    dspread_weight = None
    if spread_weight is not None:
        w = included(spread_weight, mask, z)
        dz = dz + per_sum * spread_cotangent(k, w, row_sum(w, axes), e, s)
        in_temperature.append((k, w))
        dw = times_nll(k, nll_of_class)
        if mask is not None:
            dw = jnp.where(mask, dw, 0)
        dspread_weight = _sum_to_shape(dw, spread_weight)

    dtemperature = None
    if temperature is not None:
        dz = dz * inverse_temperature(temperature)
        u = -sum_of_choices(times_log(e, d), axes) * per_sum
        d_and_u = jnp.where(jnp.isinf(d), 0, d + u)
        # The sums come before the cotangents, which in forward mode have a factor 1/t
        # that may make them infinite.
        dt = sum(g * row_sum(q * d_and_u, axes) for g, q in in_temperature)
        if with_lse:
            dt = dt + h * logsumexp_slope(u, m, temperature)
        dtemperature = jnp.sign(temperature) * inverse_temperature(temperature) * dt
    dx, dsoftcap = to_input(dz)
    if label_entry is not None:
        dx = _with_label_entry(dx, label_entry, targets, axes)
    return dx, dtargets, dspread_weight, None, dtemperature, dsoftcap


row_terms.defvjp(_fwd, _bwd)


def _is_of_labels_alone(targets, spread_weight, temperature):
    """Whether what e and d are at the maximum is read at labels alone."""
    by_index = isinstance(targets, RowLabels) and spread_weight is None
    return by_index and temperature is None


def row_cotangent(g, labels):
    """0 into an ignored row; NaN into the whole row of an invalid label."""
    return jnp.where(labels.counted, g, 0) * jnp.where(labels.valid, 1, jnp.nan)


def label_cotangent(g, e, s):
    """(1 + s) g (p - 1) of the label."""
    return -g * (s + (1 - e))


def spread_cotangent(k, w, total, e, s):
    """(1 + s) k (W p_i - w_i); where p_i is above 1/2, as W (p_i - 1) + (W - w_i)."""
    sure = (total - w) * (1 + s) - total * (s + (1 - e))
    return k * jnp.where(e > s + (1 - e), sure, total * e - w * (1 + s))


def _mask(where, targets):
    """An ignored row is a row in which no class counts."""
    if not isinstance(targets, RowLabels):
        return where
    return targets.counted if where is None else where & targets.counted


def _mask_of_classes(where, targets, x, axes):
    """_mask, of a few classes compared class by class. Of a mask that is one number per
    row LLVM makes two loops over the classes, one of them without a mask, and
    vectorizes a short loop no more."""
    mask = _mask(where, targets)
    count = class_count(x.shape, axes)
    if where is not None or mask is None or count >= CLASSES_OF_A_LONG_LOOP:
        return mask
    return _class_index(x, axes) < jnp.where(mask, count, 0)


def _of_counted(targets, v, otherwise):
    if not isinstance(targets, RowLabels):
        return v
    return jnp.where(targets.counted, v, otherwise)


def _label_logit(x, labels, where, temperature, softcap, axes):
    """z of the label; of an invalid one, something finite.

    An accelerator compares every class with the label on its way through the row, which
    costs it nothing; a CPU takes one number from the row.
    """

    def compared(x, labels, where, temperature, softcap):
        z = counted_logits(x, where, temperature, softcap)
        hit = _is_label(labels, x, axes)
        return jnp.sum(jnp.where(hit, z, 0), axes, keepdims=True)

    def taken(x, labels, where, temperature, softcap):
        (axis,) = axes
        index, found = local_index(labels.class_index, x.shape[axis], axes.mesh_names)

        def of_label(v: Any) -> Any:
            if v is None or v.shape[axis] == 1:
                return v
            return jnp.take_along_axis(v, index, axis, mode="promise_in_bounds")

        z = counted_logits(of_label(x), of_label(where), temperature, softcap)
        return jnp.where(found, z, 0)

    given = x, labels, where, temperature, softcap
    if in_one_piece(x, axes):
        z = jax.lax.platform_dependent(*given, cpu=taken, default=compared)
    else:
        z = compared(*given)
    return device_sum(z, axes.mesh_names)


def _with_label_entry(dz, of_label, labels, axes):
    """dz with another number at every label.

    An accelerator compares every class with the label; a CPU, in long rows, writes the
    number where it belongs. Measured on two cores in float32, in ms, a gradient whose
    logits are donated:

        rows x classes    compared    written
        1 x 1000000           1.36       1.04
        64 x 131072            7.2        6.5
        512 x 50257           21.7       17.8
        4096 x 8192           27.4       25.6
        1024 x 1000            1.1        1.0
    """

    def compared(dz, of_label, labels):
        return jnp.where(_is_label(labels, dz, axes), of_label, dz)

    def written(dz, of_label, labels):
        (axis,) = axes
        rows = tuple(i for i in range(dz.ndim) if i != axis)
        one_place_per_row = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(),
            inserted_window_dims=(axis,),
            scatter_dims_to_operand_dims=(axis,),
            operand_batching_dims=rows,
            scatter_indices_batching_dims=tuple(range(len(rows))),
        )
        # In a row whose label is no class, all entries are 0, or all are NaN.
        index = jnp.maximum(jnp.squeeze(labels.class_index, axis), 0)
        return jax.lax.scatter(
            dz,
            jnp.expand_dims(index, -1),
            jnp.squeeze(of_label, axis),
            one_place_per_row,
            unique_indices=True,
            mode="promise_in_bounds",
        )

    given = dz, of_label, labels
    is_long = in_one_piece(dz, axes) and dz.shape[axes[0]] >= CLASSES_OF_A_LONG_ROW
    if not is_long or axes.mesh_names or split_by_type(dz, range(dz.ndim)):
        return compared(*given)
    return jax.lax.platform_dependent(*given, cpu=written, default=compared)


def _is_label(labels, x, axes):
    """Compared, not gathered: a comparison stays local when the classes are sharded."""
    return _class_index(x, axes) == labels.class_index


def _class_index(x, axes):
    class_index, stride = jnp.zeros((1,) * x.ndim, jnp.int32), 1
    for axis in reversed(axes):
        along_axis = [n if i == axis else 1 for i, n in enumerate(x.shape)]
        iota = jax.lax.broadcasted_iota(jnp.int32, along_axis, axis)
        class_index = class_index + stride * iota
        stride *= x.shape[axis]
    class_index = split_alike(class_index, x)
    return first_class(axes.count_here(x.shape), axes.mesh_names) + class_index


def _coefficients(targets, mask, z):
    """q_c w_c, without the NaN that the probability of a masked class may be."""
    q = targets.q.astype(z.dtype)
    q = q if mask is None else jnp.where(mask | (q > 0), q, 0)
    if targets.class_weight is None:
        return q
    return q * targets.class_weight.astype(z.dtype)


def included(spread_weight, mask, z):
    w = split_alike(jnp.broadcast_to(spread_weight.astype(z.dtype), z.shape), z)
    return w if mask is None else jnp.where(mask, w, 0)


def _expectation(q, nll_of_class, axes):
    """sum_c q_c (-log p_c) with 0 (-log 0) = 0."""
    return sum_of_choices(times_loss(q, nll_of_class), axes)


def times_nll(g, nll_of_class):
    """g (-log p_c), and 0 where that is infinite, as in `times_loss`."""
    return g * jnp.where(jnp.isinf(nll_of_class), 0, nll_of_class)


def logsumexp_over_temperature(m, s, temperature):
    if temperature is None:
        return m + jnp.log1p(s)
    t = jnp.where(is_hard(temperature), 0, jnp.abs(temperature))
    return jnp.where(m == 0, 0, m / t) + jnp.log1p(s)


def logsumexp_slope(u, m, temperature):
    """t times the derivative in t of logsumexp/t: U - m/t, without infinities of m."""
    lse_of_max = jnp.where(jnp.isinf(m), 0, m) * inverse_temperature(temperature)
    return u - jnp.where(jnp.isinf(lse_of_max), 0, lse_of_max)


def _sum_to_shape(dw, spread_weight):
    shared = [i for i, n in enumerate(spread_weight.shape) if n != dw.shape[i]]
    return jnp.sum(dw, shared, keepdims=True).astype(spread_weight.dtype)
