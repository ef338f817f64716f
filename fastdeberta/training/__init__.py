"""One engine for pre-training and fine-tuning."""

from .settings import TrainSettings
from .trainer import Diverged, Interrupted, Task, Trainer

__all__ = ["Diverged", "Interrupted", "Task", "TrainSettings", "Trainer"]
