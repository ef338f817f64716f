"""One engine for pre-training and fine-tuning."""

from .draws import Draws
from .settings import TrainSettings
from .trainer import Diverged, Interrupted, RankLost, Task, Trainer

__all__ = ["Diverged", "Draws", "Interrupted", "RankLost", "Task", "TrainSettings", "Trainer"]
