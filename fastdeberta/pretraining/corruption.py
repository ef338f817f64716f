"""Corruption: which tokens are chosen, what stands in their place, and draws from a generator.

Tokens are numbered through the whole batch, [B * L] of a padded one and [T] of a packed one, so
that both are treated alike. Every function is one of its arguments: random numbers are given.
"""

import torch
from torch import Tensor


def choose_positions(
    maskable: Tensor, sequence: Tensor, numbers: Tensor, fraction: float
) -> Tensor:
    """Chooses round(fraction * maskable) tokens of each sequence, at least one, each once.

    Args:
        maskable: bool [T], False for special and padding tokens.
        sequence: int64 [T], each token's sequence, ascending.
        numbers: float32 [T], uniform in [0, 1).
        fraction: in (0, 1); 0.15 in ELECTRA-Small and -Base, 0.25 in -Large.

    Returns:
        int64 [N], ascending.

    Source: ELECTRA, section 3.1.
    """
    candidates, available, starts = _candidates(maskable, sequence)
    counts = (available * fraction).round().clamp(min=1).minimum(available)
    # A number below one added to the sequence's own sorts within sequences.
    order = (sequence[candidates].double() + numbers[candidates].double()).argsort()
    candidates = candidates[order]
    own = sequence[candidates]
    rank = torch.arange(len(candidates)) - starts[own]
    return candidates[rank < counts[own]].sort().values


def draw_positions(
    maskable: Tensor,
    sequence: Tensor,
    numbers: Tensor,
    fraction: float,
    lengths: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws tokens of each sequence with replacement, as Google's ELECTRA does.

    A sequence gets round(fraction * tokens) draws, special tokens counted, at least one and at most
    max_predictions = int((fraction + 0.005) * length).

    Args:
        maskable, sequence, numbers, fraction: see `choose_positions`.
        lengths: int64 [S], each sequence's length with padding. tokens: the same without.

    Returns:
        The chosen tokens, int64 [N], ascending, and how often each was drawn, float32 [N].

    Source: google-research/electra, pretrain_helpers.
    """
    candidates, available, starts = _candidates(maskable, sequence)
    most = ((fraction + 0.005) * lengths.double()).long().clamp(min=1)
    draws = (fraction * tokens.double()).round().long().clamp(min=1).minimum(most)
    draws = draws.where(available > 0, 0)
    first = torch.zeros_like(lengths)
    first[1:] = lengths.cumsum(0)[:-1]
    place = torch.arange(len(sequence)) - first[sequence]
    drawing = (place < draws[sequence]).nonzero().squeeze(1)
    own = sequence[drawing]
    index = (numbers[drawing].double() * available[own]).long().minimum(available[own] - 1)
    positions, counts = candidates[starts[own] + index].unique(return_counts=True)
    return positions, counts.float()


def choose_spans(
    maskable: Tensor,
    sequence: Tensor,
    numbers: Tensor,
    fraction: float,
    max_ngram: int,
    starts_word: Tensor | None = None,
) -> Tensor:
    """Chooses spans of 1 to max_ngram words, n words with probability proportional to 1/n.

    Spans are taken in random order; one that meets a chosen word, reaches past a special token or
    holds more tokens than are still to be chosen is passed over. So a sequence gets at most
    round(fraction * maskable) tokens, and at least one word.

    Args:
        maskable, sequence, fraction: see `choose_positions`.
        numbers: float32 [T, 2], uniform in [0, 1).
        starts_word: bool [T], tokens with which a word starts. None: every token is a word.

    Returns:
        int64 [N], ascending.

    Source: DeBERTa, appendix A; microsoft/DeBERTa's masked language model.
    """
    candidates, available, _ = _candidates(maskable, sequence)
    if not len(candidates):
        return candidates
    counts = (available * fraction).round().clamp(min=1).long().tolist()
    own = sequence[candidates]
    # A run holds maskable tokens that follow one another; a word ends with its run.
    run = torch.ones_like(candidates, dtype=torch.bool)
    run[1:] = (candidates.diff() > 1) | (own.diff() > 0)
    word = torch.ones_like(run) if starts_word is None else run | starts_word[candidates]
    first = word.nonzero().squeeze(1)  # Each word's first token, as a place in `candidates`.
    end = torch.cat([first[1:], torch.tensor([len(candidates)])]).tolist()
    run_of = run.cumsum(0)[first].tolist()
    sequence_of = own[first].tolist()
    weights = 1 / torch.arange(1, max_ngram + 1)
    cumulative = (weights / weights.sum()).cumsum(0)
    draws = numbers[candidates[first]]
    length = torch.searchsorted(cumulative, draws[:, 1].contiguous(), right=True) + 1
    lengths, begin = length.clamp(max=max_ngram).tolist(), first.tolist()
    covered = [False] * len(begin)
    left = dict(enumerate(counts))
    untouched = set(sequence_of)
    picked: list[int] = []
    for u in draws[:, 0].argsort().tolist():
        own_sequence = sequence_of[u]
        room, last = left[own_sequence], u + lengths[u] - 1
        if room <= 0 or last >= len(run_of) or run_of[last] != run_of[u]:
            continue
        size = end[last] - begin[u]
        # The first span of all may be a word longer than the budget.
        fits = size <= room or (own_sequence in untouched and lengths[u] == 1)
        if not fits or any(covered[u : last + 1]):
            continue
        covered[u : last + 1] = [True] * lengths[u]
        untouched.discard(own_sequence)
        left[own_sequence] = room - size
        picked.extend(range(begin[u], end[last]))
    for u, own_sequence in enumerate(sequence_of):
        if own_sequence in untouched:  # Every span reached too far: its first word, then.
            untouched.discard(own_sequence)
            picked.extend(range(begin[u], end[u]))
    return candidates[torch.tensor(sorted(picked), dtype=torch.long)]


def split_masking(
    original: Tensor,
    numbers: Tensor,
    mask_id: int,
    allowed: Tensor,
    mask_token_fraction: float,
    random_token_fraction: float,
) -> Tensor:
    """What masked language models read at chosen positions: [MASK], a random token or the original.

    Args:
        original: int64 [N]. numbers: float32 [N, 2], uniform in [0, 1).
        allowed: int64 [A], the tokens that may stand there by chance.
        mask_token_fraction, random_token_fraction: 0.8 and 0.1 in BERT.
    """
    choice = numbers[:, 0]
    index = (numbers[:, 1].double() * len(allowed)).long().clamp(max=len(allowed) - 1)
    kept = torch.where(
        choice < mask_token_fraction + random_token_fraction, allowed[index], original
    )
    return torch.where(choice < mask_token_fraction, mask_id, kept)


def sample(logits: Tensor, numbers: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws from softmax(logits / temperature) by its inverse cumulative distribution.

    One uniform number a draw: a Gumbel number for every entry of the vocabulary would cost more
    than the rest of the step's sampling. No gradient flows through the draw.

    Args:
        logits: [..., vocab]. numbers: float32 [...], uniform in [0, 1).

    Returns:
        int64 [...].
    """
    with torch.no_grad():
        cumulative = (logits.detach().float() / temperature).softmax(-1).cumsum(-1)
        return inverse_cumulative(cumulative, numbers)


def inverse_cumulative(cumulative: Tensor, numbers: Tensor) -> Tensor:
    """The entry at which `cumulative` [..., V] passes numbers [...] times its last value."""
    draws = numbers.unsqueeze(-1) * cumulative[..., -1:]
    # right=True skips entries of probability zero; rounding can put a draw at the very end.
    tokens = torch.searchsorted(cumulative, draws, right=True).squeeze(-1)
    return tokens.clamp_(max=cumulative.size(-1) - 1)


def gumbel_sample(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws from softmax(logits / temperature) as ELECTRA's authors do: argmax with Gumbel noise.

    The noise is torch's own, so that draws depend on how a batch was divided.
    """
    with torch.no_grad():
        noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
        return (logits.detach().float() / temperature + noise).argmax(-1)


def _candidates(maskable: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maskable tokens; how many each sequence has, int64 [S]; and where its first one is."""
    candidates = maskable.nonzero().squeeze(1)
    count = int(sequence[-1]) + 1 if len(sequence) else 0
    available = sequence[candidates].bincount(minlength=count)
    return candidates, available, available.cumsum(0) - available
