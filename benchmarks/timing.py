"""Contestants run in turn, in a random order, so that all meet the same noise."""

import random
import statistics
import time
from collections.abc import Mapping

from benchmarks.cells import Cell, Contestant

# The threads of some peers spin for a while after their work, and slow down the next.
PAUSE_SECONDS = 0.012
MOST_ROUNDS = 150
FEWEST_ROUNDS = 5
# A run after the pause wakes its threads, and is not counted; those that follow are, as
# many as there is time for. In a training loop no thread sleeps.
TURN_SECONDS = 4e-3
MOST_OF_A_TURN = 10


def medians(
    contestants: Mapping[str, Contestant], seconds: float, seed: int = 0
) -> dict[str, float]:
    """Median seconds of a run; as many as some seconds hold, after two to warm up."""
    shuffle = random.Random(seed)
    once = {name: [_timed(c), _timed(c)][1] for name, c in contestants.items()}
    slowest = max(once.values())
    counted = max(1, min(MOST_OF_A_TURN, int(TURN_SECONDS / slowest)))
    of_a_round = (counted + 1) * sum(once.values()) + PAUSE_SECONDS * len(once)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / of_a_round)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in shuffle.sample(list(contestants), len(contestants)):
            time.sleep(PAUSE_SECONDS)
            _timed(contestants[name])
            times[name] += [_timed(contestants[name]) for _ in range(counted)]
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(contestant: Contestant) -> float:
    start = time.perf_counter()
    contestant.run()
    return time.perf_counter() - start


def measured(cell: Cell, seconds: float) -> dict:
    """What the results file says of a cell."""
    contestants = cell.make()
    of = medians(contestants, seconds)
    peers = {name: value for name, value in of.items() if name != "jaxsoft"}
    fastest = min(peers, key=peers.__getitem__)
    compiled = {k: c for k, c in contestants.items() if c.compile_seconds is not None}
    return {
        "operation": cell.operation,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "milliseconds": {name: round(1e3 * v, 5) for name, v in of.items()},
        "fastest_peer": fastest,
        "times_the_fastest_peer": round(peers[fastest] / of["jaxsoft"], 3),
        "times": {name: round(v / of["jaxsoft"], 3) for name, v in peers.items()},
        "compile_seconds": {
            k: round(c.compile_seconds, 3) for k, c in compiled.items()
        },
        "temporary_bytes": {k: c.temporary_bytes for k, c in compiled.items()},
    }
