"""Corruption: which tokens are masked, and what a generator puts in their place."""

from typing import NamedTuple

import torch
from torch import Tensor


class Masked(NamedTuple):
    """The chosen positions of a batch, a fixed number of places a row.

    positions: int64 [B, K], positions in the row. A row with fewer chosen ones has spare places.
    chosen: bool [B, K], False = a spare place. original: int64 [B, K], the tokens there.
    """

    positions: Tensor
    chosen: Tensor
    original: Tensor


def choose_positions(input_ids: Tensor, maskable: Tensor, fraction: float) -> Masked:
    """Draws round(fraction * maskable) positions of each row without replacement, at least one.

    Args:
        input_ids: int64 [B, L]. maskable: bool [B, L], False for special and padding tokens.
        fraction: in (0, 1); 0.15 in ELECTRA-Small and -Base, 0.25 in -Large.

    Source: ELECTRA, section 3.1.
    """
    available = maskable.sum(1)
    counts = (available * fraction).round().clamp(min=1).minimum(available)
    places = max(1, round(input_ids.size(1) * fraction))
    draws = torch.rand(input_ids.shape, device=input_ids.device).masked_fill_(~maskable, -1)
    positions = draws.topk(places, dim=1).indices
    chosen = torch.arange(places, device=input_ids.device) < counts[:, None]
    return Masked(positions, chosen, input_ids.gather(1, positions))


def substitute(input_ids: Tensor, masked: Masked, tokens: Tensor | int) -> Tensor:
    """A copy of input_ids with `tokens` ([B, K], or one id) at the chosen positions."""
    new = torch.where(masked.chosen, tokens, masked.original)
    return input_ids.scatter(1, masked.positions, new)


def sample(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws a token from softmax(logits / temperature): [..., vocab] -> int64 [...].

    One uniform number a draw, looked up in the cumulative distribution: a Gumbel number for every
    entry of the vocabulary would cost more than the rest of the step's sampling. No gradient
    flows through the draw.
    """
    with torch.no_grad():
        cumulative = (logits.detach().float() / temperature).softmax(-1).cumsum(-1)
        total = cumulative[..., -1:]
        draws = torch.rand(total.shape, device=logits.device) * total
        # right=True skips entries of probability zero; rounding can put a draw at the very end.
        tokens = torch.searchsorted(cumulative, draws, right=True).squeeze(-1)
        return tokens.clamp_(max=logits.size(-1) - 1)
