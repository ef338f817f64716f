"""`fastdeberta prepare`: text of any size into tokenised shards, with several processes.

Shards are written one after another and each is there whole or not at all; it knows where in the
text the next one begins. So a run that was killed continues behind its last shard, and its shards
are, byte for byte, those of a run that was not.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import tokenizer as tokenizers
from ..files import atomic_directory, write_atomically
from ..training.reporting import NoProgress, Progress
from .shards import (
    FORMAT,
    META,
    PARTS,
    ROWS,
    ShardWriter,
    Tokens,
    is_prepared,
    open_prepared,
    read_meta,
    read_shard_meta,
    shard_path,
    token_dtype,
    tokenizer_hash,
)
from .text import EMBEDDED, Corpus, tokenize

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Characters of text that a process tokenises at a time.
_BATCH = 1 << 20
# Sentences are at uint32 places of a shard.
_MOST_SHARD_TOKENS = 1 << 31


@dataclass
class PrepareSettings:
    """From text to a prepared directory; `text.Corpus` says what `data` may be."""

    output: str = "runs/data"
    data: str = EMBEDDED
    column: str = "text"  # of .jsonl, .parquet and datasets
    dataset_config: str | None = None
    dataset_split: str = "train"
    held_out: float = 0.02  # share of documents kept for evaluation
    tokenizer: str | None = None  # a tokenizer file or directory; None trains one on the text
    lowercase: bool = False
    vocab_size: int = 8192  # of a tokenizer trained here
    tokenizer_kind: str = "unigram"  # or "bpe", "wordpiece"
    tokenizer_megabytes: float = 64.0  # of text, drawn from all of it, to train a tokenizer on
    workers: int = 0  # processes; 0: one a core
    shard_tokens: int = 1 << 26  # at least; a shard ends with a batch of text
    seed: int = 0  # of the documents held out and those the tokenizer is trained on

    def check(self) -> None:
        """Raises ValueError for a value out of range, naming its key."""
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        if self.tokenizer_megabytes <= 0:
            raise ValueError(
                f"tokenizer_megabytes must be positive, got {self.tokenizer_megabytes}"
            )
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if not 1 <= self.shard_tokens <= _MOST_SHARD_TOKENS:
            raise ValueError(
                f"shard_tokens must be in [1, {_MOST_SHARD_TOKENS}], got {self.shard_tokens}"
            )


class _Batch(NamedTuple):
    """Documents by part, and the position in the text behind them."""

    position: tuple[int, int]
    documents: dict[str, list[str]]


class _Tokenized(NamedTuple):
    position: tuple[int, int]
    tokens: dict[str, Tokens]


def prepare(settings: PrepareSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenises text into `settings.output`; continues an interrupted run.

    A document is held out, or not, by its text and the seed, so that no text is on both sides.
    Memory does not grow with the text: a few batches of it are held at a time, and, to train a
    tokenizer, tokenizer_megabytes of it.

    With more than one worker, a program that calls this must guard its main module
    (`if __name__ == "__main__"`), as for any use of multiprocessing.

    Returns:
        What meta.json holds: counts of shards, documents and tokens.

    Raises:
        FileNotFoundError, ValueError: bad settings or data; the output holds other shards; no
        document, or none of them held out. RuntimeError: a worker died.
    """
    settings.check()
    progress = progress or NoProgress()
    output = Path(settings.output)
    corpus = Corpus(settings.data, settings.column, settings.dataset_config, settings.dataset_split)
    _remove_unfinished(output)
    meta = _begin(settings, corpus, output)
    if meta["complete"]:
        progress.say(f"{output} is complete")
        return meta
    done = 0
    while shard_path(output, done).exists():
        done += 1
    position = read_shard_meta(shard_path(output, done - 1))["position"] if done else (0, 0)
    if done:
        progress.say(f"continuing {output} after {done} shards")

    workers = settings.workers or os.cpu_count() or 1
    with closing(_tokenized(_batches(corpus, position, settings), output, workers)) as results:
        result = next(results, None)
        while result is not None:
            with atomic_directory(shard_path(output, done)) as fresh:
                writer = ShardWriter(fresh, np.dtype(meta["dtype"]))
                while result is not None and writer.tokens < settings.shard_tokens:
                    for name in PARTS:
                        writer.add(name, result.tokens[name])
                    position = result.position
                    result = next(results, None)
                writer.finish(position)
            done += 1
            progress.say(f"shard {done}: {writer.tokens} tokens")
    return _finish(output, meta, done, settings)


def _begin(settings: PrepareSettings, corpus: Corpus, output: Path) -> dict[str, Any]:
    """The meta.json of a run: that of the run to continue, or a new one, with a tokenizer."""
    identity = {
        "source": corpus.source,
        "files": [[str(path), path.stat().st_size] for path in corpus.files],
        **{
            key: getattr(settings, key)
            for key in (
                "column", "dataset_config", "dataset_split", "held_out", "tokenizer", "lowercase",
                "vocab_size", "tokenizer_kind", "tokenizer_megabytes", "shard_tokens", "seed",
            )
        },
    }  # fmt: skip
    if is_prepared(output):
        meta = read_meta(output)
        for key, value in identity.items():
            if meta["made_from"].get(key) != value:
                raise ValueError(
                    f"output: {output} holds shards made with another {key} "
                    f"({meta['made_from'].get(key)!r} there, {value!r} now); "
                    "choose another output, or delete it"
                )
        if tokenizer_hash(output) != meta["tokenizer"]:
            raise ValueError(f"{output / tokenizers.FILE} is not the one that {output} began with")
        return meta
    if shard_path(output, 0).exists():
        raise ValueError(f"output: {output} holds shards without a {META}; delete them")
    shutil.rmtree(output / ROWS, ignore_errors=True)
    if settings.tokenizer is not None:
        tokenizer = tokenizers.load(settings.tokenizer)
    else:
        tokenizer = tokenizers.train(
            _sample(corpus, settings),
            settings.vocab_size,
            settings.lowercase,
            settings.tokenizer_kind,
        )
    tokenizers.save(tokenizer, output)
    meta = {
        "format": FORMAT,
        "complete": False,
        "tokenizer": tokenizer_hash(output),
        "dtype": token_dtype(tokenizer.get_vocab_size()).str,
        "made_from": identity,
    }
    write_atomically(output / META, json.dumps(meta, indent=2) + "\n")
    return meta


def _finish(
    output: Path, meta: dict[str, Any], shards: int, settings: PrepareSettings
) -> dict[str, Any]:
    counts = [read_shard_meta(shard_path(output, number)) for number in range(shards)]
    # The array of where documents start also holds where the last one ends.
    documents = {name: sum(c[name]["documents"]["count"] - 1 for c in counts) for name in PARTS}
    tokens = {name: sum(c[name]["tokens"]["count"] for c in counts) for name in PARTS}
    if not documents["train"]:
        raise ValueError(f"data: no text to train on in {settings.data}")
    if settings.held_out and not documents["held_out"]:
        raise ValueError(
            f"held_out: none of {documents['train']} documents was drawn at "
            f"{settings.held_out}; raise it, or set it to 0"
        )
    meta |= {"complete": True, "shards": shards, "documents": documents, "tokens": tokens}
    write_atomically(output / META, json.dumps(meta, indent=2) + "\n")
    open_prepared(output)
    return meta


def _remove_unfinished(output: Path) -> None:
    """Removes what a killed run left of the shard that it was writing."""
    if output.is_dir():
        for path in output.iterdir():
            if re.fullmatch(r"\.shard-\d+\.(writing|replaced)-\d+", path.name):
                shutil.rmtree(path)


def _place(document: bytes, seed: int) -> float:
    """A number in [0, 1) that a text and a seed determine."""
    key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(document, digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _batches(
    corpus: Corpus, position: Iterable[int], settings: PrepareSettings
) -> Iterator[_Batch]:
    """The text from a position on. Where batches end depends on that position and the text alone,
    and shards end where batches do: so a continued run makes the same batches."""
    documents: dict[str, list[str]] = {name: [] for name in PARTS}
    size, end = 0, None
    for file, number, document in corpus.read(*position):
        data = document.encode("utf-8", "replace")  # JSON can hold half of a surrogate pair.
        name = PARTS[_place(data, settings.seed) < settings.held_out]
        documents[name].append(data.decode("utf-8"))
        size, end = size + len(document), (file, number)
        if size >= _BATCH:
            yield _Batch(end, documents)
            documents = {name: [] for name in PARTS}
            size, end = 0, None
    if end is not None:
        yield _Batch(end, documents)


def _sample(corpus: Corpus, settings: PrepareSettings) -> list[str]:
    """About tokenizer_megabytes of documents that are not held out, drawn evenly from the text;
    of a stream, which would be fetched twice, from that much at its start."""
    budget = settings.tokenizer_megabytes * 1e6
    kept: list[tuple[float, bytes]] = []
    size, limit = 0, 1.0
    for *_, document in corpus.read():
        data = document.encode("utf-8", "replace")
        place = _place(data, settings.seed)
        if not settings.held_out <= place < limit:
            continue
        kept.append((place, data))
        size += len(data)
        if size > budget and corpus.streamed:
            break
        while size > budget and len(kept) > 1:
            limit = settings.held_out + (limit - settings.held_out) / 2
            kept = [item for item in kept if item[0] < limit]
            size = sum(len(data) for _, data in kept)
    return [data.decode("utf-8") for _, data in kept]


def _tokenize(tokenizer: "Tokenizer", batch: _Batch) -> _Tokenized:
    tokens = {name: tokenize(tokenizer, documents) for name, documents in batch.documents.items()}
    return _Tokenized(batch.position, tokens)


def _tokenized(
    batches: Iterator[_Batch], directory: Path, workers: int
) -> Generator[_Tokenized, None, None]:
    """Tokenises batches, in their order, by the tokenizer in `directory`.

    A worker gets its next batch when its last result was taken: no more batches are held than there
    are workers. A worker whose parent is killed finds its pipe closed and ends.
    """
    if workers == 1:
        tokenizer = tokenizers.load(directory)
        yield from (_tokenize(tokenizer, batch) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    sent, taken = 0, 0  # batches, and results of them

    @contextmanager
    def worker(number: int) -> Iterator[Connection]:
        try:
            yield pipes[number % workers]
        except (EOFError, OSError):
            raise RuntimeError("a worker died; was there too little memory?") from None

    def take() -> _Tokenized:
        with worker(taken) as pipe:
            result = pipe.recv()
        if isinstance(result, Exception):
            raise result
        return result

    try:
        for batch in batches:
            if sent - taken == workers:
                yield take()
                taken += 1
            if len(pipes) < workers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, directory), daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            with worker(sent) as pipe:
                pipe.send(batch)
            sent += 1
        while taken < sent:
            yield take()
            taken += 1
    finally:
        for end in pipes:
            end.close()
        for process in processes:
            process.terminate()
            process.join()


def _work(pipe: Connection, directory: Path) -> None:
    """A worker: batches in, tokens out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.load(directory)
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        try:
            result: Any = _tokenize(tokenizer, batch)
        except Exception as error:
            result = error
        pipe.send(result)
