"""Strict JAX, seeded numbers, and the measured figures at the end of a run."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from laws import FORMS, QUICKLY, THE_FORM

import jaxsoft

# `benchmarks` and `evidence` are beside the tests; a jaxsoft that is installed, or that
# lies in the current folder, comes first.
sys.path.append(str(Path(__file__).parent.parent))

# What is compiled for a few numbers need not be fast: laws.as_users_have_it is.
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(f"--{name}={str(value).lower()}" for name, value in QUICKLY.items()),
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# A library must work for users who have forbidden silent promotion and broadcasting.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, and none with a time limit: some compile a program.
COMMON = {"deadline": None, "database": None, "print_blob": True}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=60, **COMMON)
hypothesis.settings.register_profile("thorough", max_examples=3000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# JAX keeps every program, and all that it was made of. Python would look for garbage in
# it again and again, at last for ten seconds each time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_in_compiled_programs() -> Iterator[None]:
    yield
    gc.freeze()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251121)


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name == THE_FORM else pytest.mark.slow)
        for name in FORMS
    ]
)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """The form that the functions run in, for `laws.program` and for eager calls."""
    with FORMS[request.param]():
        yield request.param


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types inside the test. `jax.enable_x64` is public from JAX 0.8 on."""
    with jax.enable_x64(True):
        yield


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxsoft in {Path(jaxsoft.__file__).parent}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded with `record_property`, under xdist too."""
    measured = [
        (report.nodeid, report.user_properties)
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call" and report.user_properties
    ]
    if measured:
        terminalreporter.section("measured")
    for nodeid, properties in sorted(measured):
        terminalreporter.write_line(nodeid)
        for name, value in properties:
            terminalreporter.write_line(f"    {name}: {value}")
    totals: dict[str, int] = {}
    for _, properties in measured:
        for name, value in properties:
            if name.endswith(" without NaN"):
                totals[name] = totals.get(name, 0) + value
    for name, total in totals.items():
        terminalreporter.write_line(f"in all {total} {name}")
