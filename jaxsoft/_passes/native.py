"""The passes as calls of the compiled kernels, on a CPU.

A form here is a form of a `Pass`, or None where the kernels do not know the case: class
axes that are not neighbours in order, classes over several devices, or another dtype.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.logits import Logits
from jaxsoft._core.mesh import Axes, first_class
from jaxsoft._passes.merge import Summary

DTYPES = ("float32", "float64", "bfloat16", "float16")
# Of more coefficients the kernels keep no sums; and they know no more axes.
MOST_COEFFICIENTS = 4
MOST_AXES = 6

# An operand and its letter, by which the kernel knows it.
Operand = tuple[str, Array | None]


def softmax(axes: Axes, logits: Logits, _: Any) -> Array | None:
    return _of_classes("softmax", axes, logits)


def log_softmax(axes: Axes, logits: Logits, _: Any) -> Array | None:
    return _of_classes("log_softmax", axes, logits)


def softmax_pull(axes: Axes, logits: Logits, g: Array) -> Array | None:
    return _of_classes("softmax_pull", axes, logits, ("v", g))


def log_softmax_pull(axes: Axes, logits: Logits, g: Array) -> Array | None:
    return _of_classes("log_softmax_pull", axes, logits, ("v", g))


def log_softmax_push(axes: Axes, logits: Logits, t: Array) -> Array | None:
    return _of_classes("log_softmax_push", axes, logits, ("v", t))


def to_classes(axes: Axes, fixed: Any, linear: Any) -> Array | None:
    logits, m, labels, overwriting = fixed
    scale, at_label = linear
    if not _knows(axes, logits):
        return None
    index = _local_index(axes, logits.x, labels)
    rows = ("m", m), ("l", index), ("s", scale), ("a", at_label)
    return _like_logits("to_classes", axes, logits, rows, overwriting.x)


def to_rows(axes: Axes, fixed: Any, t: Array) -> Any:
    logits, m, labels, _ = fixed
    if not _knows(axes, logits):
        return None
    index = _local_index(axes, logits.x, labels)
    operands = ("m", m), ("l", index), ("v", t)
    results = "r" if labels is None else "ra"
    sums = _per_row("to_rows", axes, logits, operands, results)
    return sums[0], None if labels is None else sums[1]


def summary(axes: Axes, logits: Logits, riders: Any) -> Summary | None:
    """Of the classes that are here."""
    q = riders.coefficients
    v, sums = riders.values, accumulation_dtype(logits.x.dtype)
    known = riders.weights is None and len(q) <= MOST_COEFFICIENTS
    known &= v is None or v.dtype == sums
    if not (known and _knows(axes, logits)):
        return None
    index = _local_index(axes, logits.x, riders.labels)
    operands = *(("q", c) for c in q), ("l", index), ("v", v)
    asked = {
        "m": True,
        "s": True,
        "e": riders.with_e_d,
        "z": riders.labels is not None,
        "v": v is not None,
        "d": v is not None,
        "o": v is not None,
    }
    names = "".join(name for name, is_asked in asked.items() if is_asked)
    names += "q" * len(q) + "b" * len(q)
    results = _per_row("summary", axes, logits, operands, names)
    named = dict(zip(names, results))
    return Summary(
        m=named["m"],
        s=named["s"],
        e_d=named.get("e"),
        logit=named.get("z"),
        total=tuple(v for name, v in zip(names, results) if name == "q"),
        below=tuple(v for name, v in zip(names, results) if name == "b"),
        value=named.get("v"),
        deviation=named.get("d"),
        others=named.get("o"),
    )


def _knows(axes: Axes, logits: Logits) -> bool:
    x = logits.x
    if not axes.dims:
        return False
    first = axes.from_the_start(x.ndim).dims
    in_order = first == tuple(range(first[0], first[0] + len(first)))
    return in_order and x.ndim <= MOST_AXES and x.dtype.name in DTYPES


def _of_classes(name, axes, logits, *operands: Operand):
    if axes.mesh_names or not _knows(axes, logits):
        return None
    return _like_logits(name, axes, logits, operands)


def _like_logits(name, axes, logits, operands, overwrites_x=False):
    kind = _typed(logits.x, (), logits.x.dtype)
    return _call(name, axes, logits, operands, kind, "", overwrites_x)


def _per_row(name, axes, logits, operands, results):
    """Numbers per row; the class axes are kept with size 1.

    The kernels leave these axes out. XLA then moves what follows to arrays without
    them: over a last axis of size 1 it makes no vectors, and a logarithm takes five
    times as long.
    """
    kind = _typed(logits.x, axes.dims, accumulation_dtype(logits.x.dtype))
    rows = _call(name, axes, logits, operands, [kind] * len(results), results)
    return [jnp.expand_dims(v, axes.dims) for v in rows]


def _typed(x, without, dtype):
    """A type that is split over a mesh as x is, without these axes."""
    kind = jax.typeof(x)
    kept = [a for a in range(x.ndim) if a - x.ndim not in without]
    spec = [kind.sharding.spec[a] for a in kept]
    return jax.ShapeDtypeStruct(
        tuple(x.shape[a] for a in kept),
        dtype,
        sharding=kind.sharding.update(spec=jax.sharding.PartitionSpec(*spec)),
        manual_axis_type=kind.manual_axis_type,
    )


def _call(
    name,
    axes,
    logits,
    operands: Iterable[Operand],
    kinds,
    results: str,
    overwrites_x: bool = False,
) -> Any:
    x = logits.x
    where, temperature = ("w", logits.where), ("t", logits.temperature)
    given = [(k, v) for k, v in (where, temperature, *operands) if v is not None]
    arrays = [_as_operand(letter, v, axes, x) for letter, v in given]
    aliases = {0: 0} if overwrites_x else None
    call = jax.ffi.ffi_call(f"jaxsoft_{name}", kinds, input_output_aliases=aliases)
    return call(
        x,
        *arrays,
        first_class=x.ndim + axes.dims[0],
        class_axes=len(axes.dims),
        operands="".join(letter for letter, _ in given),
        results=results,
    )


def _as_operand(letter, v, axes, x):
    dtype = accumulation_dtype(x.dtype)
    if letter in "tmsa" or (letter in "vq" and not _is_read(v.dtype, dtype)):
        v = v.astype(dtype)
    if letter in "tmsal":
        return jnp.squeeze(v, axes.dims)
    if letter == "v":
        return jnp.broadcast_to(v, x.shape)
    # The kernels read an operand that is broadcast over all class axes, or none, and
    # over all axes behind them, or none.
    first, last = axes.dims[0], axes.dims[-1]
    shape = list(v.shape)
    for some in (range(first, last + 1), range(last + 1, 0)):
        if len({v.shape[a] == 1 for a in some if x.shape[a] > 1}) == 2:
            for a in some:
                shape[a] = x.shape[a]
    return jnp.broadcast_to(v, shape)


def _is_read(dtype, sums):
    half = dtype.name in ("bfloat16", "float16")
    return dtype == sums or (half and sums == jnp.float32)


def _local_index(axes, x, labels):
    """The label among the classes that are here, -1 if it is none of them."""
    if labels is None:
        return None
    count = axes.count_here(x.shape)
    labels = labels - first_class(count, axes.mesh_names)
    if labels.dtype != jnp.int32:
        labels = jnp.where((labels >= 0) & (labels < count), labels, -1)
    return labels.astype(jnp.int32)
