"""`with_jvp`: forward mode for a function whose rule is a `jax.custom_vjp`.

JAX refuses to push a tangent through a `custom_vjp` function, because its rule says
only how to pull a cotangent back. That rule is enough. Let J be the jacobian of f at
x, and let the pullback be ct -> J^T ct. It is linear in ct, so JAX can transpose it:

    t -> (J^T)^T t = J t,

which is the forward derivative. `with_jvp` gives f a `custom_jvp` rule that does
exactly this. Reverse mode asks for the transpose of J, and gets J^T as it was written:
what JAX makes of two transposes has other casts, and other copies in its loops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval

P = ParamSpec("P")
R = TypeVar("R")


class with_jvp(Generic[P, R]):  # noqa: N801, a decorator, named like jax.custom_vjp
    """Give a function with a `jax.custom_vjp` rule both modes of differentiation.

    The forward derivative is the transpose of the rule's own backward pass:
    ``jvp(f)(x, t) = linear_transpose(vjp(f, x))(t)``. `jax.grad`, `jax.jvp`,
    `jax.linearize`, `jax.jacfwd`, `jax.jacrev`, `jax.hessian` and every nesting of them
    then work, under `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.checkpoint` too.

    Args:
        f: a `jax.custom_vjp` function. Arguments and results may be pytrees; integer
            and boolean leaves are carried along undifferentiated; ``nondiff_argnums``
            of ``f`` are honoured. ``defvjp`` may be called before or after wrapping.

    Returns:
        A function with the signature and the values of ``f``. Its method ``defvjp`` is
        that of ``f``.

    Raises:
        TypeError: ``f`` has no custom rule.

    Gradient:
        Reverse mode saves exactly the residuals of ``f``'s forward pass. The backward
        pass must be linear in the cotangent and made of operations that JAX can
        transpose (`jax.lax.scan`, not `jax.lax.while_loop`). Arguments that are not
        differentiated are constants of the rule: nothing is computed for them. A
        derivative of second order differentiates ``f``'s forward and backward
        functions as JAX sees them, as for any `jax.custom_vjp` function.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> @jaxsoft.with_jvp
        ... @jax.custom_vjp
        ... def clipped_exp(x):
        ...     return jnp.exp(x)
        >>> def forward(x):
        ...     y = jnp.exp(x)
        ...     return y, y
        >>> def backward(y, ct):
        ...     return (jnp.minimum(y, 10.0) * ct,)
        >>> clipped_exp.defvjp(forward, backward)
        >>> jax.jvp(clipped_exp, (5.0,), (1.0,))[1]  # jax.custom_vjp alone raises here
        Array(10., dtype=float32, weak_type=True)
    """

    def __init__(self, f: Callable[P, R]) -> None:
        if not isinstance(f, jax.custom_vjp):
            raise TypeError(
                "with_jvp: f must be a jax.custom_vjp function; got "
                f"{type(f).__name__} {getattr(f, '__name__', f)!r}. Plain functions "
                "have both modes already."
            )
        self._rule: Any = f
        static = tuple(f.nondiff_argnums)
        self._call = jax.custom_jvp(_unwrapped(f), nondiff_argnums=static)
        self._call.defjvp(
            functools.partial(_transposed_rule, f, static), symbolic_zeros=True
        )
        functools.update_wrapper(self, f)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._call(*args, **kwargs)

    def defvjp(self, *args: Any, **kwargs: Any) -> None:
        """The method of the wrapped `jax.custom_vjp` function."""
        self._rule.defvjp(*args, **kwargs)


def _unwrapped(f: Any) -> Callable[..., Any]:
    @functools.wraps(f)
    def call(*args: Any) -> Any:
        return f(*args)

    return call


def _transposed_rule(f: Any, static_positions: tuple[int, ...], *rule_args: Any) -> Any:
    *static, primals, tangents = rule_args
    leaves, tree = jax.tree.flatten(tuple(primals))
    tangent_leaves = jax.tree.leaves(
        tuple(tangents), is_leaf=lambda t: isinstance(t, SymbolicZero)
    )
    moving = [i for i, t in enumerate(tangent_leaves) if _is_tangent(t)]

    def of_moving(*moving_leaves: Any) -> Any:
        every_leaf = list(leaves)
        for i, leaf in zip(moving, moving_leaves, strict=True):
            every_leaf[i] = leaf
        args = list(jax.tree.unflatten(tree, every_leaf))
        for position, value in zip(static_positions, static, strict=True):
            args.insert(position, value)
        out = f(*args)
        return [leaf for leaf in jax.tree.leaves(out) if _is_inexact(leaf)], out

    smooth_leaves, pullback, out = jax.vjp(
        of_moving, *(leaves[i] for i in moving), has_aux=True
    )
    out_leaves, out_tree = jax.tree.flatten(out)
    smooth = [i for i, leaf in enumerate(out_leaves) if _is_inexact(leaf)]
    if not moving or not smooth:
        return out, jax.tree.map(_zero_tangent, out)
    for i, leaf in zip(smooth, smooth_leaves, strict=True):
        out_leaves[i] = leaf
    out = jax.tree.unflatten(out_tree, out_leaves)

    out_tangents = [_zero_tangent(leaf) for leaf in out_leaves]
    examples = [out_leaves[i] for i in smooth]
    pushed = pushed_forward(pullback, examples, [tangent_leaves[i] for i in moving])
    for i, tangent in zip(smooth, pushed, strict=True):
        out_tangents[i] = tangent
    return out, jax.tree.unflatten(out_tree, out_tangents)


def pushed_forward(pullback: Any, examples: list[Any], tangents: list[Any]) -> Any:
    """The transpose of a pullback, which takes a list of cotangents like the examples.

    The pullback is a pytree, whose leaves are its residuals, as that of `jax.vjp` is.
    """
    residuals, tree = jax.tree.flatten(pullback)

    def pull(*leaves: Any) -> list[Any]:
        residuals, cotangents = _split(leaves, tree.num_leaves)
        return list(tree.unflatten(residuals)(cotangents))

    types = [jax.typeof(leaf) for leaf in (*residuals, *examples)]
    pull = _traced(pull, types)
    return _push.bind(*residuals, *tangents, pull=pull, count=len(residuals))


def _traced(f: Callable[..., list[Any]], types: Sequence[Any]) -> Any:
    """The jaxpr of f, without what its results do not need."""
    closed = jax.jit(f).trace(*types).jaxpr
    everything = [True] * len(closed.out_avals)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, everything, instantiate=True)
    return closed.replace(jaxpr=jaxpr)


# (residuals, tangents) -> tangents of the result, with the jaxpr of the pullback, which
# takes (residuals, cotangents of the result). The residuals are the first `count`.
_push = Primitive("push")
_push.multiple_results = True


@_push.def_impl
def _pushed(*leaves: Any, pull: Any, count: int) -> list[Any]:
    residuals, tangents = _split(leaves, count)

    def of_residuals(*cotangents: Any) -> list[Any]:
        return jaxpr_as_fun(pull)(*residuals, *cotangents)

    return jax.linear_transpose(of_residuals, *pull.in_avals[count:])(tangents)


@_push.def_abstract_eval
def _pushed_types(*types: Any, pull: Any, count: int) -> list[Any]:
    return pull.in_avals[count:]


def _push_jvp(leaves: Any, dots: Any, *, pull: Any, count: int) -> Any:
    params = {"pull": pull, "count": count}
    results = _push.bind(*leaves, **params)
    residuals, tangents = _split(leaves, count)
    moving = [i for i, dot in enumerate(dots) if _moves(dot)]
    terms = []
    if any(i >= count for i in moving):
        dots_of_tangents = map(ad.instantiate_zeros, dots[count:])
        terms.append(_push.bind(*residuals, *dots_of_tangents, **params))
    moving = [i for i in moving if i < count]
    if moving:
        # Reverse mode would save what the transposition computes, the probabilities for
        # instance, in place of the residuals.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_moving(*some: Any) -> list[Any]:
            every = list(residuals)
            for i, leaf in zip(moving, some, strict=True):
                every[i] = leaf
            return _pushed(*every, *tangents, **params)

        some, dots = ([v[i] for i in moving] for v in (leaves, dots))
        terms.append(jax.jvp(of_moving, some, dots)[1])
    if not terms:
        return results, [ad.Zero(jax.typeof(v).to_tangent_aval()) for v in results]
    return results, [functools.reduce(jnp.add, parts) for parts in zip(*terms)]


def _push_transposed(cotangents: Any, *leaves: Any, pull: Any, count: int) -> Any:
    nothing = [None] * len(leaves)
    if all(type(c) is ad.Zero for c in cotangents):
        return nothing
    cotangents = map(ad.instantiate_zeros, cotangents)
    # As above, for who differentiates the backward pass.
    pulled = jax.checkpoint(jaxpr_as_fun(pull), prevent_cse=False)
    results = [None] * count + pulled(*leaves[:count], *cotangents)
    return [
        result if ad.is_undefined_primal(leaf) else None
        for leaf, result in zip(leaves, results)
    ]


def _push_batched(leaves: Any, dims: Any, *, pull: Any, count: int) -> Any:
    size = next(v.shape[d] for v, d in zip(leaves, dims) if d is not None)

    def spread(*some: Any) -> list[Any]:
        return [jnp.broadcast_to(v, (size, *v.shape)) for v in some]

    leaves = [v if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(leaves, dims)]
    residuals, tangents = _split(leaves, count)
    tangents = [
        v if d is not None else spread(v)[0]
        for v, d in zip(tangents, dims[count:], strict=True)
    ]
    examples = jax.jit(spread).trace(*pull.in_avals[count:]).jaxpr.out_avals
    axes = [None if d is None else 0 for d in dims[:count]]
    pull = jax.vmap(jaxpr_as_fun(pull), (*axes, *(0 for _ in examples)))
    pull = _traced(pull, [*map(jax.typeof, residuals), *examples])
    results = _push.bind(*residuals, *tangents, pull=pull, count=count)
    return results, [0] * len(results)


ad.primitive_jvps[_push] = _push_jvp
ad.primitive_transposes[_push] = _push_transposed
batching.primitive_batchers[_push] = _push_batched
mlir.register_lowering(_push, mlir.lower_fun(_pushed, multiple_results=True))


def _split(leaves: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    return list(leaves[:count]), list(leaves[count:])


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _moves(tangent: Any) -> bool:
    return type(tangent) is not ad.Zero and tangent.dtype != jax.dtypes.float0


def _is_tangent(leaf: Any) -> bool:
    return not isinstance(leaf, SymbolicZero) and _is_inexact(leaf)


def _zero_tangent(leaf: Any) -> Any:
    if _is_inexact(leaf):
        return jnp.zeros_like(leaf)
    # float0, and of the type that the leaf has inside `jax.shard_map`.
    return SymbolicZero(jax.typeof(leaf).to_tangent_aval())
