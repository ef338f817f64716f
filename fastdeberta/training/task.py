"""What the trainer asks of a task."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .draws import Draws


class Task(Protocol):
    """What is trained. Random numbers come from `draws` and torch's seeded generator alone.

    Attributes:
        model: model(batch) -> each loss's sum over the batch, by name, as scalars. It may be
            wrapped; `evaluate` and `export` always find it whole, with the weights to be judged.
        rows: training rows; the trainer says which of them a step takes.
    """

    title: str
    model: nn.Module
    rows: int

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups, each with a `peak_lr` and its `network`."""
        ...

    def begin(self, step: int) -> None:
        """Before step `step`, from 0: may copy or freeze weights. Twice is as good as once."""
        ...

    def batch(self, rows: Tensor, draws: Draws) -> Any:
        """One micro-batch of the training rows `rows`, int64 [count], on the CPU.

        A function of its arguments and the data alone; likewise the next three. With `workers`,
        threads call them, steps ahead of `begin`.
        """
        ...

    def counts(self, batch: Any) -> dict[str, float]:
        """The denominators of the losses, by the names of their sums."""
        ...

    def tokens(self, batch: Any) -> int:
        """Real tokens in a batch."""
        ...

    def compute(self, batch: Any) -> float:
        """Floating-point operations of training on a batch; 0.0: unknown."""
        ...

    def weights(self, step: int) -> dict[str, float]:
        """The loss of a step is the sum of weight * sum / count; a name left out is only logged."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out data."""
        ...

    def export(self, directory: Path) -> None:
        """Writes the models, loadable by from_pretrained, below `directory`."""
        ...
