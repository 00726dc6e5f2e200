"""Can the tests fail? Break one line of the package, and see whether one does.

    python -m evidence.mutants                       all of them, in 20 minutes
    python -m evidence.mutants --only tail           those with the word in their name
    python -m evidence.mutants --output docs/mutants.md

Each mutant is made in a copy of the package in a temporary directory, and meets the few
tests that are about its line. The exit status is 1 when one survives, or when its line
is no longer there: then strengthen the tests, or bring the mutant up to date.

A CPU runs the compiled kernels, which the copy has too. Lines that are then not run are
met by the tests in plain JAX.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from jaxsoft._passes import library

ROOT = Path(__file__).parent.parent
COPIED = ("jaxsoft", "tests", "evidence", "pyproject.toml")
TIMEOUT_SECONDS = 900


class Mutant(NamedTuple):
    what: str
    module: str
    old: str  # occurs exactly once in the module
    new: str
    tests: str  # a file of tests/
    select: str  # pytest's -k
    kernels: bool = True  # False: the tests run in plain JAX


class Fate(NamedTuple):
    mutant: Mutant
    killer: str  # the test that failed; empty where none did
    trouble: str
    seconds: float


def _laws(law: str) -> str:
    return f"oracle and -{law}]"


def _derivatives(law: str) -> str:
    return f"every_derivative and -{law}]"


MUTANTS = [
    # The machinery of derivatives.
    Mutant(
        "forward mode has the wrong sign",
        "_autodiff",
        "out_tangents[i] = tangent",
        "out_tangents[i] = -tangent",
        "test_autodiff.py",
        "without_jit and jvp",
    ),
    Mutant(
        "reverse mode has the wrong sign",
        "_autodiff",
        "results = [None] * count + pulled(*leaves[:count], *cotangents)",
        "results = pulled(*leaves[:count], *(-c for c in cotangents))\n"
        "    results = [None] * count + results",
        "test_autodiff.py",
        "without_jit and vjp",
    ),
    Mutant(
        "arguments that do not move are differentiated too",
        "_autodiff",
        "return not isinstance(leaf, SymbolicZero) and _is_inexact(leaf)",
        "return _is_inexact(leaf)",
        "test_autodiff.py",
        "does_not_move",
    ),
    Mutant(
        "derivatives overflow half precision",
        "_core/dtypes",
        "return within_range(t, dtype)",
        "return t",
        "test_stability.py",
        "saturate",
    ),
    # The classes on many devices.
    Mutant(
        "sums over the classes stay on their device",
        "_core/mesh",
        "return jax.lax.psum(v, mesh_names) if mesh_names else v",
        "return v",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "labels are indices of the device",
        "_core/mesh",
        "return jax.lax.axis_index(mesh_names) * classes_here if mesh_names else 0",
        "return 0",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "every device counts its maximum as the maximum",
        "_passes/summary",
        "s = sums.s if weight is not None else sums.s + (sums.m - 1)",
        "s = sums.s",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "a row is what one device has of it",
        "_passes/summary",
        "    if not axes.mesh_names:\n        return row\n",
        "    if True:\n        return row\n",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "the gradient of hidden states is that of the device's classes",
        "_linear/recompute",
        "    dhidden = device_sum(dhidden, plan.mesh_names)  # in float32\n",
        "",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "a mean over all tokens divides by the weights of the device",
        "_sharding",
        "divisor, ratio = mean_divisor(of_rows, counted, like, total)",
        "divisor, ratio = mean_divisor(of_rows, counted, like)",
        "test_sharding.py",
        "eight_devices and a_mean",
    ),
    Mutant(
        "probabilities of whole rows stay whole beside logits that a type splits",
        "_core/mesh",
        "    v = reshard_like(v, like)\n    return v, reshard",
        "    return v, reshard",
        "test_sharding.py",
        "eight_devices and types and a_mean",
    ),
    Mutant(
        "a type follows what the linear head slices",
        "_core/mesh",
        "    if not split:\n        return f(*arguments)\n",
        "    if True:\n        return f(*arguments)\n",
        "test_sharding.py",
        "eight_devices and types and a_mean",
    ),
    # The letters of a row.
    Mutant(
        "half precision is summed in half precision",
        "_core/dtypes",
        "return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)",
        "return dtype",
        "test_precision.py",
        "half_precision and float16",
    ),
    Mutant(
        "a negative temperature is still the maximum",
        "_core/logits",
        "z = jnp.where(is_negative(logits.temperature), -z, z)",
        "z = jnp.where(is_negative(logits.temperature), z, z)",
        "test_facts.py",
        "bounds_and_symmetry",
        kernels=False,
    ),
    Mutant(
        "masked classes count",
        "_core/logits",
        "z = jnp.where(broadcast_like(logits.where, z), z, -jnp.inf)",
        "z = 1 * z",
        "test_facts.py",
        "mask",
        kernels=False,
    ),
    Mutant(
        "1/0 at temperature 0",
        "_core/logits",
        "return jnp.where(hard, 0, _inverse(jnp.where(hard, 1, jnp.abs(temperature))))",
        "return 1 / jnp.abs(temperature)",
        "test_stability.py",
        "grid and log_softmax_options-float32",
        kernels=False,
    ),
    Mutant(
        "1/t^2 overflows in a derivative",
        "_core/logits",
        "-within_range(inverse * inverse, size.dtype) * size_dot",
        "-(inverse * inverse) * size_dot",
        "test_smooth_max.py",
        "underflows_twice",
    ),
    Mutant(
        "a logit is divided before it is shifted",
        "_core/logits",
        "jnp.where(infinite, 0, gap) / divisor)",
        "jnp.where(infinite | (gap == 0), 0, z / divisor - m / divisor))",
        "test_laws.py",
        "extreme and -softmax_options]",
        kernels=False,
    ),
    Mutant(
        "the maximum is found by equality with what another kernel rounds",
        "_core/logits",
        "return d > jnp.where(s < 0.5, math.log(NEAR), 0)",
        "return d >= 0",
        "test_cross_entropy.py",
        "made_in_the_same_program",
        kernels=False,
    ),
    Mutant(
        "1 - p at the maximum",
        "_core/logits",
        "dz = multiply(g, s + (1 - e)) - multiply(others, e)",
        "dz = multiply(g, (1 + s) - e) - multiply(others, e)",
        "test_precision.py",
        "digits",
        kernels=False,
    ),
    Mutant(
        "0 times infinity is NaN",
        "_core/logits",
        "return a * jnp.where(a == 0, 0, b)",
        "return a * b",
        "test_merge.py",
        "forms_agree",
    ),
    Mutant(
        "the cotangent of softcap is dropped",
        "_elementwise",
        "rule_from_partials(capped, _slope_in_z, _slope_in_cap)",
        "rule_from_partials(capped, _slope_in_z, lambda z, c: jnp.zeros_like(z))",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "log(1 + x) in place of log1p(x)",
        "_elementwise",
        "return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))",
        "return jnp.maximum(z, 0) + jnp.log(1 + jnp.exp(-jnp.abs(z)))",
        "test_binary.py",
        "digits",
    ),
    Mutant(
        "flat class indices run along the axes in reverse",
        "_core/mesh",
        "for axis in reversed(axes.dims):",
        "for axis in axes.dims:",
        "test_facts.py",
        "over_two_axes",
        kernels=False,
    ),
    # The merge.
    Mutant(
        "the lower of two summaries loses its maximum's 1",
        "_passes/merge",
        "mass = (1 if low.weight is None else low.weight) + low.s",
        "mass = (0 if low.weight is None else low.weight) + low.s",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "the lower of two maxima is the maximum",
        "_passes/merge",
        "a_is_high = a.m >= b.m",
        "a_is_high = a.m <= b.m",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "the tail has the maximum's 1",
        "_passes/summary",
        "        s=zero,\n        temperature=spread(t),\n",
        "        s=zero + 1,\n        temperature=spread(t),\n",
        "test_merge.py",
        "forms_agree and merged-False",
    ),
    Mutant(
        "infinity less infinity",
        "_passes/merge",
        "gap = jnp.where(low == m, 0, low - m)",
        "gap = low - m",
        "test_merge.py",
        "forms_agree and merged-False",
    ),
    Mutant(
        "the gap of a tie is divided by a temperature of 0",
        "_passes/merge",
        "jnp.where(low == m, 0, gap / temperature)",
        "gap / temperature",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "a NaN loses the comparison of two maxima",
        "_passes/merge",
        "    high = high._replace(m=jnp.maximum(a.m, b.m))  # NaN if either is\n",
        "",
        "test_merge.py",
        "forms_agree and merged",
    ),
    Mutant(
        "e d is not seen from the higher maximum",
        "_passes/merge",
        "e_d = times(e, e_d) + times(times(e, mass), delta)",
        "e_d = times(e, e_d)",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "values are not seen from that of the higher maximum",
        "_passes/merge",
        "deviation = times(deviation + times(low.value - value, mass), e)",
        "deviation = times(deviation, e)",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "sums of q (z - m) keep their own m",
        "_passes/merge",
        "below = tuple(w + 2 * times(q, half) for q, w in zip(low.total, below))",
        "below = tuple(below)",
        "test_merge.py",
        "any_tree",
    ),
    Mutant(
        "the weight of the lower maximum is 1",
        "_passes/merge",
        "mass = (1 if low.weight is None else low.weight) + low.s",
        "mass = 1 + low.s",
        "test_merge.py",
        "forms_agree and merged",
    ),
    # The summary of a row.
    Mutant(
        "the sum of all less 1",
        "_passes/summary",
        "return total(jnp.where(is_near, 0, terms)) + jnp.where(\n"
        "            is_single, 0, of_near - own\n        )",
        "return total(terms) - own",
        "test_facts.py",
        "sure_model",
        kernels=False,
    ),
    Mutant(
        "the tail has the terms of the maximum",
        "_passes/summary",
        "            is_single, 0, of_near - own\n",
        "            is_single, of_near, of_near - own\n",
        "test_merge.py",
        "forms_agree and merged",
    ),
    Mutant(
        "the maximum is the same bits in both passes over a row",
        "_passes/summary",
        "is_near = e > NEAR if is_near is None else is_near",
        "is_near = e == 1 if is_near is None else is_near",
        "test_cross_entropy.py",
        "made_in_the_same_program",
        kernels=False,
    ),
    Mutant(
        "of tied maxima one counts",
        "_passes/summary",
        "is_single = near < 1 + NEAR / 2",
        "is_single = near < 3",
        "test_facts.py",
        "test_softmax or temperature_zero",
        kernels=False,
    ),
    Mutant(
        "the sum of weighted exponentials is not weighted",
        "_passes/summary",
        "tail = total(jnp.where(is_top, 0, _weighted(riders, e)))",
        "tail = total(jnp.where(is_top, 0, e))",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    Mutant(
        "the maximum has the weight 1",
        "_passes/summary",
        "weight = total(jnp.where(is_top, b, 0))",
        "weight = total(jnp.where(is_top, 1, 0 * b))",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    Mutant(
        "a class of weight 0 is the maximum",
        "_passes/summary",
        "return z if riders.weights is None else jnp.where(riders.weights == 0, "
        "-jnp.inf, z)",
        "return z",
        "test_peers.py",
        "weighted_logsumexp",
    ),
    Mutant(
        "a row of nothing has a tail",
        "_passes/summary",
        "s = jnp.where(empty, 0, summary.s)",
        "s = summary.s",
        "test_merge.py",
        "forms_agree and merged",
    ),
    Mutant(
        "a NaN that the maximum of a long row ignores is ignored",
        "_passes/summary",
        "return Reduced(sums._replace(m=jnp.where(jnp.isnan(tail), tail, m)), d, "
        "is_empty)",
        "return Reduced(sums, d, is_empty)",
        "test_stability.py",
        "nan_shows and logsumexp",
        kernels=False,
    ),
    Mutant(
        "in a block a temperature of 0 divides",
        "_passes/summary",
        "d = jnp.where(hard & (gap < 0), -jnp.inf, d)",
        "d = 1 * d",
        "test_merge.py",
        "forms_agree and in_block",
    ),
    Mutant(
        "the derivative of a tail lacks the term of the maximum",
        "_passes/summary",
        "s=total(_weighted(riders, e)),",
        "s=total(jnp.where(e == 1, 0, _weighted(riders, e))),",
        "test_transformations.py",
        _derivatives("logsumexp"),
    ),
    Mutant(
        "the derivative of the other values counts that of the maximum",
        "_passes/summary",
        '"others": total(v) - value,',
        '"others": total(v),',
        "test_cross_entropy.py",
        "second_derivatives_of_a_sure_row",
    ),
    Mutant(
        "the derivative of a tail forgets the temperature",
        "_passes/summary",
        "gap, d, e = shifted(z, m, None), shifted(z, m, t), exp_shifted(z, m, t)",
        "gap, d, e = shifted(z, m, None), shifted(z, m, t), exp_shifted(z, m, None)",
        "test_transformations.py",
        "other_laws and -logsumexp_options]",
    ),
    # The passes that write a number for every class.
    Mutant(
        "the softmax is p (1 + s)",
        "_passes/classes",
        "return _leaving(jnp.exp(row.d) / (1 + row.summary.s), logits)",
        "return _leaving(jnp.exp(row.d), logits)",
        "test_laws.py",
        _laws("softmax"),
        kernels=False,
    ),
    Mutant(
        "the largest log-probability is log(1 + s)",
        "_passes/classes",
        "log_p = exact_at_maximum(row.d, s) - jnp.log1p(s)",
        "log_p = exact_at_maximum(row.d, s) - jnp.log(1 + s)",
        "test_precision.py",
        "digits",
        kernels=False,
    ),
    Mutant(
        "below an infinite maximum in a block lies the largest number",
        "_passes/classes",
        "    log_p = jnp.where(row.d <= -jnp.finfo(log_p.dtype).max, -jnp.inf, "
        "log_p)\n",
        "",
        "test_merge.py",
        "forms_agree and in_block",
    ),
    Mutant(
        "the pullback of softmax loses the sum over the classes",
        "_passes/classes",
        "mean = times(summary.deviation, per_total)",
        "mean = 0 * per_total",
        "test_laws.py",
        _laws("softmax"),
        kernels=False,
    ),
    Mutant(
        "the pullback of softmax is not about the value of the maximum",
        "_passes/classes",
        "deviation = (_given(logits, g) - summary.value) - mean",
        "deviation = _given(logits, g) - mean",
        "test_laws.py",
        _laws("softmax"),
        kernels=False,
    ),
    Mutant(
        "the pullback of softmax subtracts numbers that are nearly equal",
        "_passes/summary",
        "is_sure = is_maximum(d, tail) & (tail < 0.5)\n        value",
        "is_sure = is_maximum(d, tail) & (tail < 0)\n        value",
        "test_precision.py",
        "digits",
        kernels=False,
    ),
    Mutant(
        "the tangent of log_softmax is not about the value of the maximum",
        "_passes/classes",
        "tangent = (_tangent_of_d(logits, t) - summary.value) - mean",
        "tangent = _tangent_of_d(logits, t) - mean",
        "test_merge.py",
        "transposes",
    ),
    Mutant(
        "the cotangent of a masked class leaks",
        "_passes/classes",
        "return v if logits.where is None else jnp.where(logits.where, v, 0)",
        "return v",
        "test_laws.py",
        _laws("log_softmax_options"),
        kernels=False,
    ),
    Mutant(
        "below temperature 0 a derivative has the sign of z",
        "_passes/classes",
        "v = jnp.where(is_negative(logits.temperature), -v, v)",
        "v = 1 * v",
        "test_laws.py",
        _laws("softmax_options"),
        kernels=False,
    ),
    Mutant(
        "a derivative leaves for its dtype as an infinity",
        "_passes/classes",
        "return within_range(v, logits.x.dtype).astype(logits.x.dtype)",
        "return v.astype(logits.x.dtype)",
        "test_stability.py",
        "saturate",
        kernels=False,
    ),
    Mutant(
        "the label's entry is that of any class",
        "_passes/classes",
        "dz = jnp.where(is_class(labels, z, axes), at_label, dz)",
        "dz = 1 * dz",
        "test_facts.py",
        "sure_model",
        kernels=False,
    ),
    Mutant(
        "the transpose counts the label among the classes",
        "_passes/classes",
        "terms = jnp.where(hit, 0, terms)",
        "terms = 1 * terms",
        "test_transformations.py",
        "other_laws and -cross_entropy]",
        kernels=False,
    ),
    Mutant(
        "the transpose of writing is writing",
        "_passes/classes",
        "transpose=lambda axes, logits, t, _: _log_softmax_push(axes, logits, t),",
        "transpose=lambda axes, logits, t, _: _log_softmax_pull(axes, logits, t),",
        "test_transformations.py",
        _derivatives("log_softmax"),
    ),
    Mutant(
        "the product with a cotangent of 0 is NaN",
        "_passes/product",
        "lambda _, factor, g: times(g, factor)",
        "lambda _, factor, g: g * factor",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "the transpose of a product is not summed over what is shared",
        "_passes/product",
        "return jnp.sum(t, shared, keepdims=True)",
        "return t",
        "test_transformations.py",
        "other_laws and -softargmax]",
    ),
    Mutant(
        "a tangent of the temperature is not pushed to the row",
        "_passes/slopes",
        "return sum(of_rows, jnp.sum(of_classes, axes.dims, keepdims=True))",
        "return jnp.sum(of_classes, axes.dims, keepdims=True)",
        "test_transformations.py",
        "other_laws and -entropy_options]",
    ),
    Mutant(
        "the entropy lacks its second term",
        "_passes/entropy",
        "return Entropy(of.m, of.s, u, jnp.log1p(of.s) + u)",
        "return Entropy(of.m, of.s, u, jnp.log1p(of.s))",
        "test_laws.py",
        _laws("entropy"),
    ),
    # A pass is a primitive.
    Mutant(
        "the derivative of a pass lacks what is linear",
        "_passes/primitive",
        "if any(i >= first_linear for i in moving):",
        "if False:",
        "test_transformations.py",
        "other_laws and -cross_entropy]",
    ),
    Mutant(
        "the derivative of a pass lacks what is not linear",
        "_passes/primitive",
        "moving = [i for i in moving if i < first_linear]",
        "moving = []",
        "test_transformations.py",
        _derivatives("softmax"),
    ),
    Mutant(
        "a transpose gives its cotangents in another order",
        "_passes/primitive",
        "results = dict(enumerate(jax.tree.leaves(linear), _count_of_fixed(tree)))",
        "linear = jax.tree.leaves(linear)[::-1]\n"
        "            results = dict(enumerate(linear, _count_of_fixed(tree)))",
        "test_transformations.py",
        "other_laws and -cross_entropy]",
    ),
    Mutant(
        "what a transpose is given may be a symbol for 0",
        "_passes/primitive",
        "cotangents = [ad.instantiate_zeros(c) for c in cotangents]",
        "cotangents = list(cotangents)",
        "test_merge.py",
        "transposes",
    ),
    Mutant(
        "under vmap the batch stays where it is",
        "_passes/primitive",
        "return jnp.moveaxis(v, dim, 0)",
        "return jnp.moveaxis(v, dim, -1)",
        "test_transformations.py",
        "vmap_is_a_loop and -softmax_options]",
    ),
    Mutant(
        "under vmap the class axes are counted from the first",
        "_passes/primitive",
        "axes = axes.from_the_end(leaves[0].ndim)",
        "axes = axes.from_the_start(leaves[0].ndim)",
        "test_transformations.py",
        "vmap_is_a_loop and -softmax_options]",
    ),
    Mutant(
        "a batch of what is linear gives logits of one",
        "_passes/primitive",
        "spread = i == 0 or i >= first_linear",
        "spread = False",
        "test_transformations.py",
        _derivatives("softmax"),
    ),
    Mutant(
        "kernels run on arrays that are split over devices",
        "_passes/primitive",
        'if chosen == "native" and not _lies_whole(context):',
        "if False:",
        "test_native.py",
        "on_meshes",
    ),
    Mutant(
        "no kernel runs inside shard_map",
        "_passes/primitive",
        "return bool(manual) and mesh is not None and set(manual) == "
        "set(mesh.axis_names)",
        "return False",
        "test_native.py",
        "on_meshes",
    ),
    Mutant(
        "a case that the kernels do not know has no other form",
        "_passes/primitive",
        "return plain(axes, fixed, linear) if results is None else results",
        "return results",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    # The kernels of a CPU.
    Mutant(
        "a CPU runs its kernels though they are switched off",
        "_passes/forms",
        "form = cpu_form.value",
        'form = "native"',
        "test_native.py",
        "switch_is_seen",
    ),
    Mutant(
        "the switch is always on",
        "_passes/switch",
        'with cpu_form("native" if use else "plain"):',
        'with cpu_form("native"):',
        "test_native.py",
        "switch_is_seen",
    ),
    Mutant(
        "a library of another version is registered",
        "_passes/library",
        "if ours // 1000 != theirs // 1000 or ours > theirs:",
        "if False:",
        "test_native.py",
        "another_version",
    ),
    Mutant(
        "labels of 64 bits wrap",
        "_passes/native",
        "labels = jnp.where((labels >= 0) & (labels < count), labels, -1)",
        "labels = 1 * labels",
        "test_native.py",
        "beyond_32_bits",
    ),
    Mutant(
        "a kernel takes the label for a class of its device",
        "_passes/native",
        "labels = labels - first_class(count, axes.mesh_names)",
        "labels = 1 * labels",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "a softmax over devices is that of the device",
        "_passes/native",
        "if axes.mesh_names or not _knows(axes, logits):",
        "if not _knows(axes, logits):",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "class axes in another order are taken for those in order",
        "_passes/native",
        "return in_order and x.ndim <= MOST_AXES",
        "return x.ndim <= MOST_AXES",
        "test_cross_entropy.py",
        "matter_of_layout",
    ),
    Mutant(
        "a kernel forgets the weights",
        "_passes/native",
        "known = riders.weights is None and len(q) <= MOST_COEFFICIENTS",
        "known = len(q) <= MOST_COEFFICIENTS",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    Mutant(
        "sums of q are those of q (z - m)",
        "_passes/native",
        'total=tuple(v for name, v in zip(names, results) if name == "q"),',
        'total=tuple(v for name, v in zip(names, results) if name == "b"),',
        "test_laws.py",
        _laws("cross_entropy_probabilities"),
    ),
    # Rows and their rules.
    Mutant(
        "derivatives lack 1/t",
        "_row",
        "return inverse_temperature(self.logits.temperature)",
        "return 1.0",
        "test_laws.py",
        _laws("softargmax_options"),
    ),
    Mutant(
        "the derivative in the temperature has the sign of t",
        "_row",
        "return 1.0 if temperature is None else sign_of(temperature)",
        "return 1.0",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "the cotangent of z is taken for that of x",
        "_row",
        "lambda x: masked_logits(self.logits._replace(x=x)), self.logits.x",
        "lambda x: masked_logits(Logits(x)), self.logits.x",
        "test_laws.py",
        _laws("entropy_options"),
    ),
    Mutant(
        "a rule has no derivative in the temperature",
        "_row",
        "return Logits(dx, None, dtemperature), *dgiven",
        "return Logits(dx, None, None), *dgiven",
        "test_facts.py",
        "derivative_in_temperature",
    ),
    # What every loss does with one number per row.
    Mutant(
        "checkify finds no check of the labels",
        "_losses/per_row",
        "if labels.size and check_labels:",
        "if False:",
        "test_option_promises.py",
        "checkify",
    ),
    Mutant(
        "label -1 is a class",
        "_losses/per_row",
        "is_class = ~ignored & (labels >= 0) & (labels < classes)",
        "is_class = ~ignored & (labels < classes)",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "a label beyond the last class is one",
        "_losses/per_row",
        "is_class = ~ignored & (labels >= 0) & (labels < classes)",
        "is_class = ~ignored & (labels >= 0) & (labels <= classes)",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "ignored rows have a weight in the mean",
        "_losses/per_row",
        "return weight if counted is None else jnp.where(counted, weight, 0)",
        "return weight",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "a mean divides by the number of rows",
        "_losses/per_row",
        "options, divisor = options_of_mean(options, counted, terms.nll)",
        "divisor = jnp.asarray(terms.nll.size, terms.nll.dtype)",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "the mean of nothing is 0/0",
        "_losses/per_row",
        "return jnp.where(empty, 0, total / jnp.where(empty, 1, total_weight))",
        "return total / total_weight",
        "test_facts.py",
        "all_rows_ignored",
    ),
    Mutant(
        "smoothing is spread over masked classes too",
        "_losses/per_row",
        "included = jnp.broadcast_to(where, over_classes)",
        "included = jnp.ones(over_classes, bool)",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "smoothing leaves the label its whole weight",
        "_losses/per_row",
        "loss = times_loss(1 - options.label_smoothing, loss)",
        "loss = 1 * loss",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "z_loss is multiplied by the class weight",
        "_losses/per_row",
        "loss = loss + times_loss(options.z_loss, _square(terms.logsumexp))",
        "w = options.label_weight\n"
        "        w = 1 if w is None else w\n"
        "        loss = loss + w * times_loss(options.z_loss, "
        "_square(terms.logsumexp))",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "a row of weight 0 counts",
        "_losses/per_row",
        "return jnp.where(weight == 0, 0, weight * loss)",
        "return weight * loss",
        "test_linear_divergence.py",
        "tokens_of_weight_0",
    ),
    Mutant(
        "a row without any class counts",
        "_losses/per_row",
        "labels.counted & ~empty,",
        "labels.counted,",
        "test_what_counts.py",
        "without_any_class",
    ),
    Mutant(
        "class weights rescale the z-loss of a mean",
        "_losses/per_row",
        "options = options._replace(z_loss=options.z_loss * ratio)",
        "pass",
        "test_what_counts.py",
        "rescale",
    ),
    Mutant(
        "the sum of the smallest logits overflows",
        "_losses/per_row",
        "return 0.5 ** (max(classes, 1) - 1).bit_length()",
        "return 1.0",
        "test_what_counts.py",
        "smallest_logits",
    ),
    Mutant(
        "a focal loss loses the digits of 1 - p",
        "_losses/per_row",
        "rest = -jnp.expm1(-nll)\n    some",
        "rest = 1 - jnp.exp(-nll)\n    some",
        "test_what_counts.py",
        "sure_model",
    ),
    Mutant(
        "loss_weight counts ignored rows",
        "_losses/loss_weight",
        "counted = index.counted if counted is None else index.counted & counted",
        "counted = counted",
        "test_what_counts.py",
        "loss_weight",
    ),
    Mutant(
        "an argument of another library has no hint",
        "_hints",
        "if name not in names:",
        "if False:",
        "test_errors.py",
        "class_and_text",
    ),
    Mutant(
        "a subnormal temperature below 0 acts as one above",
        "_core/logits",
        "return (bits < 0) & (bits != jnp.iinfo(bits.dtype).min)",
        "return temperature < 0",
        "test_facts.py",
        "subnormal",
        kernels=False,
    ),
    Mutant(
        "a weight 0 times a loss +inf is NaN",
        "_losses/per_row",
        "return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)",
        "return weight * loss",
        "test_binary.py",
        "removes_an_infinite_loss",
    ),
    # Distributions.
    Mutant(
        "the derivative of logsumexp in the temperature is half an entropy",
        "_logsumexp",
        "entropy = log_total - summary.e_d / (1 + row.s) if with_slope else None",
        "entropy = log_total if with_slope else None",
        "test_facts.py",
        "derivative_in_temperature",
    ),
    Mutant(
        "the weights of logsumexp forget the temperature",
        "_logsumexp",
        "        db = product(db, logits.temperature)\n",
        "        db = 1 * db\n",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    Mutant(
        "the logarithm of a negative sum is that of its size",
        "_logsumexp",
        "return log_sum if b is None else log_sum + nan_where(sign < 0, log_sum.dtype)",
        "return log_sum",
        "test_peers.py",
        "weighted_logsumexp",
    ),
    Mutant(
        "the logarithm of a sum near 1 is that of the sum less 1",
        "_logsumexp",
        "jnp.where(near_1, (weight - 1) + rest, 0)",
        "jnp.where(near_1, total - 1, 0)",
        "test_precision.py",
        "small_weight",
    ),
    Mutant(
        "logmeanexp divides by the classes that are masked too",
        "_logsumexp",
        "included = jnp.ones_like(z) if where is None else broadcast_like(where, z)",
        "included = jnp.ones_like(z)",
        "test_laws.py",
        _laws("logmeanexp"),
    ),
    Mutant(
        "a probability has a derivative of the wrong sign in the temperature",
        "_softmax",
        "dtemperature = -row_sum(product(dx, zero_if_infinite(d)), axes)",
        "dtemperature = row_sum(dx * zero_if_infinite(d), axes)",
        "test_laws.py",
        _laws("softmax_options"),
    ),
    Mutant(
        "the derivative of the entropy in the temperature loses its sign",
        "_passes/entropy",
        "return in_z, sign_of(logits.temperature) * variance * per_t",
        "return in_z, variance * per_t",
        "test_laws.py",
        _laws("entropy_options"),
    ),
    # Losses of given logits.
    Mutant(
        "p - 1 at the label",
        "_losses/nll",
        "at_label = product(g, -(row.s + (1 - e_label)) * per_total)",
        "at_label = product(g, (e_label - (1 + row.s)) * per_total)",
        "test_facts.py",
        "sure_model",
    ),
    Mutant(
        "an invalid label has a gradient that is a number",
        "_losses/nll",
        "factor = 1 + nan_where(~labels.valid, row.s.dtype)",
        "factor = jnp.ones_like(row.s)",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "an invalid label has a loss that is a number",
        "_losses/nll",
        "nll = nll + nan_where(~labels.valid, nll.dtype)",
        "nll = 1 * nll",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "the NaN of an ignored row leaks",
        "_losses/nll",
        "nll = jnp.where(labels.counted, nll, 0)",
        "nll = 1 * nll",
        "test_linear.py",
        "tokens_that_count",
    ),
    Mutant(
        "a NaN that does not count meets the derivative of the cap",
        "_elementwise",
        "    return product(\n",
        "    return jnp.multiply(\n",
        "test_laws.py",
        "masked_entries and cross_entropy_options",
    ),
    Mutant(
        "the cotangent of z_loss is dropped",
        "_losses/nll",
        "return product(g + h, per_total), at_label + product(h, e_label * per_total)",
        "return product(g, per_total), at_label",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "in a long row the label's entry has no z_loss",
        "_losses/nll",
        "return product(g + h, per_total), at_label + product(h, e_label * per_total)",
        "return product(g + h, per_total), at_label",
        "test_cross_entropy.py",
        "label_in_a_long_row",
    ),
    Mutant(
        "label probabilities are not weighted",
        "_losses/nll",
        "return q if targets.class_weight is None else q * targets.class_weight",
        "return q",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "the sum of all weights is that of the masked classes too",
        "_losses/nll",
        "summary = summary._replace(total=(row.sum(weights),))",
        "all_weights = jnp.broadcast_to(w, row.z.shape)\n"
        "        summary = summary._replace(total=(row.sum(all_weights),))",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "a sure class has a small difference for its part of the smoothing",
        "_losses/nll",
        "dz = jnp.where(e > s + (1 - e), sure, total * e - w * (1 + s))",
        "dz = total * e - w * (1 + s)",
        "test_option_promises.py",
        "sure_model_keeps and weighs",
    ),
    Mutant(
        "the derivative of z_loss in the temperature lacks m/t",
        "_losses/nll",
        "dt = product(h, u - zero_if_infinite(m_over_t))",
        "dt = product(h, u)",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "smoothing forgets the class weights",
        "_losses/cross_entropy",
        'uniform = None if options["label_smoothing"] is None else w',
        'uniform = None if options["label_smoothing"] is None else jnp.ones_like(w)',
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "class weights of several axes lie in another order",
        "_losses/cross_entropy",
        "sorted(range(len(axes.dims)), key=axes.dims.__getitem__)",
        "range(len(axes.dims))",
        "test_cross_entropy.py",
        "matter_of_layout",
    ),
    Mutant(
        "the divergence teaches the teacher the wrong way",
        "_losses/kl_divergence",
        "return of_x.to_x(dz_x)",
        "return of_x.to_x(-dz_x)",
        "test_laws.py",
        _laws("kl_divergence"),
    ),
    Mutant(
        "a small divergence loses the roundings of its logits",
        "_passes/compared",
        "gap = 2 * ((gap - shift) + (rounding - rounding_of_shift))",
        "gap = 2 * (gap - shift)",
        "test_kl_divergence.py",
        "digits",
    ),
    Mutant(
        "the gradient of a small divergence keeps what rounding makes of all log "
        "ratios",
        "_passes/divergence",
        "of_classes = compared(x, y, rows.temperature, of.epsilon)",
        "of_classes = compared(x, y, rows.temperature)",
        "test_kl_divergence.py",
        "digits",
    ),
    Mutant(
        "a mixture keeps what rounding makes of all log ratios",
        "_passes/compared",
        "surplus = too_large if part == 1 else part**2 * too_large",
        "surplus = 0 * too_large",
        "test_kl_divergence.py",
        "many_nearly_equal_classes",
    ),
    Mutant(
        "a class that only the prediction has takes no part in the mixture",
        "_passes/compared",
        "of_q = jnp.where(of.p == 0, least_of_q, of_q)",
        "of_q = 1 * of_q",
        "test_kl_divergence.py",
        "mixture_has_no_infinities",
    ),
    Mutant(
        "the prediction learns with the weight of the target",
        "_passes/compared",
        "in_x, in_y = beta * in_x, (1 - beta) * in_y",
        "in_x, in_y = beta * in_x, beta * in_y",
        "test_laws.py",
        _laws("jensen_shannon_options"),
    ),
    Mutant(
        "beta 1 is beta 0",
        "_losses/kl_divergence",
        "x, y, beta = logits, target_logits, 0.0",
        "beta = 0.0",
        "test_kl_divergence.py",
        "the_ends",
    ),
    Mutant(
        "binary smoothing moves the labels by eps, not eps/2",
        "_losses/binary",
        "y = (1 - smoothing) * y + smoothing / 2",
        "y = (1 - smoothing) * y + smoothing",
        "test_laws.py",
        _laws("binary_cross_entropy_options"),
    ),
    Mutant(
        "the threshold class of the multi-label loss is forgotten",
        "_losses/binary",
        "s + jnp.exp(-jnp.where(above, m, 0)),",
        "s,",
        "test_laws.py",
        _laws("multilabel_cross_entropy"),
    ),
    Mutant(
        "the margin of the circle loss has the wrong sign",
        "_losses/binary",
        "_scaled_gap(scale, a_n, s_n - margin)",
        "_scaled_gap(scale, a_n, s_n + margin)",
        "test_facts.py",
        "circle",
    ),
    # The linear head.
    Mutant(
        "under vmap the pass has room for the element in which the fewest count",
        "_core/batching",
        "return largest_of_batch(jnp.max(v, 0)), False",
        "return largest_of_batch(jnp.min(v, 0)), False",
        "test_linear.py",
        "skipped_under_vmap",
    ),
    Mutant(
        "the last chunk counts classes again",
        "_linear/chunks",
        "fresh = None if size % chunk == 0 else classes >= position * chunk",
        "fresh = None",
        "test_linear.py",
        "no_column",
    ),
    Mutant(
        "a chunk's maximum is lost where chunks meet",
        "_linear/forward",
        "return Sums(merge(sums.summary, summary, shifted), frozen), None",
        "summary = summary._replace(s=summary.s - 1)\n"
        "        return Sums(merge(sums.summary, summary, shifted), frozen), None",
        "test_linear.py",
        "value_and_every_gradient",
    ),
    Mutant(
        "the sums of a frozen head are not about one maximum",
        "_linear/forward",
        "m = jnp.maximum(before.m, row.m)\n    to_before",
        "m = row.m\n    to_before",
        "test_linear.py",
        "value_and_every_gradient and frozen",
    ),
    Mutant(
        "the cotangent of the second output is dropped",
        "_linear/recompute",
        "scales = scale_and_label_entry(row, summary, g, h)",
        "scales = scale_and_label_entry(row, summary, g, 0 * h)",
        "test_linear.py",
        "one_output",
    ),
    Mutant(
        "products are summed in bfloat16",
        "_linear/chunks",
        "dimensions, preferred_element_type=dtype\n    )",
        "dimensions\n    ).astype(dtype)",
        "test_linear_memory.py",
        "bfloat16_products",
    ),
    Mutant(
        "a label counts in both chunks that have it",
        "_linear/chunks",
        "found = found & (index >= first_fresh)",
        "found = found & True",
        "test_linear.py",
        "value_and_every_gradient",
    ),
    Mutant(
        "fewer rows are taken than tokens count",
        "_linear/chunks",
        "enough = jnp.sum(jnp.sum(counted) > jnp.array(sizes))",
        "enough = jnp.sum(jnp.sum(counted) > 2 * jnp.array(sizes))",
        "test_linear.py",
        "test_tokens_that_count",
    ),
    Mutant(
        "of tied classes the last is the top label",
        "_passes/merge",
        "first = jnp.minimum(a.top, b.top)",
        "first = jnp.maximum(a.top, b.top)",
        "test_linear.py",
        "top_label",
    ),
    Mutant(
        "the last chunk of tokens counts tokens again",
        "_linear/accumulate",
        "labels.counted & fresh,",
        "labels.counted,",
        "test_linear.py",
        "part_of_the_tokens",
    ),
    Mutant(
        "a summed loss ignores its cotangent",
        "_linear/accumulate",
        "dhidden = (g * dhidden.astype(g.dtype)).astype(hidden.dtype)",
        "dhidden = dhidden.astype(hidden.dtype)",
        "test_linear.py",
        "value_and_every_gradient and mean",
    ),
    Mutant(
        "the NaN of a dead token leaks into the head",
        "_linear/backward",
        "hidden = hidden if plan.is_on_gpu else without_infinities(hidden)",
        "hidden = 1 * hidden",
        "test_linear.py",
        "dead_tokens",
    ),
    Mutant(
        "a live token with an infinite hidden state has a finite gradient",
        "_linear/recompute",
        "factor = 1 + nan_where(broken, row.s.dtype)",
        "factor = jnp.ones_like(row.s)",
        "test_linear.py",
        "broken_hidden_state",
    ),
    Mutant(
        "the NaN of an excluded class leaks into the hidden gradient",
        "_linear/chunks",
        "weight = weight if tokens.where is None else without_infinities(weight)",
        "weight = 1 * weight",
        "test_linear.py",
        "excluded",
    ),
    # Two heads.
    Mutant(
        "of two heads the classes that are not fresh count again",
        "_linear/chunks",
        "mask = chunk.fresh\n    if",
        "mask = None\n    if",
        "test_linear_divergence.py",
        "every_gradient and every",
    ),
    Mutant(
        "two heads skip the tokens whose weights are differentiated",
        "_linear/two_heads",
        "if _moves(weight):",
        "if False:",
        "test_linear_divergence.py",
        "tokens_of_weight_0",
    ),
    Mutant(
        "a gradient that is taken beside the value ignores its cotangent",
        "_linear/two_heads",
        "of_y = jax.tree.map(lambda v: scaled(v, g), gradient)",
        "of_y = gradient",
        "test_linear_divergence.py",
        "every_gradient and student",
    ),
    Mutant(
        "a sum of mixtures takes its gradient beside the value",
        "_linear/two_heads",
        "in_value = plan.is_summed and plan.beta == 0 and",
        "in_value = plan.is_summed and",
        "test_linear_divergence.py",
        "products",
    ),
    Mutant(
        "a fixed teacher costs its products",
        "_linear/two_heads",
        "return leaf is not None and leaf.perturbed",
        "return leaf is not None",
        "test_linear_divergence.py",
        "products",
    ),
    Mutant(
        "the NaN of a token of weight 0 leaks into the student's head",
        "_linear/pairs",
        "hidden = without_infinities(seen.hidden)",
        "hidden = seen.hidden",
        "test_linear_divergence.py",
        "cotangent_0",
    ),
    Mutant(
        "the temperature of two heads moves one of them",
        "_linear/pairs",
        "both = jnp.sum(slopes[0] * d + slopes[1] * b, 1, keepdims=True)",
        "both = jnp.sum(slopes[0] * d, 1, keepdims=True)",
        "test_linear_divergence.py",
        "every_gradient and every",
    ),
    Mutant(
        "the reverse of two heads is no reverse",
        "_linear/distillation",
        "Pair(*reversed(models)) if reverse else models,",
        "models,",
        "test_linear_divergence.py",
        "every_gradient and reverse",
    ),
    Mutant(
        "a chunk of two heads is as large as one of one",
        "_linear/inputs",
        "_chunk_classes(len(heads) * tokens, heads[0].classes, size)",
        "_chunk_classes(tokens, heads[0].classes, size)",
        "test_linear_divergence.py",
        "chunk_bytes",
    ),
    Mutant(
        "the last part of a gradient is scaled twice",
        "_passes/product",
        "own = jnp.where(start + iota < i * size, 1, own)",
        "own = own * (iota >= 0)",
        "test_linear_divergence.py",
        "scaled_in_place",
    ),
    Mutant(
        "of several labels each takes the probability of all",
        "_linear/backward",
        "dz = product(others, e * per_total) + product(scale, e)",
        "dz = product(others + gamma, e * per_total) + product(scale, e)",
        "test_linear.py",
        "four",
    ),
    Mutant(
        "a chunk before the last has the classes of the last",
        "_linear/backward",
        "positions, reverse=True)[0]",
        "positions)[0]",
        "test_linear.py",
        "value_and_every_gradient",
    ),
    Mutant(
        "an ignored token has a top label",
        "_losses/nll",
        "jnp.where(counted, terms.top_label, -1)",
        "jnp.where(counted, terms.top_label, 0)",
        "test_linear.py",
        "invalid_labels_of_log_probs",
    ),
    Mutant(
        "the metrics are of the weighted loss",
        "_losses/per_row",
        "metrics = LossMetrics(terms.nll, lse, z, terms.entropy, terms.top_label)",
        "metrics = LossMetrics(2 * terms.nll, lse, z, terms.entropy, terms.top_label)",
        "test_linear.py",
        "metrics",
    ),
    Mutant(
        "the mean of a summed loss divides by the tokens",
        "_linear/api",
        "(total if divisor is None else mean_loss(total, divisor))",
        "(total if divisor is None else total / len(hidden))",
        "test_linear.py",
        "value_and_every_gradient and mean",
    ),
    Mutant(
        "of several labels the class before is read",
        "_passes/labels",
        "jnp.take_along_axis(x, jnp.maximum(index, 0), -1)",
        "jnp.take_along_axis(x, jnp.maximum(index - 1, 0), -1)",
        "test_linear.py",
        "value_and_every_gradient",
    ),
    Mutant(
        "a head sums in half precision",
        "_linear/inputs",
        "accumulation_dtype(jnp.promote_types(hidden.dtype, vocab_weight.dtype))",
        "jnp.promote_types(hidden.dtype, vocab_weight.dtype)",
        "test_linear.py",
        "float16_does_not_hold",
    ),
    # Soft forms of hard functions.
    Mutant(
        "half precision derivatives of the soft forms overflow",
        "_elementwise",
        "return cast(core(*(cast(a, wide) for a in arrays), temperature), dtype)",
        "return core(*(cast(a, wide) for a in arrays), temperature).astype(dtype)",
        "test_smooth.py",
        "stop_at_its_largest",
    ),
    Mutant(
        "the weight of y is 1 - w",
        "_smooth/pair",
        "    lambda x, y, tau: weight(y, x, tau),\n",
        "    lambda x, y, tau: 1 - weight(x, y, tau),\n",
        "test_smooth.py",
        "every_digit and smooth_maximum-float32",
    ),
    Mutant(
        "the second derivative of the soft step has the wrong sign",
        "_smooth/pair",
        "return slope(x, y, tau) * (weight(y, x, tau) - weight(x, y, tau))",
        "return slope(x, y, tau) * (weight(x, y, tau) - weight(y, x, tau))",
        "test_smooth.py",
        "third",
    ),
    Mutant(
        "the slope of the soft sign is that of the soft step",
        "_smooth/elementwise",
        "return 4 * _pair.slope(x, -x, temperature)",
        "return 2 * _pair.slope(x, -x, temperature)",
        "test_smooth.py",
        "every_digit and smooth_sign",
    ),
    Mutant(
        "the soft minimum is the maximum at minus the temperature",
        "_smooth/elementwise",
        "return -_pair.maximum(-x, -y, temperature)",
        "t = jnp.ones((), x.dtype) if temperature is None else temperature\n"
        "    return _pair.maximum(x, y, -t)",
        "test_smooth.py",
        "temperature_zero",
    ),
    Mutant(
        "the slope of the soft clip is a + b - 1",
        "_smooth/clip",
        "return above_lower * below_upper * -jnp.expm1(-_pair.gap(upper, lower, t))",
        "return above_lower + below_upper - 1",
        "test_smooth.py",
        "every_digit and smooth_clip",
    ),
    Mutant(
        "crossed bounds stay crossed",
        "_smooth/clip",
        "    lower = jnp.where(lower > upper, upper, lower)\n",
        "",
        "test_smooth.py",
        "crossed",
    ),
    Mutant(
        "the soft minimum is that of minus the numbers",
        "_smooth/max",
        "return -_logsumexp(-x, axes, where, tau, keepdims)",
        "return _logsumexp(-x, axes, where, tau, keepdims)",
        "test_smooth_max.py",
        "bounds",
    ),
    Mutant(
        "a softer Boltzmann maximum is larger",
        "_smooth/max",
        "return dx, product(g, -row.sum(p * above_mean**2))",
        "return dx, product(g, row.sum(p * above_mean**2))",
        "test_smooth_max.py",
        "every_digit and boltzmann_max",
    ),
    Mutant(
        "the soft argmax counts along the axes in reverse",
        "_smooth/softargmax",
        "for axis in reversed(axes.dims):",
        "for axis in axes.dims:",
        "test_smooth_max.py",
        "axes_mask and softargmax",
    ),
    Mutant(
        "a sure soft argmax subtracts numbers that are nearly equal",
        "_smooth/softargmax",
        "h = a - row.sum(jnp.where(p > 0.5, a, 0))",
        "h = 1 * a",
        "test_smooth_max.py",
        "digits",
    ),
    Mutant(
        "straight_through has the value of soft",
        "_smooth/straight_through",
        "return run_hard(*hard_arrays)",
        "return run_soft(*soft_arrays)",
        "test_straight_through.py",
        "value_of_hard and eager",
    ),
    # Errors.
    Mutant(
        "an array may enlarge the result",
        "_checks",
        "enlarged = jnp.broadcast_shapes(array.shape, shape) != shape",
        "enlarged = jnp.broadcast_shapes(array.shape, shape) is None",
        "test_errors.py",
        "class_and_text",
    ),
    Mutant(
        "an axis may be given twice",
        "_checks",
        "if len(set(axes)) != len(axes):",
        "if False:",
        "test_errors.py",
        "class_and_text",
    ),
    Mutant(
        "True is the temperature 1",
        "_checks",
        "return isinstance(value, int | float) and not isinstance(value, bool)",
        "return isinstance(value, int | float)",
        "test_bad_input.py",
        "test_broken_calls and soft",
    ),
    Mutant(
        "unhashable options reach jit",
        "_sharding",
        "if not all(isinstance(value, Hashable) for _, value in static):",
        "if False:",
        "test_bad_input.py",
        "shard_vocab",
    ),
    # Prefixes and samples.
    Mutant(
        "a prefix's sums are seen from the maximum of the whole",
        "_passes/prefixes",
        "return n, w + times(v, exp_shifted(n, m, t))",
        "return n, w + v",
        "test_laws.py",
        _laws("logcumsumexp"),
    ),
    Mutant(
        "logcumsumexp is the running maximum",
        "_prefix",
        "jnp.where(jnp.isinf(m), m, m + excess)",
        "m",
        "test_laws.py",
        _laws("logcumsumexp"),
    ),
    Mutant(
        "a sample is without noise",
        "_gumbel",
        "z = masked_logits(Logits(cast(x, wide) + noise, where, temperature))",
        "z = masked_logits(Logits(cast(x, wide), where, temperature))",
        "test_gumbel.py",
        "distributed",
    ),
    Mutant(
        "a block is drawn without its number of classes",
        "_linear/draw",
        "noisy = d + (jnp.log1p(ahead.s) + ahead.noise)",
        "noisy = d + ahead.noise",
        "test_linear_sample.py",
        "distributed",
    ),
    Mutant(
        "the noise is that of the chunk",
        "_linear/draw",
        "(keys, first[0] + first_here, m.dtype)",
        "(keys, first[0] - first[0, 0], m.dtype)",
        "test_linear_sample.py",
        "no_chunk",
    ),
    Mutant(
        "the noise is that of the device",
        "_linear/draw",
        "(keys, first[0] + first_here, m.dtype)",
        "(keys, first[0], m.dtype)",
        "test_linear_sample.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "the blocks of all vocabularies are of one size",
        "_linear/draw",
        "return max(min(power_of_2 // DEVICES, LARGEST_BLOCK), 1)",
        "return LARGEST_BLOCK",
        "test_linear_sample.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "all tokens have the same noise",
        "_linear/sample",
        "jax.random.fold_in(keys, i)",
        "jax.random.fold_in(keys, 0)",
        "test_linear_sample.py",
        "independent",
    ),
    Mutant(
        "the classes of a block share one noise",
        "_linear/draw",
        "score = d + noise if t is None else d + jnp.where(is_hard(t), 0, noise)",
        "score = d",
        "test_linear_sample.py",
        "distributed",
    ),
    # Segments.
    Mutant(
        "the tail of a sure segment is S - 1",
        "_grouped",
        "jnp.where(total < 1.5, rest, total - 1)",
        "total - 1",
        "test_segments.py",
        "digits",
    ),
    Mutant(
        "ids below 0 count from the end",
        "_grouped",
        "found = (self.ids >= 0) & (self.ids < self.segments.count)",
        "found = self.ids < self.segments.count",
        "test_segments.py",
        "is_a_row",
    ),
    Mutant(
        "a sure segment's softmax is pulled back without its winner",
        "_segments",
        "deviation = g - of.at_entries(of.sum(jnp.where(of.is_top, g, 0)))",
        "deviation = g",
        "test_segments.py",
        "digits",
    ),
]


def text_of(module: str) -> str:
    return (ROOT / "jaxsoft" / f"{module}.py").read_text()


def occurrences(mutant: Mutant) -> int:
    return text_of(mutant.module).count(mutant.old)


def meet(mutant: Mutant) -> Fate:
    """The tests of a mutant in a copy of the package that has it."""
    started = time.monotonic()
    if occurrences(mutant) != 1:
        trouble = f"its line occurs {occurrences(mutant)} times"
        return Fate(mutant, "", trouble, 0)
    with tempfile.TemporaryDirectory(prefix="jaxsoft-mutant-") as name:
        folder = Path(name).resolve()
        copy_to(folder)
        broken = text_of(mutant.module).replace(mutant.old, mutant.new)
        (folder / "jaxsoft" / f"{mutant.module}.py").write_text(broken)
        status, output = tested(folder, mutant.tests, mutant.select, mutant.kernels)
    seconds = time.monotonic() - started
    failed = re.findall(r"^FAILED tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
    if status == 1 and failed:
        return Fate(mutant, failed[0], "", seconds)
    trouble = "" if status == 0 else output[-1500:]
    return Fate(mutant, "", trouble, seconds)


def copy_to(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    kernels = library.library_path()
    if kernels is not None:  # an editable installation has them elsewhere
        shutil.copy(kernels, folder / "jaxsoft" / "_passes" / kernels.name)


def tested(
    folder: Path, tests: str, select: str, with_kernels: bool
) -> tuple[int, str]:
    """pytest's exit status and output, for the package in the folder."""
    options = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-k", select]
    # The current folder comes first on sys.path, before a jaxsoft that is installed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["JAXSOFT_CPU_KERNELS"] = "1" if with_kernels else "0"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{tests}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if f"jaxsoft in {folder / 'jaxsoft'}\n" not in done.stdout:
        return -1, f"another jaxsoft was tested: {done.stdout}{done.stderr}"
    return done.returncode, done.stdout


def whole_package_passes(pool: concurrent.futures.Executor) -> bool:
    """The tests that kill, on the package as it is."""
    selections: dict[tuple[str, bool], list[str]] = {}
    for mutant in MUTANTS:
        selected = selections.setdefault((mutant.tests, mutant.kernels), [])
        selected.append(f"({mutant.select})")
    with tempfile.TemporaryDirectory(prefix="jaxsoft-whole-") as name:
        folder = Path(name).resolve()
        copy_to(folder)

        def passes(of: tuple[str, bool]) -> bool:
            tests, with_kernels = of
            select = " or ".join(dict.fromkeys(selections[of]))
            status, output = tested(folder, tests, select, with_kernels)
            what = tests if with_kernels else f"{tests}, plain"
            print(f"unbroken  {what:32} {output.strip().splitlines()[-1]}", flush=True)
            return status == 0

        return all(pool.map(passes, selections))


def row_of(fate: Fate) -> str:
    killer = f"`{fate.killer}`" if fate.killer else f"**survived** {fate.trouble[:60]}"
    module = f"`{fate.mutant.module}`"
    return f"| {fate.mutant.what} | {module} | {killer.replace('|', ' ')} |"


def page(fates: list[Fate]) -> str:
    killed = sum(bool(fate.killer) for fate in fates)
    modules = len({fate.mutant.module for fate in fates})
    return "\n".join(
        [
            "# Mutants",
            "",
            "Each line below was broken in a copy of the package, one at a time, and",
            "the tests about it were run: one that fails has seen it. Killed:",
            f"{killed} of {len(fates)} mutants in {modules} modules, with jax "
            f"{jax.__version__}.",
            "",
            "Written by `python -m evidence.mutants --output docs/mutants.md`. What",
            "overloads promise an editor is left to pyright, which `.ci/run` runs.",
            "",
            "| broken | module | the test that fails |",
            "|---|---|---|",
            *map(row_of, fates),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="those with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a page for the table")
    options = parser.parse_args(arguments)
    if not library.is_loaded():
        print("no compiled kernels, without which their mutants survive")
        return 1
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.what]
    fates = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        if not options.only and not whole_package_passes(pool):
            print("the tests fail without a mutant")
            return 1
        for fate in pool.map(meet, chosen):
            fates.append(fate)
            verdict = "killed  " if fate.killer else "SURVIVED"
            by = fate.killer or fate.trouble
            print(
                f"{verdict} {fate.seconds:4.0f} s  {fate.mutant.what}: {by}", flush=True
            )
    if options.output:
        options.output.write_text(page(fates))
    survivors = sum(not fate.killer for fate in fates)
    print(f"{len(fates) - survivors} of {len(fates)} mutants killed")
    return 1 if survivors or not fates else 0


if __name__ == "__main__":
    sys.exit(main())
