"""A row of logits and its summary: what the rules of the library are written with.

A rule is a value and a pullback. `row_rule` makes of the two a function that both modes
of differentiation know; `Row` has the letters in which they are written, those of
`logits` and `merge`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._autodiff import with_jvp
from jaxsoft._checks import kept_shape
from jaxsoft._core.logits import (
    Logits,
    exact_at_maximum,
    exact_exp_shifted,
    exp_shifted,
    inverse_temperature,
    masked_logits,
    shifted,
    sign_of,
    size_of,
)
from jaxsoft._core.mesh import Axes, match_varying, reshard_like, row_sum
from jaxsoft._passes.product import product
from jaxsoft._passes.summary import NO_RIDERS, Riders, summarize


def logits_of(
    x: Array, where: Array | None, temperature: Array | None, axes: Axes
) -> Logits:
    """Logits with a temperature for every row, typed as the passes want them.

    A shared temperature is spread before a rule sees it: the sum over rows in its
    derivative is then JAX's own.
    """
    if temperature is not None:
        kept = jnp.broadcast_to(temperature, kept_shape(x.shape, axes))
        temperature = reshard_like(kept, x)
    x, temperature = match_varying(axes, x, temperature)
    return Logits(x, where, temperature)


class Row(NamedTuple):
    """Rows of logits with their maxima m and tails s."""

    axes: Axes
    logits: Logits
    m: Array
    s: Array

    @property
    def z(self) -> Array:
        return masked_logits(self.logits)

    @property
    def d(self) -> Array:
        """(z - m)/t, 0 at the maximum."""
        return exact_at_maximum(shifted(self.z, self.m, self.t), self.s)

    @property
    def e(self) -> Array:
        return exp_shifted(self.z, self.m, self.t)

    @property
    def exact_e(self) -> Array:
        """e without the rounding of d, which costs a pass over the logits."""
        return exact_exp_shifted(self.z, self.m, self.t)

    @property
    def p(self) -> Array:
        """0 at a masked class, and 0 throughout where nothing counts."""
        return self.e / (1 + self.s)

    @property
    def t(self) -> Array | None:
        return size_of(self.logits.temperature)

    @property
    def per_t(self) -> Array | float:
        """1/t, and 0 at t = 0."""
        return inverse_temperature(self.logits.temperature)

    def over_t(self, v: Array) -> Array:
        """v/t for a derivative v, which is 0 where v is 0; at t = 0 all of it is."""
        return v if self.t is None else product(v, self.per_t)

    @property
    def sign(self) -> Array | float:
        """That of the temperature."""
        temperature = self.logits.temperature
        return 1.0 if temperature is None else sign_of(temperature)

    def sum(self, v: Array) -> Array:
        return row_sum(v, self.axes)

    def to_x(self, dz: Array) -> Array:
        """The cotangent of x, for one of z."""
        _, to_x = jax.vjp(
            lambda x: masked_logits(self.logits._replace(x=x)), self.logits.x
        )
        return to_x(dz)[0]


def summarized(
    axes: Axes, logits: Logits, riders: Riders = NO_RIDERS
) -> tuple[Row, Any]:
    """The row, and its whole summary."""
    summary = summarize(axes, logits, riders)
    return Row(axes, logits, summary.m, summary.s), summary


def computed_anew(tree: Any) -> Any:
    """The same arrays, of which XLA computes nothing together with the value.

    A pullback that repeats what the value is made of asks for it: XLA would round the
    value otherwise than without a derivative.
    """
    # One by one: a barrier gives all its results the type of one that varies.
    return jax.tree.map(jax.lax.optimization_barrier, tree)


def row_rule(value: Callable[..., Any], pullback: Callable[..., Any]) -> Any:
    """The function f(axes, logits, *given) with both modes of differentiation.

    Args:
        value: (axes, logits, *given) -> the result of f, and the few numbers per row
            that are kept for the pullback.
        pullback: (axes, logits, *given, kept, cotangent of the result) -> the
            cotangents of x, of the temperature, and of each of given; None is 0.
    """

    @with_jvp
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def f(axes: Axes, logits: Logits, *given: Any) -> Any:
        return value(axes, logits, *given)[0]

    def forward(axes, logits, *given):
        result, kept = value(axes, logits, *given)
        return result, (logits, given, kept)

    def backward(axes, residuals, cotangent):
        logits, given, kept = residuals
        cotangents = pullback(axes, logits, *given, kept, cotangent)
        dx, dtemperature, *dgiven = cotangents
        return Logits(dx, None, dtemperature), *dgiven

    f.defvjp(forward, backward)
    return f
