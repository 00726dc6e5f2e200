"""The passes that write a number for every class, and their transposes.

For the letters see `logits` and `merge`. All of them are linear in their last argument.
A class that is masked gets 0. A row whose cotangent is 0 gets 0, whatever its logits:
for that every product here is 0 where its first factor is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import accumulation_dtype, within_range
from jaxsoft._core.logits import (
    Logits,
    exact_at_maximum,
    exp_shifted,
    inverse_temperature,
    is_negative,
    log_softmax_cotangent,
    masked_logits,
    shifted,
    size_of,
    times,
)
from jaxsoft._core.mesh import Axes, is_class, row_max, row_sum
from jaxsoft._passes import native
from jaxsoft._passes.primitive import Pass
from jaxsoft._passes.summary import NO_RIDERS, Riders, of_all_devices, of_forms


def _included(logits: Logits, v: Array) -> Array:
    return v if logits.where is None else jnp.where(logits.where, v, 0)


def _signed(logits: Logits, v: Array) -> Array:
    """The derivative in x of what has v in z, or the other way round."""
    if logits.temperature is not None:
        v = jnp.where(is_negative(logits.temperature), -v, v)
    return _included(logits, v)


def _over_t(logits: Logits, v: Array) -> Array:
    """v/t, and 0 where v is, whatever t is."""
    if logits.temperature is None:
        return v
    return times(v, inverse_temperature(logits.temperature))


def _leaving(v: Array, logits: Logits) -> Array:
    """In the dtype of x, stopped at its largest number."""
    return within_range(v, logits.x.dtype).astype(logits.x.dtype)


def _given(logits: Logits, v: Array) -> Array:
    """A cotangent or tangent of the logits' shape, in the dtype of sums."""
    return _included(logits, v.astype(accumulation_dtype(v.dtype)))


def _forms(write, riders=lambda logits, linear: NO_RIDERS):
    """The forms of a pass that reduces every row, with the riders, and then writes what
    follows from it."""

    def form(reduce):
        def of_rows(axes, logits, linear):
            row = reduce(axes, logits, riders(logits, linear))
            return write(logits, linear, of_all_devices(axes, logits, row))

        return of_rows

    return of_forms(form)


def _values(logits, linear):
    return Riders(values=_given(logits, linear))


def _smooth_probabilities(axes, logits):
    """p and log p by their formulas, about a maximum that is held fixed."""
    z = masked_logits(logits)
    m = row_max(jax.lax.stop_gradient(z), axes)
    e = exp_shifted(z, m, size_of(logits.temperature))
    total = row_sum(e, axes)
    total = jnp.where(total == 0, 1, total)
    return e / total, shifted(z, m, size_of(logits.temperature)) - jnp.log(total)


def _write_softmax(logits, _, row):
    return _leaving(jnp.exp(row.d) / (1 + row.summary.s), logits)


def _smooth_softmax(axes, logits, *_):
    return _leaving(_smooth_probabilities(axes, logits)[0], logits)


# p_i = e_i / (1 + s)
_softmax = Pass(
    "softmax",
    **_forms(_write_softmax),
    native=native.softmax,
    smooth=_smooth_softmax,
)


def softmax(axes: Axes, logits: Logits) -> Array:
    """p, in the dtype of x."""
    return _softmax(axes, logits)


def _write_log_softmax(logits, _, row):
    s = row.summary.s
    log_p = exact_at_maximum(row.d, s) - jnp.log1p(s)
    # Below an infinite maximum, which `in_block` takes for the largest number.
    log_p = jnp.where(row.d <= -jnp.finfo(log_p.dtype).max, -jnp.inf, log_p)
    return log_p.astype(logits.x.dtype)


def _smooth_log_softmax(axes, logits, *_):
    return _leaving(_smooth_probabilities(axes, logits)[1], logits)


# log p_i = d_i - log(1 + s)
_log_softmax = Pass(
    "log_softmax",
    **_forms(_write_log_softmax),
    native=native.log_softmax,
    smooth=_smooth_log_softmax,
)


def log_softmax(axes: Axes, logits: Logits) -> Array:
    """log p, in the dtype of x."""
    return _log_softmax(axes, logits)


# With v the value of g at the maximum, since sum_j p_j = 1,
#     t dz_i = p_i (g_i - sum_j p_j g_j)
#            = p_i ((g_i - v) - sum_j p_j (g_j - v))
# where nothing cancels when the model is sure: the sum is one over the others.
def _write_softmax_pull(logits, g, row):
    summary, per_total = row.summary, 1 / (1 + row.summary.s)
    mean = times(summary.deviation, per_total)
    deviation = (_given(logits, g) - summary.value) - mean
    dz = _over_t(logits, times(deviation, jnp.exp(row.d) * per_total))
    return _leaving(_signed(logits, dz), logits)


def _smooth_softmax_pull(axes, logits, g, _):
    p, g = _smooth_probabilities(axes, logits)[0], _given(logits, g)
    dz = p * (g - row_sum(p * g, axes)) * inverse_temperature(logits.temperature)
    return _leaving(_signed(logits, dz), logits)


_softmax_pull = Pass(
    "softmax_pull",
    **_forms(_write_softmax_pull, _values),
    native=native.softmax_pull,
    smooth=_smooth_softmax_pull,
    transpose=lambda axes, logits, t, _: _softmax_pull(axes, logits, t),
)


def softmax_pull(axes: Axes, logits: Logits, g: Array) -> Array:
    """dx for a cotangent g of softmax. The matrix is symmetric."""
    return _softmax_pull(axes, logits, g)


def _write_log_softmax_pull(logits, g, row):
    g, of = jnp.where(row.is_empty, 0, _given(logits, g)), row.summary
    dz = log_softmax_cotangent(g, row.d, of.s, of.value, of.others, times)
    dz = _over_t(logits, dz)
    return _leaving(_signed(logits, dz), logits)


def _smooth_log_softmax_pull(axes, logits, g, _):
    p, g = _smooth_probabilities(axes, logits)[0], _given(logits, g)
    dz = (g - p * row_sum(g, axes)) * inverse_temperature(logits.temperature)
    return _leaving(_signed(logits, dz), logits)


_log_softmax_pull = Pass(
    "log_softmax_pull",
    **_forms(_write_log_softmax_pull, _values),
    native=native.log_softmax_pull,
    smooth=_smooth_log_softmax_pull,
    transpose=lambda axes, logits, t, _: _log_softmax_push(axes, logits, t),
)


def log_softmax_pull(axes: Axes, logits: Logits, g: Array) -> Array:
    """dx for a cotangent g of log_softmax."""
    return _log_softmax_pull(axes, logits, g)


# The tangent: with v the value of dd at the maximum,
#     dlog p_i = dd_i - sum_j p_j dd_j = (dd_i - v) - sum_j p_j (dd_j - v)
def _tangent_of_d(logits, t):
    inverse = inverse_temperature(logits.temperature)
    return _signed(logits, t.astype(accumulation_dtype(t.dtype))) * inverse


def _write_log_softmax_push(logits, t, row):
    summary = row.summary
    mean = times(summary.deviation, 1 / (1 + summary.s))
    tangent = (_tangent_of_d(logits, t) - summary.value) - mean
    tangent = jnp.where(row.is_empty, 0, tangent)
    return _leaving(_included(logits, tangent), logits)


def _smooth_log_softmax_push(axes, logits, t, _):
    p, dd = _smooth_probabilities(axes, logits)[0], _tangent_of_d(logits, t)
    return _leaving(_included(logits, dd - row_sum(p * dd, axes)), logits)


_log_softmax_push = Pass(
    "log_softmax_push",
    **_forms(
        _write_log_softmax_push,
        lambda logits, t: Riders(values=_tangent_of_d(logits, t)),
    ),
    native=native.log_softmax_push,
    smooth=_smooth_log_softmax_push,
    transpose=lambda axes, logits, g, _: _log_softmax_pull(axes, logits, g),
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Overwriting:
    """Whether the result may be written over x."""

    x: bool


# dz_c = scale e_c, and at the label a number of its own.
def _write_to_classes(axes, fixed, linear):
    logits, m, labels, _ = fixed
    scale, at_label = linear
    z = masked_logits(logits)
    dz = times(scale, exp_shifted(z, m, size_of(logits.temperature)))
    if labels is not None:
        dz = jnp.where(is_class(labels, z, axes), at_label, dz)
    return _leaving(_signed(logits, dz), logits)


# The transpose: sum of e_c t_c over all classes but the label, and t at the label.
def _reduce_to_rows(axes, fixed, t):
    logits, m, labels, _ = fixed
    z, v = masked_logits(logits), _signed(logits, t.astype(m.dtype))
    terms = times(v, exp_shifted(z, m, size_of(logits.temperature)))
    at_label = None
    if labels is not None:
        hit = is_class(labels, z, axes)
        terms = jnp.where(hit, 0, terms)
        at_label = jnp.sum(jnp.where(hit, v, 0), axes.dims, keepdims=True)
    return jnp.sum(terms, axes.dims, keepdims=True), at_label


_to_classes = Pass(
    "to_classes",
    _write_to_classes,
    native=native.to_classes,
    transpose=lambda axes, fixed, t, _: _to_rows(axes, fixed, t),
)
_to_rows = Pass(
    "to_rows",
    _reduce_to_rows,
    native=native.to_rows,
    transpose=lambda axes, fixed, linear, _: _to_classes(axes, fixed, linear),
)


def to_classes(
    axes: Axes,
    logits: Logits,
    m: Array,
    scale: Array,
    labels: Array | None = None,
    at_label: Array | None = None,
    *,
    overwrites_x: bool = False,
) -> Array:
    """dx for dz_c = scale e_c, and at_label in place of it at the label.

    What nobody reads afterwards may be overwritten: a CPU's kernels then need no second
    array of the size of x. Of logits that are still wanted, XLA would make a copy.
    """
    fixed = logits, m, labels, Overwriting(overwrites_x)
    return _to_classes(axes, fixed, (scale, at_label))
