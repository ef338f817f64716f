"""Text in, tokens out: corpora document by document, held-out parts, tokenisation."""

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..datasets import wiki_leads
from ..files import read_lines
from ..tokenizer import SEP, special_id
from .shards import Tokens, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMBEDDED = "wiki-leads"
STREAMED = "datasets:"  # begins the name of what the library `datasets` reads
_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Documents encoded at a time: encodings are far larger than their tokens.
_ENCODED = 1024
# A sentence ends behind its mark and what closes around it, or with a line.
_SENTENCE_END = re.compile(
    r"""[.!?]["'\u2019\u201d)\]\u00bb]*(?=\s)|[\u3002\uff01\uff1f]+|(?<!\n)(?=\n)"""
)


class Corpus:
    """The documents of a corpus, read one by one, from any of them on.

    Args:
        source: "wiki-leads", the embedded text; a .jsonl file of objects with a "text"; a .parquet
            file with such a column; a text file whose documents are separated by blank lines; a
            directory of such files; or "datasets:NAME", what `datasets.load_dataset` streams: a
            dataset of the hub, or a local one.
        column: what "text" is called. config, split: of a dataset.

    Raises:
        FileNotFoundError: no such file or directory.
    """

    def __init__(
        self,
        source: str | Path,
        column: str = "text",
        config: str | None = None,
        split: str = "train",
    ):
        self.source, self.column, self.config, self.split = str(source), column, config, split
        self.streamed = self.source.startswith(STREAMED)
        self.files: list[Path] = []  # none: the text is not in files
        if self.streamed or self.source == EMBEDDED:
            return
        path = Path(source)
        if path.is_dir():
            self.files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        else:
            self.files = [path]
        if not self.files:
            raise ValueError(f"data: no text in {source}, no {', '.join(_SUFFIXES)}")
        if not self.files[0].is_file():
            raise FileNotFoundError(f"no such file: {path}")

    def read(self, file: int = 0, skip: int = 0) -> Iterator[tuple[int, int, str]]:
        """The documents from number `skip` of file number `file` on.

        Yields:
            (the number of the file, that of the next document in it, the document). A corpus that
            is not in files counts as one.

        Raises:
            ValueError: not UTF-8, a line that is no such object, no such column, a damaged file.
        """
        for number in range(file, max(1, len(self.files))):
            for position, document in enumerate(self._read_file(number, skip), skip + 1):
                yield number, position, document
            skip = 0

    def _read_file(self, number: int, skip: int) -> Iterator[str]:
        if self.streamed:
            return self._stream(skip)
        if not self.files:
            return islice((article.text for article in wiki_leads()), skip, None)
        path = self.files[number]
        if path.suffix == ".jsonl":
            documents = _jsonl(path, self.column)
        elif path.suffix == ".parquet":
            documents = _parquet(path, self.column)
        else:
            documents = _paragraphs(path)
        return islice(documents, skip, None)

    def _stream(self, skip: int) -> Iterator[str]:
        try:
            import datasets  # type: ignore[import-not-found]
        except ImportError:
            raise _missing("datasets", self.source) from None
        name = self.source.removeprefix(STREAMED)
        rows = datasets.load_dataset(name, self.config, split=self.split, streaming=True)
        for row in rows.skip(skip):
            text = row.get(self.column, 0)
            if not isinstance(text, str | None):
                raise ValueError(f"data: {self.source} has no texts in a column {self.column!r}")
            yield text or ""


def read_documents(source: str | Path) -> list[str]:
    """All documents of a corpus that fits in memory; for `source` see `Corpus`.

    Raises:
        FileNotFoundError, ValueError: see `Corpus`; or there is no text at all.
    """
    documents = [text for *_, text in Corpus(source).read() if text.strip()]
    if not documents:
        raise ValueError(f"data: no text in {source}")
    return documents


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(
                f'{path}, line {number}: expected a JSON object with a "{column}"'
            ) from None
        if isinstance(text, str) and text.strip():
            yield text


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow  # type: ignore[import-not-found]
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", str(path)) from None
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(
                    f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    if isinstance(text, str) and text.strip():
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file, or damaged: {error}") from None


def _missing(package: str, what: str) -> ValueError:
    return ValueError(f"data: {what} needs {package}: pip install 'fastdeberta[data]'")


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


def tokenize(tokenizer: "Tokenizer", documents: Sequence[str]) -> Tokens:
    """Documents as tokens, each followed by [SEP]; those without any token are left out.

    A sentence ends with . ! ? before a space, with their full-width forms, or with a line.
    """
    sep = special_id(tokenizer, SEP)
    tokens, starts, sentences = array("I"), array("q", [0]), array("q")
    for first in range(0, len(documents), _ENCODED):
        some = documents[first : first + _ENCODED]
        encodings = tokenizer.encode_batch(some, add_special_tokens=False)
        for document, encoding in zip(some, encodings, strict=True):
            ids = encoding.ids
            if not ids:
                continue
            offsets = encoding.offsets
            # The tokens that begin at a sentence's end or behind it belong to the next one.
            opening = (bisect_left(offsets, (m.end(),)) for m in _SENTENCE_END.finditer(document))
            sentences.extend(sorted({len(tokens) + i for i in (0, *opening) if i < len(ids)}))
            tokens.extend(ids)
            tokens.append(sep)
            starts.append(len(tokens))
    dtype = token_dtype(tokenizer.get_vocab_size())
    return Tokens(np.array(tokens, dtype), np.array(starts), np.array(sentences))


def split(documents: Sequence, held_out: float, seed: int = 0) -> tuple[list, list]:
    """Shuffles and splits: (the rest, a `held_out` fraction, at least one of each if possible)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(len(documents) * held_out)), len(documents) - 1)
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]
