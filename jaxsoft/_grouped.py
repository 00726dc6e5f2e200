"""Entries in segments: what `Row` is to a row, of rows whose entries stand anywhere.

m and the sum S of all e are two scatters, and S - 1 is s: nothing is lost where S is
1.5 or more. Below it the maximum stands alone, and S has rounded digits of s
away, and a third scatter sums the others. It is run if there is one.

With sorted ids the merge could be scanned in place of that. Passes over 2^20 logits in
2^16 segments, compiled with JAX 0.10.2, beside the formula that is usually written by
hand (segment_max, segment_sum); the second number is with the third scatter:

              two, three scatters     scan, kernels     by hand
    H200           4.8, 7.0             38.9, 130         4.8
    v5e            5.2, 6.1              4.3, 720         5.2

So sorted ids are a hint to the scatters alone. Nor does a form with the third sum in the
same scatter, in two columns, serve everywhere: 4.9 on an H200, but 5.3 for 4.4 with
eight numbers an entry, and 128 times the memory on a v5e.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.batching import largest_of_batch
from jaxsoft._core.logits import (
    NEAR,
    Logits,
    exact_at_maximum,
    exp_shifted,
    masked_logits,
    shifted,
    sign_of,
    size_of,
)


@dataclasses.dataclass(frozen=True)
class Segments:
    """What is static about them."""

    count: int
    are_sorted: bool

    @property
    def of_ids(self) -> dict[str, Any]:
        """What a scatter and a gather may rely on."""
        return {
            "mode": "promise_in_bounds",
            "indices_are_sorted": self.are_sorted,
            "wrap_negative_indices": False,
        }

    def full(self, value: float, like: Array) -> Array:
        """A number for every segment of an array of entries."""
        return jnp.full((self.count, *like.shape[1:]), value, like.dtype)


class Grouped(NamedTuple):
    """Entries in segments, with the maximum m and the sum S = 1 + s of every segment.

    What has the letter of a row, d, e or p, is of every entry.
    """

    segments: Segments
    ids: Array
    logits: Logits  # whose temperature is that of every entry
    temperature: Array | None  # of every segment
    m: Array
    total: Array

    @property
    def z(self) -> Array:
        return masked_logits(self.logits)

    @property
    def t(self) -> Array | None:
        return size_of(self.logits.temperature)

    @property
    def e(self) -> Array:
        return exp_shifted(self.z, self.at_entries(self.m), self.t)

    @property
    def d(self) -> Array:
        """(z - m)/t, 0 at the maximum of a segment that is sure."""
        d = shifted(self.z, self.at_entries(self.m), self.t)
        return exact_at_maximum(d, self.at_entries(self.total - 1))

    @property
    def p(self) -> Array:
        total = jnp.where(self.total == 0, 1, self.total)
        return self.e / self.at_entries(total)

    @property
    def s(self) -> Array:
        """The tail, with all its digits and with the derivative of S."""
        is_sure = _is_sure(self.total - 1)
        e, total = jax.lax.stop_gradient((self.e, self.total))
        # JAX runs both branches for a batch, unless they are chosen for all of it.
        rest = jax.lax.cond(
            largest_of_batch(jnp.any(is_sure)),
            lambda: self.sum(jnp.where(e > NEAR, 0, e)),
            lambda: total,
        )
        tail = jnp.where(total < 1.5, rest, total - 1)
        return tail + (self.total - total)

    @property
    def is_top(self) -> Array:
        """Which entries have most of the probability of a segment that is sure."""
        return (self.e > NEAR) & self.at_entries(_is_sure(self.total - 1))

    @property
    def sign(self) -> Array | float:
        """That of the temperature, of every segment."""
        return 1.0 if self.temperature is None else sign_of(self.temperature)

    def at_entries(self, v: Array) -> Array:
        """What is of the segment of every entry."""
        return v.at[self.ids].get(**self.segments.of_ids)

    def sum(self, v: Array) -> Array:
        """Over the entries of every segment."""
        return self.segments.full(0, v).at[self.ids].add(v, **self.segments.of_ids)

    def to_x(self, dz: Array) -> Array:
        """The cotangent of x, for one of z."""
        _, to_x = jax.vjp(
            lambda x: masked_logits(self.logits._replace(x=x)), self.logits.x
        )
        return to_x(dz)[0]


def _is_sure(s):
    """The maximum is alone above NEAR: two would have a tail of NEAR at least."""
    return (s > -1) & (s < 0.5)


def grouped(
    segments: Segments, logits: Logits, ids: Array, kept: Any = None
) -> Grouped:
    """The entries in their segments, those in no segment masked; the temperature of the
    logits is that of every segment. kept are m and S, where they are known."""
    of_ids, temperature = segments.of_ids, logits.temperature
    found = (ids >= 0) & (ids < segments.count)
    found = jax.lax.expand_dims(found, range(1, logits.x.ndim))
    where = found if logits.where is None else logits.where & found
    in_range = jnp.clip(ids, 0, segments.count - 1)
    if temperature is not None:
        logits = logits._replace(temperature=temperature.at[in_range].get(**of_ids))
    masked = logits._replace(where=where)
    if kept is not None:
        return Grouped(segments, in_range, masked, temperature, *kept)
    # Derivatives hold m fixed. Of logits without a mask no copy is made: the scatter
    # leaves out what is in no segment.
    z = jax.lax.stop_gradient(masked_logits(logits))
    m = segments.full(-jnp.inf, z).at[ids].max(z, **{**of_ids, "mode": "drop"})
    of = Grouped(segments, in_range, masked, temperature, m, m)
    return of._replace(total=of.sum(of.e))
