"""Training rows of tokenised documents, by number."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tokenizer import CLS, PAD, SEP, special_id
from ..training.order import mix, uniform
from .shards import Part, Tokens

# Of ELECTRA's examples: the share that are one segment, and that are short.
_SINGLE, _SHORT = 0.1, 0.05
_LEAST_SHORT = 5

Table = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Some rows. Padded: input_ids int64 [B, L], with attention_mask bool [B, L] or None without
    padding, and token_type_ids int64 [B, L] or None if all are 0. Packed: input_ids [T], and
    sequence i is cu_seqlens[i] to cu_seqlens[i + 1] (int32 [S + 1]), max_seqlen tokens at most.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class Examples(ABC):
    """Rows of `length` tokens at most: `len(examples)`, `examples[int64 row numbers]` -> Rows.

    Which tokens a row has is a function of the text, the length and the seed. Tables of where rows
    start are made once; the tokens stay where they are until a row is read.

    Args:
        directory: where tables are kept and found again; None, or where nothing can be written:
            in memory.

    Raises:
        ValueError: length is too small, or there are no rows.
    """

    layout: str
    columns: tuple[str, ...] = ()  # of a shard's table

    def __init__(
        self,
        part: Part,
        tokenizer: Any,
        length: int,
        seed: int = 0,
        directory: str | Path | None = None,
    ):
        if length < _LEAST_SHORT:
            raise ValueError(f"sequence_length must be at least {_LEAST_SHORT}, got {length}")
        self.part, self.length, self.seed = part, length, seed
        self.cls, self.sep, self.pad = (special_id(tokenizer, t) for t in (CLS, SEP, PAD))
        self._tables = [self._stored(t, i, directory) for i, t in enumerate(part.shards)]
        counts = [self._count(t, table) for t, table in zip(part.shards, self._tables, strict=True)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not len(self):
            raise ValueError("the data hold no rows")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Tensor) -> Rows:
        numbers = index.numpy()
        if ((numbers < 0) | (numbers >= len(self))).any():
            raise IndexError(f"row numbers must be in [0, {len(self)}), got {index.tolist()}")
        return self._rows([self._locate(int(number)) for number in numbers])

    def row_lengths(self, index: Tensor) -> Tensor | None:
        """Tokens of each packed row, int64 [B]; None where rows are padded."""
        return None

    def _locate(self, row: int) -> tuple[Tokens, Table, int]:
        shard = int(np.searchsorted(self._ends, row, "right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self.part.shards[shard], self._tables[shard], row - first

    def _stored(self, tokens: Tokens, shard: int, directory: str | Path | None) -> Table:
        """The table of a shard, mapped from files if it can be.

        Each file appears whole, and what it holds is always the same: several processes may write
        it at once.
        """
        if directory is None or not self.columns:
            return self._table(tokens, shard)
        place = Path(directory) / f"{self.layout}-{self.length}-{self.seed}"
        paths = {name: place / f"{shard:05d}.{name}.npy" for name in self.columns}
        try:
            return _map(paths)
        except (OSError, ValueError):  # not there, or damaged
            table = self._table(tokens, shard)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name, path in paths.items():
                fresh = path.with_name(f".{path.name}.writing-{os.getpid()}")
                with fresh.open("wb") as stream:
                    np.save(stream, table[name])
                    stream.flush()
                    os.fsync(stream.fileno())
                fresh.replace(path)
            return _map(paths)
        except OSError:  # a place that cannot be written
            return table

    def _table(self, tokens: Tokens, shard: int) -> Table:
        """Where the rows of a shard are; arrays by name."""
        return {}

    @abstractmethod
    def _count(self, tokens: Tokens, table: Table) -> int:
        """How many rows a shard has."""

    @abstractmethod
    def _rows(self, places: list[tuple[Tokens, Table, int]]) -> Rows: ...

    def _padded(self, bodies: list[tuple[np.ndarray, ...]]) -> Rows:
        """[CLS] segment [SEP] (segment [SEP]) for each row."""
        ids = np.full((len(bodies), self.length), self.pad, np.int64)
        types = np.zeros_like(ids)
        mask = np.zeros(ids.shape, bool)
        ids[:, 0] = self.cls
        for row, segments in enumerate(bodies):
            end = 1
            for number, segment in enumerate(segments):
                start, end = end, end + len(segment) + 1
                ids[row, start : end - 1] = segment
                ids[row, end - 1] = self.sep
                types[row, start:end] = number
            mask[row, :end] = True
        return Rows(
            torch.from_numpy(ids),
            None if mask.all() else torch.from_numpy(mask),
            torch.from_numpy(types) if types.any() else None,
        )


def _map(paths: dict[str, Path]) -> Table:
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


class StreamExamples(Examples):
    """[CLS] tokens [SEP]: documents follow one another, separated by [SEP], and rows are full but
    for the last of each shard. A row may hold the end of a document and the start of the next."""

    layout = "stream"

    def _count(self, tokens: Tokens, table: Table) -> int:
        return -(-max(0, len(tokens.tokens) - 1) // (self.length - 2))

    def _rows(self, places: list[tuple[Tokens, Table, int]]) -> Rows:
        width = self.length - 2
        # The [SEP] of the shard's last document is the one that ends the row.
        return self._padded(
            [(t.tokens[:-1][row * width : (row + 1) * width],) for t, _, row in places]
        )


class SegmentExamples(Examples):
    """[CLS] A [SEP] B [SEP], from one document: the examples of ELECTRA and BERT.

    A row gathers sentences until it has `length` tokens (5 % of rows: a random number from 5 to
    `length`). 10 % of rows are one segment; in the others A takes sentences while it stays below
    half of that number ((number - 3) // 2), always the first, and with probability 1/2 the one that
    passes it; B takes the rest.

    Source: google-research/electra, build_pretraining_dataset.py. What it cuts off an example that
    got too long it drops; here the next row begins with it, unless the document ends there and it
    is less than half a row. It may also put a short sentence that follows those of B at the end of
    A; here B takes it.
    """

    layout = "segments"
    columns = ("start", "first", "second")

    def _table(self, tokens: Tokens, shard: int) -> Table:
        """start int64 [R]; first, second int32 [R]: tokens of A and of B.

        Steps through all documents of the shard at once: number i of the loop makes their i-th row.
        """
        length = self.length
        boundaries = np.append(tokens.sentences, len(tokens.tokens)).astype(np.int64)
        start = np.asarray(tokens.documents[:-1], np.int64)
        end = np.asarray(tokens.documents[1:], np.int64) - 1  # where the [SEP] is
        key = mix(self.seed, shard)
        found = []

        def following(place: np.ndarray) -> np.ndarray:
            """The first end of a sentence at `place` or behind it, in the document."""
            index = np.searchsorted(boundaries, place).clip(max=len(boundaries) - 1)
            return np.minimum(boundaries[index], end)

        while len(start):
            draws = [uniform(key, start, number) for number in range(4)]
            short = _LEAST_SHORT + (draws[1] * (length - _LEAST_SHORT + 1)).astype(np.int64)
            target = np.where(draws[0] < _SHORT, short, length)
            gathered = following(start + target)

            half = (target - 3) // 2
            index = np.searchsorted(boundaries, start + half) - 1
            below = np.where(end < start + half, end, boundaries[index])
            split = np.where(below > start, below, following(start + 1))
            passing = (split - start < half) & (split < gathered) & (draws[2] < 0.5)
            split = np.minimum(np.where(passing, following(split + 1), split), gathered)
            split = np.where(draws[3] < _SINGLE, gathered, split)

            first = np.minimum(split - start, length - 2)
            room = np.maximum(length - 3 - first, 0)
            second = np.minimum(gathered - start - first, room)
            found.append((start, first, second))
            start = start + first + second
            rest = end - start
            left = (rest > 0) & ((gathered < end) | (rest >= (length - 3) // 2))
            start, end = start[left], end[left]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)] or [start] * 3
        order = np.argsort(columns[0])
        kinds = {"start": np.int64, "first": np.int32, "second": np.int32}
        return {
            name: column[order].astype(kind)
            for (name, kind), column in zip(kinds.items(), columns, strict=True)
        }

    def _count(self, tokens: Tokens, table: Table) -> int:
        return len(table["start"])

    def _rows(self, places: list[tuple[Tokens, Table, int]]) -> Rows:
        bodies: list[tuple[np.ndarray, ...]] = []
        for tokens, table, row in places:
            start, first, second = (int(table[name][row]) for name in ("start", "first", "second"))
            body = tokens.tokens[start : start + first + second]
            bodies.append((body[:first], body[first:]) if second else (body,))
        return self._padded(bodies)


class PackedExamples(Examples):
    """Documents as sequences [CLS] tokens [SEP] of their own, several in a row.

    A document that is longer than a row is split into full rows and a rest. Rows are filled with
    the longest piece there is, then with the longest that fits beside it, until none does.
    """

    layout = "packed"
    columns = ("start", "length", "rows")

    def _table(self, tokens: Tokens, shard: int) -> Table:
        """start int64 [N], length int32 [N]: pieces, row by row. rows int64 [R + 1]: where each
        row's pieces start."""
        width = self.length - 2
        documents = np.asarray(tokens.documents, np.int64)
        starts, lengths = documents[:-1], documents[1:] - documents[:-1] - 1
        pieces = -(-lengths // width)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = np.repeat(starts, pieces) + number * width
        length = np.minimum(np.repeat(lengths, pieces) - number * width, width)

        # Pieces by length, those of a length in random order: neighbours in a row have little in
        # common.
        order = np.lexsort((mix(self.seed, shard, start), length))
        last = np.searchsorted(length[order], np.arange(1, width + 1), "right").tolist()
        first = [0, *last[:-1]]
        # longest[n]: the longest length up to n that may have pieces left; halved as it is used.
        longest = list(range(width + 1))

        def fitting(room: int) -> int:
            """The longest length up to `room` of which a piece is left; 0: none."""
            path = []
            while room > 0 and (longest[room] != room or first[room - 1] == last[room - 1]):
                path.append(room)
                room = longest[room] if longest[room] != room else room - 1
            for place in path:
                longest[place] = room
            return max(room, 0)

        picked: list[int] = []
        rows = [0]
        while len(picked) < len(order):
            room = self.length
            while size := fitting(room - 2):
                picked.append(first[size - 1])
                first[size - 1] += 1
                room -= size + 2
            rows.append(len(picked))
        order = order[np.array(picked, np.int64)]
        return {
            "start": start[order],
            "length": length[order].astype(np.int32),
            "rows": np.array(rows),
        }

    def row_lengths(self, index: Tensor) -> Tensor:
        lengths = []
        for _, table, row in map(self._locate, index.tolist()):
            begin, end = table["rows"][row : row + 2].tolist()
            lengths.append(int(table["length"][begin:end].sum()) + 2 * (end - begin))
        return torch.tensor(lengths)

    def _count(self, tokens: Tokens, table: Table) -> int:
        return len(table["rows"]) - 1

    def _rows(self, places: list[tuple[Tokens, Table, int]]) -> Rows:
        pieces: list[np.ndarray] = []
        for tokens, table, row in places:
            begin, end = table["rows"][row : row + 2]
            for start, length in zip(
                table["start"][begin:end].tolist(), table["length"][begin:end].tolist(), strict=True
            ):
                pieces.append(tokens.tokens[start : start + length])
        lengths = np.array([len(piece) + 2 for piece in pieces], np.int64)
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            ids[end - 1 - len(piece) : end - 1] = piece
        ids[ends - lengths], ids[ends - 1] = self.cls, self.sep
        cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
        return Rows(
            torch.from_numpy(ids),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=int(lengths.max(initial=0)),
        )


LAYOUTS: dict[str, type[Examples]] = {
    kind.layout: kind for kind in (StreamExamples, SegmentExamples, PackedExamples)
}


def make_examples(
    layout: str,
    part: Part,
    tokenizer: Any,
    length: int,
    seed: int = 0,
    directory: str | Path | None = None,
) -> Examples:
    """Rows of one of the LAYOUTS; see `Examples`.

    Raises:
        ValueError: no such layout, a length that is too small, or no rows.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    return LAYOUTS[layout](part, tokenizer, length, seed, directory)
