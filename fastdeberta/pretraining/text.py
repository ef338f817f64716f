"""Text in, training rows out: corpora, held-out parts, packing."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..datasets import wiki_leads
from ..files import read_lines
from ..tokenizer import CLS, PAD, SEP, special_id

EMBEDDED = "wiki-leads"


def read_documents(source: str | Path) -> list[str]:
    """The documents of a corpus.

    Args:
        source: "wiki-leads", the embedded text; a .jsonl file of objects with a "text"; a text
            file whose documents are separated by blank lines; or a directory of such files.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: not UTF-8, a line that is not such an object, or no text at all.
    """
    if source == EMBEDDED:
        return [article.text for article in wiki_leads()]
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    else:
        files = [path]
    documents = [
        document
        for file in files
        for document in (_jsonl(file) if file.suffix == ".jsonl" else _paragraphs(file))
    ]
    if not documents:
        raise ValueError(f"data: no text in {source}")
    return documents


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with a "text"'
            ) from None
        if isinstance(text, str) and text.strip():
            yield text


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in read_lines(path):
        if line.strip():
            lines.append(line.strip())
        elif lines:
            yield " ".join(lines)
            lines = []
    if lines:
        yield " ".join(lines)


def split(documents: Sequence, held_out: float, seed: int = 0) -> tuple[list, list]:
    """Shuffles and splits: (the rest, a `held_out` fraction, at least one of each if possible)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(len(documents) * held_out)), len(documents) - 1)
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]


def pack(tokenizer, documents: Sequence[str], length: int) -> Tensor:
    """Documents as rows of `length` tokens, [rows, length] int64.

    Each row is [CLS] tokens [SEP]; documents follow one another, separated by [SEP]. Only the last
    row may end in [PAD].
    """
    if length < 4:
        raise ValueError(f"sequence_length must be at least 4, got {length}")
    cls, sep, pad = (special_id(tokenizer, t) for t in (CLS, SEP, PAD))
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    pieces = [torch.tensor([*e.ids, sep]) for e in encodings]
    stream = torch.cat(pieces)[:-1]
    width = length - 2
    rows = -(-stream.numel() // width)
    body = torch.full((rows * width,), pad)
    body[: stream.numel()] = stream
    packed = torch.full((rows, length), cls)
    packed[:, 1:-1] = body.view(rows, width)
    packed[:, -1] = sep
    used = stream.numel() - (rows - 1) * width
    if used < width:  # The last row's [SEP] follows its text.
        packed[-1, used + 1], packed[-1, -1] = sep, pad
    return packed
