"""Early stopping: the trainer that ends a run whose score no longer grows, and keeps its best."""

import math
from pathlib import Path

from ..files import atomic_directory
from ..models.checkpoint import load
from ..training.reporting import METRICS, Log, Progress, read_metrics
from ..training.settings import TrainSettings
from ..training.trainer import Trainer
from .finetuning import Finetuning

BEST = "best"


class StoppingTrainer(Trainer):
    """Ends after `patience` evaluations in a row that are not better than the best one.

    The model of the best evaluation, of equals the first, is in output/best/model. What is watched
    is the first score of the task's evaluation. All of this is told from metrics.jsonl, so that a
    resumed run stops where an uninterrupted one does.
    """

    def __init__(
        self,
        task: Finetuning,
        settings: TrainSettings,
        patience: int,
        progress: Progress | None = None,
    ):
        super().__init__(task, settings, progress)
        self.finetuning, self.patience = task, patience
        self.history: list[tuple[int, float]] = []  # steps, and their scores

    @property
    def best(self) -> int:
        """The step of the best evaluation; 0: there was none."""
        if not self.history:
            return 0
        return max(self.history, key=lambda pair: (pair[1], -pair[0]))[0]

    def load_best(self) -> None:
        """Gives the task's model the weights of the best evaluation."""
        load(self.finetuning.classifier, self.output / BEST / "model")

    def _start_or_resume(self) -> None:
        super()._start_or_resume()
        history = []
        for line in read_metrics(self.output / METRICS) if self.step and self.main else []:
            held_out = [value for key, value in line.items() if key.startswith("held_out/")]
            if held_out and line["step"] <= self.step:
                history.append((line["step"], _comparable(held_out[0])))
        self.history = self.ranks.share(history)
        if self._exhausted():
            self.settings.steps = self.step

    def _evaluate(self, log: Log) -> dict[str, float]:
        scores = super()._evaluate(log)
        if scores:
            self.history.append((self.step, _comparable(next(iter(scores.values())))))
        if self.best == self.step:
            self._keep()
        if self._exhausted() and self.step < self.settings.steps:
            self.progress.say(
                f"stopped after step {self.step}: no better score since step {self.best}"
            )
            self._checkpoint()
            self.settings.steps = self.step
        return scores

    def _exhausted(self) -> bool:
        later = [step for step, _ in self.history if step > self.best]
        return len(later) >= self.patience

    def _keep(self) -> None:
        if not self.main:
            self._export(Path())
            return
        with atomic_directory(self.output / BEST) as fresh:
            self._export(fresh)


def _comparable(score: float) -> float:
    return -math.inf if math.isnan(score) else score
