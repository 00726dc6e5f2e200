"""The pass that has the entropy of every row, and its pullback.

In the letters of `logits`, with U = -sum_i p_i d_i,

    H = log(1 + s) + U

where both terms are >= 0, so that neither cancels.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsoft._core.logits import (
    Logits,
    exact_at_maximum,
    exp_shifted,
    inverse_temperature,
    masked_logits,
    override_primal,
    shifted,
    sign_of,
    size_of,
)
from jaxsoft._core.mesh import Axes, device_sum, row_sum
from jaxsoft._passes import native
from jaxsoft._passes.merge import Summary
from jaxsoft._passes.primitive import Pass
from jaxsoft._passes.slopes import pull_and_push
from jaxsoft._passes.summary import (
    Reduced,
    Riders,
    by_merge,
    in_block,
    maximum_first,
    of_all_devices,
)

RIDERS = Riders(with_e_d=True)


class Entropy(NamedTuple):
    """A number per row each."""

    m: Array
    s: Array
    u: Array
    h: Array


def _numbers(of: Summary) -> Entropy:
    u = -of.e_d / (1 + of.s)
    return Entropy(of.m, of.s, u, jnp.log1p(of.s) + u)


def _form(reduce):
    def form(axes, logits, _):
        row = of_all_devices(axes, logits, reduce(axes, logits, RIDERS))
        return _numbers(row.summary)

    return form


# One kernel of XLA, which a division by a temperature ends.
def _in_block(axes, logits, _):
    by = by_merge if logits.temperature is not None else in_block
    return _form(by)(axes, logits, ())


def _native(axes, logits, _):
    here = native.summary(axes, logits, RIDERS)
    if here is None:
        return None
    return _numbers(of_all_devices(axes, logits, Reduced(here, None, None)).summary)


# With the maximum held fixed.
def _smooth(axes, logits, _, results):
    z, m, t = masked_logits(logits), results.m, size_of(logits.temperature)
    d, e = shifted(z, m, t), exp_shifted(z, m, t)
    s = override_primal(results.s, True, row_sum(e, axes))
    e_d = row_sum(e * jnp.where(e == 0, 0, d), axes)
    return _numbers(Summary(m, s, e_d=e_d))


_entropy = Pass(
    "entropy",
    _form(maximum_first),
    merged=_form(by_merge),
    in_block=_in_block,
    native=_native,
    smooth=_smooth,
)


def entropy(axes: Axes, logits: Logits) -> Entropy:
    """The arrays keep the class axes with size 1."""
    return _entropy(axes, logits)


# The derivatives of H:
#     t dz_i = -p_i (d_i + U)
#     t dt   = sum_i p_i (d_i + U)^2
def _slopes(axes, logits, of):
    z, t = masked_logits(logits), size_of(logits.temperature)
    d = exact_at_maximum(shifted(z, of.m, t), of.s)
    return _of_each_class(axes, logits, d, exp_shifted(z, of.m, t), of)


def _slopes_in_block(axes, logits, of):
    """With the numbers of the row computed anew: to write them for a derivative ends
    the one kernel of the value."""
    if logits.temperature is not None or axes.mesh_names:
        return _slopes(axes, logits, of)
    return _slopes_of_block(axes, logits, in_block(axes, logits, RIDERS))


def _slopes_of_block(axes, logits, row):
    return _of_each_class(axes, logits, row.d, jnp.exp(row.d), _numbers(row.summary))


def _of_each_class(axes, logits, d, e, of):
    p, per_t = e / (1 + of.s), inverse_temperature(logits.temperature)
    surprise = jnp.where(p == 0, 0, d + of.u)
    in_z = -p * surprise * per_t
    if logits.temperature is None:
        return in_z, None
    variance = jnp.sum(p * surprise**2, axes.dims, keepdims=True)
    return in_z, sign_of(logits.temperature) * variance * per_t


_entropy_pull, _entropy_push = pull_and_push("entropy", _slopes, _slopes_in_block)


def entropy_pull(axes: Axes, logits: Logits, of: Entropy, g: Array) -> Any:
    """The cotangents of z and of the temperature, for a cotangent g of h; the last is
    None without a temperature."""
    dz, dt = _entropy_pull(axes, (logits, of), g)
    return dz, None if dt is None else device_sum(dt, axes.mesh_names)
