"""The split of a row in one pass on a CPU: about its label, or about a sample of it.

What the split (m, s) asks of m is not that it is the maximum, only that exponentials do
not overflow. So a CPU need not look for the maximum first.

With the logit of a label y as m, and the sum over the other classes as tail,

    m = z_y        s = sum_{c != y} exp(z_c - m)        sum_c exp(z_c) = exp(m) (1 + s),

the loss of the label is log1p(s), with all digits of s, and its derivative at the label
is -s/(1 + s). With the maximum of a few classes as m, and s = sum_c exp(z_c - m) - 1,
the logsumexp is m + log1p(s), unless it is near 0 and the two nearly cancel.

Where a class lies too far above m, or digits would be lost, the split about the maximum
takes its place, for all rows. Measured on two cores in float32, in ms:

                         cross_entropy              logsumexp
    rows x classes    optax  two passes  one    jax.nn  two passes  one
    256 x 131072        138          24   10       146          20   12
    4096 x 8192          21          19   10        22          21   13
    8192 x 1000           6           7    5         6           7    4
    65536 x 128          11           7    5        10           6    4
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.batching import largest_of_batch
from jaxsoft._core.exp import HIGHEST, exp_of_difference_on_cpu
from jaxsoft._core.lanes import (
    apart,
    first_of_part,
    of_lanes,
    steps_of_lanes,
    sum_of_lanes,
)
from jaxsoft._core.mesh import Axes, in_one_piece
from jaxsoft._core.numerics import accumulation_dtype
from jaxsoft._passes.max_and_tail import (
    Rows,
    capped_counted,
    max_and_tail,
    split_tangents,
)

# A sum with an exponential that ended at exp(HIGHEST) is larger.
LARGEST_SUM = 1e30
# In shorter rows there is less to win than to lose: that every option of a loss, at its
# neutral value, changes no bit. Smoothing and a temperature have two passes.
LEAST_CLASSES = 64
# Classes whose maximum stands for that of the row.
SAMPLE = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def label_and_tail(
    x: Array,
    where: Array | None,
    softcap: Array | None,
    class_index: Array,
    label_logit: Array,
    axes: Axes,
    to_add: bool,
) -> tuple[Array, Array]:
    """(m, s) as `max_and_tail` has it, or with m the logit of the row's label. Rows
    with class_index -1 may have any s. Of m and log1p(s) that are to be added, the sum
    keeps its digits."""

    def about_the_maximum(x, where, softcap, *_):
        return max_and_tail(x, where, None, axes, softcap)

    def about_the_label(x, where, softcap, class_index, label_logit):
        m = jax.lax.stop_gradient(label_logit)
        s = _sum_about(x, where, softcap, m, class_index, axis=axes[0])
        far = s > LARGEST_SUM
        if to_add:
            # A label with more than half of the probability is the maximum.
            far |= (s > 1) & _cancels(m, jnp.log1p(s))
        far &= class_index >= 0
        return _unless(far, (m, s), lambda: about_the_maximum(x, where, softcap))

    given = x, where, softcap, class_index, label_logit
    if not _may_be_one_pass(x, axes):
        return about_the_maximum(*given)
    return jax.lax.platform_dependent(
        *given, cpu=about_the_label, default=about_the_maximum
    )


@label_and_tail.defjvp
def _label_and_tail_jvp(axes, to_add, primals, tangents):
    m, s = label_and_tail(*primals, axes, to_add)

    def of_split(x, where, softcap, *_):
        return x, where, None, softcap, None

    return (m, s), split_tangents(m, axes, of_split(*primals), of_split(*tangents))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def sample_and_tail(
    x: Array, where: Array | None, axes: Axes, to_add: bool
) -> tuple[Array, Array]:
    """(m, s) as `max_and_tail` has it, or with m no more than the maximum. Of m and
    log1p(s) that are to be added, the sum keeps its digits."""

    def about_the_maximum(x, where):
        return max_and_tail(x, where, None, axes)

    def about_a_sample(x, where):
        m, total = _sum_about_sample(x, where, axis=axes[0])
        far = ~(total <= LARGEST_SUM) | (m == jnp.inf)
        if to_add:
            far |= _cancels(m, jnp.log(jnp.maximum(total, 1)))
        s = jnp.where(total == 0, 0, total - 1)  # all are -inf, and so is m
        return _unless(far, (m, s), lambda: about_the_maximum(x, where))

    if not _may_be_one_pass(x, axes):
        return about_the_maximum(x, where)
    return jax.lax.platform_dependent(
        x, where, cpu=about_a_sample, default=about_the_maximum
    )


@sample_and_tail.defjvp
def _sample_and_tail_jvp(axes, to_add, primals, tangents):
    m, s = sample_and_tail(*primals, axes, to_add)
    nothing = None, None, None
    primals, tangents = (*primals, *nothing), (*tangents, *nothing)
    return (m, s), split_tangents(m, axes, primals, tangents)


def _may_be_one_pass(x, axes):
    if axes.mesh_names or accumulation_dtype(x.dtype) != jnp.float32:
        return False
    return in_one_piece(x, axes) and x.shape[axes[0]] >= LEAST_CLASSES


def _cancels(m, log_sum):
    """Whether m + log_sum has lost digits of log_sum, or of m where that is below 1."""
    return 2 * jnp.abs(m + log_sum) < jnp.maximum(log_sum, 1)


def _unless(far, split, otherwise):
    # One branch for all elements of a `jax.vmap`.
    any_far = largest_of_batch(jnp.max(far.astype(jnp.float32))) > 0
    return jax.lax.cond(any_far, otherwise, lambda: split)


def _sum_about_sample(x, where, *, axis):
    """The maximum m of a sample, and sum_c exp(z_c - m)."""

    def few(v):
        n = v.shape[axis]
        return jax.lax.slice_in_dim(v, 0, min(n, SAMPLE), axis=axis)

    sample = Rows(x, axis, where).logits(few)
    m = jax.lax.stop_gradient(jnp.max(sample, axis, keepdims=True))
    return m, _sum_about(x, where, None, m, axis=axis)


@functools.partial(jax.jit, static_argnames="axis")  # traced once for its shapes
def _sum_about(x, where, softcap, m, left_out=None, *, axis):
    """sum_c exp(z_c - m), without that of the class left_out."""
    rows = Rows(x, axis, where, softcap)
    m = jnp.expand_dims(m, axis)
    left_out = None if left_out is None else jnp.expand_dims(left_out, axis)

    def of_some(lanes):
        classes = steps_of_lanes(lanes, x.ndim, axis, lanes.parts * lanes.width)

        def part(k):
            is_left_out = None
            if left_out is not None:
                first = first_of_part(k, lanes, x.shape[axis])
                is_left_out = classes == left_out - first
            return _terms(rows.part(lanes, k), m, is_left_out, softcap)

        return sum_of_lanes(apart(of_lanes(jnp.add, part, lanes), m), axis)

    return sum(map(of_some, rows.lanes))


@jax.jit
def _terms(z, m, is_left_out, softcap):
    e = exp_of_difference_on_cpu(capped_counted(z, softcap), m, HIGHEST)
    # What is left out has a derivative.
    omitted = e - jax.lax.stop_gradient(e)
    return e if is_left_out is None else jnp.where(is_left_out, omitted, e)
