"""The class axes of an array, and what they are when the classes lie on many devices.

A sum over the classes of a row goes through here, and so does a label's index. Without
a mesh all of it is the plain operation. `Axes.mesh_names` is for the inside of
`jax.shard_map`; what is said of types is for meshes with explicit axes.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Axes:
    """The class axes of an array, and the mesh axes over which the classes are split.

    Without `mesh_names` the array holds all classes. With them it holds the slice of
    this device, inside `jax.shard_map`, and the sum of a row is a sum over devices.
    """

    dims: tuple[int, ...]
    mesh_names: tuple[Hashable, ...] = ()

    def count_here(self, shape: tuple[int, ...]) -> int:
        """The number of classes that this device holds, of an array of this shape."""
        return math.prod(shape[axis] for axis in self.dims)

    def from_the_end(self, ndim: int) -> "Axes":
        """The same axes of an array with ndim, counted from its last one."""
        dims = tuple(a if a < 0 else a - ndim for a in self.dims)
        return dataclasses.replace(self, dims=dims)

    def from_the_start(self, ndim: int) -> "Axes":
        dims = tuple(a % ndim for a in self.dims)
        return dataclasses.replace(self, dims=dims)


def names_of(entry: Any) -> tuple[Hashable, ...]:
    """Mesh axes, given as one name, several or none, as in a PartitionSpec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def row_sum(v: Array, axes: Axes, dtype: DTypeLike | None = None) -> Array:
    """The sum over all classes of a row; the class axes are kept with size 1."""
    total = jnp.sum(v, axes.dims, keepdims=True, dtype=dtype)
    return device_sum(total, axes.mesh_names)


def device_sum(v: Any, mesh_names: tuple[Hashable, ...]) -> Any:
    """The sum over the devices that share the classes."""
    return jax.lax.psum(v, mesh_names) if mesh_names else v


def row_max(v: Array, axes: Axes, at_least: float = -math.inf) -> Array:
    top = jnp.max(v, axes.dims, keepdims=True, initial=at_least)
    return jax.lax.pmax(top, axes.mesh_names) if axes.mesh_names else top


def class_index(x: Array, axes: Axes) -> Array:
    """The index of every class of x, among those of all devices, in the order of the
    axes; of size 1 along the other axes."""
    axes = axes.from_the_start(x.ndim)
    index, stride = jnp.zeros((1,) * x.ndim, jnp.int32), 1
    for axis in reversed(axes.dims):
        along_axis = [n if i == axis else 1 for i, n in enumerate(x.shape)]
        iota = jax.lax.broadcasted_iota(jnp.int32, along_axis, axis)
        index = index + stride * iota
        stride *= x.shape[axis]
    return first_class(axes.count_here(x.shape), axes.mesh_names) + reshard_like(
        index, x
    )


def is_class(labels: Array, x: Array, axes: Axes) -> Array:
    """Which class of every row is its label. Compared, not gathered: a comparison stays
    local when the classes are sharded."""
    return class_index(x, axes) == labels


def is_sharded(v: Any, axes: Iterable[int]) -> bool:
    """Whether a mesh with explicit axes splits any of these axes of v.

    Then only what the type can follow may be done to them: no reshape, no gather.
    """
    spec = jax.typeof(v).sharding.spec
    return any(spec[axis] is not None for axis in axes)


def reshard_like(v: Array, like: Array) -> Array:
    """v, typed to be split as `like` is over the explicit axes of a mesh, but for axes
    of size 1. In a choice between arrays JAX asks for equal types."""
    spec = [
        entry if n > 1 else None
        for entry, n in zip(jax.typeof(like).sharding.spec, v.shape)
    ]
    return _resharded(v, spec, like) if any(spec) else v


def reshard_together(v: Array, like: Array) -> tuple[Array, Array]:
    """Both, of one shape: v typed to be split as `like` is, or if only v is split,
    `like` as v."""
    v = reshard_like(v, like)
    return v, reshard_like(like, v)


def broadcast_like(v: Array, like: Array) -> Array:
    """v, and where a type splits `like`, v broadcast to its shape and split alike."""
    if not is_sharded(like, range(like.ndim)):
        return v
    return reshard_like(jnp.broadcast_to(v, like.shape), like)


def entries_at(table: Array, index: Array) -> Array:
    """table[index] of a table with one axis, split as the index is."""
    axes = range(index.ndim)
    if not (is_sharded(table, (0,)) or is_sharded(index, axes)):
        return table[index]
    whole = _resharded(table, [None], index)
    return whole.at[index].get(out_sharding=jax.typeof(index).sharding)


def _resharded(v, spec, like):
    return jax.sharding.reshard(v, _sharding(spec, like))


def _sharding(spec, like):
    mesh, spec = jax.typeof(like).sharding.mesh, jax.sharding.PartitionSpec(*spec)
    return jax.sharding.NamedSharding(mesh, spec)


def with_automatic_axes(
    f: Callable[..., Any], arguments: tuple[Any, ...], batch: Array, ndims: Any
) -> Any:
    """f of the arguments. Where the explicit axes of a mesh split one of them, they are
    automatic within f, which may then slice and sort what no type could follow.

    The results have so many axes, in the same tree, and are split as the first axes of
    `batch` are.
    """
    leaves = jax.tree.leaves(arguments)
    split = [v for v in leaves if is_sharded(v, range(v.ndim))]
    if not split:
        return f(*arguments)
    mesh = jax.typeof(split[0]).sharding.mesh
    spec = jax.typeof(batch).sharding.spec[:-1]
    results = jax.tree.map(lambda ndim: _sharding(spec[:ndim], split[0]), ndims)
    in_auto = jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=results)
    return in_auto(*arguments)


def class_count(shape: tuple[int, ...], axes: Axes) -> int:
    shards = jax.lax.axis_size(axes.mesh_names) if axes.mesh_names else 1
    return axes.count_here(shape) * shards


def first_class(classes_here: int, mesh_names: tuple[Hashable, ...]) -> Array | int:
    """The index of the first class that this device holds."""
    return jax.lax.axis_index(mesh_names) * classes_here if mesh_names else 0


def local_index(
    class_index: Array, classes_here: int, mesh_names: tuple[Hashable, ...]
) -> tuple[Array, Array]:
    """The index among the classes of this device, and whether the class is one of
    them; if not, the index is that of some other class."""
    index = class_index - first_class(classes_here, mesh_names)
    found = (index >= 0) & (index < classes_here)
    return jnp.clip(index, 0, classes_here - 1), found


def match_varying(axes: Axes, arrays: Any, rows: Any) -> tuple[Any, Any]:
    """Both trees, typed to vary over the mesh axes that anything in them varies over;
    rows not over those of the classes.

    Inside `jax.shard_map` a rule returns cotangents that vary as its cotangent does.
    An argument that is the same on all devices of some mesh axis is therefore cast
    before the rule sees it, and the transpose of the cast is the sum over devices.
    """
    leaves = jax.tree.leaves((arrays, rows))
    union = frozenset().union(*map(varies_over, leaves), axes.mesh_names)
    if not union:
        return arrays, rows
    of_rows = union.difference(axes.mesh_names)
    return varying(arrays, union), varying(rows, of_rows)


def varies_over(v: Any) -> frozenset[Hashable]:
    """The mesh axes over which the devices hold different values, inside
    `jax.shard_map`, by the type of v."""
    return jax.typeof(v).manual_axis_type.varying


def varying_like(v: Array, like: Array) -> Array:
    return varying(v, varies_over(like))


def varying(tree: Any, mesh_names: Iterable[Hashable]) -> Any:
    """The same numbers, typed to vary over these mesh axes too."""

    def cast(v):
        missing = tuple(sorted(set(mesh_names) - varies_over(v), key=str))
        if not missing:
            return v
        return jax.lax.pcast(v, missing, to="varying")

    return jax.tree.map(cast, tree)
