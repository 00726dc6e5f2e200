"""The library of compiled kernels: found, compared with jaxlib, and registered."""

import ctypes
import functools
import re
import struct
import sys
import warnings
from pathlib import Path

import jax

NAMES = (
    "softmax",
    "log_softmax",
    "softmax_pull",
    "log_softmax_pull",
    "log_softmax_push",
    "to_classes",
    "to_rows",
    "summary",
)


@functools.cache
def is_loaded() -> bool:
    """Whether the kernels can be called; the first time, they are loaded.

    Without them everything runs in plain JAX. Where the file is not there, for want of
    a compiler, that is all; where it is there and of no use, a warning says so.
    """
    path = library_path()
    if path is None:
        return False
    try:
        _register(path)
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        warnings.warn(
            f"jaxsoft: the compiled CPU kernels in {path} are not used: {error}. Plain "
            "JAX runs in their place. To build them for this machine: pip install "
            "--force-reinstall --no-binary jaxsoft jaxsoft; to do without them and "
            "this warning: JAXSOFT_CPU_KERNELS=0",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def library_path() -> Path | None:
    """Beside this file, or where the build of an editable installation puts it."""
    for folder in sys.modules[__name__.rpartition(".")[0]].__path__:
        path = Path(folder) / "jaxsoft_kernels.so"
        if path.exists():
            return path
    return None


def _register(path: Path) -> None:
    if _is_cut_short(path):
        raise OSError("the file is incomplete")
    library = ctypes.CDLL(str(path))
    # JAX registers a library of newer headers without a word, and then raises in every
    # call, of other functions too. So the versions come first.
    ours, theirs = library.jaxsoft_ffi_version(), _version_of_jaxlib()
    if ours // 1000 != theirs // 1000 or ours > theirs:
        raise RuntimeError(
            f"they were built for version {ours} of XLA's foreign calls, and jaxlib "
            f"has version {theirs}"
        )
    handlers = {name: getattr(library, f"jaxsoft_{name}") for name in NAMES}
    for name, handler in handlers.items():
        capsule = jax.ffi.pycapsule(handler)
        jax.ffi.register_ffi_target(f"jaxsoft_{name}", capsule, platform="cpu")


def _is_cut_short(path: Path) -> bool:
    """Whether the end of an ELF file is missing. To load one would end the process."""
    content = path.read_bytes()
    if not content.startswith(b"\x7fELF\x02"):  # of 64 bits
        return False
    # Its last part is a table: where it is, and the size and number of its entries.
    (offset,) = struct.unpack_from("<Q", content.ljust(64, b"\0"), 0x28)
    size, count = struct.unpack_from("<HH", content.ljust(64, b"\0"), 0x3A)
    return len(content) < offset + size * count


def _version_of_jaxlib() -> int:
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", text)
        for part in ("MAJOR", "MINOR")
    )
    if major is None or minor is None:
        raise RuntimeError(f"{header} does not say which version jaxlib has")
    return 1000 * int(major[1]) + int(minor[1])
