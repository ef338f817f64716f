"""Rivals against ours: the same work, checked once, timed in turns, and reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdeberta.timing import interleaved

OURS = "fastdeberta"


@dataclass(frozen=True)
class Rival:
    """What is timed.

    call: does the work once; returns a tensor, or a tuple of tensors and None.
    same: it computes what ours computes, and is checked; otherwise it does other work.
    """

    call: Callable[[], Any]
    same: bool = True


# Makes a rival, or raises with the reason why there is none.
Maker = Callable[[], Rival]


class Out(Exception):
    """A rival is left out for a reason of ours, not of its own."""


def gather(
    makers: Mapping[str, Maker], device: str = "cpu"
) -> tuple[dict[str, Rival], dict[str, Any], dict[str, str]]:
    """Rivals by name, what each computed, and the reasons of those that are absent or refuse.

    Ours must work: its errors are raised.
    """
    rivals, results, left_out = {}, {}, {}
    for name, make in makers.items():
        try:
            rival = make()
            result = waiting(rival.call, device)()
        except Exception as error:  # A peer may raise anything.
            if name == OURS:
                raise
            left_out[name] = _reason(error)
        else:
            rivals[name], results[name] = rival, result
    return rivals, results, left_out


def waiting(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same call, which returns when the device is done."""
    if device == "cpu":
        return call

    def call_and_wait() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return call_and_wait


def errors(rivals: Mapping[str, Rival], results: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference of `same` rivals' results from ours, relative to our largest value."""
    ours = _tensors(results[OURS])
    found = {}
    for name, rival in rivals.items():
        if name == OURS or not rival.same:
            continue
        theirs = _tensors(results[name])
        assert [x.shape for x in theirs] == [x.shape for x in ours], f"{name}: other shapes"
        found[name] = max(
            float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30))
            for a, b in zip(theirs, ours, strict=True)
        )
    return found


def run(
    benchmark: Any,
    makers: Mapping[str, Maker],
    *,
    tolerance: float,
    device: str = "cpu",
    alone: bool = False,
    **times: float,
) -> dict[str, float]:
    """Checks and times every rival, and writes all of it to `benchmark.extra_info`.

    Args:
        makers: of ours (named OURS) and the rivals.
        tolerance: largest relative difference of results that counts as the same work. On a GPU,
            where rivals add up in half precision and atomically, one that errs more is reported
            so, as long as another agrees with ours.
        device: "cpu" or "cuda".
        alone: time each rival without the others too.
        times: of `interleaved`.

    Returns:
        Median milliseconds by name.
    """
    rivals, results, left_out = gather(makers, device)
    differences = errors(rivals, results)
    del results
    wrong = {name: error for name, error in differences.items() if not error <= tolerance}
    outvoted = bool(wrong) and (device == "cpu" or len(wrong) == len(differences))
    assert not outvoted, f"not the same results as ours, largest relative difference: {wrong}"
    calls = {name: rival.call for name, rival in rivals.items()}
    times = {**times, "device": device}
    medians = interleaved(calls, warm_up=False, **times)
    record(benchmark, medians, left_out=left_out, difference=_rounded(differences))
    if wrong:
        benchmark.extra_info["differs"] = _rounded(wrong)
    if alone:
        # Each for the share of time that it had among the others.
        share = {**times, "seconds": times["seconds"] / len(calls)}
        solo = {name: interleaved({name: call}, **share)[name] for name, call in calls.items()}
        benchmark.extra_info["interleaved_over_alone"] = {
            name: round(medians[name] / solo[name], 3) for name in calls
        }
    benchmark.pedantic(waiting(calls[OURS], device), rounds=3 if medians[OURS] < 1e3 else 1)
    return medians


def record(
    benchmark: Any, values: Mapping[str, float], unit: str = "ms", ours: str = OURS, **more: Any
) -> None:
    """Writes values (less is better) and their ratios to ours for report.py."""
    info = benchmark.extra_info
    info |= {"unit": unit, "ours": ours, "values": _rounded(values)}
    info["ratio_to_ours"] = {k: round(v / values[ours], 3) for k, v in values.items()}
    info |= more


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, Out) else f"{type(error).__name__}: {text}"[:300]
