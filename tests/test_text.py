"""Corpora, document by document, and their tokens."""

import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeberta import tokenizer as tokenizers
from fastdeberta.datasets import wiki_leads
from fastdeberta.pretraining import text
from fastdeberta.pretraining.shards import Part
from fastdeberta.pretraining.text import Corpus

SEP = 2

# Corpora


def test_read_documents(tmp_path):
    (tmp_path / "b.txt").write_bytes("one\ntwo \r\n\n \n\nthr\u00e9e\n".encode("utf-8-sig"))
    (tmp_path / "a.jsonl").write_text('{"text": "zero", "x": 1}\n\n{"text": " "}\n')
    (tmp_path / "notes.md").write_text("not a text")
    assert text.read_documents(tmp_path / "b.txt") == ["one two", "thr\u00e9e"]
    assert text.read_documents(tmp_path) == ["zero", "one two", "thr\u00e9e"]
    assert len(text.read_documents("wiki-leads")) == 10_033


def write_corpus(directory):
    """Three files of documents, in the order in which they are read."""
    documents = tiny.documents(12)
    (directory / "deep").mkdir(parents=True)
    lines = [json.dumps({"body": d}) for d in documents[:5]]
    (directory / "a.jsonl").write_text("\n\n".join(lines))
    (directory / "b.txt").write_text("\n\n".join(documents[5:6]))
    (directory / "deep" / "c.txt").write_text("\n\n".join(documents[6:]))
    return documents


def test_a_corpus_goes_on_from_any_document(tmp_path):
    documents = write_corpus(tmp_path)
    corpus = Corpus(tmp_path, column="body")
    read = list(corpus.read())
    assert [document for *_, document in read] == documents
    assert [place[:2] for place in read][4:8] == [(0, 5), (1, 1), (2, 1), (2, 2)]
    for i, (file, position, _) in enumerate(read):
        assert list(corpus.read(file, position)) == read[i + 1 :]


def test_the_embedded_text_goes_on_too():
    (rest,) = Corpus("wiki-leads").read(0, 10_032)
    assert rest == (0, 10_033, wiki_leads()[-1].text)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    documents = tiny.documents(2500)
    table = pyarrow.table({"text": [*documents, None, " "], "id": list(range(2502))})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=700)
    assert text.read_documents(tmp_path) == documents
    assert next(Corpus(path).read(0, 2100))[1:] == (2101, documents[2100])
    with pytest.raises(ValueError, match=r"a.parquet has no column 'body'; it has text, id"):
        next(Corpus(path, column="body").read())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file, or damaged"):
        next(Corpus(path).read())


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'fastdeberta\[data\]'"):
        text.read_documents(tmp_path)


def test_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = tiny.documents(30)
    rows = [{"body": document, "id": i} for i, document in enumerate(documents)]
    rows[7]["body"] = None
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = Corpus(f"datasets:{tmp_path}", column="body")
    read = list(corpus.read())
    assert [d for *_, d in read] == [*documents[:7], "", *documents[8:]]
    assert list(corpus.read(0, 11)) == read[11:]
    with pytest.raises(ValueError, match="has no texts in a column 'id'"):
        next(Corpus(f"datasets:{tmp_path}", column="id").read())
    with pytest.raises(FileNotFoundError):
        next(Corpus(f"datasets:{tmp_path / 'missing'}").read())


def test_datasets_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data: datasets:x needs datasets: pip install"):
        next(Corpus("datasets:x").read())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data: no text in .*text.jsonl"),
        (b'{"text": "a"}\n{"txt": "b"}', 'line 2: expected a JSON object with a "text"'),
        (b"\n[1]", 'line 2: expected a JSON object with a "text"'),
        (b"{", 'line 1: expected a JSON object with a "text"'),
        (b'{"text": "a"}\n"\xff"', "text.jsonl is not UTF-8: line 2, byte 2"),
    ],
)
def test_unreadable_documents(content, message, tmp_path):
    (tmp_path / "text.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.read_documents(tmp_path / "text.jsonl")


def test_missing_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*missing"):
        text.read_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="data: no text in "):
        text.read_documents(tmp_path)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split(count, held_out, seed):
    documents = [str(i) for i in range(count)]
    rest, kept = text.split(documents, held_out, seed)
    assert sorted(rest + kept) == sorted(documents)
    assert rest and kept
    assert len(kept) == min(max(1, round(count * held_out)), count - 1)
    assert text.split(documents, held_out, seed) == (rest, kept)


# Tokens

SENTENCES = [
    'The old crab said: "No!"',
    " It dives by the reef.",
    " (Does it?)",
    " Version 3.5 floats",
    "\nby the coast\u2026",
    "\n\nThe owl.",
]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_tokens_and_sentences(kind):
    documents = ["".join(SENTENCES), *tiny.documents(60)]
    tokenizer = tokenizers.train(documents, 300, kind=kind)
    tokens = text.tokenize(tokenizer, documents)
    part = Part([tokens])
    assert tokens.tokens.dtype == np.uint16 and len(part) == len(documents)
    for i, document in enumerate(documents):
        expected = tokenizer.encode(document, add_special_tokens=False).ids
        assert part[i].dtype == torch.int64 and part[i].tolist() == expected
        assert tokens.tokens[tokens.documents[i + 1] - 1] == SEP
    assert set(tokens.documents[:-1].tolist()) <= set(tokens.sentences.tolist())
    assert (np.diff(tokens.sentences) > 0).all()

    end = tokens.documents[1] - 1
    inside = tokens.sentences[tokens.sentences < end]
    words = [
        ["".join(tokenizer.decode(list(ids)).split()) for ids in pieces]
        for pieces in (
            np.split(tokens.tokens[:end], inside[1:]),
            (tokenizer.encode(s, add_special_tokens=False).ids for s in SENTENCES),
        )
    ]
    assert words[0] == words[1]


def test_a_document_without_a_token_is_left_out():
    tokens = text.tokenize(tiny.tokenizer(), ["the crab", " \n", "the owl"])
    assert len(tokens.documents) == 3 and len(tokens.sentences) == 2


def test_full_width_marks_end_sentences():
    tokenizer = tokenizers.train(["\u6d77\u3002\u68ee\uff01\u9e1f"] * 9, 100, kind="wordpiece")
    tokens = text.tokenize(tokenizer, ["\u6d77\u3002\u68ee\uff01\u9e1f"])
    assert tokens.sentences.tolist() == [0, 2, 4]


def test_large_vocabularies_take_four_bytes():
    vocab = {t: i for i, t in enumerate([*tokenizers.SPECIAL_TOKENS, "crab"])}
    vocab |= {f"word{i}": i for i in range(6, 65_537)}
    from fastdeberta.tokenizer.families import wordpiece

    tokens = text.tokenize(wordpiece(vocab), ["crab word65536"])
    assert tokens.tokens.dtype == np.uint32 and tokens.tokens.tolist() == [5, 65_536, SEP]


def test_no_text_has_no_tokens():
    tokens = text.tokenize(tiny.tokenizer(), [])
    assert [len(array) for array in tokens] == [0, 1, 0] and len(Part([tokens])) == 0
