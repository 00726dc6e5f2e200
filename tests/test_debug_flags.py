"""JAX's flags that look for NaN and infinities raise at none that no result has, and
that for leaked tracers finds none.

With jit they look at the results of compiled functions, without it at every step.
Strict promotion of dtypes and ranks is on in all tests (`conftest`).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from laws import Law, every_law, problem, quickly, value_and_pullback

MODES: dict[str, tuple[Callable[..., Any], ...]] = {
    "nans": (jax.debug_nans,),
    "nans, without jit": (jax.debug_nans, jax.disable_jit),
    "infs": (jax.debug_infs,),
    "leaks": (jax.checking_leaks,),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@every_law
def test_flags_raise_at_nothing(law: Law, mode):
    given, _, cotangent = problem(law)
    of = value_and_pullback(law)
    results = jax.tree.leaves(quickly(of)(given, cotangent))
    look_for = np.isinf if mode == "infs" else np.isnan
    if any(np.any(look_for(np.asarray(v))) for v in results):
        assert mode == "infs", f"{law.name}: NaN in a result"
        return  # the infinities of the function itself, as of log 0
    with contextlib.ExitStack() as stack:
        for flag in MODES[mode]:
            stack.enter_context(flag() if flag is jax.checking_leaks else flag(True))
        (of if jax.disable_jit in MODES[mode] else jax.jit(of))(given, cotangent)
