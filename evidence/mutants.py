"""Can the tests fail? Break one line of the package, and see whether one does.

    python -m evidence.mutants                       all of them, in 20 minutes
    python -m evidence.mutants --only tail           those with the word in their name
    python -m evidence.mutants --output docs/mutants.md

Each mutant is made in a copy of the package in a temporary directory, and meets the few
tests that are about its line. The exit status is 1 when one survives, or when its line
is no longer there: then strengthen the tests, or bring the mutant up to date.
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


class Fate(NamedTuple):
    mutant: Mutant
    killer: str  # the test that failed; empty where none did
    trouble: str
    seconds: float


def _laws(law: str) -> str:
    return f"oracle and -{law}]"


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
        "reverse mode saves what the transposition computes",
        "_autodiff",
        "@functools.partial(jax.checkpoint, prevent_cse=False)",
        "@functools.partial(lambda f, prevent_cse: f, prevent_cse=False)",
        "test_autodiff.py",
        "saves_the_residuals",
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
        "_passes/max_and_tail",
        "tail + (holders - 1)",
        "tail",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "the gradient of hidden states is that of the device's classes",
        "_linear/recompute",
        "    dhidden = device_sum(dhidden, stream.mesh_names)  # in float32\n",
        "",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    Mutant(
        "a mean over all tokens divides by the weights of the device",
        "_sharding",
        "return mean_loss(total(losses), total(weights))",
        "return mean_loss(total(losses), jnp.sum(weights))",
        "test_sharding.py",
        "eight_devices and a_mean",
    ),
    Mutant(
        "probabilities of whole rows stay whole beside logits that a type splits",
        "_core/mesh",
        "    v = split_alike(v, like)\n    return v, split",
        "    return v, split",
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
    # Floats.
    Mutant(
        "half precision is summed in half precision",
        "_core/numerics",
        "return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)",
        "return dtype",
        "test_precision.py",
        "half_precision and (softmax or logsumexp)",
    ),
    Mutant(
        "a negative temperature is still the maximum",
        "_core/numerics",
        "z = z * jnp.where(temperature < 0, -1, 1).astype(z.dtype)",
        "z = z * jnp.where(temperature < 0, 1, 1).astype(z.dtype)",
        "test_facts.py",
        "bounds_and_symmetry",
    ),
    Mutant(
        "masked classes count",
        "_core/numerics",
        "return z if where is None else jnp.where(where, z, bottom)",
        "return z",
        "test_facts.py",
        "mask",
    ),
    Mutant(
        "a masked NaN meets the derivative of the cap",
        "_core/numerics",
        "z = capped(z if where is None else jnp.where(where, z, 0), softcap)",
        "z = capped(z, softcap)",
        "test_laws.py",
        "masked_entries and cross_entropy_options",
    ),
    Mutant(
        "a probability keeps the rounding of the subtraction",
        "_core/numerics",
        "return exp_of_sum(d, _rounding_of_shifted(z, m, d, temperature))",
        "return jnp.exp(d)",
        "test_precision.py",
        "exponential_of_a_difference",
    ),
    Mutant(
        "x - logsumexp(x) in place of the split (m, s)",
        "_core/numerics",
        "return exp_shifted(z, m, temperature) * (1 / (1 + s))",
        "return jnp.exp(shifted(z, m + jnp.log1p(s), temperature))",
        "test_precision.py",
        "distributions or entropy_gradient or shift_invariance",
    ),
    Mutant(
        "1/0 at temperature 0",
        "_core/numerics",
        "return jnp.where(hard, 0, _inverse(jnp.where(hard, 1, jnp.abs(temperature))))",
        "return 1 / jnp.abs(temperature)",
        "test_stability.py",
        "grid and softmax_options-float32",
    ),
    Mutant(
        "the cotangent of softcap is dropped",
        "_core/numerics",
        "return capped(z, c), sech2 * z_dot + slope * c_dot",
        "return capped(z, c), sech2 * z_dot",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "log(1 + x) in place of log1p(x)",
        "_core/numerics",
        "return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))",
        "return jnp.maximum(z, 0) + jnp.log(1 + jnp.exp(-jnp.abs(z)))",
        "test_binary.py",
        "digits",
    ),
    # The maximum and the tail.
    Mutant(
        "the tail has the maximum's 1",
        "_passes/max_and_tail",
        "(total(jnp.where(at_maximum, weights, 0)) - 1)",
        "total(jnp.where(at_maximum, weights, 0))",
        "test_peers.py",
        "weighted_logsumexp",
    ),
    Mutant(
        "no lane leaves its maximum out",
        "_passes/max_and_tail",
        "near = jnp.where(number == holder, _without_maximum(near), near)",
        "near = 1 * near",
        "test_lanes.py",
        "ties",
    ),
    Mutant(
        "every lane that ties leaves its maximum out",
        "_passes/max_and_tail",
        "near = jnp.where(number == holder, _without_maximum(near), near)",
        "near = jnp.where(near < 1, near, _without_maximum(near))",
        "test_lanes.py",
        "ties",
    ),
    Mutant(
        "the maximum is the same bits in both passes over a row",
        "_passes/max_and_tail",
        "near = e > NEAR",
        "near = e == 1",
        "test_lanes.py",
        "same_bits",
    ),
    Mutant(
        "masked classes come back in the second pass",
        "_passes/max_and_tail",
        "bottom = jnp.minimum(m, -math.inf)",
        "bottom = m",
        "test_lanes.py",
        "ties",
    ),
    Mutant(
        "a NaN that the maximum of a long row ignores is ignored",
        "_passes/max_and_tail",
        "return jnp.where(jnp.isnan(s), s, m), s",
        "return m, s",
        "test_one_pass.py",
        "sample_does_not_show",
    ),
    # Splits about another class than the maximum.
    Mutant(
        "no maximum is too far above the label",
        "_passes/one_pass",
        "far = s > LARGEST_SUM",
        "far = s > jnp.inf",
        "test_one_pass.py",
        "far_from_the_label",
    ),
    Mutant(
        "a logsumexp near 0 need not be exact",
        "_passes/one_pass",
        "return 2 * jnp.abs(m + log_sum) < jnp.maximum(log_sum, 1)",
        "return jnp.abs(m + log_sum) < 0",
        "test_one_pass.py",
        "outside_the_sample",
    ),
    Mutant(
        "the label's own term is in its tail",
        "_passes/one_pass",
        "jnp.where(is_left_out, omitted, e)",
        "jnp.where(is_left_out, e, e)",
        "test_one_pass.py",
        "far_from_the_label",
    ),
    Mutant(
        "what is left out has no derivative",
        "_passes/one_pass",
        "omitted = e - jax.lax.stop_gradient(e)",
        "omitted = 0 * e",
        "test_one_pass.py",
        "all_derivatives",
    ),
    Mutant(
        "nothing lies above the label",
        "_core/numerics",
        "cpu=functools.partial(exp_of_difference_on_cpu, highest=HIGHEST)",
        "cpu=exp_of_difference_on_cpu",
        "test_one_pass.py",
        "far_from_the_label",
    ),
    Mutant(
        "the last lanes count what they share twice",
        "_core/lanes",
        "return jnp.where(lane < lanes.seen, otherwise, v)",
        "return v",
        "test_precision.py",
        "do_not_divide",
    ),
    Mutant(
        "the exponential of a sum forgets one of its terms",
        "_core/exp",
        "f = f + jnp.where(vanishes, 0, r)",
        "f = f",
        "test_precision.py",
        "exponential_of_a_sum",
    ),
    Mutant(
        "the exponential of a difference forgets the second half of its maximum",
        "_core/exp",
        "- (n * np.float32(LOG_2[1]) + low)",
        "- n * np.float32(LOG_2[1])",
        "test_precision.py",
        "exponential_of_a_difference",
    ),
    Mutant(
        "the exponential of a difference subtracts a large maximum in halves",
        "_core/exp",
        "first = jnp.where(jnp.abs(m) <= LARGE, 0,",
        "first = jnp.where(jnp.abs(m) <= 1e6, 0,",
        "test_precision.py",
        "exponential_of_a_difference",
    ),
    Mutant(
        "sums of choices stay on their device",
        "_passes/cpu_sums",
        "return device_sum(total, axes.mesh_names)",
        "return total",
        "test_sharding.py",
        "eight_devices and axis_name",
    ),
    # What every loss does with one number per row.
    Mutant(
        "checkify finds no check of the labels",
        "_losses/checkify",
        "check(*arrays)\n        return arrays",
        "return arrays",
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
        "return weight if labels is None else jnp.where(labels.counted, weight, 0)",
        "return weight",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "a mean divides by the number of rows",
        "_losses/per_row",
        "mean_loss(total, jnp.sum(weight))",
        "mean_loss(total, jnp.asarray(loss.size, loss.dtype))",
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
        "loss = times_loss(1 - eps, loss) + times_loss(share, terms.spread)",
        "loss = loss + times_loss(share, terms.spread)",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "z_loss is multiplied by the class weight",
        "_losses/per_row",
        "loss = loss + times_loss(options.z_loss, square)",
        "w = options.label_weight\n"
        "        w = 1 if w is None else w\n"
        "        loss = loss + w * times_loss(options.z_loss, square)",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "a weight 0 times a loss +inf is NaN",
        "_losses/per_row",
        "return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)",
        "return weight * loss",
        "test_cross_entropy.py",
        "weight_of_0",
    ),
    # Distributions.
    Mutant(
        "the derivative of logsumexp in the temperature is half an entropy",
        "_logsumexp",
        "slope = log_sum - row_sum(p_d, axes)",
        "slope = log_sum",
        "test_facts.py",
        "derivative_in_temperature",
    ),
    Mutant(
        "the weights of logsumexp forget the temperature",
        "_logsumexp",
        "        db = db * temperature\n",
        "        db = 1 * db\n",
        "test_laws.py",
        _laws("logsumexp_weights"),
    ),
    Mutant(
        "the logarithm of a negative sum is that of its size",
        "_logsumexp",
        "return log_sum if b is None else jnp.where(sign < 0, jnp.nan, log_sum)",
        "return log_sum",
        "test_peers.py",
        "weighted_logsumexp",
    ),
    Mutant(
        "logmeanexp divides by the classes that are masked too",
        "_logsumexp",
        "included = jnp.ones_like(v) if where is None else spread_alike(where, v)",
        "included = jnp.ones_like(v)",
        "test_laws.py",
        _laws("logmeanexp"),
    ),
    Mutant(
        "the pullback of softmax loses the sum over the classes",
        "_softmax",
        "return p * (h - apart(row_sum(p * h, axes), first))",
        "return p * h",
        "test_laws.py",
        _laws("softmax"),
    ),
    Mutant(
        "the pullback of softmax subtracts numbers that are nearly equal",
        "_softmax",
        "c = row_sum(jnp.round(p) * g, axes)",
        "c = row_sum(0 * p * g, axes)",
        "test_precision.py",
        "distributions",
    ),
    Mutant(
        "the cotangent of a masked class leaks",
        "_softmax",
        "g = g if where is None else jnp.where(spread_alike(where, g), g, 0)",
        "g = 1 * g",
        "test_laws.py",
        _laws("log_softmax_options"),
    ),
    Mutant(
        "the derivative of the entropy in the temperature loses its sign",
        "_softmax",
        "return dx, None, jnp.sign(temperature) * scale * variance",
        "return dx, None, scale * variance",
        "test_laws.py",
        _laws("entropy_options"),
    ),
    # Losses of given logits.
    Mutant(
        "p - 1 at the label",
        "_losses/row_terms",
        "return -g * (s + (1 - e))",
        "return g * (e - (1 + s))",
        "test_facts.py",
        "sure_model",
    ),
    Mutant(
        "an invalid label has a gradient that is a number",
        "_losses/row_terms",
        "return jnp.where(labels.counted, g, 0) * jnp.where(labels.valid, 1, jnp.nan)",
        "return jnp.where(labels.counted, g, 0)",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "the NaN of an ignored row leaks",
        "_losses/row_terms",
        "return targets.counted if where is None else where & targets.counted",
        "return where",
        "test_option_promises.py",
        "ignored_rows_and_invalid",
    ),
    Mutant(
        "the cotangent of z_loss is dropped",
        "_losses/row_terms",
        "h = jnp.where(jnp.isneginf(m), 0, h) if with_lse else h",
        "h = 0 * h if with_lse else h",
        "test_laws.py",
        _laws("cross_entropy_options"),
    ),
    Mutant(
        "in a long row the label's entry has no z_loss",
        "_losses/row_terms",
        "dz_of_label = dz_of_label + per_sum * h * e_of_label",
        "dz_of_label = 1 * dz_of_label",
        "test_cross_entropy.py",
        "label_in_a_long_row",
    ),
    Mutant(
        "in a long row the label's entry is that of another row",
        "_losses/row_terms",
        "jnp.squeeze(of_label, axis),",
        "jnp.squeeze(of_label, axis)[::-1],",
        "test_cross_entropy.py",
        "label_in_a_long_row",
    ),
    Mutant(
        "label probabilities are not weighted",
        "_losses/row_terms",
        "return q * targets.class_weight.astype(z.dtype)",
        "return q",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "flat class indices run along the axes in reverse",
        "_losses/row_terms",
        "for axis in reversed(axes):",
        "for axis in axes:",
        "test_facts.py",
        "over_two_axes",
    ),
    Mutant(
        "smoothing forgets the class weights",
        "_losses/cross_entropy",
        "        if class_weight is None:\n            spread_weight",
        "        if True:\n            spread_weight",
        "test_peers.py",
        "cross_entropy_of_torch",
    ),
    Mutant(
        "class weights of several axes lie in another order",
        "_losses/cross_entropy",
        "sorted(range(len(axes)), key=axes.__getitem__)",
        "range(len(axes))",
        "test_cross_entropy.py",
        "matter_of_layout",
    ),
    Mutant(
        "the divergence teaches the teacher the wrong way",
        "_losses/kl_divergence",
        "in_z = -p * v",
        "in_z = p * v",
        "test_laws.py",
        _laws("kl_divergence"),
    ),
    Mutant(
        "a small divergence loses the roundings of its logits",
        "_losses/kl_divergence",
        "delta = (b - jnp.where(p == 0, 0, d)) + (rounding_of_b - rounding_of_d)",
        "delta = b - jnp.where(p == 0, 0, d)",
        "test_kl_divergence.py",
        "digits",
    ),
    Mutant(
        "binary smoothing moves the labels by eps, not eps/2",
        "_losses/binary",
        "y = (1 - label_smoothing) * y + label_smoothing / 2",
        "y = (1 - label_smoothing) * y + label_smoothing",
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
        "scale * _times(a_n, s_n - margin)",
        "scale * _times(a_n, s_n + margin)",
        "test_facts.py",
        "circle",
    ),
    Mutant(
        "a masked NaN of the circle loss leaks",
        "_losses/binary",
        "s_n = jnp.where(counts_n & jnp.any(counts_p, -1, keepdims=True), s_n, 0)",
        "s_n = 1 * s_n",
        "test_binary.py",
        "circle_masks",
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
        "_linear/recompute",
        "jnp.where(a.m >= b.m, a.s + to_b * (1 + b.s), b.s + to_a * (1 + a.s))",
        "jnp.where(a.m >= b.m, a.s + to_b * b.s, b.s + to_a * (1 + a.s))",
        "test_linear.py",
        "value_and_every_gradient",
    ),
    Mutant(
        "the cotangent of the second output is dropped",
        "_linear/recompute",
        "        dz = dz + h * e\n",
        "        dz = 1 * dz\n",
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
        "found = found & chunk.fresh[0, index]",
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
        "_linear/recompute",
        "top_label = jnp.where(b.m > a.m, b.top_label, top_label)",
        "top_label = jnp.where(b.m >= a.m, b.top_label, top_label)",
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
        "the NaN of an ignored token leaks into the head",
        "_linear/api",
        "hidden = jnp.where(tokens.labels.counted[:, None], hidden, 0)",
        "hidden = 1 * hidden",
        "test_option_promises.py",
        "ignored_rows and linear",
    ),
    Mutant(
        "the mean of a summed loss divides by the tokens",
        "_linear/api",
        'return total if reduction == "sum" else mean_loss(total, jnp.sum(weight))',
        'return total if reduction == "sum" else total / len(hidden)',
        "test_linear.py",
        "value_and_every_gradient and mean",
    ),
    # Soft forms of hard functions.
    Mutant(
        "half precision derivatives of the soft forms overflow",
        "_smooth/partials",
        "return converted(core(*(converted(a, wide) for a in arrays), temperature),"
        " dtype)",
        "return core(*(converted(a, wide) for a in arrays), temperature).astype(dtype)",
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
        "smooth_clip_to_every_digit",
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
        "dtemperature = -g * sum_of_choices(p * above_mean**2, axes)",
        "dtemperature = g * sum_of_choices(p * above_mean**2, axes)",
        "test_smooth_max.py",
        "every_digit and boltzmann_max",
    ),
    Mutant(
        "the soft argmax counts along the axes in reverse",
        "_smooth/softargmax",
        "for axis in reversed(axes):",
        "for axis in axes:",
        "test_smooth_max.py",
        "axes_mask and softargmax",
    ),
    Mutant(
        "a sure soft argmax subtracts numbers that are nearly equal",
        "_smooth/softargmax",
        "c = sum_of_choices(jnp.where(p > 0.5, a, 0), axes)",
        "c = sum_of_choices(0 * a, axes)",
        "test_smooth_max.py",
        "digits",
    ),
    Mutant(
        "straight_through has the value of soft",
        "_smooth/straight_through",
        "return run_hard(*hard_arrays)",
        "return run_soft(*soft_arrays)",
        "test_straight_through.py",
        "value_of_hard and without_jit",
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
        status, output = tested(folder, mutant.tests, mutant.select)
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


def tested(folder: Path, tests: str, select: str) -> tuple[int, str]:
    """pytest's exit status and output, for the package in the folder."""
    options = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-k", select]
    # The current folder comes first on sys.path, before a jaxsoft that is installed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{tests}"],
        cwd=folder,
        env={**environment, "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if f"jaxsoft in {folder / 'jaxsoft'}\n" not in done.stdout:
        return -1, f"another jaxsoft was tested: {done.stdout}{done.stderr}"
    return done.returncode, done.stdout


def whole_package_passes(pool: concurrent.futures.Executor) -> bool:
    """The tests that kill, on the package as it is."""
    selections: dict[str, list[str]] = {}
    for mutant in MUTANTS:
        selections.setdefault(mutant.tests, []).append(f"({mutant.select})")
    with tempfile.TemporaryDirectory(prefix="jaxsoft-whole-") as name:
        folder = Path(name).resolve()
        copy_to(folder)

        def passes(tests: str) -> bool:
            select = " or ".join(dict.fromkeys(selections[tests]))
            status, output = tested(folder, tests, select)
            print(f"unbroken  {tests:24} {output.strip().splitlines()[-1]}", flush=True)
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
