"""Which form of the passes a CPU runs: asked for, and chosen for a block of code."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxsoft._passes.forms import cpu_form, on_cpu


def cpu_kernels() -> bool:
    """Whether a CPU runs the compiled kernels of this library, and not plain JAX.

    They are built with the package where there is a C++ compiler. Plain JAX computes
    the same, with a few digits less and in more time. Arrays that are split over
    devices run in plain JAX in any case, unless inside `jax.shard_map`. The environment
    variable ``JAXSOFT_CPU_KERNELS=0``, read when jaxsoft is imported, switches the
    kernels off, and `use_cpu_kernels` does so for a block.

    Args:
        None.

    Returns:
        True if what is traced here runs the kernels on a CPU; False if there are none
        or if they are switched off.

    Raises:
        Nothing. Kernels that cannot be used, of another version of jaxlib or for
        another processor, give a RuntimeWarning at the first call of any function.

    Example:
        >>> import jaxsoft
        >>> with jaxsoft.use_cpu_kernels(False):
        ...     jaxsoft.cpu_kernels()
        False
    """
    return on_cpu() == "native"


@contextmanager
def use_cpu_kernels(use: bool) -> Iterator[None]:
    """A block of code in which a CPU runs the compiled kernels, or plain JAX.

    What is traced inside keeps its choice where it is called outside; `jax.jit` traces
    a function anew where the choice is another. `jax.export` refuses to serialise
    compiled kernels for a CPU: export inside ``use_cpu_kernels(False)``. Programs for
    other platforms never have any.

    Args:
        use: True for the kernels, if they are there; False for plain JAX.

    Returns:
        A context manager.

    Raises:
        TypeError: ``use`` is not a bool.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxsoft
        >>> x = jax.ShapeDtypeStruct((8, 10), jnp.float32)
        >>> with jaxsoft.use_cpu_kernels(False):
        ...     exported = jax.export.export(jax.jit(jaxsoft.softmax))(x)
        >>> len(exported.serialize()) > 0
        True
    """
    if not isinstance(use, bool):
        raise TypeError(
            f"use_cpu_kernels: use must be a bool; got {type(use).__name__}"
        )
    with cpu_form("native" if use else "plain"):
        yield
