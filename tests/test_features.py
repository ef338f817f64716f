"""Features: pairs, windows, tags, options and entities as tokens, and batches of them."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeberta.finetuning import features
from fastdeberta.finetuning.examples import (
    Answer,
    ChoiceExample,
    EntityExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from fastdeberta.finetuning.features import Ragged, batches, covering, truncate
from fastdeberta.finetuning.labels import class_names, encode
from fastdeberta.finetuning.settings import FinetuneSettings
from fastdeberta.finetuning.tasks import TASKS
from fastdeberta.finetuning.windows import parts, windows
from fastdeberta.tokenizer.families import wordpiece

PAD, CLS, SEP, MASK = 0, 1, 2, 4
TEXT = "The old crab swims near the reef, and the small owl sleeps by the big oak tree."

tokens = st.lists(st.integers(5, 9), max_size=40)


def row(found, number):
    return found.tokens[found.starts[number] : found.starts[number + 1]].tolist()


# Texts


@given(tokens, st.one_of(st.none(), tokens), st.integers(3, 60))
def test_truncate(a, b, limit):
    first, second = truncate(a, b, limit)
    assert first == a[: len(first)]
    if b is None:
        assert second is None and len(first) == min(len(a), limit - 2)
        return
    assert second == b[: len(second)]
    assert len(first) + len(second) == min(len(a) + len(b), limit - 3), "no more than needed"
    cut_a, cut_b = len(a) - len(first), len(b) - len(second)
    if cut_a:
        assert len(first) >= len(second) - 1
    if cut_b:
        assert len(second) >= len(first) - 1


def test_texts_are_framed_as_the_tokenizer_does():
    tokenizer = tiny.tokenizer()
    pairs = [("the old crab", None), ("the owl", "the big old whale"), ("the owl", "")]
    examples = [TextExample("", *pair) for pair in pairs]
    found = features.texts(tokenizer, examples, [1, 0, 1], 100)
    assert len(found) == 3 and found.targets["labels"].tolist() == [1, 0, 1]
    batch = found.batch([0, 1, 2], packed=False)
    for i, pair in enumerate(pairs):
        theirs = tokenizer.encode(*(x for x in pair if x is not None))
        assert row(found, i) == theirs.ids
        assert batch.token_type_ids[i, : len(theirs.ids)].tolist() == theirs.type_ids


def test_a_chunk_is_no_border(monkeypatch):
    examples = [
        TextExample("", t, t[:9] if i % 3 else None) for i, (t, _) in enumerate(tiny.labelled(7))
    ]
    whole = features.texts(tiny.tokenizer(), examples, None, 30)
    monkeypatch.setattr(features, "_CHUNK", 2)
    chunked = features.texts(tiny.tokenizer(), examples, None, 30)
    assert torch.equal(whole.tokens, chunked.tokens) and torch.equal(whole.starts, chunked.starts)


# Batches


def test_packed_and_padded_batches_hold_the_same():
    examples = [TextExample("", text, "the owl") for text, _ in tiny.labelled(5)]
    found = features.texts(tiny.tokenizer(), examples, [0.5, 1, 2, 3, 4], 60)
    packed, padded = found.batch([3, 0, 3]), found.batch([3, 0, 3], packed=False, pad_id=6)
    assert packed.attention_mask is None and padded.cu_seqlens is None
    mask = padded.attention_mask
    assert torch.equal(padded.input_ids[mask], packed.input_ids)
    assert torch.equal(padded.token_type_ids[mask], packed.token_type_ids)
    assert (padded.input_ids[~mask] == 6).all() and not padded.token_type_ids[~mask].any()
    assert packed.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert packed.max_seqlen == mask.size(1) == mask.sum(1).max()
    assert packed.targets["labels"].tolist() == padded.targets["labels"].tolist() == [3, 0.5, 3]


@given(st.lists(st.integers(3, 20), min_size=1, max_size=30), st.integers(1, 60), st.booleans())
def test_batches_for_evaluation(sizes, budget, packed):
    found = features.Features.of([(np.full(size, 7, np.int32), size) for size in sizes])
    chosen = list(batches(found, budget, packed))
    assert sorted(i for rows in chosen for i in rows) == list(range(len(sizes)))
    for rows in chosen:
        lengths = [sizes[i] for i in rows]
        total = sum(lengths) if packed else max(lengths) * len(rows)
        assert total <= budget or len(rows) == 1
    order = [sizes[i] for rows in chosen for i in rows]
    assert order == sorted(sizes, reverse=True)


def test_ragged():
    values = Ragged.of([[(1, 2)], [], [(3, 4), (5, 6)]], 2)
    assert values[0].tolist() == [[1, 2]] and values[1].shape == (0, 2)
    assert values[2].tolist() == [[3, 4], [5, 6]]


# Choices


def test_options_are_rows_of_their_own():
    options = ("the reef", "the owl sleeps", "")
    examples = [ChoiceExample("a", TEXT, options, 2), ChoiceExample("b", "the owl", options[:2], 0)]
    found = features.choices(tiny.tokenizer(), examples, [2, 0], 200)
    assert len(found) == 2 and len(found.starts) == 6
    theirs = [
        tiny.tokenizer().encode(example.text, option).ids
        for example in examples
        for option in example.options
    ]
    assert [row(found, i) for i in range(5)] == theirs
    assert found.lengths.tolist() == [sum(map(len, theirs[:3])), sum(map(len, theirs[3:]))]
    batch = found.batch([1])
    assert batch.options == (2,) and len(batch.cu_seqlens) == 3
    assert batch.targets["labels"].tolist() == [0]
    assert found.batch([1, 0], packed=False).input_ids.shape[0] == 5


# Tags


def test_first_sub_words():
    pieces = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "the", "wal", "##rus", "swims", ".")
    tokenizer = wordpiece({piece: i for i, piece in enumerate(pieces)})
    words = ("The", "walrus", "\u200b", "swims", "walrus.")
    tags = [[0, 1, 2, -100, 4]]
    found = features.sentences(tokenizer, [TaggedExample("", words)], tags, 100)
    assert row(found, 0) == [CLS, 5, 6, 7, 8, 6, 7, 9, SEP]
    # The tokenizer leaves nothing of the third word, and the fourth is not scored.
    assert found.words[0].tolist() == [0, 1, 4]
    assert found.targets["places"][0].tolist() == [1, 2, 5]
    assert found.targets["labels"][0].tolist() == [0, 1, 4]
    unlabelled = features.sentences(tokenizer, [TaggedExample("", words)], None, 100)
    assert "labels" not in unlabelled.targets
    assert unlabelled.words[0].tolist() == [0, 1, 3, 4]
    assert unlabelled.targets["places"][0].tolist() == [1, 2, 4, 5]


@given(st.integers(4, 30))
def test_words_beyond_the_length_have_no_place(limit):
    words = tuple(TEXT.split())
    found = features.sentences(tiny.tokenizer(), [TaggedExample("", words)], None, limit)
    assert len(found.tokens) <= limit
    seen = found.words[0].tolist()
    assert seen == list(range(len(seen)))
    assert all(0 < place < len(found.tokens) - 1 for place in found.targets["places"][0])
    assert (len(seen) == len(words)) == (limit >= len(tiny.tokenizer().encode(" ".join(words)).ids))


def test_places_count_within_the_batch():
    examples = [TaggedExample("", tuple(text.split())) for text, _ in tiny.labelled(4)]
    found = features.sentences(tiny.tokenizer(), examples, None, 50)
    packed, padded = found.batch([2, 0]), found.batch([2, 0], packed=False)
    own = [row(found, i)[place] for i in (2, 0) for place in found.targets["places"][i].tolist()]
    assert packed.input_ids[packed.targets["places"]].tolist() == own
    assert padded.input_ids.flatten()[padded.targets["places"]].tolist() == own


# Spans


@given(st.integers(0, 300), st.integers(1, 50), st.integers(1, 60))
def test_parts_cover_the_text(length, room, stride):
    begins = list(parts(length, room, stride))
    covered = [i for begin in begins for i in range(begin, min(length, begin + room))]
    assert set(covered) == set(range(length))
    assert begins[0] == 0 and all(
        b - a == min(stride, room) for a, b in zip(begins, begins[1:], strict=False)
    )
    assert len(begins) == 1 or begins[-2] + room < length, "no part more than needed"


def test_windows():
    tokenizer = tiny.tokenizer()
    question = "Where does the owl sleep by the old oak"
    answer = Answer("small owl", TEXT.index("small owl"))
    example = SpanExample("q", question, TEXT, (answer, Answer("x", 0)))
    query = tokenizer.encode(question, add_special_tokens=False).ids[:6]
    settings = {"max_length": 24, "stride": 5, "max_query_length": 6}
    shown = windows(tokenizer, [example], training=False, **settings)
    room = 24 - 3 - 6
    assert len(shown) > 3 and not shown.targets
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    for number, window in enumerate(shown.windows):
        own = row(shown, number)
        part = ids[5 * number : 5 * number + room]
        assert own == [CLS, *query, SEP, *part, SEP] and window.example == 0
        assert (window.offsets[: len(query) + 2] == -1).all() and (window.offsets[-1] == -1).all()
        covered = {i for a, b in window.offsets[len(query) + 2 : -1].tolist() for i in range(a, b)}
        between = range(min(covered), max(covered) + 1)
        assert covered == {i for i in between if TEXT[i] != " "}
    trained = windows(tokenizer, [example], training=True, **settings)
    assert torch.equal(trained.tokens, shown.tokens) and not trained.windows
    starts, ends = trained.targets["start_positions"], trained.targets["end_positions"]
    holding = starts.nonzero().flatten().tolist()
    assert 0 < len(holding) < len(shown)
    for number in range(len(shown)):
        offsets = shown.windows[number].offsets
        begins = offsets[:, 0].tolist()
        inside = answer.start in begins and answer.start + 9 in offsets[:, 1].tolist()
        assert (number in holding) == inside
        if inside:
            start, end = offsets[starts[number], 0], offsets[ends[number], 1]
            assert TEXT[start:end] == "small owl"
        else:
            assert starts[number] == ends[number] == 0


def test_no_answer_is_the_first_token():
    example = SpanExample("q", "the owl", TEXT, ())
    found = windows(tiny.tokenizer(), [example], training=True, max_length=100)
    assert len(found) == 1
    assert found.targets["start_positions"].tolist() == [0]
    assert found.targets["end_positions"].tolist() == [0]


def test_covering():
    offsets = np.array([(0, 3), (-1, -1), (4, 6), (6, 9)])
    assert covering(offsets, 0, 3) == (0, 0)
    assert covering(offsets, 2, 7) == (0, 3)
    assert covering(offsets, 3, 4) is None


# Entities


def test_entities():
    places = [(TEXT.index(word), TEXT.index(word) + len(word)) for word in ("crab", "oak tree")]
    example = EntityExample("e", TEXT, "the @placeholder sleeps", tuple(places), ("crab",))
    found = features.entities(tiny.tokenizer(), [example], True, 200)
    ids = row(found, 0)
    assert ids.count(MASK) == 1 and ids.index(MASK) > ids.index(SEP)
    spans = found.targets["entity_spans"][0].tolist()
    for (start, end), word in zip(spans, ("crab", "oak tree"), strict=True):
        assert tiny.tokenizer().decode(ids[start:end]).replace(" ##", "") == word
    assert found.targets["labels"][0].tolist() == [1, 0]
    # The end of the text is cut off, and its entity with it.
    short = features.entities(tiny.tokenizer(), [example, example], False, 30)
    assert short.targets["entity_spans"][0].tolist() == [spans[0], [-1, -1]]
    assert row(short, 0)[-4:-1] == ids[-4:-1] and "labels" not in short.targets
    one = EntityExample("f", TEXT, "x", tuple(places[:1]))
    both = features.entities(tiny.tokenizer(), [one, example], True, 200).batch([0, 1]).targets
    assert both["entity_spans"].shape == (2, 2, 2) and both["entity_spans"][0, 1].tolist() == [
        -1,
        -1,
    ]
    assert both["labels"].tolist() == [[0, 0], [1, 0]]


# Labels


def test_class_names():
    examples = [TextExample("", "", label=x) for x in ("b", "a", None, "b", "10", "9")]
    assert class_names(TASKS["classification"], examples) == ["10", "9", "a", "b"]
    tagged = [TaggedExample("", ("x", "y"), ("V", "N")), TaggedExample("", ("z",), ("N",))]
    assert class_names(TASKS["tagging"], tagged) == ["N", "V"]
    assert class_names(TASKS["rte"], []) == ["entailment", "not_entailment"]
    assert class_names(TASKS["stsb"], []) == class_names(TASKS["squad"], []) == []


UNKNOWN = "dev.csv, example 2: label 'maybe' is not among no, yes"


@pytest.mark.parametrize(
    ("head", "examples", "names", "changes", "message"),
    [
        (
            "sequence",
            [TextExample("", "a", label=x) for x in ("yes", "maybe")],
            ["no", "yes"],
            {},
            UNKNOWN,
        ),
        (
            "token",
            [TaggedExample("", ("a",), (x,)) for x in ("yes", "maybe")],
            ["no", "yes"],
            {},
            UNKNOWN,
        ),
        (
            "sequence",
            [TextExample("", "a", label="x")],
            [],
            {},
            "example 1: label 'x' is not among the numb",
        ),
        ("sequence", [TextExample("", "a")], ["a"], {}, "dev.csv, example 1: no label"),
        ("token", [TaggedExample("", ("a",))], ["a"], {}, "dev.csv, example 1: no label"),
        ("choice", [ChoiceExample("", "a", ("b", "c"))], [], {}, "dev.csv, example 1: no label"),
        ("span", [SpanExample("", "a", "b")], [], {}, "dev.csv, example 1: no label"),
        (
            "choice",
            [ChoiceExample("one", "a", ("b", "c"), 0), ChoiceExample("two", "a", (), 0)],
            [],
            {},
            r"example 2 \(two\) has no options",
        ),
        (
            "span",
            [SpanExample("", "a", "b", ())],
            [],
            {"max_length": 67},
            r"max_length must be at least max_query_length \+ 4 = 68, got 67",
        ),
        ("sequence", [], ["a"], {}, "dev.csv: no example"),
    ],
)
def test_errors(head, examples, names, changes, message):
    settings = FinetuneSettings(**changes)
    with pytest.raises(ValueError, match=message):
        encode(head, tiny.tokenizer(), examples, names, settings, True, "dev.csv")


def test_one_class_is_nothing_to_learn():
    for labels, has in ((["x", "x"], "one label, 'x'"), ([None], "no label")):
        examples = [TextExample("", "", label=x) for x in labels]
        with pytest.raises(ValueError, match=f"classification have {has}: nothing to learn"):
            class_names(TASKS["classification"], examples)
