"""`with_jvp`: forward mode for a function whose rule is a `jax.custom_vjp`.

JAX refuses to push a tangent through a `custom_vjp` function, because its rule says
only how to pull a cotangent back. That rule is enough. Let J be the jacobian of f at
x, and let the pullback be ct -> J^T ct. It is linear in ct, so JAX can transpose it:

    t -> (J^T)^T t = J t,

which is the forward derivative. `with_jvp` gives f a `custom_jvp` rule that does
exactly this. Reverse mode then transposes once more, and arrives at J^T, the rule that
was written by hand.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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

    def pull(*cotangents: Any) -> Any:
        return pullback(list(cotangents))

    # Without the checkpoint, reverse mode would save what the transposition computes,
    # the probabilities for instance, in place of the rule's residuals.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def push(*moving_tangents: Any) -> Any:
        examples = [out_leaves[i] for i in smooth]
        return jax.linear_transpose(pull, *examples)(moving_tangents)

    out_tangents = [_zero_tangent(leaf) for leaf in out_leaves]
    pushed = push(*(tangent_leaves[i] for i in moving))
    for i, tangent in zip(smooth, pushed, strict=True):
        out_tangents[i] = tangent
    return out, jax.tree.unflatten(out_tree, out_tangents)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _is_tangent(leaf: Any) -> bool:
    return not isinstance(leaf, SymbolicZero) and _is_inexact(leaf)


def _zero_tangent(leaf: Any) -> Any:
    if _is_inexact(leaf):
        return jnp.zeros_like(leaf)
    # float0, and of the type that the leaf has inside `jax.shard_map`.
    return SymbolicZero(jax.typeof(leaf).to_tangent_aval())
