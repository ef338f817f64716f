"""Rows of tokens in, corrupted batches out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..packing import sequence_of
from ..training.draws import Draws
from . import corruption
from .examples import Rows

# Phases. A step without one trains everything that there is.
CAUSAL = "causal"  # mlm+ar: from left to right
GENERATOR, DISCRIMINATOR = "generator", "discriminator"  # two_stage: what is trained
POLICY = "policy"  # adversarial: the generator is trained by reward


class RowSource(Protocol):
    """A text's rows: `source[int64 row numbers]` are its `Rows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Rows: ...

    def row_lengths(self, rows: Tensor, /) -> Tensor | None:
        """Tokens of each packed row, int64 [B]; None where rows are padded."""
        ...


class Batch(NamedTuple):
    """One micro-batch, all that is random about it drawn.

    input_ids, attention_mask, token_type_ids, cu_seqlens, max_seqlen: as in `Rows`.
    inputs: int64 like input_ids, what the first network to run reads.
    positions: int64 [N], the chosen tokens, or for a causal step all that predict; numbers in the
        flattened batch, ascending. targets: int64 [N], what is to be predicted there.
    weights: float32 [N], how often each was drawn; None: once.
    numbers: float32 [N], uniform in [0, 1), for the generator's samples; None where it has none.
    phase: what a step does where steps differ.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    inputs: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor | None
    numbers: Tensor | None
    phase: str

    @property
    def tokens(self) -> int:
        """Real tokens."""
        if self.attention_mask is None:
            return self.input_ids.numel()
        return int(self.attention_mask.sum())

    @property
    def chosen(self) -> float:
        """The chosen positions, each as often as it was drawn."""
        return len(self.positions) if self.weights is None else float(self.weights.sum())

    def lengths(self) -> Tensor:
        """Real tokens of each sequence, int64 [S]."""
        if self.attention_mask is None and self.cu_seqlens is None:
            return torch.full((len(self.input_ids),), self.input_ids.size(1))
        mask = self.attention_mask
        real = torch.ones_like(self.input_ids) if mask is None else mask.long()
        if self.cu_seqlens is None:
            return real.sum(1)
        counts = torch.zeros(len(self.cu_seqlens) - 1, dtype=torch.long)
        return counts.index_add(0, sequence_of(self.cu_seqlens, len(real)), real)


@dataclass
class Corruption:
    """How batches are corrupted.

    special: bool [vocab], tokens that are never chosen and never put in by chance.
    fraction: of the tokens, to be chosen. replacement: draw them as Google's ELECTRA does.
    max_ngram: above 1, choose spans of up to so many words. starts_word: bool [vocab], tokens with
        which a word starts; None: every token is a word.
    mask_token_fraction, random_token_fraction: of the chosen, those that become [MASK] and those
        that become a random token; the rest stay as they are.
    proposals: float64 [vocab], a cumulative distribution: a generator without a network, which
        puts its samples into `inputs`.
    """

    mask_id: int
    special: Tensor
    fraction: float = 0.15
    replacement: bool = False
    max_ngram: int = 1
    starts_word: Tensor | None = None
    mask_token_fraction: float = 1.0
    random_token_fraction: float = 0.0
    proposals: Tensor | None = None

    def __call__(
        self, rows: Rows, draws: Draws, phase: str = "", row_lengths: Tensor | None = None
    ) -> Batch:
        """Corrupts rows; the numbers of `draws` alone decide how.

        Args:
            row_lengths: int64 [B], tokens of each packed row; None: all have as many.
        """
        ids, sequence = rows.input_ids.flatten(), _sequences(rows)

        def uniform(*shape: int) -> Tensor:
            return _uniform(rows, draws, row_lengths, *shape)

        maskable = ~self.special[ids]
        if rows.attention_mask is not None:
            maskable &= rows.attention_mask.flatten()
        positions, weights = self._choose(rows, maskable, sequence, uniform)
        original = ids[positions]
        numbers = None
        if self.proposals is not None:
            put = corruption.inverse_cumulative(self.proposals, uniform()[positions].double())
        else:
            put = torch.full_like(original, self.mask_id)
            if self.mask_token_fraction < 1:
                put = corruption.split_masking(
                    original,
                    uniform(2)[positions],
                    self.mask_id,
                    (~self.special).nonzero().squeeze(1),
                    self.mask_token_fraction,
                    self.random_token_fraction,
                )
            numbers = uniform()[positions]
        inputs = ids.index_copy(0, positions, put).view_as(rows.input_ids)
        return Batch(*rows, inputs, positions, original, weights, numbers, phase)

    def _choose(
        self,
        rows: Rows,
        maskable: Tensor,
        sequence: Tensor,
        uniform: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        if self.max_ngram > 1:
            numbers = uniform(2)
            starts = None
            if self.starts_word is not None:
                starts = self.starts_word[rows.input_ids.flatten()]
            spans = corruption.choose_spans(
                maskable, sequence, numbers, self.fraction, self.max_ngram, starts
            )
            return spans, None
        numbers = uniform()
        if not self.replacement:
            return corruption.choose_positions(maskable, sequence, numbers, self.fraction), None
        lengths = sequence.bincount()
        tokens = lengths
        if rows.attention_mask is not None:
            tokens = sequence[rows.attention_mask.flatten().bool()].bincount(minlength=len(lengths))
        return corruption.draw_positions(
            maskable, sequence, numbers, self.fraction, lengths, tokens
        )


def causal(rows: Rows, phase: str) -> Batch:
    """Every real token but a sequence's first is predicted from those before it."""
    ids, sequence = rows.input_ids.flatten(), _sequences(rows)
    predicts = sequence[1:] == sequence[:-1]
    if rows.attention_mask is not None:
        real = rows.attention_mask.flatten().bool()
        predicts = predicts & real[1:] & real[:-1]
    positions = predicts.nonzero().squeeze(1)
    return Batch(*rows, rows.input_ids, positions, ids[positions + 1], None, None, phase)


def token_counts(source: RowSource, vocab_size: int, special: Sequence[int]) -> Tensor:
    """How often each token stands in a text, float64 [vocab], special ones never.

    Of a long text 10,000 rows are counted, evenly taken from all of it.
    """
    count = min(len(source), 10_000)
    rows = torch.arange(count) * len(source) // count
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for part in rows.split(256):
        counts += source[part].input_ids.flatten().bincount(minlength=vocab_size)
    counts[list(special)] = 0
    return counts


def _sequences(rows: Rows) -> Tensor:
    """Each token's sequence, int64 [T] of the flattened batch."""
    ids = rows.input_ids
    if rows.cu_seqlens is not None:
        return sequence_of(rows.cu_seqlens, len(ids))
    return torch.arange(len(ids)).repeat_interleave(ids.size(1))


def _uniform(rows: Rows, draws: Draws, row_lengths: Tensor | None, *shape: int) -> Tensor:
    """Numbers for every token of the flattened batch, [T, *shape], by row and place in it."""
    ids = rows.input_ids
    if rows.cu_seqlens is None:
        return draws.uniform(ids.size(1), *shape).flatten(0, 1)
    if row_lengths is not None:
        longest = int(row_lengths.max())
        return draws.uniform(longest, *shape)[torch.arange(longest) < row_lengths[:, None]]
    if len(ids) % draws.count:
        raise ValueError(
            f"row_lengths must be given for packed rows of several lengths, got {len(ids)} tokens "
            f"in {draws.count} rows"
        )
    return draws.uniform(len(ids) // draws.count, *shape).flatten(0, 1)
