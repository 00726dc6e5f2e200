"""shard_vocab: the functions of a row of logits, with the classes split over devices.

Inside `jax.shard_map` all of them take `axis_name`. Under plain `jax.jit` the compiler
splits the dense ones by itself, but it gathers the weights of a linear head, since that
loops over them. `shard_vocab` puts the one inside the other: it knows which axis of
which argument holds the classes, and which the tokens.
"""

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsoft._checks import (
    AxisName,
    as_array,
    as_axes,
    as_sample_weight,
    as_scalar,
    is_of,
    reduced_shape,
)
from jaxsoft._core.dtypes import accumulation_dtype
from jaxsoft._core.mesh import Axes, names_of, varying
from jaxsoft._linear.api import linear_cross_entropy, linear_log_probs
from jaxsoft._linear.distillation import linear_jensen_shannon, linear_kl_divergence
from jaxsoft._linear.sample import linear_sample, token_keys
from jaxsoft._logsumexp import logmeanexp, logsumexp
from jaxsoft._losses.cross_entropy import cross_entropy
from jaxsoft._losses.kl_divergence import jensen_shannon, kl_divergence
from jaxsoft._losses.per_row import (
    included_classes,
    mean_divisor,
    mean_loss,
    row_labels,
    row_options,
)
from jaxsoft._softmax import entropy, log_softmax, softmax

P = ParamSpec("P")
R = TypeVar("R")

LINEAR = (
    linear_cross_entropy,
    linear_jensen_shannon,
    linear_kl_divergence,
    linear_log_probs,
    linear_sample,
)
LIKE_THE_LOGITS = (softmax, log_softmax)
FUNCTIONS = (
    cross_entropy,
    entropy,
    jensen_shannon,
    kl_divergence,
    *LINEAR,
    *LIKE_THE_LOGITS,
    logmeanexp,
    logsumexp,
)

# The arguments that may be arrays, by the shape that they broadcast to.
LOGITS = {"a", "b", "x", "logits", "target_logits", "where"}
HEAD = ("hidden", "vocab_weight", "vocab_bias", "softcap")
ARRAYS = LOGITS | {
    *(f"{of}{name}" for of in ("", "target_") for name in HEAD),
    "labels",
    "class_weight",
    "sample_weight",
    "label_smoothing",
    "temperature",
    "z_loss",
    "focal_gamma",
}


def shard_vocab(
    f: Callable[P, R],
    mesh: Mesh | AbstractMesh,
    axis: Hashable | tuple[Hashable, ...],
    *,
    tokens: AxisName | PartitionSpec = None,
) -> Callable[P, R]:
    """The same function, with its classes split over the devices of a mesh.

    ``shard_vocab(f, mesh, axis)(*args) = f(*args)``, computed in `jax.shard_map` by
    devices that hold a slice of the classes each, and of the tokens too if asked.
    Call it under `jax.jit`, as any other function. Inside `jax.shard_map` use the
    option ``axis_name`` of ``f`` instead.

    Args:
        f: `linear_cross_entropy`, `linear_log_probs`, `linear_sample`,
            `linear_kl_divergence`, `linear_jensen_shannon`, `cross_entropy`,
            `kl_divergence`, `jensen_shannon`, `logsumexp`, `logmeanexp`, `softmax`,
            `log_softmax` or `entropy`, or a `functools.partial` of one.
        mesh: a device mesh with automatic or explicit axes.
        axis: mesh axis (or tuple of them) over which the classes are split, which they
            must divide evenly. Of several class axes, the first given is split.
        tokens: mesh axis (or tuple of them) over which the first batch axis is split,
            or a `PartitionSpec` of all batch axes. None: every device has all tokens.

    Returns:
        A function with the arguments of ``f``, in their full shapes. They are placed
        from any sharding: logits, ``where``, label probabilities, ``vocab_weight``,
        ``vocab_bias`` and ``class_weight`` along their classes; hidden states, index
        labels, ``sample_weight``, ``temperature`` and keys along the tokens; scalars on
        all devices. The results of ``softmax`` and ``log_softmax`` stay split as the
        logits, those with one number per token as the tokens. A reduction "sum" or
        "mean" is that of the whole batch.

    Raises:
        TypeError: ``f`` is none of the functions above, ``mesh`` is no mesh.
        ValueError: ``axis`` or ``tokens`` names no axis of the mesh, or both the same;
            the number of classes or of tokens is not divisible by that of devices;
            ``axis_name`` is given; and whatever ``f`` raises.

    Gradient:
        That of ``f``, placed as the arguments. The gradient of ``vocab_weight`` stays
        split, and is summed over the devices of ``tokens`` once, after the last chunk.
        For N tokens of D features on a device, the value and both gradients of
        `linear_cross_entropy` send two messages of O(N) numbers and one of N x D over
        ``axis``, those of two heads three and one of N x D for each that is
        differentiated; vocab_weight itself is sent nowhere. Logits are recomputed,
        whatever the reduction. Residuals: those of ``f``, on each device for its part.

    Edge cases:
        As ``f``. A vocabulary that the devices do not divide can be padded, with the
        classes that fill it up excluded by ``where``.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> mesh = jax.make_mesh((1, 1), ("data", "vocab"))
        >>> hidden = jnp.array([[1.0, 2.0], [0.5, -1.0]])
        >>> vocab_weight = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> loss = jaxsoft.shard_vocab(
        ...     jaxsoft.linear_cross_entropy, mesh, "vocab", tokens="data"
        ... )
        >>> print(jax.jit(loss)(hidden, vocab_weight, jnp.array([2, -100])))
        [0.40760595 0.        ]
    """
    if not callable(f) or functools.partial(f).func not in FUNCTIONS:
        known = ", ".join(sorted(known.__name__ for known in FUNCTIONS))
        raise TypeError(f"shard_vocab: f must be one of {known}; got {f!r}")
    given = functools.partial(f)  # flat, where f is a partial itself
    function = given.func
    if not isinstance(mesh, Mesh | AbstractMesh):
        kind = type(mesh).__name__
        raise TypeError(f"shard_vocab: mesh must be a jax.sharding.Mesh; got {kind}")
    split = _Split(mesh, _as_names(mesh, "axis", axis), _as_batch(mesh, tokens))
    if set(split.class_names) & set(split.token_names):
        raise ValueError(
            f"shard_vocab: axis and tokens must name different mesh axes; got {axis!r} "
            f"and {tokens!r}"
        )

    signature = inspect.signature(function)

    @functools.wraps(given.func)
    def sharded(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*given.args, *args, **{**given.keywords, **kwargs})
        bound.apply_defaults()
        options = dict(bound.arguments)
        axis_name = options.pop("axis_name")
        if axis_name is not None:
            raise ValueError(
                f"shard_vocab: axis_name must be left to shard_vocab; got {axis_name!r}"
            )
        arrays = {
            name: as_array(function.__name__, name, options.pop(name))
            for name in ARRAYS.intersection(options)
            if not isinstance(options[name], int | float | None)
        }
        if "key" in options:
            # One for each token of all, so that the devices need not count theirs.
            batch = arrays["hidden"].shape[:-1] if "hidden" in arrays else ()
            arrays["key"] = token_keys(function.__name__, options.pop("key"), batch)
        static = _hashable(options)
        if not all(isinstance(value, Hashable) for _, value in static):
            # Nothing that a function takes, which says why.
            jax.eval_shape(lambda: function(**arrays, **options))
        return _sharded(arrays, _Call(function, split, static))

    return sharded


class _Split(NamedTuple):
    """Which mesh axes split what."""

    mesh: Mesh | AbstractMesh
    class_names: tuple[Hashable, ...]
    batch: tuple[Any, ...]  # an entry of a PartitionSpec for each of the batch axes

    @property
    def token_names(self) -> tuple[Hashable, ...]:
        return tuple(name for entry in self.batch for name in names_of(entry))


class _Call(NamedTuple):
    """The static part of a call."""

    function: Callable[..., Any]
    split: _Split
    options: tuple[tuple[str, Any], ...]


class _Layout(NamedTuple):
    """The logits, which may exist or not."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]  # of the classes
    entries: tuple[Any, ...]  # of the logits' PartitionSpec

    def of_rows(self, values: tuple[Any, ...], in_place: Any = ()) -> tuple[Any, ...]:
        """The values of the batch axes, with others in place of the class axes."""
        kept = ((v,) if i not in self.axes else in_place for i, v in enumerate(values))
        return sum(kept, ())


def _as_names(mesh: Any, argument: str, names: Any) -> tuple[Hashable, ...]:
    names = names_of(names)
    wrong = [
        name
        for name in names
        if not isinstance(name, Hashable) or name not in mesh.axis_names
    ]
    if wrong or (argument == "axis" and not names) or len(set(names)) < len(names):
        raise ValueError(
            f"shard_vocab: {argument} must name different axes of the mesh, "
            f"{tuple(mesh.axis_names)}; got {_shown(names)}"
        )
    return names


def _shown(names: tuple[Hashable, ...]) -> str:
    return repr(names[0] if len(names) == 1 else names)


def _as_batch(mesh: Any, tokens: Any) -> tuple[Any, ...]:
    batch = tuple(tokens) if isinstance(tokens, PartitionSpec) else (tokens,)
    _as_names(mesh, "tokens", [name for entry in batch for name in names_of(entry)])
    return () if batch == (None,) else batch


def _hashable(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in options.items()
    )


@functools.partial(jax.jit, static_argnames="call")
def _sharded(arrays: dict[str, Array], call: _Call) -> Any:
    function, split = call.function, call.split
    whole = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), arrays)
    # Raises for wrong arguments, in terms of their full shapes.
    jax.eval_shape(lambda arrays: function(**arrays, **dict(call.options)), whole)
    layout = _layout(whole, call)
    in_specs = {name: _spec(name, v, layout, call) for name, v in whole.items()}
    if AxisType.Explicit in split.mesh.axis_types:
        arrays = {
            name: _placed(v, split.mesh, in_specs[name]) for name, v in arrays.items()
        }
    return jax.shard_map(
        functools.partial(_on_device, layout=layout, call=call),
        mesh=split.mesh,
        in_specs=(in_specs,),
        out_specs=_out_spec(layout, call),
    )(arrays)


def _layout(arrays: Mapping[str, Any], call: _Call) -> _Layout:
    options = dict(call.options)
    if call.function in LINEAR:
        classes = arrays["vocab_weight"].shape[options["vocab_axis"]]
        shape = (*arrays["hidden"].shape[:-1], classes)
        axes = (len(shape) - 1,)
    else:
        shapes = [arrays[name].shape for name in LOGITS - {"where"} if name in arrays]
        shape = np.broadcast_shapes(*shapes)
        axes = as_axes(call.function.__name__, options["axis"], len(shape)).dims
    if not axes:
        raise ValueError("shard_vocab: axis must name at least one class axis; got ()")
    rows = [i for i in range(len(shape)) if i not in axes]
    batch = call.split.batch
    if len(batch) > len(rows):
        raise ValueError(
            f"shard_vocab: tokens must have at most one entry per batch axis; got "
            f"{len(batch)} for {len(rows)} batch axes"
        )
    of_axis = {axes[0]: call.split.class_names, **dict(zip(rows, batch))}
    entries = tuple(of_axis.get(i) for i in range(len(shape)))
    _check_divisible(shape, axes, entries, call.split.mesh)
    return _Layout(shape, axes, entries)


def _check_divisible(shape, axes, entries, mesh):
    for i, (size, entry) in enumerate(zip(shape, entries)):
        names = names_of(entry)
        devices = math.prod(mesh.shape[name] for name in names)
        if size % devices:
            what = "classes" if i in axes else "tokens along a batch axis"
            raise ValueError(
                f"shard_vocab: the number of {what} must be divisible by that of "
                f"devices along {_shown(names)}; got {size} for {devices} devices"
            )


def _spec(name: str, array: Any, layout: _Layout, call: _Call) -> PartitionSpec:
    """How an argument is split."""
    of_head = name.removeprefix("target_")
    if of_head == "vocab_weight":
        vocab_axis = dict(call.options)[name.replace("weight", "axis")]
        return PartitionSpec(*(None,) * vocab_axis, call.split.class_names)
    if of_head in ("vocab_bias", "class_weight"):
        return PartitionSpec(call.split.class_names)
    rows = layout.of_rows(layout.entries)
    entries = {
        "hidden": (*rows, None),
        "labels": (*rows, None) if array.ndim > len(rows) else rows,
        "sample_weight": rows,
        "key": rows,
        "temperature": layout.of_rows(layout.entries, (None,)),
    }.get(of_head, layout.entries)
    if name == "labels" and is_of(array.dtype, jnp.floating):
        entries = layout.entries
    # An argument may lack axes in front, and have 1 in place of a size.
    entries = entries[len(entries) - array.ndim :]
    return PartitionSpec(*(e if n > 1 else None for e, n in zip(entries, array.shape)))


def _out_spec(layout: _Layout, call: _Call) -> Any:
    options = dict(call.options)
    rows = PartitionSpec(*layout.of_rows(layout.entries))
    reduced = options.get("reduction", "none") != "none"
    if options.get("with_metrics", False):
        return PartitionSpec() if reduced else rows, rows
    if reduced:
        return PartitionSpec()
    if call.function in LIKE_THE_LOGITS:
        return PartitionSpec(*layout.entries)
    kept = (None,) if options.get("keepdims", False) else ()
    return PartitionSpec(*layout.of_rows(layout.entries, kept))


def _placed(array: Array, mesh: Any, spec: PartitionSpec) -> Array:
    """The array, resharded over the explicit axes of the mesh, as shard_map asks."""
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Explicit
    }
    entries = (tuple(n for n in names_of(e) if n in explicit) for e in spec)
    spec = PartitionSpec(*(entry or None for entry in entries))
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def _on_device(arrays: dict[str, Array], layout: _Layout, call: _Call) -> Any:
    names, token_names = call.split.class_names, call.split.token_names
    options = dict(call.options)
    reduction = options.get("reduction", "none")
    if reduction == "none" or not token_names:
        return call.function(**arrays, **options, axis_name=names)
    options["reduction"] = "none"

    def total(v: Array) -> Array:
        return jax.lax.psum(varying(jnp.sum(v), token_names), token_names)

    if reduction == "sum":
        losses = call.function(**arrays, **options, axis_name=names)
        return _of_loss(total, losses)
    of_rows, counted, like = _of_rows({**options, **arrays}, layout, call)
    divisor, ratio = mean_divisor(of_rows, counted, like, total)
    if ratio is not None:
        z_loss = {**options, **arrays}["z_loss"]
        options = {k: v for k, v in options.items() if k != "z_loss"}
        arrays = {**arrays, "z_loss": z_loss * ratio}
    losses = call.function(**arrays, **options, axis_name=names)
    if ratio is not None and isinstance(losses, tuple):
        losses, metrics = losses
        z = metrics.z_loss / jnp.where(ratio == 0, 1, ratio)
        losses = losses, metrics._replace(z_loss=z)
    return _of_loss(lambda v: mean_loss(total(v), divisor), losses)


def _of_loss(f, losses):
    """f of the loss, beside which metrics stay as they are."""
    if isinstance(losses, tuple):
        return f(losses[0]), losses[1]
    return f(losses)


def _of_rows(arguments, layout, call):
    """What decides on the weight of each of this device's rows in a mean: its options,
    whether it counts, and an array of the rows' shape and the losses' dtype."""
    function, axes = call.function.__name__, Axes(layout.axes, call.split.class_names)
    shape, dtype = _logits_here(arguments)
    rows = reduced_shape(shape, axes)
    like, where, counted = jnp.zeros(rows, dtype), arguments["where"], None
    if where is not None:
        where = jnp.expand_dims(where, range(len(shape) - where.ndim))
        counted = included_classes(where, shape, axes) > 0
    weight = as_sample_weight(function, arguments["sample_weight"], rows, dtype)
    options: dict[str, Any] = {"sample_weight": weight}
    labels, index = arguments.get("labels"), None
    if labels is not None and is_of(labels.dtype, jnp.integer):
        classes = math.prod(layout.shape[a] for a in layout.axes)
        index = row_labels(function, labels, classes, arguments["ignore_index"])
        counted = index.counted if counted is None else index.counted & counted
        z_loss = as_scalar(function, "z_loss", arguments["z_loss"], dtype, neutral=0)
        options["z_loss"] = z_loss
        if arguments["class_weight"] is not None:
            weights = jnp.asarray(arguments["class_weight"], dtype)
            options["class_weight"] = weights
    return row_options(index, rows, axes, **options), counted, like


def _logits_here(arguments):
    """Shape and dtype of sums of the logits of this device, which may exist or not."""
    if "hidden" in arguments:
        hidden, weight = arguments["hidden"], arguments["vocab_weight"]
        of_heads = [k for k in arguments if k.endswith(("hidden", "vocab_weight"))]
        dtypes = (arguments[k].dtype for k in of_heads)
        dtype = functools.reduce(jnp.promote_types, dtypes)
        classes = weight.shape[arguments["vocab_axis"]]
        return (*hidden.shape[:-1], classes), accumulation_dtype(dtype)
    logits = [v for k, v in arguments.items() if k in ("logits", "target_logits")]
    dtype = functools.reduce(jnp.promote_types, (v.dtype for v in logits))
    return logits[0].shape, accumulation_dtype(dtype)
