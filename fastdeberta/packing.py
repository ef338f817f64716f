"""Packed batches: sequences of any length end to end, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Packing:
    """Where packed rows [T, ...] stand in the padded batch [B, L, ...] that they came from.

    shape: (B, L). kept: int64 [T], the rows of the flattened batch that are left. key_mask: bool
    [T], or None where every kept row is a token. cu_seqlens: int32 [B + 1]. max_seqlen: int.
    """

    shape: tuple[int, int]
    kept: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, mask: Tensor | None) -> "Packing | None":
        """Of a mask [B, L], nonzero = a token: the rows from each sequence's first token to its
        last. None where nothing would be left out. Reads the mask."""
        if mask is None or mask.dim() != 2:
            return None
        valid = mask.bool()
        if valid.all():
            return None
        # Positions are differences of indices: what lies between two tokens must stay.
        after_first = valid.cumsum(1) > 0
        before_last = valid.flip(1).cumsum(1).flip(1) > 0
        run = after_first & before_last
        lengths = run.sum(1)
        kept = run.flatten().nonzero().squeeze(1)
        key_mask = valid.flatten()[kept]
        return cls(
            (mask.size(0), mask.size(1)),
            kept,
            None if key_mask.all() else key_mask,
            nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            int(lengths.max()),
        )

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]; a first dimension of 1 stands for every sequence."""
        return x.expand(*self.shape, *x.shape[2:]).flatten(0, 1).index_select(0, self.kept)

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], zeros where there is no token."""
        if self.key_mask is not None:
            keep = self.key_mask.view(-1, *(1,) * (rows.dim() - 1))
            rows = rows.masked_fill(~keep, 0)
        batch, length = self.shape
        out = rows.new_zeros(batch * length, *rows.shape[1:])
        return out.index_copy(0, self.kept, rows).unflatten(0, self.shape)


class PaddedStates(Sequence[Tensor]):
    """A model's hidden states, packed, each padded when it is first read.

    first: one that stands before them and is padded already.
    """

    def __init__(self, states: Sequence[Tensor], packing: Packing, first: Tensor | None = None):
        before: list[Tensor] = [] if first is None else [first]
        self._states, self._packing = [*before, *states], packing
        self._padded: list[Tensor | None] = [*before, *(None for _ in states)]

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        state = self._padded[i]
        if state is None:
            state = self._padded[i] = self._packing.pad(self._states[i])
        return state


def pack(sequences: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor, int]:
    """Token ids of several sequences end to end, none of which will see another.

    Args:
        sequences: at least one; of each, its token ids.

    Returns:
        input_ids int64 [T], cu_seqlens int32 [B + 1] and max_seqlen, as models take them.

    Raises:
        ValueError: no sequence.
    """
    if not len(sequences):
        raise ValueError("sequences must hold at least one sequence, got none")
    parts = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    lengths = torch.tensor([len(part) for part in parts])
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(parts[0].device)
    return torch.cat(parts), cu_seqlens, int(lengths.max())


def positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each of `total` packed tokens' position within its sequence, int64 [T]."""
    index = torch.arange(total, device=cu_seqlens.device)
    return index - cu_seqlens[sequence_of(cu_seqlens, total)]


def sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """Each of `total` packed tokens' sequence, int64 [T]."""
    index = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.bucketize(index, cu_seqlens[1:], right=True)
