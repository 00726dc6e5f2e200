"""The wheel that pip builds is the package of the checkout, and that alone."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

import jaxsoft

SOURCES = Path(__file__).parent.parent / "jaxsoft"


@pytest.mark.skipif(
    not sys.flags.safe_path,
    reason="the checkout is tested; with PYTHONSAFEPATH=1 it is the installed wheel",
)
def test_the_installed_wheel_is_tested_and_holds_the_package():
    site_packages = Path(jaxsoft.__file__).parent.parent
    assert site_packages.name == "site-packages"
    files = importlib.metadata.files("jaxsoft")
    assert files is not None
    assert {file.parts[0] for file in files} == {
        "jaxsoft",
        f"jaxsoft-{jaxsoft.__version__}.dist-info",
    }
    installed = {
        Path(file): file.read_binary()
        for file in files
        if file.parts[0] == "jaxsoft" and file.suffix not in (".pyc", ".so")
    }
    assert installed == {
        path.relative_to(SOURCES.parent): path.read_bytes()
        for path in SOURCES.rglob("*")
        if path.suffix in (".py", ".typed")
    }
