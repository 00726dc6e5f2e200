"""Entries in segments: what `Row` is to a row, of rows whose entries stand anywhere.

m and the sum S of all e are two scatters, and S - 1 is s: nothing is lost where S is
1.5 or more. Below it the maximum stands alone, and S has rounded digits of s away. A
third scatter then sums the others; it runs if any segment is so sure.

With sorted ids the merge could be scanned in place of that. Passes over 2^20 logits in
2^16 segments, in programs compiled with JAX 0.10.2; by hand is log(segment_sum(exp)) by
jax.ops, with the maximum shifted out. In brackets, with the third scatter:

              segment_logsumexp     scan, kernels     by hand
    H200         4.9 (7.0)            38.9, 130         4.8
    v5e          5.4 (9.4)             4.3, 720         5.2

So sorted ids are a hint to the scatters alone. A scatter of two columns, with the third
sum in the second, has 4.9 on an H200 too, but more than three scatters where an entry
is of eight numbers, and 128 times the memory on a v5e.
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
        """What a gather may rely on, with ids in range."""
        return {**self.of_any_ids, "mode": "promise_in_bounds"}

    @property
    def of_any_ids(self) -> dict[str, Any]:
        """How a scatter leaves out what is in no segment."""
        return {
            "mode": "drop",
            "indices_are_sorted": self.are_sorted,
            "wrap_negative_indices": False,
        }

    def full(self, value: float, like: Array) -> Array:
        """A number for every segment of an array of entries."""
        return jnp.full((self.count, *like.shape[1:]), value, like.dtype)


class Grouped(NamedTuple):
    """Entries in segments, with the maximum m and the sum S = 1 + s of every segment.

    What has the letter of a row, d, e or p, is of every entry. Each is made where it is
    asked for, of what is given: XLA writes out what a branch is handed.
    """

    segments: Segments
    given: Logits  # with a temperature for every segment
    ids: Array
    m: Array
    total: Array

    @property
    def logits(self) -> Logits:
        """With a temperature for every entry; what is in no segment is masked."""
        x, where, temperature = self.given
        found = (self.ids >= 0) & (self.ids < self.segments.count)
        found = jax.lax.expand_dims(found, range(1, x.ndim))
        where = found if where is None else where & found
        if temperature is not None:
            temperature = self.at_entries(temperature)
        return Logits(x, where, temperature)

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
        return exact_at_maximum(self.d_as_rounded, self.at_entries(self.total - 1))

    @property
    def d_as_rounded(self) -> Array:
        """(z - m)/t, and next to 0 at the maximum if XLA makes z anew."""
        return shifted(self.z, self.at_entries(self.m), self.t)

    @property
    def p(self) -> Array:
        total = jnp.where(self.total == 0, 1, self.total)
        return self.e / self.at_entries(total)

    @property
    def s(self) -> Array:
        """The tail, with all its digits and with the derivative of S."""
        given, m, total = jax.lax.stop_gradient((self.given, self.m, self.total))
        of = Grouped(self.segments, given, self.ids, m, total)
        is_sure = _is_sure(total - 1)
        # JAX runs both branches for a batch, unless they are chosen for all of it.
        rest = jax.lax.cond(
            largest_of_batch(jnp.any(is_sure)),
            lambda: of.sum(jnp.where(of.e > NEAR, 0, of.e)),
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
        temperature = self.given.temperature
        return 1.0 if temperature is None else sign_of(temperature)

    def at_entries(self, v: Array) -> Array:
        """What is of the segment of every entry; in no segment, of any."""
        in_range = jnp.clip(self.ids, 0, self.segments.count - 1)
        return v.at[in_range].get(**self.segments.of_ids)

    def sum(self, v: Array) -> Array:
        """Over the entries of every segment."""
        nothing = self.segments.full(0, v)
        return nothing.at[self.ids].add(v, **self.segments.of_any_ids)

    def to_x(self, dz: Array) -> Array:
        """The cotangent of x, for one of z."""
        logits = self.logits
        _, to_x = jax.vjp(lambda x: masked_logits(logits._replace(x=x)), logits.x)
        return to_x(dz)[0]


def _is_sure(s):
    """The maximum is alone above NEAR: two would have a tail of NEAR at least."""
    return (s > -1) & (s < 0.5)


def grouped(segments: Segments, given: Logits, ids: Array) -> Grouped:
    # Derivatives hold m fixed. Of logits without a mask no copy is made: the scatter
    # leaves out what is in no segment.
    per_entry = Grouped(segments, given, ids, ids, ids).logits
    z = jax.lax.stop_gradient(masked_logits(per_entry._replace(where=given.where)))
    m = segments.full(-jnp.inf, z).at[ids].max(z, **segments.of_any_ids)
    of = Grouped(segments, given, ids, m, m)
    return of._replace(total=of.sum(of.e))
