"""Labelled text: reading it, naming its labels, batching it."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import read_lines
from ..tokenizer import CLS, SEP, special_id


class Example(NamedTuple):
    """A text, or a pair of texts, and its label (None when it has none)."""

    text: str
    pair: str | None
    label: str | None


class Encoded(NamedTuple):
    """Token ids of each example, with [CLS] and [SEP], and its label's number (or -1)."""

    ids: list[list[int]]
    types: list[list[int]]
    labels: Tensor


class Batch(NamedTuple):
    """One padded batch: int64 [B, L], bool [B, L], int64 [B, L], int64 [B]."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor


def read_examples(
    path: str | Path, text: str = "text", pair: str | None = None, label: str | None = "label"
) -> list[Example]:
    """Examples of a .jsonl, .tsv or .csv file (UTF-8; TSV and CSV with a header line).

    Args:
        text, pair, label: the names of the columns (keys); None: no such column.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, not UTF-8, a missing column, or no example; says which line.
    """
    path = Path(path)
    rows = _rows(path)
    names = [name for name in (text, pair, label) if name is not None]
    examples = []
    for number, row in rows:
        for name in names:
            if row.get(name) is None:
                raise ValueError(
                    f"{path}, line {number}: no {name!r}; it has {', '.join(map(str, row))}"
                )
        examples.append(
            Example(
                str(row[text]),
                None if pair is None else str(row[pair]),
                None if label is None else str(row[label]),
            )
        )
    if not examples:
        raise ValueError(f"no example in {path}")
    return examples


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    if path.suffix in (".jsonl", ".json"):
        for number, line in read_lines(path):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield number, row
    elif path.suffix in (".tsv", ".csv"):
        # With its end: a quoted field may go on in the next line.
        lines = (line + "\n" for _, line in read_lines(path))
        if path.suffix == ".tsv":  # GLUE's files use quotes as ordinary characters.
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.DictReader(lines)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    else:
        raise ValueError(f"{path}: expected a .jsonl, .tsv or .csv file")


def label_names(examples: Iterable[Example]) -> list[str]:
    """The distinct labels, sorted."""
    return sorted({e.label for e in examples if e.label is not None})


def encode(
    tokenizer, examples: Sequence[Example], labels: Sequence[str], max_length: int, where: str
) -> Encoded:
    """Tokenises examples to at most max_length tokens (of a pair, the longer side is cut).

    Args:
        labels: the labels that training knows. where: what the examples are, for errors.

    Raises:
        ValueError: a label that is not among them.
    """
    index = {name: i for i, name in enumerate(labels)}
    for i, example in enumerate(examples):
        if example.label is not None and example.label not in index:
            raise ValueError(
                f"{where}, example {i + 1}: label {example.label!r} was not seen in training; "
                f"known are {', '.join(labels)}"
            )
    numbers = [-1 if e.label is None else index[e.label] for e in examples]
    cls, sep = special_id(tokenizer, CLS), special_id(tokenizer, SEP)
    first = tokenizer.encode_batch_fast([e.text for e in examples], add_special_tokens=False)
    pairs = [i for i, e in enumerate(examples) if e.pair is not None]
    second = dict(
        zip(
            pairs,
            tokenizer.encode_batch_fast(
                [examples[i].pair for i in pairs], add_special_tokens=False
            ),
            strict=True,
        )
    )
    ids, types = [], []
    for i, encoding in enumerate(first):
        a = encoding.ids
        b = second[i].ids if i in second else None
        a, b = truncate(a, b, max_length)
        ids.append([cls, *a, sep] + ([] if b is None else [*b, sep]))
        types.append([0] * (len(a) + 2) + ([] if b is None else [1] * (len(b) + 1)))
    return Encoded(ids, types, torch.tensor(numbers))


def truncate(
    a: list[int], b: list[int] | None, max_length: int
) -> tuple[list[int], list[int] | None]:
    """Cuts so that [CLS] a [SEP] (b [SEP]) has at most max_length tokens, the longer side first."""
    if b is None:
        return a[: max(0, max_length - 2)], None
    room = max(0, max_length - 3)
    cut = max(0, len(a) + len(b) - room)
    # Level the longer one first, then share what is left of the cut.
    excess = min(cut, abs(len(a) - len(b)))
    cut_a, cut_b = (excess, 0) if len(a) > len(b) else (0, excess)
    rest = cut - excess
    cut_a, cut_b = cut_a + rest // 2, cut_b + rest - rest // 2
    return a[: len(a) - cut_a], b[: len(b) - cut_b]


def collate(encoded: Encoded, rows: Sequence[int], pad_id: int) -> Batch:
    """The examples `rows`, padded on the right to the longest."""
    length = max(len(encoded.ids[i]) for i in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    types = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for place, i in enumerate(rows):
        size = len(encoded.ids[i])
        input_ids[place, :size] = torch.tensor(encoded.ids[i])
        types[place, :size] = torch.tensor(encoded.types[i])
        mask[place, :size] = True
    return Batch(input_ids, mask, types, encoded.labels[list(rows)])
