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
    modules = {path.stem for path in (mutants.ROOT / "jaxsoft").glob("_*.py")}
    assert {mutant.module for mutant in mutants.MUTANTS} == modules - {"__init__"}
    names = collections.Counter(mutant.what for mutant in mutants.MUTANTS)
    assert max(names.values()) == 1
