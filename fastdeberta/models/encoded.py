"""What heads read and what they write: an encoded batch, targets, a model's output."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..packing import sequence_of


@dataclass
class SpanBeam:
    """The K likeliest starts and of each the K likeliest ends, best first; of ties, earlier first.

    K is the config's span_beam_size, or L if that is less.
    start_index int64, start_log_probs: [B, K]. end_index int64, end_log_probs given that start:
    [B, K, K]. A span's log-probability is the sum of both. An end may lie before its start. Where
    fewer than K tokens may hold answers, others follow them with log-probabilities below -1000.
    """

    start_index: Tensor
    start_log_probs: Tensor
    end_index: Tensor
    end_log_probs: Tensor


@dataclass
class ModelOutput:
    """What a model returns; None where it does not apply.

    last_hidden_state: [B, L, hidden] or packed [T, hidden]; rows of padding are zeros where the
        model left padding out, and hold no meaning elsewhere. With an enhanced mask decoder: its
        output. With first_only: [B, hidden].
    logits: mlm, causal [B, L, vocab]; rtd [B, L]; sequence [B, num_labels]; token [B, L,
        num_labels]; choice [B, C]; entity [B, E].
    loss: scalar, when labels were given.
    hidden_states: embeddings and every layer's output, when asked for.
    attentions: every layer's probabilities [B, H, L, L], when asked for.
    start_logits, end_logits: span [B, L]. Of the beam's head, end_logits are those of the given
        start_positions.
    beam: the best spans, of the beam's head; not in training.
    impossible_logits: span [B], above 0 = the text does not hold the answer; of the beam's head.
    """

    last_hidden_state: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    beam: SpanBeam | None = None
    impossible_logits: Tensor | None = None


@dataclass
class Encoded:
    """What a head reads: a batch after the encoder.

    hidden: [B, L, hidden] or packed [T, hidden]; or, without cu_seqlens, [B, hidden], each
    sequence's first token alone. mask: [B, L], [T] or None. table: the token embeddings [vocab,
    embedding_size]. choices: rows of one question follow one another, so many. max_seqlen,
    token_type_ids, answer_mask, entity_spans: see Model.forward.
    """

    hidden: Tensor
    table: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    choices: int | None = None
    max_seqlen: int | None = None
    token_type_ids: Tensor | None = None
    answer_mask: Tensor | None = None
    entity_spans: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """Each sequence's first token, [B, hidden], also behind padding on the left."""
        if self.cu_seqlens is not None:
            return self.hidden[self.cu_seqlens[:-1].long()]
        if self.hidden.dim() == 2:
            return self.hidden
        if self.mask is None:
            return self.hidden[:, 0]
        row = torch.arange(self.hidden.size(0), device=self.hidden.device)
        return self.hidden[row, self.first_place]

    @property
    def first_place(self) -> Tensor:
        """Where each row's first token stands, int64 [B]; of a padded batch."""
        if self.mask is None:
            return self.hidden.new_zeros(self.hidden.size(0), dtype=torch.long)
        return first_places(self.mask)

    @property
    def first_of_each(self) -> Tensor:
        """For each token its sequence's first, broadcastable to hidden."""
        if self.cu_seqlens is None:
            return self.first.unsqueeze(1)
        return self.first[sequence_of(self.cu_seqlens, self.hidden.size(0))]


def first_places(mask: Tensor) -> Tensor:
    """[B, L], nonzero = a real token -> where each row's first one stands, int64 [B]."""
    return mask.bool().int().argmax(1)


@dataclass
class Targets:
    """What a head is trained towards; see Model.forward."""

    labels: Tensor | None = None
    start_positions: Tensor | None = None
    end_positions: Tensor | None = None
    is_impossible: Tensor | None = None


class Head(nn.Module):
    """One task's output layers; `fill` writes its logits, and given targets its loss."""

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        raise NotImplementedError
