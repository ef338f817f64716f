"""Tokenised text: arrays in memory, or in the files of a directory that `prepare` wrote.

A prepared directory holds tokenizer.json, meta.json and numbered shards, each a directory:

    shard-00000/meta.json            counts, checksums, the position in the text after the shard
    shard-00000/train.tokens         uint16 (uint32 where the vocabulary needs it), little-endian
    shard-00000/train.documents      int64, where documents start, and the number of tokens
    shard-00000/train.sentences      uint32, where sentences start
    shard-00000/held_out.*           the same for the documents that are held out
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import tokenizer as tokenizers
from ..files import write_atomically

META = "meta.json"
ROWS = "rows"  # where tables of rows may be kept; see `examples`
FORMAT = 1
PARTS = ("train", "held_out")


class Tokens(NamedTuple):
    """Documents, each followed by one [SEP]. The arrays may be memory-mapped.

    tokens: uint16 or uint32 [T]. documents: int64 [D + 1], where each starts; the last is T.
    sentences: integers [S], where each starts, those that open a document among them.
    """

    tokens: np.ndarray
    documents: np.ndarray
    sentences: np.ndarray


class Part:
    """Documents by number, over several shards: `len(part)`, `part[i]` -> int64 [tokens]."""

    def __init__(self, shards: Sequence[Tokens]):
        self.shards = list(shards)
        counts = [len(shard.documents) - 1 for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        number = int(np.searchsorted(self._ends, i, "right"))
        shard = self.shards[number]
        i -= int(self._ends[number - 1]) if number else 0
        start, end = shard.documents[i : i + 2]
        return torch.from_numpy(shard.tokens[start : end - 1].astype(np.int64))

    @property
    def tokens(self) -> int:
        """Tokens of the documents, without the [SEP] that follow them."""
        return sum(len(shard.tokens) for shard in self.shards) - len(self)

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs, the [SEP] after documents among them: int64 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for shard in self.shards:
            for start in range(0, len(shard.tokens), 1 << 22):
                counts += np.bincount(shard.tokens[start : start + (1 << 22)], minlength=vocab_size)
        return torch.from_numpy(counts)


class Prepared(NamedTuple):
    """What a prepared directory holds."""

    directory: Path
    tokenizer: Any
    train: Part
    held_out: Part
    meta: dict[str, Any]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype of shards that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def is_prepared(directory: str | Path) -> bool:
    """Whether `prepare` wrote, or began to write, the directory."""
    return (Path(directory) / META).is_file()


def open_prepared(directory: str | Path, verify: bool = False) -> Prepared:
    """Opens a directory that `prepare` wrote; tokens stay on disk until they are read.

    Args:
        verify: also read every file and compare its checksum.

    Raises:
        FileNotFoundError: no such directory, or `prepare` did not write it.
        ValueError: `prepare` has not finished it, or a file is missing, damaged or truncated.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    if not meta["complete"]:
        raise ValueError(f"{directory} is not complete: run `fastdeberta prepare` again")
    if tokenizer_hash(directory) != meta["tokenizer"]:
        raise ValueError(f"{directory / tokenizers.FILE} is not the tokenizer of these tokens")
    parts: dict[str, list[Tokens]] = {name: [] for name in PARTS}
    for number in range(meta["shards"]):
        shard = shard_path(directory, number)
        counts = read_shard_meta(shard)
        for name in PARTS:
            try:
                tokens = _open_tokens(shard, name, counts[name], meta["dtype"], verify)
            except (KeyError, TypeError):
                raise ValueError(f"{shard / META} is damaged: it lacks counts") from None
            parts[name].append(tokens)
    tokenizer = tokenizers.load(directory)
    return Prepared(directory, tokenizer, Part(parts["train"]), Part(parts["held_out"]), meta)


def read_meta(directory: Path) -> dict[str, Any]:
    """The meta.json of a prepared directory, complete or not."""
    path = directory / META
    if not path.is_file():
        raise FileNotFoundError(f"{directory} was not made by `fastdeberta prepare`: no {META}")
    meta = _read_json(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format {meta.get('format')!r} is unknown, {FORMAT} is read")
    return meta


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}"


def read_shard_meta(shard: Path) -> dict[str, Any]:
    """Counts, checksums and the position after a shard."""
    path = shard / META
    if not path.is_file():
        raise ValueError(f"{shard} is missing or damaged: no {META}")
    return _read_json(path)


def tokenizer_hash(directory: Path) -> str:
    """SHA-256 of the directory's tokenizer.json."""
    path = directory / tokenizers.FILE
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ShardWriter:
    """Writes one shard into a directory; batches go straight to its files.

    tokens: written so far, of both parts.
    """

    def __init__(self, directory: Path, dtype: np.dtype):
        self.directory, self.tokens = directory, 0
        dtypes = {"tokens": dtype, "documents": np.dtype("<i8"), "sentences": np.dtype("<u4")}
        self._files = {name: [_File(directory, name, *f) for f in dtypes.items()] for name in PARTS}

    def add(self, name: str, batch: Tokens) -> None:
        """Appends documents to the part `name`."""
        tokens, documents, sentences = self._files[name]
        start = tokens.count
        documents.write(batch.documents[:-1] + start)
        sentences.write(batch.sentences.astype(np.int64) + start)
        tokens.write(batch.tokens)
        self.tokens += len(batch.tokens)

    def finish(self, position: Any) -> None:
        """Ends the files; `position` says where in the text the next shard begins."""
        meta: dict[str, Any] = {"position": position}
        for name, files in self._files.items():
            files[1].write(np.array([files[0].count]))
            meta[name] = {file.field: file.close() for file in files}
        write_atomically(self.directory / META, json.dumps(meta) + "\n")


class _File:
    """One array, appended to; its count and checksum."""

    def __init__(self, directory: Path, part: str, field: str, dtype: np.dtype):
        self.field, self.count, self._dtype, self._checksum = field, 0, dtype, 0
        self._stream = (directory / f"{part}.{field}").open("wb")

    def write(self, array: np.ndarray) -> None:
        data = array.astype(self._dtype).tobytes()
        self._stream.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self.count += len(array)

    def close(self) -> dict[str, int]:
        self._stream.close()
        return {"count": self.count, "crc32": self._checksum}


def _open_tokens(
    shard: Path, part: str, files: dict[str, dict[str, int]], dtype: str, verify: bool
) -> Tokens:
    dtypes = {"tokens": dtype, "documents": "<i8", "sentences": "<u4"}
    arrays = {}
    for field, kind in dtypes.items():
        path = shard / f"{part}.{field}"
        size = files[field]["count"] * np.dtype(kind).itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            there = "missing" if found is None else f"{found} bytes"
            raise ValueError(f"{path} is damaged or truncated: {there}, expected {size} bytes")
        # An empty file cannot be mapped.
        arrays[field] = np.memmap(path, kind, "r") if size else np.empty(0, kind)
        if verify and zlib.crc32(arrays[field].data) != files[field]["crc32"]:
            raise ValueError(f"{path} is damaged: its checksum is not the one it was written with")
    tokens = Tokens(**arrays)
    if len(tokens.documents) == 0 or tokens.documents[-1] != len(tokens.tokens):
        raise ValueError(f"{shard / part}.documents is damaged: it does not fit {part}.tokens")
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value
