"""What is printed in a docstring or in the README is what the code prints."""

import doctest
import pathlib

import jax
import pytest

import jaxsoft

README = pathlib.Path(jaxsoft.__file__).parent.parent / "README.md"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run(test: doctest.DocTest) -> doctest.TestResults:
    """With JAX as a reader has it: these examples are not for the strict."""
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = runner.run(test, out=output.append)
    assert results.failed == 0, "".join(output)
    return results


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in jaxsoft.__all__
        if not hasattr(getattr(jaxsoft, name), "_fields")  # a named tuple is a result
    ],
)
def test_docstring(name):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(getattr(jaxsoft, name), name, globs={})
    assert run(test).attempted > 0


@pytest.mark.skipif(not README.exists(), reason="not in a checkout")
def test_readme():
    """Its `>>>` blocks, in one session from top to bottom."""
    text = README.read_text()
    # The closing fence of a code block is no output.
    text = "\n".join(
        "" if line.startswith("```") else line for line in text.splitlines()
    )
    test = doctest.DocTestParser().get_doctest(text, {}, "README", str(README), 0)
    assert run(test).attempted > 0
