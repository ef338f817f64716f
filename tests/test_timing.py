"""Rivals take turns, and the median counts."""

import pytest
import torch

from fastdeberta import timing


class Clock:
    """Time passes only where a rival lets it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def rival(self, calls, name, *seconds):
        """A function that takes `seconds`, one after another, then the last again and again."""
        left = list(seconds)

        def function():
            calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return function


def test_interleaved(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "time", clock)
    rivals = {
        "a": clock.rival(calls, "a", 9.0, 0.5, 0.002, 0.001),  # A slow warm-up and one outlier.
        "b": clock.rival(calls, "b", 0.003),
    }
    medians = timing.interleaved(rivals, seconds=0.0, least=5)
    assert calls == ["a", "b"] * 6
    assert medians == pytest.approx({"a": 1.0, "b": 3.0})


def test_seconds_are_for_all(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "time", clock)
    timing.interleaved({"a": clock.rival(calls, "a", 0.1)}, seconds=0.95, least=1)
    assert len(calls) == 1 + 10


def test_turns(monkeypatch):
    """A turn of several calls opens with one that does not count; a long call is a turn."""
    clock, calls = Clock(), []
    clock.sleep = lambda seconds: calls.append("rest")
    monkeypatch.setattr(timing, "time", clock)
    rivals = {"a": clock.rival(calls, "a", 0.1), "b": clock.rival(calls, "b", 2.0)}
    medians = timing.interleaved(rivals, seconds=0.0, least=2, turn=0.3, rest=0.05)
    assert calls == ["a", "b"] + 2 * ["rest", *4 * ["a"], "rest", "b"]
    assert medians == pytest.approx({"a": 100.0, "b": 2000.0})


class Stream:
    """A device that works through its queue; only waiting for it brings the host up to its time."""

    def __init__(self, clock):
        self.clock, self.busy_until = clock, 0.0

    def launch(self, calls, name, host, device):
        """A function that takes the host `host` seconds to queue `device` seconds of work."""

        def function():
            calls.append(name)
            self.clock.now += host
            self.busy_until = max(self.busy_until, self.clock.now) + device

        return function

    def synchronize(self):
        self.clock.now = max(self.clock.now, self.busy_until)

    def event(self, enable_timing):
        assert enable_timing
        stream = self

        class Event:
            def record(self):
                self.time = max(stream.busy_until, stream.clock.now)

            def elapsed_time(self, end):
                return (end.time - self.time) * 1e3

        return Event()


@pytest.mark.parametrize(
    "host, device, expected",
    [(0.001, 0.004, 4.0), (0.004, 0.001, 4.0)],
    ids=["device is slower", "launching is slower"],
)
def test_calls_on_cuda_queue_up(monkeypatch, host, device, expected):
    """A call takes the longer of both; the first of a turn, on an idle device, does not count."""
    clock, calls = Clock(), []
    stream = Stream(clock)
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", stream.synchronize)
    rivals = {
        "a": stream.launch(calls, "a", host, device),
        "b": stream.launch(calls, "b", host, 10.0),
    }
    medians = timing.interleaved(rivals, seconds=0.0, least=2, device="cuda", turn=0.041)
    warm_up = [*"aa", *"bb"]
    assert calls == warm_up + 2 * [*(1 + 10) * "a", *"bb"]
    assert medians == pytest.approx({"a": expected, "b": 1e4})
