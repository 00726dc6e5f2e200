"""Strict JAX, seeded numbers, the cases of a short run, and the measured figures at the
end of it.

Without a path, pytest runs a part of all cases, in ten minutes on two cores: none that
is marked slow, and of the others the first of every test and one in eight. With
`--left-out` it runs the rest; with a path, as in `pytest tests`, all that is there.
"""

import argparse
import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

import jaxsoft

# `benchmarks` and `evidence` are beside the tests; a jaxsoft that is installed, or that
# lies in the current folder, comes first.
sys.path.append(str(Path(__file__).parent.parent))

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


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types inside the test. `jax.enable_x64` is public from JAX 0.8 on."""
    with jax.enable_x64(True):
        yield


LEFT_OUT = "--left-out"
ONE_CASE_IN = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        LEFT_OUT, action="store_true", help="run what a run without a path leaves out"
    )
    parser.addoption("--without-a-path", action="store_true", help=argparse.SUPPRESS)


def pytest_configure(config: pytest.Config) -> None:
    # A worker of xdist gets this option, and paths in any case.
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        config.option.without_a_path = True


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not config.option.without_a_path:
        return
    tests_seen: set[str] = set()
    parts: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        is_chosen = False
        if item.get_closest_marker("slow") is None:
            test = item.nodeid.split("[")[0]
            # By name: the cases of a test are in the order of their parameters.
            is_chosen = zlib.crc32(item.nodeid.encode()) % ONE_CASE_IN == 0
            is_chosen |= test not in tests_seen
            tests_seen.add(test)
        parts[is_chosen].append(item)
    left_out = config.getoption(LEFT_OUT)
    items[:] = parts[not left_out]
    config.hook.pytest_deselected(items=parts[left_out])


def pytest_report_header(config: pytest.Config) -> list[str]:
    header = [f"jax {jax.__version__}, jaxsoft in {Path(jaxsoft.__file__).parent}"]
    if config.option.without_a_path:
        left_out = config.getoption(LEFT_OUT)
        what = "the cases left out of" if left_out else "a part of all cases, for"
        header.append(f"{what} a short run; with {LEFT_OUT} the rest, with a path all")
    return header


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
