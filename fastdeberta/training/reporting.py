"""What a run says: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from ..files import write_atomically

METRICS = "metrics.jsonl"


class MetricsFile:
    """metrics.jsonl: one object a logged step, each a function of the data and the seed alone.

    Times are not in it, so that an interrupted and resumed run leaves the same bytes as an
    uninterrupted one.
    """

    def __init__(self, output: Path, step: int):
        """Opens the file for appending after dropping every line beyond `step`."""
        self.path = output / METRICS
        lines = read_metrics(self.path)
        kept = "".join(_line(values) for values in lines if values["step"] <= step)
        write_atomically(self.path, kept)
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._stream.write(_line({"step": step, **values}))
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return values


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


class Events:
    """TensorBoard events under output/tensorboard; nothing where TensorBoard is not installed."""

    def __init__(self, output: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
            return
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Log:
    """A run's metrics.jsonl and TensorBoard events; where not `main`, nothing is written."""

    def __init__(self, output: Path, step: int, main: bool):
        self._metrics = MetricsFile(output, step) if main else None
        self._events = Events(output, step) if main else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Values that are functions of the data and the seed."""
        if self._metrics is not None:
            self._metrics.write(step, values)
        self.watch(step, values)

    def watch(self, step: int, values: dict[str, Any]) -> None:
        """Values that depend on time: events only."""
        if self._events is not None:
            self._events.write(step, values)

    def close(self) -> None:
        for part in (self._metrics, self._events):
            if part is not None:
                part.close()


class Progress(Protocol):
    """Follows a long task step by step; `say` prints a line that stays."""

    def start(self, title: str, step: int, steps: int) -> None: ...

    def update(self, step: int, note: str) -> None: ...

    def say(self, line: str) -> None: ...

    def stop(self) -> None: ...


class PlainProgress:
    """Lines on a stream, at most one every `interval` seconds."""

    def __init__(self, interval: float = 10.0):
        self.interval = interval

    def start(self, title: str, step: int, steps: int) -> None:
        self._title, self._first, self._steps = title, step, steps
        self._started = self._said = time.monotonic()

    def update(self, step: int, note: str) -> None:
        now = time.monotonic()
        if now - self._said < self.interval and step < self._steps:
            return
        self._said = now
        rate = (step - self._first) / max(now - self._started, 1e-9)
        left = (self._steps - step) / max(rate, 1e-9)
        self.say(f"{self._title} {step}/{self._steps}  {rate:.1f}/s  {_clock(left)} left  {note}")

    def say(self, line: str) -> None:
        print(line, flush=True)

    def stop(self) -> None:
        pass


class BarProgress:
    """A rich progress bar: step, rate, time left, loss."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console()

    def start(self, title: str, step: int, steps: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f}/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._first, self._started = step, time.monotonic()
        self._task = self._bar.add_task(title, total=steps, completed=step, rate=0.0, note="")
        self._bar.start()

    def update(self, step: int, note: str) -> None:
        rate = (step - self._first) / max(time.monotonic() - self._started, 1e-9)
        self._bar.update(self._task, completed=step, rate=rate, note=note)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()


class NoProgress:
    """Says nothing."""

    def start(self, title: str, step: int, steps: int) -> None:
        pass

    def update(self, step: int, note: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def stop(self) -> None:
        pass


def default_progress() -> Progress:
    """A bar on a terminal, plain lines elsewhere."""
    return BarProgress() if sys.stdout.isatty() else PlainProgress()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes}:{seconds:02d}"
