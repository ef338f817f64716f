"""Features: examples as sequences of tokens with their targets, and batches of them.

A row is what training counts and shuffles: a text, a pair, a sentence, one window of a long text,
or a question with all its options, each of which is a sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..packing import pack
from ..tokenizer import CLS, MASK, SEP, special_id
from .examples import ChoiceExample, EntityExample, TaggedExample, TextExample
from .spans import Window, visible_offsets

# What ReCoRD writes for the entity that its query misses.
PLACEHOLDER = "@placeholder"

# Examples that are tokenised at a time: what the tokenizer returns is many times their size.
_CHUNK = 4096

Tokens = np.ndarray  # int32 [L]


class Batch(NamedTuple):
    """Rows for a model: packed, or padded on the right.

    input_ids, token_type_ids (0: first text, 1: second): int64 [T], or [B, L]. attention_mask: bool
    [B, L], None where packed. cu_seqlens, max_seqlen: None where padded. options: of questions with
    options, each of which is a sequence, how many; None: a row is one. targets: labels int64 [B] or
    float32 [B] (regression); start_positions, end_positions int64 [B]; entity_spans int64 [B, E, 2]
    with labels int64 [B, E]; places int64 [N], where the first sub-words stand among all of the
    batch's tokens, padding counted, with labels int64 [N].
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    options: tuple[int, ...] | None
    targets: dict[str, Tensor]


@dataclass(frozen=True)
class Ragged:
    """Several values a row: row i has values[starts[i] : starts[i + 1]]."""

    values: Tensor
    starts: Tensor

    def __getitem__(self, row: int) -> Tensor:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @classmethod
    def of(cls, rows: Sequence[Any], *shape: int) -> "Ragged":
        """Of one list (of lists of `shape`) a row."""
        values = [torch.tensor(row, dtype=torch.long).view(-1, *shape) for row in rows]
        sizes = torch.tensor([len(value) for value in values])
        return cls(torch.cat(values), torch.nn.functional.pad(sizes.cumsum(0), (1, 0)))


@dataclass(frozen=True)
class Features:
    """Encoded examples.

    tokens: int32 [T] of all sequences, end to end. starts: int64 [S + 1], where each begins.
    seconds: int64 [S], the place within each where its second text begins (its length: none).
    targets: of every row one value (Tensor) or several (Ragged), by the names in Batch. options:
    int64 [N], sequences of each row; None: one. windows: of a text in windows, where each row's
    tokens stand in the text. words: of tagging, the number of the word that each of a row's
    `places` begins.
    """

    tokens: Tensor
    starts: Tensor
    seconds: Tensor
    targets: dict[str, Tensor | Ragged] = field(default_factory=dict)
    options: Tensor | None = None
    windows: tuple[Window, ...] = ()
    words: Ragged | None = None

    @classmethod
    def of(cls, sequences: "list[tuple[Tokens, int]]", **rest: Any) -> "Features":
        """Of each sequence's tokens and the place of its second text."""
        sizes = torch.tensor([len(tokens) for tokens, _ in sequences])
        return cls(
            torch.from_numpy(np.concatenate([tokens for tokens, _ in sequences])),
            torch.nn.functional.pad(sizes.cumsum(0), (1, 0)),
            torch.tensor([second for _, second in sequences]),
            **rest,
        )

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1 if self.options is None else len(self.options)

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, of all its sequences: int64 [N]."""
        return self.starts[self._firsts].diff()

    @cached_property
    def _firsts(self) -> Tensor:
        """Of every row the first sequence, and of what would come next: int64 [N + 1]."""
        if self.options is None:
            return torch.arange(len(self.starts))
        return torch.nn.functional.pad(self.options.cumsum(0), (1, 0))

    def batch(self, rows: Sequence[int], packed: bool = True, pad_id: int = 0) -> Batch:
        """The rows `rows`, packed or padded with `pad_id` to the longest."""
        firsts = self._firsts
        sequences = [i for row in rows for i in range(int(firsts[row]), int(firsts[row + 1]))]
        options = None if self.options is None else tuple(self.options[list(rows)].tolist())
        ids = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in sequences]
        types = [
            torch.arange(len(x)) >= self.seconds[i] for x, i in zip(ids, sequences, strict=True)
        ]
        if packed:
            input_ids, cu_seqlens, max_seqlen = pack(ids)
            first = cu_seqlens[:-1]
            return Batch(
                input_ids,
                torch.cat(types).long(),
                None,
                cu_seqlens,
                max_seqlen,
                options,
                self._targets(rows, first.tolist()),
            )
        length = max(map(len, ids))
        input_ids = torch.full((len(ids), length), pad_id)
        token_type_ids = torch.zeros(len(ids), length, dtype=torch.long)
        for place, (tokens, second) in enumerate(zip(ids, types, strict=True)):
            input_ids[place, : len(tokens)] = tokens
            token_type_ids[place, : len(tokens)] = second
        sizes = torch.tensor([len(tokens) for tokens in ids])
        mask = torch.arange(length) < sizes.unsqueeze(1)
        targets = self._targets(rows, [i * length for i in range(len(ids))])
        return Batch(input_ids, token_type_ids, mask, None, None, options, targets)

    def _targets(self, rows: Sequence[int], first: list[int]) -> dict[str, Tensor]:
        """The targets of `rows`; first: where among the batch's tokens each of them begins."""
        targets: dict[str, Tensor] = {}
        for name, values in self.targets.items():
            if isinstance(values, Tensor):
                targets[name] = values[list(rows)]
            elif name == "places":
                parts = [values[row] + at for row, at in zip(rows, first, strict=True)]
                targets[name] = torch.cat(parts)
            elif "entity_spans" in self.targets:
                fill = -1 if name == "entity_spans" else 0
                targets[name] = torch.nn.utils.rnn.pad_sequence(
                    [values[row] for row in rows], batch_first=True, padding_value=fill
                )
            else:
                targets[name] = torch.cat([values[row] for row in rows])
        return targets


def batches(features: Features, budget: int, packed: bool = True) -> Iterator[list[int]]:
    """All rows, those of one length together, in lists of at most `budget` tokens (padding
    counted, unless packed) or of one row."""
    lengths = features.lengths
    chosen: list[int] = []
    total = 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        longest = int(lengths[chosen[0]]) if chosen and not packed else int(lengths[row])
        if chosen and total + longest > budget:
            yield chosen
            chosen, total = [], 0
        chosen.append(row)
        total += longest
    if chosen:
        yield chosen


def texts(
    tokenizer: Any,
    examples: Sequence[TextExample],
    labels: Sequence[str | float] | None,
    max_length: int,
) -> Features:
    """Texts and pairs of at most max_length tokens; the longer side of a pair is cut first.

    Args:
        labels: of each example its class's number, or a float; None: none.
    """
    sequences = []
    pairs = [example.pair is not None for example in examples]
    firsts = token_ids(tokenizer, [example.text for example in examples])
    seconds = token_ids(tokenizer, [e.pair for e in examples if e.pair is not None])
    for has_pair, first in zip(pairs, firsts, strict=True):
        second = next(seconds) if has_pair else None
        sequences.append(framed(tokenizer, *truncate(first, second, max_length)))
    targets = {} if labels is None else {"labels": torch.tensor(labels)}
    return Features.of(sequences, targets=targets)


def choices(
    tokenizer: Any,
    examples: Sequence[ChoiceExample],
    labels: Sequence[int] | None,
    max_length: int,
) -> Features:
    """One sequence, [CLS] text [SEP] option [SEP], for each option of each question.

    Raises:
        ValueError: a question without options.
    """
    sequences = []
    firsts = token_ids(tokenizer, [example.text for example in examples])
    options = token_ids(tokenizer, [option for e in examples for option in e.options])
    for number, (example, first) in enumerate(zip(examples, firsts, strict=True)):
        if not example.options:
            raise ValueError(f"example {number + 1} ({example.id}) has no options")
        for _ in example.options:
            sequences.append(framed(tokenizer, *truncate(first, next(options), max_length)))
    targets = {} if labels is None else {"labels": torch.tensor(labels)}
    counts = torch.tensor([len(example.options) for example in examples])
    return Features.of(sequences, targets=targets, options=counts)


def sentences(
    tokenizer: Any,
    examples: Sequence[TaggedExample],
    labels: Sequence[Sequence[int]] | None,
    max_length: int,
) -> Features:
    """Words between single spaces; each is scored at its first sub-word.

    Words beyond max_length, and those of which the tokenizer leaves nothing, have no place.

    Args:
        labels: of each example the numbers of its words' tags, -100: not scored; None: none.
    """
    sequences, places, words, targets = [], [], [], []
    lines = [" ".join(example.words) for example in examples]
    tokens = offset_tokens(tokenizer, lines)
    for number, (example, (ids, offsets)) in enumerate(zip(examples, tokens, strict=True)):
        ids, _ = truncate(ids, None, max_length)
        sequences.append(framed(tokenizer, ids, None))
        sizes = np.array([len(word) for word in example.words])
        ends = np.cumsum(sizes + 1) - 1
        starts, visible = offsets[: len(ids), 0], offsets[: len(ids), 1] > offsets[: len(ids), 0]
        # Of a token of characters the word, then of each word the first token.
        word = np.searchsorted(ends, starts, side="right")
        seen, first = np.unique(word[visible], return_index=True)
        first = np.flatnonzero(visible)[first]
        scored = seen < len(sizes)
        if labels is not None:
            scored &= np.array([labels[number][w] != -100 for w in seen], bool)
            targets.append([labels[number][w] for w in seen[scored]])
        places.append((first[scored] + 1).tolist())  # after [CLS]
        words.append(seen[scored].tolist())
    found: dict[str, Tensor | Ragged] = {"places": Ragged.of(places)}
    if labels is not None:
        found["labels"] = Ragged.of(targets)
    return Features.of(sequences, targets=found, words=Ragged.of(words))


def entities(
    tokenizer: Any, examples: Sequence[EntityExample], labelled: bool, max_length: int
) -> Features:
    """[CLS] text [SEP] query [SEP], in which [MASK] stands for the missing entity.

    The text is cut, and the query only beyond half of max_length; an entity that is cut off has
    the span (-1, -1).
    """
    sequences, spans, labels = [], [], []
    queries = token_ids(tokenizer, [e.query.replace(PLACEHOLDER, MASK) for e in examples])
    tokens = offset_tokens(tokenizer, [example.text for example in examples])
    for example, query, (ids, offsets) in zip(examples, queries, tokens, strict=True):
        query = query[: max_length // 2]
        ids = ids[: max_length - 3 - len(query)]
        sequences.append(framed(tokenizer, ids, query))
        of_row, answers = [], []
        for start, end in example.entities:
            inside = covering(offsets, start, end)
            kept = inside is not None and inside[1] < len(ids)
            # After [CLS]; the end is the token behind the last.
            of_row.append((inside[0] + 1, inside[1] + 2) if inside and kept else (-1, -1))
            answers.append(int(example.text[start:end] in (example.answers or ())))
        spans.append(of_row)
        labels.append(answers)
    targets: dict[str, Tensor | Ragged] = {"entity_spans": Ragged.of(spans, 2)}
    if labelled:
        targets["labels"] = Ragged.of(labels)
    return Features.of(sequences, targets=targets)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Iterator[Tokens]:
    """Each text's token ids, without special tokens."""
    for start in range(0, len(texts), _CHUNK):
        part = list(texts[start : start + _CHUNK])
        for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False):
            yield np.array(encoding.ids, np.int32)


def offset_tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[Tokens, np.ndarray]]:
    """Each text's token ids, and of every token the characters [start, end) that it covers, int64
    [L, 2]."""
    for start in range(0, len(texts), _CHUNK):
        part = list(texts[start : start + _CHUNK])
        encodings = tokenizer.encode_batch(part, add_special_tokens=False)
        for text, encoding in zip(part, encodings, strict=True):
            offsets = visible_offsets(text, encoding.offsets)
            yield np.array(encoding.ids, np.int32), np.asarray(offsets).reshape(-1, 2)


def covering(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that cover a part of the characters [start, end); None: none
    does."""
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def framed(tokenizer: Any, first: Tokens, second: Tokens | None) -> tuple[Tokens, int]:
    """[CLS] first [SEP] (second [SEP]), and the place where the second begins."""
    cls, sep = special_id(tokenizer, CLS), special_id(tokenizer, SEP)
    parts: list[Any] = [[cls], first, [sep], *([] if second is None else [second, [sep]])]
    return np.concatenate(parts).astype(np.int32), len(first) + 2


def truncate(first: Any, second: Any, max_length: int) -> tuple[Any, Any]:
    """Cuts so that [CLS] first [SEP] (second [SEP]) has at most max_length tokens, the longer side
    first; second may be None."""
    if second is None:
        return first[: max(0, max_length - 2)], None
    room = max(0, max_length - 3)
    cut = max(0, len(first) + len(second) - room)
    # Level the longer one first, then share what is left of the cut.
    excess = min(cut, abs(len(first) - len(second)))
    cut_first, cut_second = (excess, 0) if len(first) > len(second) else (0, excess)
    rest = cut - excess
    cut_first, cut_second = cut_first + rest // 2, cut_second + rest - rest // 2
    return first[: len(first) - cut_first], second[: len(second) - cut_second]
