"""When a CPU runs the compiled kernels: the switch, the library; and their labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from jaxsoft._core.logits import Logits
from jaxsoft._core.mesh import Axes
from jaxsoft._passes import library
from jaxsoft._passes.summary import Riders, summarize

pytestmark = pytest.mark.skipif(not library.is_loaded(), reason="no kernels were built")


def test_the_switch_decides_what_is_lowered():
    of_x, x = jax.jit(jaxsoft.softmax), jnp.ones((4, 8))
    for use in (True, False, True):
        with jaxsoft.use_cpu_kernels(use):
            assert jaxsoft.cpu_kernels() is use
            assert ("@jaxsoft_softmax" in of_x.lower(x).as_text()) is use


@pytest.mark.parametrize("version", [0, 1000 * 1000])
def test_a_library_of_another_version_is_not_registered(version, monkeypatch):
    """It would fail every call of JAX, of other functions too."""
    monkeypatch.setattr(library, "_version_of_jaxlib", lambda: version)
    with pytest.warns(RuntimeWarning, match=f"jaxlib has version {version}"):
        assert not library.is_loaded.__wrapped__()


@pytest.mark.usefixtures("x64")
def test_a_label_beyond_32_bits_is_no_class():
    riders = Riders(labels=jnp.array([[2**32], [-1], [4], [3]]))
    with jaxsoft.use_cpu_kernels(True), jax.numpy_dtype_promotion("standard"):
        summary = summarize(Axes((1,)), Logits(jnp.ones((4, 4), jnp.float32)), riders)
    np.testing.assert_array_equal(summary.logit[:, 0], [0, 0, 0, 1])
