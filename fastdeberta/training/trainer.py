"""The one training loop: steps, logs, evaluations, checkpoints, exact resume."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import set_backend
from ..files import write_atomically
from ..models.encoder import Backbone, Encoder
from . import checkpoint
from .distributed import Ranks, Replica, Shards, lost_contact, pinned, to_device, whole_tensor
from .draws import Draws, seed_step
from .optimizer import LossScaler, clip_gradients, make_optimizer, set_learning_rate
from .order import epoch_rows
from .prefetch import prefetched
from .reporting import Log, NoProgress, Progress
from .settings import TrainSettings, load_yaml, to_yaml
from .task import Task
from .throughput import utilization

CONFIG = "config.yaml"

# Settings that may differ where a run goes on: they change how a step is computed, not what.
FREE = ("output", "accumulation", "activation_checkpointing", "compile", "workers")


class Share(NamedTuple):
    """This rank's micro-batches of a step, and what `counts`, `tokens` and `compute` say of them
    together."""

    batches: list[Any]
    counts: dict[str, float]
    tokens: int
    flops: float


class Interrupted(Exception):
    """A signal stopped the run; its message names the checkpoint that continues it."""


class RankLost(Interrupted):
    """Another process of the run is gone; the message names the checkpoint that continues it."""


class Diverged(Exception):
    """The loss is no longer finite; the last good checkpoint is kept."""


class Trainer:
    """Runs a task to its last step, from the run's newest checkpoint if it has one.

    Every step seeds torch with (seed, step) and takes the data of `step`, so that the step
    number, the weights and the optimiser are all there is to restore. Of several processes each
    takes its share of every step's rows; rank 0 alone evaluates, logs and writes.

    Attributes:
        main: whether this process is rank 0. After `run`, only there does the task's model hold
            the final weights (the averaged ones, with ema).

    Raises:
        ValueError: the output directory holds a run with other settings, or too few rows for all
            ranks and micro-batches.
    """

    def __init__(self, task: Task, settings: TrainSettings, progress: Progress | None = None):
        self.task, self.settings = task, settings
        self.ranks = Ranks(settings.device)
        self.main, self.device = self.ranks.main, self.ranks.device
        self.progress = (progress or NoProgress()) if self.main else NoProgress()
        self.output = Path(settings.output)
        self.sequences = min(settings.batch_size, task.rows)  # of a step
        parts = self.ranks.count * settings.accumulation
        if self.sequences < parts:
            raise ValueError(
                f"batch_size: a step of {self.sequences} rows cannot be cut into {parts} "
                f"(ranks: {self.ranks.count}, accumulation: {settings.accumulation})"
            )
        set_backend(task.model, settings.backend)
        for module in task.model.modules():
            if isinstance(module, Encoder):
                module.activation_checkpointing = settings.activation_checkpointing
        sharded = settings.parallel == "fsdp" and self.ranks.count > 1
        groups = task.parameter_groups()
        self.held: Replica | Shards
        if sharded:
            names = {id(p): name for name, p in task.model.named_parameters()}
            self.held = Shards(task.model, self.ranks)
            ours = dict(self.held.model.named_parameters())
            for group in groups:
                group["params"] = [ours[names[id(p)]] for p in group["params"]]
        else:
            self.held = Replica(task.model.to(self.device), self.ranks)
        self.model = self.held.model
        if settings.compile:
            # Encoders are nearly all of the work. A loss over the vocabulary would be compiled
            # anew for every number of chosen tokens.
            modules = list(self.model.modules())
            for module in [m for m in modules if isinstance(m, Backbone)] or modules[:1]:
                module.compile()
        self.optimizer = make_optimizer(groups, settings)
        self.scaler = LossScaler(settings.precision == "fp16")
        self.averages: dict[str, Tensor] = {}
        if settings.ema:
            self.averages = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = 0
        self.tokens_seen = 0
        self.flops = 0.0
        self.seconds = 0.0  # of training, evaluations and checkpoints excluded
        self._window: dict[str, list[float]] = {}  # of each value its sum and count since a log
        self._signal: int | None = None
        self._stop: int | None = None  # a signal that every rank knows of

    def run(self) -> dict[str, Any]:
        """Trains; returns the last evaluation with step, compute and training time, on every rank.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was written. Or another rank is gone.
            Diverged: the loss became infinite or NaN.
        """
        handlers = self._catch_signals()
        try:
            return self._run()
        except Exception as error:
            if self.ranks.count > 1 and lost_contact(error):
                kept = _newest(self.output)
                handlers.clear()  # The launcher's SIGTERM must not come before the message.
                raise RankLost(
                    f"rank {self.ranks.rank} of {self.ranks.count}: another rank is gone, at step "
                    f"{self.step + 1}; start the job again to go on "
                    f"{f'from {kept}' if kept else 'from the start: there is no checkpoint yet'}"
                ) from error
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> dict[str, Any]:
        self._start_or_resume()
        log = Log(self.output, self.step, self.main)
        self.progress.start(self.task.title, self.step, self.settings.steps)
        scores: dict[str, float] = {}
        try:
            with self._shares(self.settings.steps) as shares:
                while self.step < self.settings.steps:
                    self._train_step(shares)
                    last = self.step == self.settings.steps
                    if self._due(self.settings.log_every) or last:
                        self._log(log)
                    if self._due(self.settings.evaluate_every) or last:
                        scores = self._evaluate(log)
                    stop = self._stopping()
                    if self._due(self.settings.checkpoint_every) or last or stop is not None:
                        path = self._checkpoint()
                        if stop is not None and not last:
                            name = signal.Signals(stop).name
                            raise Interrupted(
                                f"{name}: stopped after step {self.step}; saved {path}"
                            )
        finally:
            self.progress.stop()
            log.close()
        if not scores:  # The run was complete before it started.
            scores = self._scores()
        self._leave_weights()
        return self.ranks.share({**scores, **self._totals()})

    def measure(self, steps: int) -> float:
        """Seconds a step, over a few real steps; what they change is not saved."""
        started = self.seconds
        with self._shares(self.step + steps) as shares:
            for _ in range(steps):
                self._train_step(shares)
        return (self.seconds - started) / steps

    def _totals(self) -> dict[str, Any]:
        """What the run took until now."""
        totals = {
            "step": self.step,
            "tokens": self.tokens_seen,
            "flops": self.flops,
            "train_seconds": round(self.seconds, 1),
            "tokens_per_second": round(self.tokens_seen / max(self.seconds, 1e-9)),
        }
        if self.main and self.flops and self.seconds:
            rate = self.flops / self.seconds / self.ranks.count
            totals |= utilization(rate, self.device, self.settings.precision)
        return totals

    def _start_or_resume(self) -> None:
        if self.main:
            checkpoint.remove_unfinished(self.output)
        self.ranks.wait()
        newest = self.ranks.share(_newest(self.output))
        if newest is not None:
            self._check_same_settings()
            state = checkpoint.load(newest, self._weights(), self._sharded_files)
            self.step, self.tokens_seen = state["step"], state["tokens"]
            self.flops, self.seconds = state["flops"], state["seconds"]
            self._window = state["window"]
            self.scaler.load(state["scaler"])
            self.progress.say(f"resuming {self.output} after step {self.step}")
        self.ranks.wait()
        if self.main:
            write_atomically(self.output / CONFIG, to_yaml(self.settings))

    def _check_same_settings(self) -> None:
        import yaml

        old = load_yaml(self.output / CONFIG)
        new = yaml.safe_load(to_yaml(self.settings))
        changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"output: {self.output} holds a run with other settings ({key}: {old.get(key)!r} "
                f"there, {new[key]!r} now); continue it with its own, or choose another output"
            )

    def _train_step(self, shares: Iterator[Share]) -> None:
        started = time.perf_counter()
        self.model.train()
        seed_step(self.settings.seed, self.step)
        self._begin()
        seed_step(self.settings.seed, self.step, self.ranks.rank)
        share = next(shares)
        counts, tokens, flops = self._totalled(share)
        weights = self.task.weights(self.step)
        factors = {k: weights.get(k, 0.0) / count if count else 0.0 for k, count in counts.items()}
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(share.batches):
            with self.held.accumulate(last=i == len(share.batches) - 1):
                with self._autocast():
                    loss, terms = self.held.call(to_device(batch, self.device), factors)
                # Ranks' gradients are averaged, but ours are parts of one sum.
                (loss * (self.scaler.scale * self.ranks.count)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.double()
        numbers, norms = self._reduce(sums, counts, factors)
        finite = all(map(math.isfinite, norms.values()))
        if not all(map(math.isfinite, numbers.values())) or not (finite or self.scaler.enabled):
            raise Diverged(self._diverged({**numbers, **norms}))
        if finite:
            set_learning_rate(self.optimizer, self.step, self.settings)
            self.optimizer.step()
            self._average()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(finite)
        if self.scaler.scale < 2.0**-14:
            raise Diverged(self._diverged({**numbers, **norms}))
        self.step += 1
        self.tokens_seen += tokens
        self.flops += flops
        self.seconds += time.perf_counter() - started
        for name, number in (numbers | (norms if finite else {})).items():
            total, count = self._window.get(name, (0.0, 0))
            self._window[name] = [total + number, count + 1]
        self.progress.update(self.step, f"loss {numbers['loss']:.3f}")

    def _begin(self) -> None:
        """Lets the task change weights; where they are sharded, on a whole copy, if it does."""
        whole = [*self.task.model.parameters(), *self.task.model.buffers()]
        before = [tensor._version for tensor in whole]
        self.task.begin(self.step)
        if isinstance(self.held, Shards) and before != [tensor._version for tensor in whole]:
            self.held.gather(everywhere=True)
            self.task.begin(self.step)
            self.held.scatter()

    def _shares(self, end: int) -> AbstractContextManager[Iterator[Share]]:
        """This rank's shares of the steps from the next one to `end`, one after another."""
        start = None
        if self.device.type == "cuda" and self.device.index is not None:
            start = partial(torch.cuda.set_device, self.device)  # for which memory is pinned
        return prefetched(self._share, range(self.step, end), self.settings.workers, start)

    def _share(self, step: int) -> Share:
        settings, total = self.settings, self.sequences
        rows = epoch_rows(self.task.rows, total, step, settings.seed)
        parts = self.ranks.count * settings.accumulation
        bounds = [total * i // parts for i in range(parts + 1)]
        first = self.ranks.rank * settings.accumulation
        batches = [
            self.task.batch(rows[start:end], Draws(settings.seed, step, start, end - start, total))
            for start, end in zip(
                bounds[first : first + settings.accumulation], bounds[first + 1 :], strict=False
            )
        ]
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in self.task.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        tokens, flops = sum(map(self.task.tokens, batches)), sum(map(self.task.compute, batches))
        if settings.workers and self.device.type == "cuda":
            batches = pinned(batches)
        return Share(batches, counts, tokens, flops)

    def _totalled(self, share: Share) -> tuple[dict[str, float], int, float]:
        """The step's denominators, tokens and operations, over all ranks."""
        numbers = [*share.counts.values(), share.tokens, share.flops]
        values = self.ranks.sum(torch.tensor(numbers, dtype=torch.float64))
        *totals, tokens, flops = values.tolist()
        return dict(zip(share.counts, totals, strict=True)), int(tokens), flops

    def _reduce(
        self, sums: dict[str, Tensor], counts: dict[str, float], factors: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The step's losses, and the gradients' norms before they are clipped."""
        if isinstance(self.held, Shards):
            self.held.forget_frozen()
        norms = clip_gradients(self.optimizer, self.settings.max_grad_norm, self.scaler.scale)
        values = [*sums.values(), *(whole_tensor(norm).double() for norm in norms.values())]
        numbers = torch.stack([value.to(self.device) for value in values]).cpu()
        stop = torch.tensor([float(self._signal or 0)])
        totals = self.ranks.sum(torch.cat([numbers[: len(sums)], stop.double()])).tolist()
        if totals.pop():
            self._stop = self._signal or signal.SIGTERM
        summed = dict(zip(sums, totals, strict=True))
        losses = {name: total / counts[name] for name, total in summed.items() if counts[name]}
        losses["loss"] = sum(factors[name] * total for name, total in summed.items())
        grad_norms = numbers[len(sums) :].tolist()
        return losses, {f"grad_norm/{n}": v for n, v in zip(norms, grad_norms, strict=True)}

    @torch.no_grad()
    def _average(self) -> None:
        for name, parameter in self.model.named_parameters() if self.averages else ():
            self.averages[name].lerp_(parameter, 1 - self.settings.ema)

    def _diverged(self, numbers: dict[str, float]) -> str:
        kept = _newest(self.output)
        where = f"the last checkpoint is {kept}" if kept else "no checkpoint was written yet"
        return f"step {self.step + 1}: {numbers}; a lower learning_rate may help; {where}"

    def _log(self, log: Log) -> None:
        means = {name: total / count for name, (total, count) in self._window.items()}
        values: dict[str, Any] = {
            **means,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "tokens": self.tokens_seen,
            "flops": self.flops,
        }
        if self.scaler.enabled:
            values |= {"skipped_steps": self.scaler.skipped}
        log.write(self.step, values)
        log.watch(self.step, {"tokens_per_second": self.tokens_seen / max(self.seconds, 1e-9)})
        self._window = {}

    def _evaluate(self, log: Log) -> dict[str, float]:
        scores = self._scores()
        log.write(self.step, {f"held_out/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.progress.say(f"step {self.step}: held-out {shown}")
        return scores

    def _scores(self) -> dict[str, float]:
        """The task's evaluation, of rank 0."""
        seed_step(self.settings.seed, -1)  # The same draws at every evaluation.
        scores: dict[str, float] = {}
        with self._judged():
            if self.main:
                self.task.model.eval()
                with self._eager(), torch.no_grad(), self._autocast():
                    scores = self.task.evaluate()
        return self.ranks.share(scores)

    def _eager(self) -> AbstractContextManager:
        """Around an evaluation: to compile for its few batches and their shapes would not pay."""
        return torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """The task's model as it is evaluated and exported: whole, averaged with ema."""
        if isinstance(self.held, Shards):
            self.held.gather(self.averages)
            if self.main:
                self.task.model.to(self.device)
            try:
                yield
            finally:
                self.task.model.to("cpu")
            return
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        for name, parameter in self.model.named_parameters() if self.averages else ():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    def _leave_weights(self) -> None:
        """Leaves the final weights in the task's model, for whoever uses it after the run."""
        if isinstance(self.held, Shards):
            self.held.gather(self.averages)
        else:
            self._swap_averages()

    @property
    def _sharded_files(self) -> bool:
        return self.settings.parallel == "fsdp"

    def _weights(self) -> checkpoint.Weights:
        return checkpoint.Weights(self.model, self.optimizer, self.averages)

    def _export(self, directory: Path) -> None:
        with self._judged():
            if self.main:
                self.task.export(directory)

    def _checkpoint(self) -> Path:
        state = {
            "tokens": self.tokens_seen,
            "flops": self.flops,
            "seconds": self.seconds,
            "window": self._window,
            "seed": self.settings.seed,
            "scaler": self.scaler.state(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        return checkpoint.save(
            self.output,
            self.step,
            self._weights(),
            state,
            self._export,
            self.settings.keep_checkpoints,
            self.ranks,
            self._sharded_files,
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stopping(self) -> int | None:
        """The signal that ends the run; of several ranks, all must know of it."""
        return self._signal if self.ranks.count == 1 else self._stop

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.settings.precision == "fp16" else torch.bfloat16
        enabled = self.settings.precision != "fp32"
        return torch.autocast(self.device.type, dtype, enabled=enabled)

    def _catch_signals(self) -> dict[int, Any]:
        """Lets SIGINT and SIGTERM end the run after its current step; a second one is final."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        handlers: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, handle)
            except ValueError:  # Only a program's main thread may handle signals.
                break
        return handlers


def _newest(output: Path) -> Path | None:
    return next(reversed(checkpoint.checkpoints(output)), None)
