"""What the tests of predictions start from: checkpoints, and files of one JSON object a line."""

import json
from pathlib import Path

import tiny

from fastdeberta import tokenizer as tokenizers
from fastdeberta.models import Model

LABELS = {0: "forest", 1: "sea", 2: "ça"}
TAGS = {0: "O", 1: "B-ANIMAL"}


def save(directory, head="sequence", family="deberta-v2", **changes):
    """A checkpoint of random weights with its tokenizer."""
    labels = {"sequence": LABELS, "token": TAGS}.get(head)
    if labels is not None:
        changes = {"id2label": labels} | changes
    size = tiny.tokenizer().get_vocab_size()
    model = Model(tiny.config(family, vocab_size=size, **changes), head)
    tiny.randomize(model)
    model.save_pretrained(directory)
    tokenizers.save(tiny.tokenizer(), directory)
    return directory


def write(path, rows):
    """One line a row; a row of bytes is a line as it is."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def texts(count):
    return [{"text": text} for text, _ in tiny.labelled(count)]
