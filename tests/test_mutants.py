"""The list of mutants keeps up with the package: `python -m evidence.mutants`."""

import ast
import collections

import pytest

from evidence import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_still_applies(mutant):
    assert mutants.occurrences(mutant) == 1
    assert mutant.new != mutant.old
    broken = mutants.text_of(mutant.module).replace(mutant.old, mutant.new)
    ast.parse(broken)
    assert (mutants.ROOT / "tests" / mutant.tests).exists()


def test_every_module_has_a_mutant():
    package = mutants.ROOT / "jaxsoft"
    paths = [p for p in package.rglob("*.py") if p.stem != "__init__"]
    modules = {p.relative_to(package).with_suffix("").as_posix() for p in paths}
    assert {mutant.module for mutant in mutants.MUTANTS} == modules
    names = collections.Counter(mutant.what for mutant in mutants.MUTANTS)
    assert max(names.values()) == 1
