"""The shape of the package: who imports whom, what is public, what a docstring has."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsoft

PACKAGE = pathlib.Path(jaxsoft.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("_*.py") if path.stem != "__init__")

# A module imports only from lower levels.
LEVELS = {
    "_autodiff": 0,
    "_axes": 0,
    "_batching": 0,
    "_saturation": 0,
    "_straight_through": 0,
    "_cpu_sums": 1,
    "_lanes": 0,
    "_numerics": 1,
    "_checkify": 0,
    "_checks": 2,
    "_exp": 0,
    "_max_and_tail": 2,
    "_per_row": 2,
    "_elementwise": 3,
    "_one_pass": 3,
    "_logsumexp": 4,
    "_row_terms": 4,
    "_softmax": 4,
    "_binary": 5,
    "_cross_entropy": 5,
    "_kl_divergence": 5,
    "_linear_chunks": 2,
    "_linear_terms": 5,
    "_pair": 5,
    "_smooth_max": 5,
    "_softargmax": 5,
    "_linear_scalar": 6,
    "_smooth": 6,
    "_smooth_clip": 6,
    "_linear": 7,
    "_sharding": 8,
}


def imports_of(module: str) -> set[str]:
    """The full names that a module imports from."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module
            if node.module == "jaxsoft":
                names |= {f"jaxsoft.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module):
    assert module in LEVELS, "give the module a level"
    for name in imports_of(module):
        if name.split(".")[0] == "jaxsoft":
            imported = name.removeprefix("jaxsoft.")
            assert LEVELS[imported] < LEVELS[module], f"{module} imports {imported}"


@pytest.mark.parametrize("module", [*MODULES, "__init__"])
def test_nothing_but_public_jax_is_imported(module):
    allowed = {"jax", "jaxsoft", "numpy"} | sys.stdlib_module_names
    for name in imports_of(module):
        assert name.split(".")[0] in allowed, f"{module} imports {name}"
        assert "_src" not in name.split("."), f"{module} imports {name}"
    assert "jax._src" not in (PACKAGE / f"{module}.py").read_text()


def test_importing_needs_jax_alone():
    program = (
        "import sys, jaxsoft; "
        "heavy = {'optax', 'chex', 'flax', 'matplotlib', 'sklearn', 'mpmath'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.strip() == "[]"


def test_all_is_the_public_names():
    public = {
        name
        for name, value in vars(jaxsoft).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(jaxsoft.__all__)
    assert list(jaxsoft.__all__) == sorted(jaxsoft.__all__)
    for name in jaxsoft.__all__:
        assert getattr(jaxsoft, name).__module__.startswith("jaxsoft")


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


SECTIONS = ("Args", "Returns", "Raises", "Gradient", "Awkward values", "Example")
# A decorator has no values.
WITHOUT_AWKWARD_VALUES = {"with_jvp"}
PUBLIC_FUNCTIONS = [
    name
    for name in jaxsoft.__all__
    if not hasattr(getattr(jaxsoft, name), "_fields")  # a named tuple is a result
]


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_a_docstring_has_all_sections_in_order(name):
    doc = inspect.getdoc(getattr(jaxsoft, name))
    assert doc
    first_line, blank = doc.splitlines()[:2]
    assert first_line.endswith(".")
    assert blank == ""
    wanted = [
        section
        for section in SECTIONS
        if section != "Awkward values" or name not in WITHOUT_AWKWARD_VALUES
    ]
    found = [
        line.rstrip(":")
        for line in doc.splitlines()
        if line.rstrip(":") in SECTIONS and line.endswith(":")
    ]
    assert found == wanted
    assert ">>> " in doc[doc.index("\nExample:") :]


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_every_argument_is_in_the_docstring(name):
    function = getattr(jaxsoft, name)
    doc = inspect.getdoc(function)
    assert doc
    arguments = doc[doc.index("\nArgs:") : doc.index("\nReturns:")]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", arguments), parameter
