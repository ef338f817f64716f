"""The one training loop: steps, logs, evaluations, checkpoints, exact resume."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attention import set_backend
from ..files import write_atomically
from . import checkpoint
from .optimizer import clip_gradients, make_optimizer, set_learning_rate
from .reporting import Events, MetricsFile, NoProgress, Progress
from .settings import TrainSettings, load_yaml, to_yaml

CONFIG = "config.yaml"


class Task(Protocol):
    """What is trained. All of it must be a function of its arguments and torch's seed."""

    title: str
    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups, each with a `peak_lr`."""
        ...

    def batch(self, step: int) -> Any:
        """The data of step `step`."""
        ...

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalars to log beside it."""
        ...

    def tokens(self, batch: Any) -> int:
        """Real tokens in a batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out data."""
        ...

    def export(self, directory: Path) -> None:
        """Writes the models, loadable by from_pretrained, below `directory`."""
        ...


class Interrupted(Exception):
    """A signal stopped the run; its message names the checkpoint that continues it."""


class Diverged(Exception):
    """The loss is no longer finite; the last good checkpoint is kept."""


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: no {name!r} here: {str(error).splitlines()[0]}") from None
    return device


class Trainer:
    """Runs a task to its last step, from the run's newest checkpoint if it has one.

    Every step seeds torch with (seed, step) and takes the data of `step`, so that the step
    number, the weights and the optimiser are all there is to restore.

    Raises:
        ValueError: the output directory holds a run with other settings.
    """

    def __init__(self, task: Task, settings: TrainSettings, progress: Progress | None = None):
        self.task, self.settings = task, settings
        self.progress = progress or NoProgress()
        self.output = Path(settings.output)
        self.device = resolve_device(settings.device)
        self.model = task.model.to(self.device)
        set_backend(self.model, settings.backend)
        self.optimizer = make_optimizer(task.parameter_groups(), settings)
        self.step = 0
        self.tokens_seen = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints excluded
        self._window: dict[str, float] = {}
        self._window_steps = 0
        self._stop: int | None = None

    def run(self) -> dict[str, Any]:
        """Trains; returns the last evaluation with step, tokens and training time.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
            Diverged: the loss became infinite or NaN.
        """
        self._start_or_resume()
        metrics, events = MetricsFile(self.output, self.step), Events(self.output, self.step)
        scores: dict[str, float] = {}
        handlers = self._catch_signals()
        self.progress.start(self.task.title, self.step, self.settings.steps)

        def write(values: dict[str, Any]) -> None:
            metrics.write(self.step, values)
            events.write(self.step, values)

        try:
            while self.step < self.settings.steps:
                self._train_step()
                last = self.step == self.settings.steps
                if self._due(self.settings.log_every) or last:
                    self._log(write, events)
                if self._due(self.settings.evaluate_every) or last:
                    scores = self._evaluate(write)
                if self._due(self.settings.checkpoint_every) or last or self._stop is not None:
                    path = self._checkpoint()
                    if self._stop is not None and not last:
                        name = signal.Signals(self._stop).name
                        raise Interrupted(f"{name}: stopped after step {self.step}; saved {path}")
        finally:
            self.progress.stop()
            metrics.close()
            events.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not scores:  # The run was complete before it started.
            scores = self._scores()
        return {
            **scores,
            "step": self.step,
            "tokens": self.tokens_seen,
            "train_seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens_seen / max(self.seconds, 1e-9)),
        }

    def measure(self, steps: int) -> float:
        """Seconds a step, over a few real steps; what they change is not saved."""
        started = self.seconds
        for _ in range(steps):
            self._train_step()
        return (self.seconds - started) / steps

    def _start_or_resume(self) -> None:
        resolved = to_yaml(self.settings)
        checkpoint.remove_unfinished(self.output)
        saved = checkpoint.checkpoints(self.output)
        if saved:
            self._check_same_settings()
            state = checkpoint.load(saved[-1], self.model, self.optimizer)
            self.step, self.tokens_seen = state["step"], state["tokens"]
            self.seconds = state["seconds"]
            self._window, self._window_steps = state["window"], state["window_steps"]
            self.progress.say(f"resuming {self.output} after step {self.step}")
        write_atomically(self.output / CONFIG, resolved)

    def _check_same_settings(self) -> None:
        import yaml

        old = load_yaml(self.output / CONFIG)
        new = yaml.safe_load(to_yaml(self.settings))
        changed = [key for key in new if key != "output" and old.get(key) != new[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"output: {self.output} holds a run with other settings ({key}: {old.get(key)!r} "
                f"there, {new[key]!r} now); continue it with its own, or choose another output"
            )

    def _train_step(self) -> None:
        started = time.perf_counter()
        self.model.train()
        seed_step(self.settings.seed, self.step)
        batch = to_device(self.task.batch(self.step), self.device)
        with self._autocast():
            loss, values = self.task.loss(batch)
        loss.backward()
        norms = clip_gradients(self.optimizer, self.settings.max_grad_norm)
        set_learning_rate(self.optimizer, self.step, self.settings)
        values = {"loss": loss, **values}
        values |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        numbers = {name: value.item() for name, value in values.items()}
        if not all(map(math.isfinite, numbers.values())):
            kept = checkpoint.checkpoints(self.output)
            where = (
                f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
            )
            raise Diverged(
                f"step {self.step + 1}: {numbers}; a lower learning_rate may help; {where}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_seen += self.task.tokens(batch)
        self.seconds += time.perf_counter() - started
        for name, number in numbers.items():
            self._window[name] = self._window.get(name, 0.0) + number
        self._window_steps += 1
        self.progress.update(self.step, f"loss {numbers['loss']:.3f}")

    def _log(self, write: Callable[[dict[str, Any]], None], events: Events) -> None:
        means = {name: total / self._window_steps for name, total in self._window.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        write({**means, "learning_rate": max(rates), "tokens": self.tokens_seen})
        events.write(self.step, {"tokens_per_second": self.tokens_seen / max(self.seconds, 1e-9)})
        self._window, self._window_steps = {}, 0

    def _evaluate(self, write: Callable[[dict[str, Any]], None]) -> dict[str, float]:
        scores = self._scores()
        write({f"held_out/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.progress.say(f"step {self.step}: held-out {shown}")
        return scores

    def _scores(self) -> dict[str, float]:
        self.model.eval()
        seed_step(self.settings.seed, -1)  # The same draws at every evaluation.
        with torch.no_grad(), self._autocast():
            return self.task.evaluate()

    def _checkpoint(self) -> Path:
        state = {
            "tokens": self.tokens_seen,
            "seconds": self.seconds,
            "window": self._window,
            "window_steps": self._window_steps,
            "seed": self.settings.seed,
        }
        return checkpoint.save(
            self.output,
            self.step,
            self.model,
            self.optimizer,
            state,
            self.task.export,
            self.settings.keep_checkpoints,
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _catch_signals(self) -> dict[int, Any]:
        """Lets SIGINT and SIGTERM end the run after its current step; a second one is final."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = number

        handlers: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, handle)
            except ValueError:  # Only a program's main thread may handle signals.
                break
        return handlers


def seed_step(seed: int, step: int) -> None:
    """Seeds torch for one step: a function of both numbers, different for every step."""
    torch.manual_seed((seed * 1_000_003 + step + 1) & 0x7FFF_FFFF_FFFF_FFFF)


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves every tensor of a (named) tuple, dict or tensor."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def epoch_rows(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Row numbers of step `step` when `count` rows are shuffled anew for every epoch.

    An epoch has count // batch_size steps (at least one); what is left over sits it out.
    """
    batch_size = min(batch_size, count)
    epoch, index = divmod(step, count // batch_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    return order[index * batch_size : (index + 1) * batch_size]
