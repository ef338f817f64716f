"""Times that can be compared: every rival in one process, taking turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Calls of a turn on a GPU, at most.
_LONGEST_QUEUE = 100


def interleaved(
    rivals: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    least: int = 5,
    device: str = "cpu",
    turn: float = 0.0,
    rest: float = 0.0,
    warm_up: bool = True,
) -> dict[str, float]:
    """Median milliseconds of each function, called in turn for about `seconds` in all.

    Args:
        rivals: functions without arguments. least: rounds to run at least.
        device: "cuda" makes each turn a queue of calls on the current stream, timed by the device;
            its mean is one value. That is the longer of what a call takes there and of what the
            host takes to launch it, as in a model whose layers follow each other.
        turn: seconds of calls in a row that make a turn, at least one call; 0: one call. A turn
            of several opens with one that does not count: it finds the last rival's cache. On
            "cuda" every turn opens so, since that call finds an idle device too.
        rest: seconds of sleep before each turn, in which another engine's threads fall asleep.
        warm_up: call each function before the first round.
    """
    take_turn = _queued if torch.device(device).type == "cuda" else _one_by_one

    last = {
        name: take_turn(function, math.inf, 0.0)[-1] if warm_up else math.inf
        for name, function in rivals.items()
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        rounds += 1
        for name, function in rivals.items():
            if rest:
                time.sleep(rest)
            taken = take_turn(function, last[name], turn)
            times[name] += taken
            last[name] = taken[-1]
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def _one_by_one(function: Callable[[], Any], last: float, turn: float) -> list[float]:
    """Seconds of each call of a turn; `last` is what a call took before."""
    if last < turn / 2:
        function()
    taken, over = [], time.perf_counter() + turn
    while True:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
        if time.perf_counter() + taken[-1] / 2 > over:
            return taken


def _queued(function: Callable[[], Any], last: float, turn: float) -> list[float]:
    """Mean seconds of a turn's calls, queued behind one that does not count."""
    calls = max(1, min(_LONGEST_QUEUE, int(turn / max(last, 1e-9))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    function()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 / calls]
