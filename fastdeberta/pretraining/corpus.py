"""A text, tokenised: the rows that pre-training takes, and what is known of it without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tokenizer as tokenizers
from ..training.checkpoint import checkpoints
from . import text
from .batches import RowSource, token_counts
from .examples import make_examples
from .settings import PretrainSettings
from .shards import Part, is_prepared, open_prepared


class Corpus(NamedTuple):
    """A tokenizer, and rows of its tokens."""

    tokenizer: Any
    train: RowSource
    held_out: RowSource


def load_corpus(settings: PretrainSettings) -> Corpus:
    """Opens what `fastdeberta prepare` wrote; or reads, splits and tokenises text in memory.

    A run that continues uses the tokenizer that it keeps in its output directory.

    Raises:
        FileNotFoundError, ValueError: see `shards.open_prepared`, `text.read_documents`,
            `tokenizers.load` and `make_examples`.
    """
    output = Path(settings.output)
    if is_prepared(settings.data):
        if settings.tokenizer is not None:
            raise ValueError(
                f"tokenizer: {settings.data} is prepared text and has its own tokenizer; "
                f"got {settings.tokenizer!r}"
            )
        prepared = open_prepared(settings.data)
        if not len(prepared.held_out):
            raise ValueError(f"data: {settings.data} was prepared without held-out documents")
        tokenizers.save(prepared.tokenizer, output)
        tokenizer, directory = prepared.tokenizer, prepared.directory
        parts = {"train": prepared.train, "held_out": prepared.held_out}
    else:
        directory = None
        documents = text.read_documents(settings.data)
        if len(documents) < 2:
            raise ValueError(
                f"data: {settings.data} holds one document; at least two are needed, one to hold "
                "out"
            )
        train, held_out = text.split(documents, settings.held_out, settings.seed)
        tokenizer = _tokenizer(settings, train, output)
        parts = {
            name: Part([text.tokenize(tokenizer, part)])
            for name, part in (("train", train), ("held_out", held_out))
        }
    rows = (
        make_examples(
            settings.layout,
            part,
            tokenizer,
            settings.sequence_length,
            settings.seed,
            None if directory is None else directory / "rows" / name,
        )
        for name, part in parts.items()
    )
    return Corpus(tokenizer, *rows)


def _tokenizer(settings: PretrainSettings, documents: list[str], output: Path) -> Any:
    if not (checkpoints(output) and (output / tokenizers.FILE).exists()):
        # A tokenizer without a checkpoint is of a run that failed, maybe for its settings.
        if settings.tokenizer is not None:
            tokenizer = tokenizers.load(settings.tokenizer)
        else:
            tokenizer = tokenizers.train(
                documents, settings.vocab_size, settings.lowercase, settings.tokenizer_kind
            )
        tokenizers.save(tokenizer, output)
    # As read back: a file rounds scores, and a run that continues must see the same tokens.
    return tokenizers.load(output)


def baselines(corpus: Corpus, special_ids: Sequence[int]) -> dict[str, float]:
    """Held-out masked-token accuracy without a model.

    most_frequent: always the training text's most frequent token. unigram: a draw from its
    token frequencies (the expected accuracy).
    """
    size = corpus.tokenizer.get_vocab_size()
    counts = (token_counts(rows, size, special_ids) for rows in (corpus.train, corpus.held_out))
    train, held_out = (count / count.sum() for count in counts)
    return {
        "most_frequent": float(held_out[train.argmax()]),
        "unigram": float((train * held_out).sum()),
    }


def starts_word(tokenizer: Any) -> Tensor:
    """Which tokens of a vocabulary start a word, bool [vocab].

    A WordPiece vocabulary marks those that do not; SentencePiece (U+2581) and byte-level BPE
    (U+0120) mark the space before those that do.
    """
    vocab = tokenizer.get_vocab(True)
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    marks = "\u2581", "\u0120"
    table = torch.zeros(max(vocab.values()) + 1, dtype=torch.bool)
    for token, index in vocab.items():
        table[index] = not token.startswith(prefix) if prefix else token.startswith(marks)
    return table
