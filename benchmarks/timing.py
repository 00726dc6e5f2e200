"""Contestants run in turn, in a random order, so that all meet the same noise."""

import random
import statistics
import time
from collections.abc import Mapping

from benchmarks.cells import Cell, Contestant

# The threads of some peers spin for a while after their work, and slow down the next.
PAUSE_SECONDS = 0.02


def medians(
    contestants: Mapping[str, Contestant], rounds: int, seed: int = 0
) -> dict[str, float]:
    """Median seconds of a run, after two that warm up."""
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-2, rounds):
        for name in order.sample(list(contestants), len(contestants)):
            contestant = contestants[name]
            contestant.prepare()
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            contestant.run()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measured(cell: Cell, rounds: int) -> dict:
    """What the results file says of a cell."""
    seconds = medians(cell.contestants, rounds)
    peers = {
        name: value
        for name, value in seconds.items()
        if not name.startswith(("jaxsoft", "floor"))
    }
    fastest = min(peers, key=peers.__getitem__)
    return {
        "operation": cell.operation,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "milliseconds": {name: round(1e3 * v, 5) for name, v in seconds.items()},
        "fastest_peer": fastest,
        "times_the_fastest_peer": round(peers[fastest] / seconds["jaxsoft"], 3),
        "times_the_floor": round(seconds["jaxsoft"] / seconds["floor"], 2),
        "compiled": {
            name: compiled_facts(contestant)
            for name, contestant in cell.contestants.items()
            if contestant.compiled is not None
        },
    }


def compiled_facts(contestant: Contestant) -> dict[str, float]:
    costs = contestant.compiled.cost_analysis() or {}
    memory = contestant.compiled.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": costs.get("bytes accessed"),
        "flops": costs.get("flops"),
    }
