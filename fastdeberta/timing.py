"""Times that can be compared: every rival in one process, taking turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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
        device: "cuda" waits for the device after every call.
        turn: seconds of calls in a row that make a turn, at least one call; 0: one call. A turn
            of several opens with one that does not count: it finds the last rival's cache.
        rest: seconds of sleep before each turn, in which another engine's threads fall asleep.
        warm_up: call each function once before the first round.
    """

    def timed(function: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    last = {name: timed(function) if warm_up else math.inf for name, function in rivals.items()}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        rounds += 1
        for name, function in rivals.items():
            if rest:
                time.sleep(rest)
            if last[name] < turn / 2:
                timed(function)
            over = time.perf_counter() + turn
            while True:
                last[name] = timed(function)
                times[name].append(last[name] * 1e3)
                if time.perf_counter() + last[name] / 2 > over:
                    break
    return {name: statistics.median(values) for name, values in times.items()}
