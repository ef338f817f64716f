"""The fine-tuning task that `Trainer` runs, one for all heads."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import tokenizer as tokenizers
from ..models import Model
from ..training.accounting import training_flops
from ..training.distributed import to_device
from ..training.draws import Draws
from . import decoding
from .decoding import Outputs, Predicted
from .examples import Example
from .features import Batch, Features, batches
from .objectives import objective_for
from .recipes import layer_groups
from .settings import FinetuneSettings
from .sift import SiFT
from .spans import THRESHOLD, best_thresholds
from .tasks import Task

# Passes of a SiFT step, forward and backward: clean, ascent, perturbed.
_SIFT_PASSES = 3


class Split(NamedTuple):
    """Examples of one split, and their features without labels."""

    examples: Sequence[Example]
    features: Features


class Finetuning:
    """A model with a head, its training rows, and the splits it is scored on.

    Args:
        task: says what is predicted and scored. train: with targets. dev: by name; the first
            split's scores have plain names, others' are behind theirs ("dev-mm/accuracy").

    Attributes:
        classifier: the model itself; `model` is the objective around it.
        scores: every score of the last evaluation, with those that are no number. predicted: its
            predictions by split. outputs: what they were made from. threshold: of no_answer, see
            SpanPrediction; of SQuAD 2.0 the one with the best F1 on the first dev split.
    """

    title = "fine-tuning"

    def __init__(
        self,
        task: Task,
        model: Model,
        settings: FinetuneSettings,
        tokenizer: Any,
        train: Features,
        dev: dict[str, Split],
    ):
        self.task, self.settings, self.tokenizer = task, settings, tokenizer
        self.objective = objective_for(model)
        self.model: nn.Module = self.objective
        self.sift: SiFT | None = None
        if settings.sift:
            self.model = self.sift = SiFT(
                self.objective, settings.sift_alpha, settings.sift_sigma, settings.sift_step_size
            )
        self.classifier = model
        self.train, self.dev = train, dev
        self.rows = len(train)
        self.pad_id = tokenizers.special_id(tokenizer, tokenizers.PAD)
        self.scores: dict[str, Any] = {}
        self.predicted: dict[str, Predicted] = {}
        self.threshold = math.inf
        self.outputs: dict[str, Outputs] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `layer_groups`."""
        settings = self.settings
        return layer_groups(
            self.classifier,
            settings.learning_rate,
            settings.weight_decay,
            settings.layer_decay,
            settings.layer_decay_quirk,
        )

    def begin(self, step: int) -> None:
        pass

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        return self.train.batch(rows.tolist(), self.settings.packed, self.pad_id)

    def counts(self, batch: Batch) -> dict[str, float]:
        count = self.objective.count(batch)
        return {"loss": count} | ({} if self.sift is None else self.sift.counts(count))

    def weights(self, step: int) -> dict[str, float]:
        return {"loss": 1.0} | ({} if self.sift is None else self.sift.weights())

    def tokens(self, batch: Batch) -> int:
        return int(sum(_lengths(batch).tolist()))

    def compute(self, batch: Batch) -> float:
        # Padding is no work; a head is as good as nothing beside the layers.
        lengths, counts = _lengths(batch).unique(return_counts=True)
        flops = sum(
            training_flops(self.classifier.config, length, count, output_fraction=0.0)
            for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        )
        return flops * (1 if self.sift is None else _SIFT_PASSES)

    def evaluate(self) -> dict[str, float]:
        """The scores that are numbers, of every dev split."""
        self.judge({name: self.run(split.features) for name, split in self.dev.items()})
        return {k: float(v) for k, v in self.scores.items() if isinstance(v, (int, float))}

    def judge(self, outputs: dict[str, Outputs]) -> None:
        """Sets scores, predicted and the threshold by the dev splits' outputs."""
        self.outputs, self.scores = outputs, {}
        for number, (name, split) in enumerate(self.dev.items()):
            predicted = decoding.predict(
                self.task, *split, outputs[name], self.names, self.settings
            )
            thresholds: dict[str, float] = {}
            if "squad2" in self.task.metrics:
                right = decoding.references(self.task, split.examples, self.names, name)
                thresholds = best_thresholds(predicted.spans or [], right)
                if number == 0:
                    self.threshold = thresholds["best_f1_threshold"]
                predicted = decoding.abstaining(predicted, self.threshold)
            found = decoding.score(self.task, split.examples, predicted.values, self.names, name)
            found |= thresholds
            if self.task.head == "token":
                found["missed_words"] = predicted.missed
            self.scores |= {k if number == 0 else f"{name}/{k}": v for k, v in found.items()}
            self.predicted[name] = predicted

    def predict(self, split: Split, outputs: Outputs | None = None) -> Predicted:
        """Of a split without labels, by given outputs or those of the model."""
        outputs = self.run(split.features) if outputs is None else outputs
        predicted = decoding.predict(self.task, *split, outputs, self.names, self.settings)
        return decoding.abstaining(predicted, self.threshold) if predicted.spans else predicted

    @property
    def names(self) -> list[str]:
        """The classes; of a regression none."""
        if self.task.labels == () or self.task.head not in ("sequence", "token"):
            return []
        return list(self.classifier.config.id2label.values())

    @torch.no_grad()
    def run(self, features: Features) -> Outputs:
        """The logits of every row, in the rows' order, float32 on the CPU."""
        self.model.eval()
        device = next(self.model.parameters()).device
        outputs: Outputs = [()] * len(features)
        packed, precision = self.settings.packed, self.settings.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        for rows in batches(features, self.settings.evaluation_tokens, packed):
            batch = to_device(features.batch(rows, packed, self.pad_id), device)
            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                for row, own in zip(rows, self._of_rows(batch, features, rows), strict=True):
                    outputs[row] = own
        return outputs

    def _of_rows(
        self, batch: Batch, features: Features, rows: list[int]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Each row's part of what the head gives for a batch."""
        if self.task.head == "span":
            output = self.objective.run(batch)
            if output.beam is not None:
                beam = output.beam
                found = [
                    beam.start_index,
                    beam.start_log_probs,
                    beam.end_index,
                    beam.end_log_probs,
                ]
                if output.impossible_logits is not None:
                    found.append(output.impossible_logits)
                yield from zip(*(_on_cpu(x) for x in found), strict=True)
                return
            assert output.start_logits is not None and output.end_logits is not None
            start, end = _on_cpu(output.start_logits), _on_cpu(output.end_logits)
            for i, length in enumerate(features.lengths[rows].tolist()):
                yield start[i, :length], end[i, :length]
            return
        logits = _on_cpu(self.objective.outputs(batch)[0])
        if self.task.head == "token":
            places = features.targets["places"]
            sizes = [len(places[row]) for row in rows]
            yield from ((part,) for part in logits.split(sizes))
        elif self.task.head == "entity":
            spans = features.targets["entity_spans"]
            yield from ((logits[i, : len(spans[row])],) for i, row in enumerate(rows))
        elif batch.options is not None:
            yield from ((row[:count],) for row, count in zip(logits, batch.options, strict=True))
        else:
            yield from ((row,) for row in logits)

    def export(self, directory: Path) -> None:
        """Writes `directory`/model with the tokenizer, and of SQuAD 2.0 the threshold."""
        target = directory / "model"
        extra = self.classifier.config.extra
        extra.pop(THRESHOLD, None)
        if math.isfinite(self.threshold):
            extra[THRESHOLD] = self.threshold
        target.mkdir(parents=True, exist_ok=True)
        self.classifier.save_pretrained(target)
        tokenizers.save(self.tokenizer, target)


def _lengths(batch: Batch) -> Tensor:
    if batch.cu_seqlens is not None:
        return batch.cu_seqlens.diff()
    assert batch.attention_mask is not None
    return batch.attention_mask.sum(1)


def _on_cpu(x: Tensor) -> Tensor:
    return x.float().cpu() if x.is_floating_point() else x.cpu()
