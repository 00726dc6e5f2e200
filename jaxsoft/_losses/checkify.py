"""A check of values that `jax.experimental.checkify` makes, and nothing else sees.

`checkify.debug_check` compiles to nothing, but is an effect of the function around it.
JAX then calls a jitted function by way of Python, in 184 us in place of 18, and does
not serialize what `jax.export` makes of it. So the check is inside an operation that
does nothing: checkify looks into every operation that says, by a `call_jaxpr`, that it
calls a function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Check = Callable[..., None]


def attach_check(check: Check, *arrays: Array) -> tuple[Array, ...]:
    """The arrays, which must be used: with them goes the check. check(*arrays) calls
    `checkify.debug_check`, and has the same to say of arrays with one more axis."""

    def checking(*arrays: Array) -> tuple[Array, ...]:
        check(*arrays)
        return arrays

    jaxpr = jax.make_jaxpr(checking)(*arrays)
    return tuple(_checked.bind(*arrays, call_jaxpr=jaxpr, check=check))


class _Checked(Primitive):
    multiple_results = True

    def bind(self, *arrays: Any, subfuns: tuple[Any, ...] = (), **params: Any) -> Any:
        if subfuns:  # from checkify, with the error before the arrays
            return subfuns[0].call_wrapped(*arrays)
        return super().bind(*arrays, **params)


_checked = _Checked("checked")
_checked.def_impl(lambda *arrays, **_: list(arrays))
_checked.def_abstract_eval(lambda *avals, **_: list(avals))
mlir.register_lowering(_checked, lambda context, *values, **_: values)


def _batched(arrays, dims, *, check, **_):
    arrays = [jnp.moveaxis(v, dim, 0) for v, dim in zip(arrays, dims, strict=True)]
    return attach_check(check, *arrays), [0] * len(arrays)


batching.primitive_batchers[_checked] = _batched
