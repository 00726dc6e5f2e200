"""straight_through: the value of one function with the derivative of another.

Written as hard + (soft - stop_gradient(soft)), as it often is, the value is off by the
rounding of soft, NaN where soft is infinite, and pays for soft where nothing is
differentiated. A rule has none of this.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

P = ParamSpec("P")
R = TypeVar("R")


def straight_through(hard: Callable[P, R], soft: Callable[..., Any]) -> Callable[P, R]:
    """The function with the value of ``hard`` and the derivatives of ``soft``.

    ``y = hard(*args)`` and ``dy = d soft(*args)``: the straight-through estimator, for
    a hard function whose own derivative is 0 or does not exist.

    Args:
        hard: function of any arguments, with arrays or pytrees of arrays as results. It
            need not be differentiable.
        soft: function of the same arguments. Its results have the tree structure, the
            shapes and the dtypes of those of ``hard``.

    Returns:
        A function of the same arguments. Its values are those of ``hard``, bit for bit.
        Nothing of ``soft`` is computed unless the function is differentiated.

    Raises:
        TypeError: ``hard`` or ``soft`` is not callable; at a call, their results differ
            in tree structure or dtype.
        ValueError: at a call, their results differ in shape.

    Gradient:
        That of ``soft``, in both modes and to all orders; also in arrays that ``soft``
        closes over. What JAX saves for ``soft`` alone is saved. ``hard`` is never
        differentiated.

    Edge cases:
        Infinite and NaN values of ``hard`` pass unchanged. Both functions are traced at
        each call, as by `jax.jit`: they cannot branch on the values of arrays, and a
        call in a loop belongs inside `jax.jit`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> def hard(x):
        ...     return jax.nn.one_hot(jnp.argmax(x), 3)
        >>> one_hot = jaxsoft.straight_through(hard, jaxsoft.softmax)
        >>> x = jnp.array([1.0, 3.0, 2.0])
        >>> print(one_hot(x))
        [0. 1. 0.]
        >>> print(jax.grad(lambda x: one_hot(x)[1])(x).round(4))
        [-0.0599  0.2227 -0.1628]

    References:
        Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating gradients
        through stochastic neurons for conditional computation", arXiv:1308.3432 (2013).
    """
    for name, function in (("hard", hard), ("soft", soft)):
        if not callable(function):
            raise TypeError(
                f"straight_through: {name} must be a function; "
                f"got {type(function).__name__}"
            )

    @functools.wraps(hard)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        run_hard, hard_inputs, results = _traced(lambda: hard(*args, **kwargs))
        run_soft, soft_inputs, soft_results = _traced(lambda: soft(*args, **kwargs))
        _check_same_results(results, soft_results)
        leaves = _with_tangent_of(run_hard, run_soft, hard_inputs, soft_inputs)
        return jax.tree.unflatten(jax.tree.structure(results), leaves)

    return call


def _traced(thunk: Callable[[], Any]) -> tuple[Callable[..., Any], list[Any], Any]:
    """The thunk as a function of every array that it reads, these arrays, and the
    shapes of its results. A custom_jvp function cannot be differentiated in what it
    closes over: here nothing is left to close over."""
    traced, results = jax.make_jaxpr(thunk, return_shape=True)()

    def run(*arrays):
        return jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, arrays))()

    return run, traced.consts, results


def _check_same_results(hard: Any, soft: Any) -> None:
    trees = jax.tree.structure(hard), jax.tree.structure(soft)
    if trees[0] != trees[1]:
        raise TypeError(
            "straight_through: hard and soft must return the same tree; "
            f"got {trees[0]} and {trees[1]}"
        )
    for one, other in zip(jax.tree.leaves(hard), jax.tree.leaves(soft), strict=True):
        if one.shape != other.shape:
            raise ValueError(
                "straight_through: hard and soft must return the same shapes; "
                f"got {one.shape} and {other.shape}"
            )
        if one.dtype != other.dtype:
            raise TypeError(
                "straight_through: hard and soft must return the same dtypes; "
                f"got {one.dtype} and {other.dtype}"
            )


def _with_tangent_of(run_hard, run_soft, hard_arrays, soft_arrays):
    @jax.custom_jvp
    def value(hard_arrays, soft_arrays):
        return run_hard(*hard_arrays)

    @functools.partial(value.defjvp, symbolic_zeros=True)
    def rule(primals, tangents):
        arrays, array_dots = primals[1], tangents[1]
        moving = [i for i, t in enumerate(array_dots) if _is_tangent(t)]

        def of_moving(*moving_arrays):
            every_array = list(arrays)
            for i, array in zip(moving, moving_arrays, strict=True):
                every_array[i] = array
            return run_soft(*every_array)

        _, out_dot = jax.jvp(
            of_moving, [arrays[i] for i in moving], [array_dots[i] for i in moving]
        )
        return value(*primals), out_dot

    return value(hard_arrays, soft_arrays)


def _is_tangent(t: Any) -> bool:
    return not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0
