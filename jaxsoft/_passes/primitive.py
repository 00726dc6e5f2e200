"""What a pass over the logits is to JAX: one primitive, with its forms and derivatives.

A primitive keeps its rules wherever it is used. The rules of a `jax.custom_jvp`
function are dropped in a scan that is differentiated twice, first in reverse, and the
reductions of `_passes` are made of operations that JAX cannot differentiate. A
primitive also chooses its form late, when it is lowered for a platform, and reads well
in a jaxpr.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxsoft._core.mesh import Axes, match_varying
from jaxsoft._passes import forms

Form = Callable[[Axes, Any, Any], Any]


class Pass:
    """A function (axes, fixed, linear) -> results of arrays of one rank.

    axes are the class axes. fixed and linear are pytrees of arrays that broadcast
    together; the results are jointly linear in `linear`.

    Args:
        name: the name of the primitive.
        plain: the function in plain JAX.
        merged, in_block: the same in other forms, which `forms` chooses.
        native: the same by compiled kernels of a CPU; None where they know no way.
        smooth: (axes, fixed, linear, results) -> results, whose derivatives in `fixed`
            are those of the pass. By default those of plain.
        transpose: (axes, fixed, cotangents of the results, types of linear) ->
            cotangents of linear. By default the transpose of plain.
    """

    def __init__(
        self,
        name: str,
        plain: Form,
        *,
        merged: Form | None = None,
        in_block: Form | None = None,
        native: Form | None = None,
        smooth: Callable[[Axes, Any, Any, Any], Any] | None = None,
        transpose: Callable[[Axes, Any, Any, Any], Any] | None = None,
    ) -> None:
        self.name = name
        self.plain = plain
        self.forms = {"merged": merged or plain, "in_block": in_block or plain}
        if native is not None:
            self.forms["native"] = _or_else(native, plain)
        self.smooth = smooth or (
            lambda axes, fixed, linear, _: plain(axes, fixed, linear)
        )
        self.transpose = transpose
        self.primitive = primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(self._run)
        primitive.def_abstract_eval(self._result_types)
        ad.primitive_jvps[primitive] = self._jvp
        ad.primitive_transposes[primitive] = self._transposed
        batching.primitive_batchers[primitive] = self._batched
        mlir.register_lowering(primitive, functools.partial(self._lowered, None))
        for platform in forms.PLATFORMS:
            rule = functools.partial(self._lowered, platform)
            mlir.register_lowering(primitive, rule, platform=platform)

    def __call__(self, axes: Axes, fixed: Any, linear: Any = ()) -> Any:
        leaves, tree = jax.tree.flatten((fixed, linear))
        # Typed to vary alike inside shard_map, or the cotangents' types would clash.
        leaves, _ = match_varying(Axes(()), [jnp.asarray(leaf) for leaf in leaves], ())
        # Counted from the last axis, they stay where they are under jax.vmap.
        axes = axes.from_the_end(leaves[0].ndim)
        params = {"axes": axes, "tree": tree, "form": forms.on_cpu()}
        results = self.primitive.bind(*leaves, **params)
        types = [jax.typeof(leaf) for leaf in leaves]
        return self._traced(tuple(types), axes, tree)[1].unflatten(results)

    def _flat(self, form: Form, axes: Axes, tree: Any) -> Callable[..., list[Any]]:
        def flat(*leaves: Any) -> list[Any]:
            fixed, linear = tree.unflatten(leaves)
            return jax.tree.leaves(form(axes, fixed, linear))

        return flat

    # Shapes, dtypes, shardings, and the mesh axes over which the results vary, are
    # those of the plain form.
    @functools.lru_cache(4096)  # noqa: B019, a pass lives as long as the module
    def _traced(self, types: tuple[Any, ...], axes: Axes, tree: Any) -> Any:
        def of_leaves(*leaves: Any) -> Any:
            return self.plain(axes, *tree.unflatten(leaves))

        traced = jax.jit(of_leaves).trace(*types)
        out_types = [v.aval for v in traced.jaxpr.jaxpr.outvars]
        return out_types, jax.tree.structure(traced.out_info)

    def _result_types(self, *types: Any, axes: Axes, tree: Any, form: str) -> Any:
        return self._traced(types, axes, tree)[0]

    def _run(self, *leaves: Any, axes: Axes, tree: Any, form: str) -> Any:
        config: Any = jax.config
        if config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs:
            return self._flat(self.plain, axes, tree)(*leaves)
        return self._jitted(axes, tree, form)(*leaves)

    @functools.lru_cache(1024)  # noqa: B019
    def _jitted(self, axes: Axes, tree: Any, form: str) -> Any:
        return jax.jit(
            functools.partial(self.primitive.bind, axes=axes, tree=tree, form=form)
        )

    def _lowered(
        self,
        platform: str | None,
        context: Any,
        *values: Any,
        axes: Axes,
        tree: Any,
        form: str,
    ) -> Any:
        x = context.avals_in[0]
        classes = axes.count_here(x.shape)
        chosen = forms.chosen(platform, self.name, classes, x, form)
        if chosen == "native" and not _lies_whole(context):
            chosen = "plain"
        flat = self._flat(self.forms.get(chosen, self.plain), axes, tree)
        return mlir.lower_fun(flat, multiple_results=True)(context, *values)

    # With r(fixed, linear) the results, r' = r(fixed, linear') + the derivative in
    # fixed. Both terms are of operations that JAX can transpose.
    def _jvp(self, leaves: Any, tangents: Any, *, axes: Axes, tree: Any, form: str):
        params = {"axes": axes, "tree": tree, "form": form}
        results = self.primitive.bind(*leaves, **params)
        first_linear = _count_of_fixed(tree)
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]
        terms = []
        if any(i >= first_linear for i in moving):
            linear = [
                ad.instantiate_zeros(t) if i >= first_linear else v
                for i, (v, t) in enumerate(zip(leaves, tangents))
            ]
            terms.append(self.primitive.bind(*linear, **params))
        moving = [i for i in moving if i < first_linear]
        if moving:

            def of_moving(*some: Any) -> list[Any]:
                out_tree = self._traced(tuple(map(jax.typeof, leaves)), axes, tree)[1]
                fixed, linear = tree.unflatten(_replaced(leaves, moving, some))
                out = out_tree.unflatten(results)
                return jax.tree.leaves(self.smooth(axes, fixed, linear, out))

            some, dots = ([v[i] for i in moving] for v in (leaves, tangents))
            terms.append(jax.jvp(of_moving, some, dots)[1])
        if not terms:
            zeros = [ad.Zero(jax.typeof(v).to_tangent_aval()) for v in results]
            return results, zeros
        return results, list(map(_sum_of_tangents, results, *terms))

    def _transposed(
        self, cotangents: Any, *leaves: Any, axes: Axes, tree: Any, form: str
    ):
        nothing = [None] * len(leaves)
        if all(type(c) is ad.Zero for c in cotangents):
            return nothing
        cotangents = [ad.instantiate_zeros(c) for c in cotangents]
        unknown = [i for i, v in enumerate(leaves) if ad.is_undefined_primal(v)]
        types = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in leaves]
        if self.transpose is None:

            def of_unknown(*some: Any) -> list[Any]:
                every = _replaced(leaves, unknown, some)
                return self._flat(self.plain, axes, tree)(*every)

            examples = [types[i] for i in unknown]
            results = jax.linear_transpose(of_unknown, *examples)(cotangents)
            results = dict(zip(unknown, results))
        else:
            out_tree = self._traced(tuple(types), axes, tree)[1]
            fixed, like = tree.unflatten(leaves)[0], tree.unflatten(types)[1]
            cotangents = out_tree.unflatten(cotangents)
            linear = self.transpose(axes, fixed, cotangents, like)
            results = dict(enumerate(jax.tree.leaves(linear), _count_of_fixed(tree)))
        return [results[i] if i in unknown else None for i in range(len(leaves))]

    def _batched(self, leaves: Any, dims: Any, *, axes: Axes, tree: Any, form: str):
        size = next(v.shape[d] for v, d in zip(leaves, dims) if d is not None)
        first_linear = _count_of_fixed(tree)

        def with_batch(i: int, v: Any, dim: int | None) -> Any:
            if dim is not None:
                return jnp.moveaxis(v, dim, 0)
            v = jnp.expand_dims(v, 0)
            # The first array gives the results their shape.
            spread = i == 0 or i >= first_linear
            return jnp.broadcast_to(v, (size, *v.shape[1:])) if spread else v

        leaves = [with_batch(i, v, d) for i, (v, d) in enumerate(zip(leaves, dims))]
        results = self.primitive.bind(*leaves, axes=axes, tree=tree, form=form)
        return results, [0] * len(results)


def _sum_of_tangents(result: Any, *parts: Any) -> Any:
    if jnp.issubdtype(result.dtype, jnp.integer):
        return ad.Zero(jax.typeof(result).to_tangent_aval())
    return functools.reduce(jnp.add, parts)


def _or_else(native: Form, plain: Form) -> Form:
    def form(axes: Axes, fixed: Any, linear: Any) -> Any:
        results = native(axes, fixed, linear)
        return plain(axes, fixed, linear) if results is None else results

    return form


def _lies_whole(context: Any) -> bool:
    """Whether every array lies on one device, or is the part of it that a device holds
    inside `jax.shard_map`. XLA gathers what a foreign call is given otherwise."""
    devices = context.module_context.axis_context
    if getattr(devices, "num_devices", None) == 1:
        return True
    manual, mesh = (getattr(devices, name, None) for name in ("manual_axes", "mesh"))
    return bool(manual) and mesh is not None and set(manual) == set(mesh.axis_names)


def _replaced(leaves: Sequence[Any], positions: list[int], some: Any) -> list[Any]:
    """The leaves, with some others at these positions."""
    others = dict(zip(positions, some, strict=True))
    return [others.get(i, leaf) for i, leaf in enumerate(leaves)]


def _count_of_fixed(tree: Any) -> int:
    return tree.children()[0].num_leaves
