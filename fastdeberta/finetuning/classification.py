"""Sequence classification: from a labelled file and a checkpoint to a scored model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import tokenizer as tokenizers
from ..files import write_atomically
from ..models import Model, from_pretrained
from ..models.encoder import initialize
from ..training.accounting import training_flops
from ..training.draws import Draws
from ..training.optimizer import parameter_groups
from ..training.reporting import Progress
from ..training.settings import TrainSettings
from ..training.trainer import Trainer
from . import metrics
from .data import Batch, Encoded, collate, encode, label_names, read_examples


@dataclass
class FinetuneSettings(TrainSettings):
    """Sequence classification. steps is computed from epochs."""

    output: str = "runs/finetune"
    model: str = ""  # a directory, or a hub id
    train_file: str = ""  # .jsonl, .tsv or .csv
    dev_file: str = ""  # scored after every evaluate_every steps and at the end
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    max_length: int = 256
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 3e-5
    warmup_fraction: float = 0.1
    dropout: float | None = None  # of the task layer; None: the model's
    layer_decay: float = 1.0  # each layer's rate is the next layer's times this
    reinit_layers: int = 0  # top layers that start anew (Zhang et al. 2021, arXiv 2006.05987)
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def check(self) -> None:
        super().check()
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.reinit_layers < 0:
            raise ValueError(f"reinit_layers must not be negative, got {self.reinit_layers}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {self.max_length}")

    def set_steps(self, examples: int) -> None:
        """Sets steps and warmup_steps for a number of training examples."""
        self.steps = max(1, round(self.epochs * examples / min(self.batch_size, examples)))
        self.warmup_steps = round(self.warmup_fraction * self.steps)


class Objective(nn.Module):
    """A classifier that is called with a batch and returns the sum of its losses."""

    def __init__(self, classifier: Model):
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.logits(batch)
        return {"loss": F.cross_entropy(logits.float(), batch.labels, reduction="sum")}

    def logits(self, batch: Batch) -> Tensor:
        """[B, num_labels]."""
        typed = self.classifier.config.type_vocab_size > 1
        types = batch.token_type_ids if typed else None
        logits = self.classifier(batch.input_ids, batch.attention_mask, types).logits
        assert logits is not None
        return logits


class SequenceClassification:
    """The task that `Trainer` runs: a model with a sequence head, training and dev examples."""

    title = "fine-tuning"

    def __init__(
        self,
        model: Model,
        settings: FinetuneSettings,
        train: Encoded,
        dev: Encoded,
        tokenizer: Any,
    ):
        self.objective = Objective(model)
        self.model: nn.Module = self.objective
        self.classifier = model
        self.rows = len(train.ids)
        self.settings, self.train, self.dev = settings, train, dev
        self.tokenizer = tokenizer
        self.pad_id = tokenizers.special_id(tokenizer, tokenizers.PAD)
        self.predicted: list[int] = []
        self.scores: dict[str, Any] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One pair of groups for each depth: head, layers from the top, embeddings."""
        layers = self.classifier.config.num_hidden_layers
        depths: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.classifier.named_parameters():
            depths.setdefault(_depth(name, layers), []).append(parameter)
        settings, groups = self.settings, []
        for depth, parameters in sorted(depths.items()):
            rate = settings.learning_rate * settings.layer_decay**depth
            groups += parameter_groups(parameters, rate, settings.weight_decay)
        return groups

    def begin(self, step: int) -> None:
        pass

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        return collate(self.train, rows.tolist(), self.pad_id)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": float(len(batch.labels))}

    def weights(self, step: int) -> dict[str, float]:
        return {"loss": 1.0}

    def tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def compute(self, batch: Batch) -> float:
        # Padding is no work; the pooled head is as good as nothing beside the layers.
        lengths, counts = batch.attention_mask.sum(1).unique(return_counts=True)
        return sum(
            training_flops(self.classifier.config, length, count, output_fraction=0.0)
            for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        )

    def evaluate(self) -> dict[str, float]:
        """Dev scores; all of them, with the confusion matrix, stay in `scores`, and the predicted
        label numbers in `predicted`."""
        names = list(self.classifier.config.id2label.values())
        self.predicted = self.predictions()
        self.scores = metrics.classification(self.dev.labels.tolist(), self.predicted, names)
        return {name: self.scores[name] for name in ("accuracy", "macro_f1", "majority")}

    @torch.no_grad()
    def predictions(self, batch_size: int = 64) -> list[int]:
        """The predicted label number of every dev example."""
        self.model.eval()
        device = next(self.model.parameters()).device
        # Examples of one length together: little padding.
        order = sorted(range(len(self.dev.ids)), key=lambda i: len(self.dev.ids[i]))
        predicted = [0] * len(order)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = Batch(*(x.to(device) for x in collate(self.dev, rows, self.pad_id)))
            logits = self.objective.logits(batch)
            for row, label in zip(rows, logits.argmax(-1).tolist(), strict=True):
                predicted[row] = label
        return predicted

    def export(self, directory: Path) -> None:
        """Writes `directory`/model with the tokenizer."""
        target = directory / "model"
        target.mkdir(parents=True, exist_ok=True)
        self.classifier.save_pretrained(target)
        tokenizers.save(self.tokenizer, target)


def reinitialize(model: Model, layers: int) -> None:
    """Gives the top `layers` layers random weights; the lower ones and the tables stay.

    Raises:
        ValueError: more layers than the model has.
    """
    stack = model.backbone.encoder.layer
    if layers > len(stack):
        raise ValueError(f"reinit_layers must be at most the model's {len(stack)}, got {layers}")
    for layer in stack[len(stack) - layers :]:
        initialize(layer, model.config.initializer_range)


def _depth(name: str, layers: int) -> int:
    """0 for the head, 1 for the top layer, layers + 1 for the embeddings."""
    if name.startswith("head."):
        return 0
    if ".encoder.layer." in name:
        return layers - int(name.split(".encoder.layer.")[1].split(".")[0])
    return layers + 1


def finetune(settings: FinetuneSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Fine-tunes `settings.model` on `train_file` and scores it on `dev_file`.

    Leaves metrics.json, predictions.jsonl and the model in `settings.output`.

    Returns:
        The scores, as written to metrics.json.

    Raises:
        FileNotFoundError, ValueError: bad settings, data or checkpoint.
    """
    for key in ("model", "train_file", "dev_file"):
        if not getattr(settings, key):
            raise ValueError(f"{key} must be given")
    columns = (settings.text_column, settings.pair_column, settings.label_column)
    train = read_examples(settings.train_file, *columns)
    dev = read_examples(settings.dev_file, *columns)
    names = label_names(train)
    if len(names) < 2:
        raise ValueError(f"{settings.train_file} has one label, {names[0]!r}: nothing to learn")
    settings.set_steps(len(train))

    changes: dict[str, Any] = {"id2label": dict(enumerate(names))}
    if settings.dropout is not None:
        changes |= {"cls_dropout": settings.dropout, "classifier_dropout": settings.dropout}
    torch.manual_seed(settings.seed)  # The new head's weights.
    model = from_pretrained(settings.model, "sequence", allow_new_head=True, **changes)
    reinitialize(model, settings.reinit_layers)
    tokenizer = tokenizers.load(settings.model)
    limit = settings.max_length
    positions = model.backbone.embeddings.position_embeddings
    if positions is not None and limit > positions.num_embeddings:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = "
            f"{positions.num_embeddings}, got {limit}"
        )
    task = SequenceClassification(
        model,
        settings,
        encode(tokenizer, train, names, limit, settings.train_file),
        encode(tokenizer, dev, names, limit, settings.dev_file),
        tokenizer,
    )
    trainer = Trainer(task, settings, progress)
    result = trainer.run()
    if not trainer.main:
        return result
    output = Path(settings.output)
    task.export(output)
    result |= task.scores
    result["parameters"] = model.num_parameters()
    lines = [
        json.dumps({"text": example.text, "label": example.label, "prediction": names[label]})
        for example, label in zip(dev, task.predicted, strict=True)
    ]
    write_atomically(output / "predictions.jsonl", "\n".join(lines) + "\n")
    write_atomically(output / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result
