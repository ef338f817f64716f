"""Times that can be compared: every rival in one process, taking turns."""

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
) -> dict[str, float]:
    """Median milliseconds of each function, called in turn for about `seconds` in all.

    Args:
        rivals: functions without arguments. least: rounds to run at least, after one warm-up.
        device: "cuda" waits for the device after every call.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for function in rivals.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, function in rivals.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}
