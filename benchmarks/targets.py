"""Accelerators that programs are compiled for on a machine without one.

The compilers are told what the device is; nothing is run. For a TPU the compiler is
libtpu. That for an NVIDIA GPU is 1.2 GB, and has an environment of its own.
"""

import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

NAMES = ("v5e", "h200")
INSTALL = {
    "v5e": "pip install libtpu",
    "h200": (
        f"pip install jax-cuda12-plugin=={jax.__version__} "
        f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12"
    ),
}
DEVICE_OF_A_GPU = Path(__file__).parent / "h200.txtpb"


class MissingCompilerError(Exception):
    """The compiler for a target is not installed; the message says how it is."""


def device(name: str) -> Any:
    """A device to compile for. To be called before JAX runs anything."""
    try:
        return (_gpu() if name == "h200" else tpu_topology("v5e:2x2")).devices[0]
    except Exception as error:
        raise MissingCompilerError(
            f"There is no compiler for {name} here. To install it: {INSTALL[name]}\n"
            f"JAX says: {error}"
        ) from error


def tpu_topology(name: str) -> Any:
    """TPUs of this name, to compile for. To be called before JAX runs anything."""
    # What libtpu would ask a machine that has one.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    jax.config.update("jax_platforms", "cpu")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def _gpu() -> Any:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # Kernels are chosen by timing them where there is a GPU, and by a model here.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {flags}"
    jax.config.update("jax_platforms", "")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x1",
        target_config=DEVICE_OF_A_GPU.read_text(),
    )


def argument(device: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array on the device."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
