"""Where stored numbers come from: command, commit, machine and versions."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax


def provenance(
    module: str, arguments: Sequence[str], packages: Sequence[str]
) -> dict[str, Any]:
    """Command, commit and versions, None of a package that is not there."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join([f"python -m {module}", *arguments]),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
    }


def machine() -> dict[str, str]:
    """What ran the programs."""
    return {
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
