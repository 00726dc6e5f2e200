"""NaNs on the grid of awkward logits, masks and temperatures, beside the peers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evidence.grid import everything, nan_rows
from evidence.points import grid_arguments
from evidence.precision import jax_nn_indices, optax_indices
from evidence.tests import laws


def _at(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """t f(x / t): how one writes a temperature that a function does not have."""
    return lambda x, t: t * f(x / t)


# By law: other libraries' functions of its arguments, as far as they have them.
PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "logsumexp": {"jax.nn": lambda x: jax.nn.logsumexp(x, -1)},
    "logsumexp_options": {
        "jax.nn": lambda x, where, t: t[:, 0] * jax.nn.logsumexp(x / t, -1, where=where)
    },
    "logsumexp_weights": {
        "jax.nn": lambda x, b, t: t[:, 0] * jax.nn.logsumexp(x / t, -1, b=b)
    },
    "logmeanexp": {
        "jax.nn": lambda x, where, t: (
            t[:, 0] * jax.nn.logmeanexp(x / t, -1, where=where)
        )
    },
    "softmax": {"jax.nn": lambda x: jax.nn.softmax(x)},
    "softmax_options": {
        "jax.nn": lambda x, where, t: jax.nn.softmax(x / t, where=where)
    },
    "log_softmax": {"jax.nn": lambda x: jax.nn.log_softmax(x)},
    "log_softmax_options": {
        "jax.nn": lambda x, where, t: jax.nn.log_softmax(x / t, where=where)
    },
    "cross_entropy": {
        "jax.nn": jax_nn_indices,
        "optax": optax_indices,
    },
    "cross_entropy_probabilities": {"optax": optax.softmax_cross_entropy},
    "kl_divergence": {
        "optax": lambda x, target: optax.kl_divergence(
            jax.nn.log_softmax(x), jax.nn.softmax(target)
        )
    },
    "binary_cross_entropy": {"optax": optax.sigmoid_binary_cross_entropy},
    "softplus": {"jax.nn": _at(jax.nn.softplus)},
    "smooth_step": {"jax.nn": lambda x, t: jax.nn.sigmoid(x / t)},
    "smooth_sign": {"jax.nn": lambda x, t: jax.nn.tanh(x / t)},
    "smooth_maximum": {"jax.nn": lambda x, y, t: t * jnp.logaddexp(x / t, y / t)},
}


def counted(law: Any, call: Callable[..., Any], dtype: str) -> dict[str, Any]:
    """Rows, numbers, and NaNs in values, gradients and tangents; of all rows, and of
    those at temperature 1, which every library has."""
    given = grid_arguments(law, dtype)
    ordinary = np.ones(len(given[0]), bool)
    if "temperature" in law.kinds:
        t = np.asarray(given[law.kinds.index("temperature")])
        ordinary = t[:, 0] == 1
    nans = {"value": 0, "gradient": 0, "tangent": 0}
    of_rows = np.zeros(len(ordinary), bool)
    numbers = 0
    for what, result in jax.jit(everything(law, call))(given).items():
        nans[what.split()[0]] += int(np.isnan(np.asarray(result, np.float64)).sum())
        of_rows |= nan_rows(result)
        numbers += np.size(result)
    return {
        "rows": len(of_rows),
        "numbers": numbers,
        "nans": nans,
        "rows_with_nan": int(of_rows.sum()),
        "rows_at_temperature_1": int(ordinary.sum()),
        "of_them_with_nan": int((of_rows & ordinary).sum()),
    }


def measured(law: Any, dtype: str) -> list[dict[str, Any]]:
    """One entry for each library."""
    functions = {"jaxsoft": law.call, **PEERS.get(law.name, {})}
    head = {"law": law.name, "function": law.function, "dtype": dtype}
    # The peers promote dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return [
            {**head, "library": library, **counted(law, call, dtype)}
            for library, call in functions.items()
        ]


# Without a reduction, every row shows.
LAWS = [law for law in laws.LAWS if law.by_row]
