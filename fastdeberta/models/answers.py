"""Heads that find an answer in a text: spans, by two linear layers or by beam search, and entities.

Packed sequences are padded here, up to the longest, and positions count from each one's first
token.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gelu,
    linear,
    log_softmax,
    softmax,
)

from ..packing import Packing, positions, sequence_of
from .config import Config
from .encoded import Encoded, Head, ModelOutput, SpanBeam, Targets

# The logit of what cannot be an answer. Even the sum of two fits into float16.
MASKED = -10000.0


class SpanHead(Head):
    """Start and end logits of every token, each by one linear layer; padding has MASKED.

    Targets past the sequence's end are not scored, those before its start count as the first token.

    Source: transformers' question answering models, which let padding compete with tokens.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, 2)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        encoded = _padded(encoded)
        logits = self.classifier(encoded.hidden)
        if encoded.mask is not None:
            logits = logits.masked_fill(~encoded.mask.bool().unsqueeze(-1), MASKED)
        start, end = output.start_logits, output.end_logits = logits.unbind(-1)
        if targets.start_positions is not None and targets.end_positions is not None:
            losses = (
                _position_loss(start, targets.start_positions),
                _position_loss(end, targets.end_positions),
            )
            output.loss = (losses[0] + losses[1]) / 2


class BeamSpanHead(Head):
    """P(start) P(end | start), and a logit of "the text does not hold the answer".

    start:      linear(token)
    end:        linear(gelu(dense(start's token, token)))
    impossible: linear(gelu(dense(first token, mean of the tokens weighted by P(start))))

    The loss scores the end given the true start, and adds the answerability's loss times its
    weight. Without targets, and in evaluation, a beam search finds the best spans.

    Source: XLNet, arXiv:1906.08237; google-research/electra's question answering.
    """

    def __init__(self, config: Config):
        super().__init__()
        hidden, size = config.hidden_size, config.span_hidden_size
        self.beam_size = config.span_beam_size
        self.weight = config.span_answerable_weight
        self.start = nn.Linear(hidden, 1)
        self.end_dense = nn.Linear(2 * hidden, size)
        self.end = nn.Linear(size, 1)
        self.answerable = config.span_answerable
        if self.answerable:
            self.impossible_dense = nn.Linear(2 * hidden, size)
            self.impossible = nn.Linear(size, 1)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        tokens, answer_mask = encoded.hidden.shape[:-1], encoded.answer_mask
        if answer_mask is not None and answer_mask.shape != tokens:
            raise ValueError(
                f"answer_mask must have one value a token, {list(tokens)}, "
                f"got {list(answer_mask.shape)}"
            )
        encoded = _padded(encoded)
        hidden, allowed = encoded.hidden, _allowed(encoded)
        start_logits = _masked(self.start(hidden), allowed)
        output.start_logits = start_logits
        if self.answerable:
            probs = softmax(start_logits, -1).to(hidden.dtype)
            pooled = torch.cat([encoded.first, (probs.unsqueeze(1) @ hidden).squeeze(1)], -1)
            logit = self.impossible(gelu(self.impossible_dense(pooled)))
            output.impossible_logits = wide(logit).squeeze(-1)
        # The dense layer on (start, token) is a sum of two, each of which runs once a token.
        states = linear(hidden, self.end_dense.weight.chunk(2, 1)[1], self.end_dense.bias)
        start, end = targets.start_positions, targets.end_positions
        if start is not None and end is not None:
            length = hidden.size(1)
            given = self._given(hidden, start.clamp(0, length - 1).unsqueeze(1)).squeeze(1)
            output.end_logits = self._end_logits(states, given, allowed)
            # Of a start past the sequence's end there is no end to score.
            end = torch.where(start < length, end, length)
            loss = _position_loss(start_logits, start) + _position_loss(output.end_logits, end)
            output.loss = loss / 2
            if output.impossible_logits is not None:
                impossible = targets.is_impossible
                output.loss = output.loss + self.weight * binary_cross_entropy_with_logits(
                    output.impossible_logits,
                    (start <= 0 if impossible is None else impossible).to(start_logits.dtype),
                )
        if output.loss is None or not self.training:
            output.beam = self._search(start_logits, hidden, states, allowed)

    def _search(
        self, start_logits: Tensor, hidden: Tensor, states: Tensor, allowed: Tensor
    ) -> SpanBeam:
        start_log_probs, start_index = _top(log_softmax(start_logits, -1), self.beam_size)
        given = self._given(hidden, start_index)
        # One start at a time: all of them together would hold [B, K, L, size].
        ends = [self._end_logits(states, one, allowed) for one in given.unbind(1)]
        end_log_probs, end_index = _top(log_softmax(torch.stack(ends, 1), -1), self.beam_size)
        return SpanBeam(start_index, start_log_probs, end_index, end_log_probs)

    def _given(self, hidden: Tensor, index: Tensor) -> Tensor:
        """What starts [B, K] add to the dense layer below the end, [B, K, size]."""
        chosen = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        return linear(chosen, self.end_dense.weight.chunk(2, 1)[0])

    def _end_logits(self, states: Tensor, given: Tensor, allowed: Tensor) -> Tensor:
        """[B, L, size], [B, size] -> [B, L]."""
        return _masked(self.end(gelu(states + given.unsqueeze(1))), allowed)


class EntityHead(Head):
    """One logit for each of a text's entities: does it answer the question?

    An entity is the mean of its tokens, weighted by the softmax of their scaled product with the
    sequence's first token; then dense, gelu, dropout, linear. Logits of padding are MASKED, and
    the loss, binary cross entropy, leaves padding out. The placeholder's position plays no part:
    it is a [MASK] in the question.

    Raises:
        ValueError: entity_spans are missing or of another shape.

    Source: microsoft/DeBERTa's ReCoRD model.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        rate = config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        encoded = _padded(encoded)
        hidden, spans = encoded.hidden, encoded.entity_spans
        if spans is None or spans.shape != (hidden.size(0), *spans.shape[1:2], 2):
            got = "none" if spans is None else list(spans.shape)
            raise ValueError(
                f"entity_spans must be [B, E, 2] with B = {hidden.size(0)} for an entity head, "
                f"got {got}"
            )
        start, end = spans.unsqueeze(-2).unbind(-1)
        position = torch.arange(hidden.size(1), device=hidden.device)
        inside = (start <= position) & (position < end)  # [B, E, L]
        if encoded.mask is not None:
            inside = inside & encoded.mask.bool().unsqueeze(1)
        scores = hidden @ (encoded.first / math.sqrt(hidden.size(-1))).unsqueeze(-1)
        weights = softmax(_masked(scores.unsqueeze(1), inside), -1).to(hidden.dtype)
        entities = self.dropout(gelu(self.proj(weights @ hidden)))
        real = inside.any(-1)
        logits = output.logits = _masked(self.classifier(entities), real)
        if targets.labels is not None:
            losses = binary_cross_entropy_with_logits(
                logits, targets.labels.to(logits.dtype), reduction="none"
            )
            output.loss = losses.where(real, 0).sum() / real.sum().clamp(min=1)


def _padded(encoded: Encoded) -> Encoded:
    """The same batch as a grid [B, L, ...], if it was packed."""
    cu_seqlens = encoded.cu_seqlens
    if cu_seqlens is None:
        return encoded
    total, batch, length = encoded.hidden.size(0), len(cu_seqlens) - 1, encoded.max_seqlen
    if length is None:
        length = int(cu_seqlens.diff().max())
    place = sequence_of(cu_seqlens, total) * length + positions(cu_seqlens, total)
    packing = Packing((batch, length), place, None, cu_seqlens, length)
    mask = encoded.mask
    if mask is None:
        mask = torch.ones(total, dtype=torch.bool, device=place.device)
    types, answers = encoded.token_type_ids, encoded.answer_mask
    return Encoded(
        packing.pad(encoded.hidden),
        encoded.table,
        packing.pad(mask),
        token_type_ids=None if types is None else packing.pad(types),
        answer_mask=None if answers is None else packing.pad(answers),
        entity_spans=encoded.entity_spans,
    )


def _allowed(encoded: Encoded) -> Tensor:
    """Which tokens may start or end an answer, bool [B, L]: see answer_mask of Model.forward."""
    shape, device = encoded.hidden.shape[:2], encoded.hidden.device
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    if encoded.mask is not None:
        allowed = encoded.mask.bool()
    if encoded.answer_mask is not None:
        allowed = allowed & encoded.answer_mask.bool()
    elif encoded.token_type_ids is not None:
        second = allowed & encoded.token_type_ids.bool()
        # In logical operators: onnxruntime cannot choose between booleans.
        allowed = second | (allowed & ~second.any(1, keepdim=True))
    first = torch.arange(shape[1], device=device) == encoded.first_place.unsqueeze(1)
    return allowed | first


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """[..., 1] -> [...], in float32 at least; allowed broadcasts to the result."""
    return wide(logits).squeeze(-1).masked_fill(~allowed, MASKED)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _top(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, or all if there are fewer. Of ties the earlier comes first, which topk
    does not promise."""
    values, index = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], index[..., :count]


def _position_loss(logits: Tensor, position: Tensor) -> Tensor:
    """Mean cross entropy of the positions that are not past the end; 0 if there are none."""
    length = logits.size(1)
    position = position.clamp(0, length)
    loss = cross_entropy(wide(logits), position, ignore_index=length, reduction="sum")
    return loss / (position < length).sum().clamp(min=1)
