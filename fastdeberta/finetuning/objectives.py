"""Objectives: of each head the logits, and the losses as sums over examples.

A model's own loss is a mean over its batch; means of micro-batches do not add up to that of a
step, sums do.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence

from ..models import Model
from ..models.answers import MASKED, wide
from ..models.encoded import ModelOutput
from .features import Batch


class Objective(nn.Module):
    """A model that is called with a batch and returns {"loss": the sum over its examples}.

    Attributes:
        model: the model with its head.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(batch, self.outputs(batch))

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The logits of one pass: sequence [B, classes], regression [B, 1]; choice [B, most
        options]; tagging [scored tokens, classes]; spans two [B, L], and answerability [B] if the
        head has it; entities [B, E]."""
        return (_given(self.run(batch).logits),)

    def losses(self, batch: Batch, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The loss of those outputs, a sum over `count` values, in float32 at least."""
        logits, labels = wide(outputs[0]), batch.targets["labels"]
        if self.model.head_name == "sequence" and self.model.config.num_labels == 1:
            return {"loss": mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="sum")}
        return {"loss": cross_entropy(logits, labels, reduction="sum")}

    def count(self, batch: Batch) -> float:
        """How many values the loss is a sum over: examples, or scored tokens or entities."""
        return float(len(batch.targets["labels"]))

    def run(self, batch: Batch, **more: Any) -> ModelOutput:
        """The model's output."""
        # A table of one type tells nothing apart.
        typed = self.model.config.type_vocab_size != 1
        return self.model(
            batch.input_ids if batch.cu_seqlens is not None else self._grid(batch.input_ids, batch),
            None if batch.attention_mask is None else self._grid(batch.attention_mask, batch),
            self._grid(batch.token_type_ids, batch) if typed else None,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            num_choices=None if batch.options is None else 1,
            first_only=self.model.head_name in ("sequence", "choice"),
            **more,
        )

    def _grid(self, x: Tensor, batch: Batch) -> Tensor:
        """A choice head takes padded sequences as [B, options, L]: here each as a question."""
        return x if batch.cu_seqlens is not None or batch.options is None else x.unsqueeze(1)


class ChoiceObjective(Objective):
    """Cross entropy of every question's right option. Where it has fewer options than another of
    the batch, the rest of its logits say that there is none."""

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        assert batch.options is not None
        logits = _given(self.run(batch).logits).squeeze(-1).split(batch.options)
        return (pad_sequence(logits, batch_first=True, padding_value=MASKED),)


class TaggingObjective(Objective):
    """Cross entropy of every word's tag, at its first sub-word."""

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        logits = _given(self.run(batch).logits)
        return (logits.flatten(0, -2)[batch.targets["places"]],)


class SpanObjective(Objective):
    """Mean of the start's and the end's cross entropy; a beam's head adds its answerability's."""

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        output = self.run(batch, **batch.targets)
        logits = _given(output.start_logits), _given(output.end_logits)
        return logits if output.impossible_logits is None else (*logits, output.impossible_logits)

    def losses(self, batch: Batch, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        start, end, *impossible = map(wide, outputs)
        starts, ends = batch.targets["start_positions"], batch.targets["end_positions"]
        loss = cross_entropy(start, starts, reduction="sum")
        loss = (loss + cross_entropy(end, ends, reduction="sum")) / 2
        if impossible:
            missing = (starts == 0).to(start.dtype)
            weight = self.model.config.span_answerable_weight
            loss = loss + weight * binary_cross_entropy_with_logits(
                impossible[0], missing, reduction="sum"
            )
        return {"loss": loss}

    def count(self, batch: Batch) -> float:
        return float(len(batch.targets["start_positions"]))

    def run(self, batch: Batch, **more: Any) -> ModelOutput:
        # Of DeBERTa's embeddings no type is left for the head to know the text by.
        return super().run(batch, answer_mask=batch.token_type_ids, **more)


class EntityObjective(Objective):
    """Binary cross entropy of every entity."""

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (_given(self.run(batch, entity_spans=batch.targets["entity_spans"]).logits),)

    def losses(self, batch: Batch, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        logits, labels = wide(outputs[0]), batch.targets["labels"]
        losses = binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return {"loss": losses[_real(batch)].sum()}

    def count(self, batch: Batch) -> float:
        return float(_real(batch).sum())


OBJECTIVES: dict[str, type[Objective]] = {
    "sequence": Objective,
    "choice": ChoiceObjective,
    "token": TaggingObjective,
    "span": SpanObjective,
    "entity": EntityObjective,
}


def objective_for(model: Model) -> Objective:
    """The objective for a model's head.

    Raises:
        ValueError: a head without one.
    """
    if model.head_name not in OBJECTIVES:
        raise ValueError(f"head must be one of {', '.join(OBJECTIVES)}; got {model.head_name!r}")
    return OBJECTIVES[model.head_name](model)


def _given(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


def _real(batch: Batch) -> Tensor:
    """Which entities are not padding, bool [B, E]."""
    start, end = batch.targets["entity_spans"].unbind(-1)
    return start < end
