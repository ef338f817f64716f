"""Settings of fine-tuning: what a user gives, and defaults by model and task."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..models import Config, from_pretrained
from ..models.checkpoint import local_directory
from ..models.config import SPAN_HEADS
from ..training.settings import TrainSettings, apply_overrides, build
from . import tasks
from .readers import table
from .recipes import recipe

KEEP = ("best", "median")

_COLUMN_TASKS = ("classification", "regression")


@dataclass
class FinetuneSettings(TrainSettings):
    """One task. steps and warmup_steps are computed from epochs and warmup_fraction.

    The defaults are those of no recipe; see `resolve`.
    """

    output: str = "runs/finetune"
    model: str = ""  # a directory, or a hub id
    task: str = "classification"  # a name in tasks.TASKS
    task_file: str | None = None  # describes a task of the user's own
    data_dir: str = ""
    text_column: str | None = None  # of a user's classification or regression; None: "text"
    pair_column: str | None = None  # None: there is one text
    label_column: str | None = None  # None: "label"
    max_length: int = 256
    stride: int = 128  # of spans: tokens from one part of a long text to the next
    max_query_length: int = 64
    n_best: int = 20
    max_answer_length: int = 30
    span_head: str | None = None  # "linear", "beam"; None: the checkpoint's
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 3e-5
    warmup_fraction: float = 0.1
    dropout: float | None = None  # of the task layer; None: the model's
    layer_decay: float = 1.0  # each layer's rate is the next layer's times this
    layer_decay_quirk: bool = False  # as Google's ELECTRA; see recipes.layer_groups
    reinit_layers: int = 0  # top layers that start anew (Zhang et al. 2021, arXiv 2006.05987)
    packed: bool = True  # batches without padding
    evaluation_tokens: int = 8192  # of a batch in evaluation
    evaluate_every: int = 0
    checkpoint_every: int = 0
    early_stopping: int = 0  # evaluations without a better score; the best model is kept; 0: no
    seeds: int = 1  # runs, with seed, seed + 1, ...
    keep: str = "best"  # or "median": which run's model, by the first dev score
    ensemble: list[str] = field(default_factory=list)  # models to score together, not to train
    sift: bool = False  # scale-invariant fine-tuning
    sift_alpha: float = 5.0
    sift_sigma: float = 1e-2
    sift_step_size: float = 1e-4

    def check(self) -> None:
        super().check()
        for key in ("epochs", "sift_alpha", "sift_sigma", "sift_step_size"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}")
        for key in ("reinit_layers", "early_stopping"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("seeds", "stride", "max_query_length", "n_best", "max_answer_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {self.max_length}")
        if self.evaluation_tokens < 1:
            raise ValueError(f"evaluation_tokens must be at least 1, got {self.evaluation_tokens}")
        if self.keep not in KEEP:
            raise ValueError(f"keep must be one of {', '.join(KEEP)}; got {self.keep!r}")
        if self.span_head not in (None, *SPAN_HEADS):
            raise ValueError(
                f"span_head must be one of {', '.join(SPAN_HEADS)}; got {self.span_head!r}"
            )

    def set_steps(self, rows: int) -> None:
        """Sets steps and warmup_steps for a number of training rows; with early stopping and no
        evaluate_every, an evaluation every epoch."""
        of_epoch = rows / min(self.batch_size, rows)
        self.steps = max(1, round(self.epochs * of_epoch))
        self.warmup_steps = round(self.warmup_fraction * self.steps)
        if self.early_stopping and not self.evaluate_every:
            self.evaluate_every = max(1, round(of_epoch))


def resolve(given: dict[str, Any], overrides: Iterable[str] = ()) -> tuple[FinetuneSettings, str]:
    """Settings from what the user gives, and a line that names the defaults that were chosen.

    What is not given comes from a task file's recipe, the task's, the model's size (see
    recipes.recipe), and FinetuneSettings, in this order. Of a task's recipe only what is its own
    goes before the size's.

    Args:
        given, overrides: values by key, and "key=value" pairs, which win.

    Raises:
        FileNotFoundError, ValueError: bad settings, task or checkpoint.
    """
    given = apply_overrides(dict(given), overrides)
    settings = build(FinetuneSettings, given)  # Errors of the user's own come first.
    task = find_task(settings)
    _required(settings)
    config = config_of(settings.ensemble[0] if settings.ensemble else settings.model)
    size, of_size = recipe(config)
    own = {k: v for k, v in task.recipe.items() if tasks.RECIPE.get(k) != v}
    from_file = dict(table.load(settings.task_file).recipe) if settings.task_file else {}
    defaults = {**task.recipe, **of_size, **own, **from_file}
    if "max_length" in defaults and (limit := position_limit(config)) is not None:
        defaults["max_length"] = min(defaults["max_length"], limit)
    chosen = {key: value for key, value in defaults.items() if key not in given}
    line = ", ".join(f"{key}={value}" for key, value in chosen.items())
    settings = build(FinetuneSettings, {**chosen, **given})
    return settings, f"recipe of {size} for {task.name}: {line or 'nothing left to choose'}"


def find_task(settings: FinetuneSettings) -> tasks.Task:
    """The task that the settings name, or that their task file describes.

    Raises:
        FileNotFoundError, ValueError: an unknown task, a bad task file, or columns that are none of
            the task's to choose.
    """
    task = tasks.find_task(settings.task_file or settings.task)
    columns = {
        name: getattr(settings, f"{name}_column")
        for name in ("text", "pair", "label")
        if getattr(settings, f"{name}_column") is not None
    }
    if not columns:
        return task
    if settings.task_file or settings.task not in _COLUMN_TASKS:
        raise ValueError(
            f"{next(iter(columns))}_column is for {' and '.join(_COLUMN_TASKS)}; a task file "
            "names the columns of other tasks"
        )
    return replace(task, read=partial(table.read, table.TaskFile(task.name, columns=columns)))


def config_of(model: str) -> Config:
    """A checkpoint's config, without its weights where its config.json says enough."""
    directory = local_directory(model)
    try:
        return Config.load(directory)
    except (FileNotFoundError, ValueError):  # Another layout's.
        return from_pretrained(directory).config


def position_limit(config: Config) -> int | None:
    """Tokens of a sequence, at most; None: any number."""
    if config.model_type == "electra" or config.position_biased_input:
        return config.max_position_embeddings
    return None


def _required(settings: FinetuneSettings) -> None:
    for key in ("model", "data_dir"):
        if not getattr(settings, key) and not (key == "model" and settings.ensemble):
            raise ValueError(f"{key} must be given")
