"""The softmax of two numbers, elementwise: what relu, abs, sign, step, maximum and
clip have in common when they are smooth.

For x, y and a temperature tau of either sign,

    u = (x - y)/tau        e = exp(-|u|)
    maximum   M = tau log(exp(x/tau) + exp(y/tau))
                = max(x, y) + tau log1p(e)             (min for tau < 0)
    weight    w = 1/(1 + exp(-u))                      of x; that of y is 1 - w
    entropy   h = -w log w - (1 - w) log(1 - w) = log1p(e) + |u| e/(1 + e)
    slope     v = w (1 - w) = e/(1 + e)^2

and with du = (dx - dy - u dtau)/tau the derivatives stay within the family:

    dM = w dx + (1 - w) dy + h dtau
    dw = v du        dh = -u v du        dv = v ((1 - w) - w) du

Each function has its rule for the digits: autodiff of the formula for M has 1 - w as a
difference, and NaN at tau = 0 and at infinities. The weight of y is the weight of the
pair (y, x), never 1 - w. e has all its digits, and everything else is made of e.

Temperature None is 1. A tie of two numbers that are -inf (at tau < 0: +inf) is the
maximum of nothing: both weights are 0. At tau = 0, h is log 2 at ties, as in the limit,
and the derivatives of w, h and v are 0.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import within_range
from jaxsoft._core.logits import (
    exact_exp_shifted,
    inverse_temperature,
    is_hard,
    is_negative,
    sign_of,
    times_log,
    zero_if_infinite,
)
from jaxsoft._elementwise import rule_from_partials


def _oriented(x, y, tau):
    """At tau < 0 the pair (-x, -y): its maximum is the minimum's negative."""
    if tau is None:
        return x, y
    below = is_negative(tau)
    return jnp.where(below, -x, x), jnp.where(below, -y, y)


def exp_gap(x: Array, y: Array, tau: Array | None) -> Array:
    """e = exp(-|x - y|/|tau|); at tau = 0, 1 at ties and 0 elsewhere."""
    x, y = _oriented(x, y, tau)
    return exact_exp_shifted(jnp.minimum(x, y), jnp.maximum(x, y), tau)


def reciprocal(tau: Array | None) -> Array | float:
    """1/tau, and 0 at tau = 0."""
    return 1.0 if tau is None else sign_of(tau) * inverse_temperature(tau)


@jax.custom_jvp
def gap(x: Array, y: Array, tau: Array | None) -> Array:
    """u = (x - y)/tau; 0 at ties, also of infinities; elsewhere infinite at tau = 0."""
    difference = jnp.where(x == y, 0, x - y)
    if tau is None:
        return difference
    hard = is_hard(tau)
    u = difference / jnp.where(hard, 1, tau)
    difference = difference * sign_of(tau)
    u = jnp.where(jnp.isinf(difference), difference, u)
    return jnp.where(hard, jnp.where(x == y, 0, difference * jnp.inf), u)


@jax.custom_jvp
def maximum(x: Array, y: Array, tau: Array | None) -> Array:
    excess = jnp.log1p(exp_gap(x, y, tau))
    if tau is None:
        return jnp.maximum(x, y) + excess
    # An infinite temperature may meet an excess of 0.
    excess = jnp.where((excess == 0) | is_hard(tau), 0, tau * excess)
    return jnp.where(is_negative(tau), jnp.minimum(x, y), jnp.maximum(x, y)) + excess


@jax.custom_jvp
def weight(x: Array, y: Array, tau: Array | None) -> Array:
    e = exp_gap(x, y, tau)
    x, y = _oriented(x, y, tau)
    return jnp.where(x > y, 1, e) / (1 + e)


@jax.custom_jvp
def entropy(x: Array, y: Array, tau: Array | None) -> Array:
    e = exp_gap(x, y, tau)
    return jnp.log1p(e) + times_log(e / (1 + e), jnp.abs(gap(x, y, tau)))


@jax.custom_jvp
def slope(x: Array, y: Array, tau: Array | None) -> Array:
    e = exp_gap(x, y, tau)
    return e / (1 + e) ** 2


def _slope_times_gap(x, y, tau):
    """u v, which is at most 0.23, and 0 where u is infinite."""
    return times_log(slope(x, y, tau), gap(x, y, tau))


def _slope_change(x, y, tau):
    """dv/du."""
    return slope(x, y, tau) * (weight(y, x, tau) - weight(x, y, tau))


rule_from_partials(
    gap,
    lambda x, y, tau: reciprocal(tau),
    lambda x, y, tau: -reciprocal(tau),
    lambda x, y, tau: within_range(
        -zero_if_infinite(gap(x, y, tau)) * reciprocal(tau), x.dtype
    ),
)
rule_from_partials(
    maximum,
    lambda x, y, tau: weight(x, y, tau),
    lambda x, y, tau: weight(y, x, tau),
    lambda x, y, tau: entropy(x, y, tau),
)
rule_from_partials(
    weight,
    lambda x, y, tau: slope(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: -slope(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: -_slope_times_gap(x, y, tau) * reciprocal(tau),
)
rule_from_partials(
    entropy,
    lambda x, y, tau: -_slope_times_gap(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: _slope_times_gap(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: (
        times_log(_slope_times_gap(x, y, tau), gap(x, y, tau)) * reciprocal(tau)
    ),
)
rule_from_partials(
    slope,
    lambda x, y, tau: _slope_change(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: -_slope_change(x, y, tau) * reciprocal(tau),
    lambda x, y, tau: (
        -times_log(_slope_change(x, y, tau), gap(x, y, tau)) * reciprocal(tau)
    ),
)
