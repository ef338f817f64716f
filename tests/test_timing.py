"""Rivals take turns, and the median counts."""

import pytest

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
