"""The shape of the package: who imports whom, what is public, what a docstring has."""

import ast
import graphlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsoft

PACKAGE = pathlib.Path(jaxsoft.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
)

# A folder or file imports only from those before it, and a file from others in its
# own folder, but in no circle.
ROOMS = (
    "_core",
    "_autodiff",
    "_passes",
    "_hints",
    "_checks",
    "_row",
    "_elementwise",
    "_grouped",
    "_logsumexp",
    "_softmax",
    "_prefix",
    "_segments",
    "_losses",
    "_smooth",
    "_gumbel",
    "_linear",
    "_sharding",
    "__init__",
)


def imports_of(module: str) -> set[str]:
    """The full names of the modules that a module imports from."""
    names = set()
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {f"jaxsoft.{m}" for m in MODULES}
            names |= (imported & modules) or {node.module}
    return names


def own_imports_of(module: str) -> set[str]:
    names = imports_of(module)
    return {n.removeprefix("jaxsoft.") for n in names if n.startswith("jaxsoft.")}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_from_those_below_it(module):
    room = module.split(".")[0]
    assert room in ROOMS, "give the folder or file a place among the rooms"
    for imported in own_imports_of(module):
        other = imported.split(".")[0]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle():
    imports = {module: own_imports_of(module) for module in MODULES}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_nothing_but_public_jax_is_imported(module):
    allowed = {"jax", "jaxsoft", "numpy"} | sys.stdlib_module_names
    for name in imports_of(module):
        assert name.split(".")[0] in allowed, f"{module} imports {name}"
        assert "_src" not in name.split("."), f"{module} imports {name}"
    assert "jax._src" not in (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


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


SECTIONS = ("Args", "Returns", "Raises", "Gradient", "Edge cases", "Example")
# A decorator has no values, and a switch no derivative either.
WITHOUT = {
    "with_jvp": {"Edge cases"},
    "cpu_kernels": {"Edge cases", "Gradient"},
    "use_cpu_kernels": {"Edge cases", "Gradient"},
}
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
    wanted = [s for s in SECTIONS if s not in WITHOUT.get(name, ())]
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
