"""Checks of arguments at trace time, from shapes, dtypes and static values alone.

Nothing here computes. A message reads `function: what must hold; got what was passed`.
"""

import functools
import operator
from collections.abc import Hashable
from typing import Any, Literal, TypeGuard, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxsoft._core.dtypes import accumulation_dtype, cast
from jaxsoft._core.mesh import Axes, class_count, names_of, varies_over

# What a loss with the option ignore_index says of a mask that has one entry per row.
IGNORE_ROWS = "To leave out a row set its label to ignore_index"

Axis = int | tuple[int, ...] | None
AxisName = Hashable | tuple[Hashable, ...] | None
Reduction = Literal["none", "sum", "mean"]
REDUCTIONS = get_args(Reduction)


@functools.cache
def is_of(dtype: Any, kind: Any) -> bool:
    """jnp.issubdtype, at a tenth of its time: an eager call takes microseconds."""
    return jnp.issubdtype(dtype, kind)


def as_array(function: str, name: str, value: ArrayLike) -> Array:
    try:
        # Of an array that is one already, asarray takes longer than all other checks.
        array = value if isinstance(value, Array) else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None or not (is_of(array.dtype, jnp.number) or array.dtype == bool):
        kind = type(value).__name__
        if isinstance(value, np.ndarray | np.generic):
            kind = f"dtype {value.dtype}"
        raise TypeError(f"{function}: {name} must be an array of numbers; got {kind}")
    return array


def as_inexact(function: str, name: str, value: ArrayLike) -> Array:
    """The array in floating (or complex) dtype; integers become floats as in JAX."""
    array = as_array(function, name, value)
    if array.dtype == bool:
        raise TypeError(f"{function}: {name} must be numbers; got a boolean array")
    if is_of(array.dtype, jnp.inexact):
        return array
    wide = array.dtype.itemsize == 8
    return array.astype(jnp.float64 if wide else jnp.float32)


def as_real(function: str, name: str, value: ArrayLike) -> Array:
    array = as_inexact(function, name, value)
    if is_of(array.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: {name} must be real; got dtype {array.dtype}")
    return array


def as_axes(function: str, axis: Axis, ndim: int, axis_name: AxisName = None) -> Axes:
    """The axes as non-negative ints, in the order given, and the mesh axes."""
    names = _as_mesh_names(function, axis_name)
    # An int is hashable, and no boolean, which would be found as 0 or 1.
    axes_of = _axes_looked_up if type(axis) is int else _axes
    return axes_of(function, axis, ndim, names)


def _axes(function, axis, ndim, names):
    if axis is None:
        return Axes(tuple(range(ndim)), names)
    given = axis if isinstance(axis, tuple | list) else (axis,)
    axes = [i for a in given if (i := as_integer(a)) is not None]
    if len(axes) < len(given):
        raise TypeError(
            f"{function}: axis must be an int, a tuple of ints or None; got {axis!r}"
        )
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(
            f"{function}: axis must lie in [{-ndim}, {ndim}) for {ndim} dimensions; "
            f"got {axis!r}"
        )
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{function}: axis must not repeat a dimension; got {axis!r}")
    return Axes(axes, names)


_axes_looked_up = functools.cache(_axes)


def _as_mesh_names(function: str, axis_name: AxisName) -> tuple[Hashable, ...]:
    names = names_of(axis_name)
    for name in names:
        try:
            jax.lax.axis_size(name)
            manual = name in jax.sharding.get_abstract_mesh().manual_axes
        except (NameError, KeyError, TypeError, ValueError):
            manual = False
        if not manual:
            # An axis of jax.vmap has a size, but no devices.
            raise ValueError(
                f"{function}: axis_name must name mesh axes of an enclosing "
                f"jax.shard_map; got {axis_name!r}"
            )
    return names


def check_split(
    function: str, axes: Axes, of_classes: dict[str, Any], of_rows: dict[str, Any]
) -> None:
    """With axis_name: arrays that hold classes differ between the devices of these mesh
    axes, and those that hold rows are the same on all. The types of JAX know it, unless
    `jax.shard_map` is told not to check them."""
    for name in axes.mesh_names:
        if name not in varies_over(jax.lax.axis_index(name)):
            continue
        for which, array in of_classes.items():
            if name not in varies_over(array):
                raise ValueError(
                    f"{function}: axis_name {name!r} must be the mesh axis over which "
                    f"the classes of {which} are split; got {which} that are the same "
                    "on all of its devices"
                )
        for which, array in of_rows.items():
            if name in varies_over(array):
                raise ValueError(
                    f"{function}: axis_name {name!r} must be the mesh axis over which "
                    f"the classes are split; got {which} that differ over it, as over "
                    "an axis of the batch. For a mean over such an axis see "
                    "loss_weight"
                )


def as_integer(value: Any) -> int | None:
    """The static integer that a value is, or None; a boolean is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_flag(function: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False; got {value!r}")
    return value


def as_mask(
    function: str,
    name: str,
    mask: ArrayLike | None,
    shape: tuple[int, ...],
    hint_for_rows: str | None = None,
) -> Array | None:
    if mask is None:
        return None
    array = as_array(function, name, mask)
    if array.dtype != bool:
        raise TypeError(
            f"{function}: {name} must be boolean; got dtype {array.dtype}. For numbers "
            f"0 and 1 write {name} != 0"
        )
    hint = ""
    if array.shape == shape[:-1]:
        hint_for_rows = (
            hint_for_rows or f"For one entry per row write {name}[..., None]"
        )
        hint = f". {hint_for_rows}"
    return as_broadcastable(function, name, array, shape, "the logits' shape", hint)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a Python number, which a boolean is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_known(value: Any) -> TypeGuard[float | np.ndarray]:
    """Whether a value can be looked at before the program runs, on any machine: an
    array of JAX may be traced, or not computed yet."""
    return isinstance(value, int | float | np.ndarray | np.generic)


def as_temperature(
    function: str,
    temperature: ArrayLike,
    x: Array | jax.ShapeDtypeStruct,
    axes: Axes,
) -> Array | None:
    """None for the number 1, else an array with the rank of x."""
    if is_number(temperature) and temperature == 1:
        return None
    array = as_real(function, "temperature", temperature)
    hint = ""
    if array.shape == reduced_shape(x.shape, axes):
        hint = f". Write jnp.expand_dims(temperature, {axes.dims})"
    return as_broadcastable(
        function,
        "temperature",
        cast(array, accumulation_dtype(x.dtype)),
        kept_shape(x.shape, axes),
        "the reduced result with the reduced axes kept, shape",
        hint,
    )


def kept_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(1 if i in axes.dims else n for i, n in enumerate(shape))


def reduced_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(shape) if i not in axes.dims)


def as_broadcastable(
    function: str,
    name: str,
    array: Array,
    shape: tuple[int, ...],
    what: str,
    hint: str = "",
) -> Array:
    """The array with ones in front up to the rank of shape, which it never enlarges."""
    try:
        enlarged = jnp.broadcast_shapes(array.shape, shape) != shape
    except ValueError:
        enlarged = True
    if enlarged:
        raise ValueError(
            f"{function}: {name} must broadcast to {what} {shape}; got {array.shape}"
            f"{hint}"
        )
    return jax.lax.expand_dims(array, range(len(shape) - array.ndim))


def reject_options(
    function: str, x: Array, temperature: ArrayLike, axis_name: AxisName
) -> None:
    """The options that complex input does not have."""
    if axis_name is not None:
        raise TypeError(f"{function}: axis_name needs real input; got {x.dtype}")
    if not (is_number(temperature) and temperature == 1):
        raise TypeError(
            f"{function}: temperature needs real input; got {x.dtype} with "
            f"temperature {temperature}"
        )


def as_reduction(function: str, reduction: Reduction) -> Reduction:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"{function}: reduction must be one of {REDUCTIONS}; got {reduction!r}"
        )
    return reduction


def as_labels(
    function: str, labels: ArrayLike, logits: Array, axes: Axes
) -> tuple[Array, bool]:
    """The labels, and whether they are class indices."""
    given, labels = labels, as_array(function, "labels", labels)
    rows = reduced_shape(logits.shape, axes)
    if is_of(labels.dtype, jnp.integer):
        if labels.shape == rows:
            return labels, True
        hint = _hint_for_indices(labels.shape, logits.shape, axes)
        raise ValueError(
            f"{function}: integer labels must have the logits' shape without the class "
            f"axis, {rows}; got labels {labels.shape} for logits {logits.shape}{hint}"
        )
    hint = ""
    if labels.dtype == bool and labels.shape == logits.shape:
        hint = ". For one-hot labels write labels.astype(jnp.float32)"
    reject_other_labels(function, labels, hint)
    if labels.shape == logits.shape:
        _check_probabilities(function, given, logits)
        return labels, False
    hint = ""
    if labels.shape == rows:
        hint = ". For class indices use an integer dtype"
    elif labels.ndim == logits.ndim + 1:
        hint = f". The order is {function}(logits, labels)"
    raise ValueError(
        f"{function}: floating labels are probabilities and must have the logits' "
        f"shape {logits.shape}; got {labels.shape}{hint}"
    )


def reject_other_labels(function: str, labels: Array, hint: str = "") -> None:
    """What is neither class indices nor probabilities."""
    if not is_of(labels.dtype, jnp.integer) and not is_of(labels.dtype, jnp.floating):
        raise TypeError(
            f"{function}: labels must be integers (class indices) or floats "
            f"(probabilities); got dtype {labels.dtype}{hint}"
        )


def _check_probabilities(function: str, labels: Any, logits: Array) -> None:
    """What can be told before the program runs of logits and labels in a wrong order,
    which have one shape."""
    if is_known(labels) and np.any(np.asarray(labels) < 0):
        raise ValueError(
            f"{function}: floating labels are probabilities and must not be negative; "
            f"got {np.min(labels)}. The order is {function}(logits, labels)"
        )


def _hint_for_indices(
    labels: tuple[int, ...], logits: tuple[int, ...], axes: Axes
) -> str:
    """What to write for integer labels that do not have the shape of the rows."""
    if labels == logits:
        return ". For one-hot labels or probabilities use a floating dtype"
    if labels == kept_shape(logits, axes):
        return f". Write jnp.squeeze(labels, {axes.dims})"
    for axis in range(len(logits)):
        if labels == (*logits[:axis], *logits[axis + 1 :]):
            return f". For classes along axis {axis} write axis={axis}"
    return ""


def as_index_labels(
    function: str, labels: ArrayLike, shape: tuple[int, ...], what: str
) -> Array:
    labels = as_array(function, "labels", labels)
    if not is_of(labels.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers (class indices); got dtype "
            f"{labels.dtype}"
        )
    if labels.shape != shape:
        raise ValueError(
            f"{function}: labels must have {what} {shape}; got {labels.shape}"
        )
    return labels


def as_key(function: str, key: Any, batch: tuple[int, ...] = ()) -> Array:
    """One key of jax.random, typed or as its numbers; or one for each of a batch."""
    if isinstance(key, Array | np.ndarray):
        if is_of(key.dtype, jax.dtypes.prng_key) and key.shape in ((), batch):
            return jnp.asarray(key)
        if key.dtype == jnp.uint32:
            numbers = jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
            if key.shape in (numbers, (*batch, *numbers)):
                return jax.random.wrap_key_data(jnp.asarray(key))
    got = type(key).__name__ + str(getattr(key, "shape", ""))
    several = f", or one per token, of shape {batch}" if batch else ""
    raise TypeError(
        f"{function}: key must be one key of jax.random{several}; got {got}"
    )


def as_ignore_index(function: str, ignore_index: int | None) -> int | None:
    if ignore_index is None:
        return None
    index = as_integer(ignore_index)
    if index is None:
        raise TypeError(
            f"{function}: ignore_index must be an int or None; got {ignore_index!r}"
        )
    return index


def as_scalar(
    function: str, name: str, value: ArrayLike, dtype: Any, neutral: float | None = None
) -> Array | None:
    """A scalar of the given dtype; None for the neutral Python number."""
    if is_number(value) and value == neutral:
        return None
    array = as_real(function, name, value)
    if array.shape != ():
        raise ValueError(f"{function}: {name} must be a scalar; got {array.shape}")
    return array.astype(dtype)


def as_softcap(function: str, softcap: ArrayLike | None, dtype: Any) -> Array | None:
    if softcap is None:
        return None
    array = as_scalar(function, "softcap", softcap, dtype)
    if is_known(softcap) and not softcap > 0:
        raise ValueError(f"{function}: softcap must be positive; got {softcap}")
    return array


def as_label_smoothing(
    function: str, label_smoothing: ArrayLike, dtype: Any
) -> Array | None:
    array = as_scalar(function, "label_smoothing", label_smoothing, dtype, neutral=0)
    if is_known(label_smoothing) and not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"{function}: label_smoothing must lie in [0, 1]; got {label_smoothing}"
        )
    return array


def as_focal_gamma(function: str, focal_gamma: ArrayLike, dtype: Any) -> Array | None:
    array = as_scalar(function, "focal_gamma", focal_gamma, dtype, neutral=0)
    if is_known(focal_gamma) and not focal_gamma >= 0:
        raise ValueError(
            f"{function}: focal_gamma must not be negative; got {focal_gamma}"
        )
    return array


def as_beta(function: str, beta: float) -> float:
    """The target's part in a mixture of two distributions: it decides on the program
    that is compiled."""
    if not is_number(beta):
        raise TypeError(
            f"{function}: beta must be a Python number, not an array; got "
            f"{type(beta).__name__}"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"{function}: beta must lie in [0, 1]; got {beta}")
    return float(beta)


def as_class_weight(
    function: str,
    class_weight: ArrayLike | None,
    shape: tuple[int, ...],
    axes: Axes,
    dtype: Any,
) -> Array | None:
    if class_weight is None:
        return None
    array = as_real(function, "class_weight", class_weight)
    classes = axes.count_here(shape)
    if array.shape not in {(classes,), (class_count(shape, axes),)}:
        raise ValueError(
            f"{function}: class_weight must have one entry per class, shape "
            f"({classes},); got {array.shape}"
        )
    return array.astype(dtype)


def as_sample_weight(
    function: str, sample_weight: ArrayLike | None, shape: tuple[int, ...], dtype: Any
) -> Array | None:
    if sample_weight is None:
        return None
    array = as_array(function, "sample_weight", sample_weight)
    if array.dtype != bool:
        array = as_real(function, "sample_weight", array)
    array = array.astype(dtype)
    what = "the shape of the losses"
    return as_broadcastable(function, "sample_weight", array, shape, what)
