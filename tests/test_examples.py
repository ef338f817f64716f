"""Rows made of tokenised documents, and their order."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeberta.pretraining import text
from fastdeberta.pretraining.examples import LAYOUTS, make_examples
from fastdeberta.pretraining.shards import Part, Tokens
from fastdeberta.training.order import epoch_rows, permute, uniform

PAD, CLS, SEP = range(3)

# Rows


def random_part(seed=0, shards=3, vocab=1000):
    """Documents of very different lengths, whose tokens are all different from the next one's."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(shards):
        tokens, documents, sentences = [], [0], []
        for size in draw.choice([1, 2, 5, 30, 100, 700], 20):
            starts = np.unique([0, *draw.integers(0, size, size // 15)])
            sentences += (len(tokens) + starts).tolist()
            tokens += [*draw.integers(5, vocab, size).tolist(), SEP]
            documents.append(len(tokens))
        made.append(Tokens(*map(np.array, (np.uint16(tokens), documents, sentences))))
    return Part(made)


def every_row(examples):
    """Each row as Rows of its own."""
    return [examples[torch.tensor([i])] for i in range(len(examples))]


@pytest.mark.parametrize("length", [5, 8, 33, 128, 5000])
def test_stream(length):
    documents = tiny.documents(30)
    tokens = text.tokenize(tiny.tokenizer(), documents)
    examples = make_examples("stream", Part([tokens]), tiny.tokenizer(), length)
    rows = examples[torch.arange(len(examples))]
    ids = rows.input_ids
    assert ids.dtype == torch.int64 and ids.shape == (len(examples), length)
    mask = torch.ones_like(ids).bool() if rows.attention_mask is None else rows.attention_mask
    assert torch.equal(mask, ids != PAD) and mask[:-1].all() and rows.token_type_ids is None
    assert (ids[:, 0] == CLS).all() and (ids.gather(1, mask.sum(1)[:, None] - 1) == SEP).all()
    stream = torch.cat([row[keep][1:-1] for row, keep in zip(ids, mask, strict=True)])
    assert np.array_equal(stream.numpy(), tokens.tokens[:-1])
    assert torch.equal(examples[torch.tensor([3 % len(examples), 0])].input_ids[1], ids[0])


@pytest.mark.parametrize("length", [5, 16, 128, 512])
def test_segments(length):
    part = random_part()
    rows = every_row(make_examples("segments", part, tiny.tokenizer(), length, seed=3))
    texts = []
    for row in rows:
        (ids,), mask = row.input_ids, row.attention_mask
        used = length if mask is None else int(mask.sum())
        assert mask is None or (mask[0, :used].all() and not mask[0, used:].any())
        assert ids[0] == CLS and ids[used - 1] == SEP and (ids[used:] == PAD).all()
        assert used >= 3
        types = torch.zeros_like(ids) if row.token_type_ids is None else row.token_type_ids[0]
        ends = (ids == SEP).nonzero().flatten().tolist()
        if len(ends) == 2:
            assert types.tolist() == [0] * (ends[0] + 1) + [1] * (used - ends[0] - 1) + [0] * (
                length - used
            )
            assert ends[0] >= 2 and ends[1] >= ends[0] + 2
        else:
            assert len(ends) == 1 and row.token_type_ids is None
        texts.append([int(i) for i in ids[1:used] if i != SEP])
    # Rows hold the documents, one after another; only short rests are left out.
    document, rest, dropped = 0, part[0].tolist(), 0
    for words in texts:
        if words != rest[: len(words)]:
            assert len(rest) < max(1, (length - 3) // 2)
            dropped += len(rest)
            document, rest = document + 1, part[document + 1].tolist()
        assert words == rest[: len(words)], "in order, and of one document"
        rest = rest[len(words) :]
        if not rest and document + 1 < len(part):
            document, rest = document + 1, part[document + 1].tolist()
    assert document == len(part) - 1
    assert dropped + len(rest) == part.tokens - sum(map(len, texts)) < 0.1 * part.tokens


def one_long_document(sentence, count):
    """`count` sentences of `sentence` tokens."""
    tokens = np.full(sentence * count + 1, 9, np.uint16)
    tokens[-1] = SEP
    return Part(
        [Tokens(tokens, np.array([0, len(tokens)]), np.arange(0, len(tokens) - 1, sentence))]
    )


def test_the_shares_of_segments():
    """10 % of rows are one segment, 5 % short; A passes its half in half of the others."""
    part, length = one_long_document(10, 60_000), 128
    examples = make_examples("segments", part, tiny.tokenizer(), length, seed=1)
    start, first, second = (examples._tables[0][k] for k in ("start", "first", "second"))
    assert (start[1:] == (start + first + second)[:-1]).all(), "nothing is left out"
    count = len(start)
    assert first.max() == length - 2 and (first + second).max() == length - 2
    assert (first + second)[second > 0].max() == length - 3

    def near(share, expected):
        deviation = (expected * (1 - expected) / count) ** 0.5
        return abs(share - expected) < 5 * deviation

    # Of the short ones, a few gather as much as the others do.
    total = first + second
    short = total < length - 3
    assert near(short.mean(), 0.05 * (120 - 5) / 124)
    lengths = np.bincount(total[short] // 10, minlength=12)[1:12]
    assert lengths.min() > 0.6 * lengths.mean()
    long = ~short
    assert near((second[long] == 0).mean(), 0.1)
    # Half is (128 - 3) // 2 = 62 tokens; rows begin anywhere in a sentence of 10.
    two = first[long & (second > 0)]
    assert two.min() >= 52 and two.max() <= 71
    assert abs((two >= 62).mean() - 0.5) < 5 * 0.5 / len(two) ** 0.5


def test_a_first_sentence_longer_than_a_row():
    part = one_long_document(300, 4)
    examples = make_examples("segments", part, tiny.tokenizer(), 64)
    assert examples._tables[0]["first"].max() == 62
    held = examples._tables[0]["first"].sum() + examples._tables[0]["second"].sum()
    assert 1200 - 30 < held <= 1200


@pytest.mark.parametrize("length", [5, 16, 128, 512])
def test_packed(length):
    part = random_part()
    examples = make_examples("packed", part, tiny.tokenizer(), length)
    pieces, used = [], []
    for row in every_row(examples):
        ids, bounds = row.input_ids, row.cu_seqlens
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(ids) <= length
        assert row.max_seqlen == bounds.diff().max() and row.attention_mask is None
        for piece in ids.split(bounds.diff().tolist()):
            assert piece[0] == CLS and piece[-1] == SEP and len(piece) > 2
            assert not ((piece[1:-1] == CLS) | (piece[1:-1] == SEP)).any(), "one document"
            pieces.append(tuple(piece[1:-1].tolist()))
        used.append(len(ids))
    width = length - 2
    documents = [part[i].tolist() for i in range(len(part))]
    expected = [tuple(d[i : i + width]) for d in documents for i in range(0, len(d), width)]
    assert Counter(pieces) == Counter(expected), "every token once, whole documents where they fit"
    # No two rows could have been one.
    spare = sorted(length - u for u in used)
    least = sum(len(piece) + 2 for piece in expected) / length
    assert len(examples) <= 1.3 * least + 1 and spare[0] >= 0

    rows = examples[torch.tensor([1, 0])]
    one, other = examples[torch.tensor([1])], examples[torch.tensor([0])]
    assert torch.equal(rows.input_ids, torch.cat([one.input_ids, other.input_ids]))
    joined = torch.cat([one.cu_seqlens, other.cu_seqlens[1:] + one.cu_seqlens[-1]])
    assert torch.equal(rows.cu_seqlens, joined)
    assert rows.max_seqlen == max(one.max_seqlen, other.max_seqlen)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_are_kept(layout, tmp_path):
    part, every = random_part(), torch.arange(10)
    fresh = make_examples(layout, part, tiny.tokenizer(), 32, 0)
    last = len(fresh) - 1 - every
    kept = [make_examples(layout, part, tiny.tokenizer(), 32, 0, tmp_path) for _ in range(2)]
    assert len(fresh) == len(kept[0]) == len(kept[1])
    assert [path.name for path in tmp_path.rglob(".*")] == []
    for path in tmp_path.rglob("00001.*"):
        path.write_bytes(path.read_bytes()[:-1])
    kept.append(make_examples(layout, part, tiny.tokenizer(), 32, 0, tmp_path))
    assert same(fresh[last], kept[2][last])
    assert same(fresh[every], kept[0][every]) and same(fresh[every], kept[1][every])
    (tmp_path / "file").write_text("")  # No directory can be made in it.
    assert same(
        fresh[every], make_examples(layout, part, tiny.tokenizer(), 32, 0, tmp_path / "file")[every]
    )
    if layout != "stream":
        other = make_examples(layout, part, tiny.tokenizer(), 32, 1, tmp_path)
        assert len(other) != len(fresh) or not same(fresh[every], other[every])
        assert len(list(tmp_path.glob(f"{layout}-32-*"))) == 2


def test_bad_rows():
    part = random_part()
    with pytest.raises(ValueError, match=r"layout must be one of stream, segments, packed; got 'x"):
        make_examples("x", part, tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match="sequence_length must be at least 5, got 4"):
        make_examples("stream", part, tiny.tokenizer(), 4)
    for layout in LAYOUTS:
        examples = make_examples(layout, part, tiny.tokenizer(), 32)
        for row in (-1, len(examples)):
            with pytest.raises(IndexError, match="row numbers must be in"):
                examples[torch.tensor([0, row])]
        with pytest.raises(ValueError, match="the data hold no rows"):
            make_examples(layout, Part([text.tokenize(tiny.tokenizer(), [])]), tiny.tokenizer(), 32)


# The order


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 3), st.integers(0, 3))
def test_permute_is_a_bijection(count, seed, epoch):
    order = permute(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(count))
    some = np.array([count - 1, 0])
    assert np.array_equal(permute(some, count, seed, epoch), order[some])


def test_permute_large_counts():
    count = 10**12 + 39
    index = np.concatenate([np.arange(100_000), count - 1 - np.arange(100_000)])
    order = permute(index, count, 7)
    assert len(np.unique(order)) == len(index) and order.min() >= 0 and order.max() < count
    bins = np.bincount(order * 100 // count, minlength=100)
    assert (np.square(bins - 2000) / 2000).sum() < 180  # 99 degrees: above it once in a million
    assert abs(np.corrcoef(index, order)[0, 1]) < 0.01
    assert abs(np.corrcoef(order[1:100_000], order[: 100_000 - 1])[0, 1]) < 0.02


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_permutations_are_as_likely(count):
    draws = 12_000
    orders = (permute(np.arange(count), count, 0, epoch) for epoch in range(draws))
    found = Counter(tuple(order.tolist()) for order in orders)
    every = list(permutations(range(count)))
    assert set(found) == set(every)
    expected = draws / len(every)
    statistic = sum((found[p] - expected) ** 2 / expected for p in every)
    degrees = len(every) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 10


def test_a_few_rows_of_many_are_anywhere():
    """Where three rows come in an epoch: each of 8 x 8 x 8 places as often, whatever the epoch."""
    count, draws = 1100, 4000
    orders = np.array([permute(np.arange(3), count, 0, epoch) for epoch in range(draws)])
    assert (orders[:, 0] != orders[:, 1]).all() and (orders[:, 1] != orders[:, 2]).all()
    places = np.bincount((orders * 8 // count) @ [64, 8, 1], minlength=512)
    expected = draws / 512
    statistic = (np.square(places - expected) / expected).sum()
    assert statistic < 511 + 4 * (2 * 511) ** 0.5


def test_uniform():
    numbers = uniform(3, np.arange(100_000))
    assert ((numbers >= 0) & (numbers < 1)).all()
    bins = np.bincount((numbers * 100).astype(int), minlength=100)
    assert (np.square(bins - 1000) / 1000).sum() < 180
    assert not np.array_equal(numbers, uniform(4, np.arange(100_000)))
    assert uniform(3, 17) == numbers[17]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (100, 32), (5, 12), (1000, 1000)])
def test_epochs(count, size):
    """Every epoch has every row once, in another order; the step alone says which come next."""
    steps = -(-3 * count // size)
    rows = torch.cat([epoch_rows(count, size, step, 5) for step in range(steps)])[: 3 * count]
    epochs = rows.view(3, count)
    assert epochs.dtype == torch.int64
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand(3, -1))
    if count >= 100:
        assert not torch.equal(epochs[0], epochs[1])
        assert epoch_rows(count, size, 0, 6).tolist() != epochs[0][:size].tolist()
        # Batches of another size, as another number of ranks may take, come in the same order.
        again = torch.cat([epoch_rows(count, size // 2, step, 5) for step in range(2 * steps)])
        assert torch.equal(again[: 3 * count], rows)


def test_the_order_of_a_seed():
    """The order of a run is fixed by its seed, in every version."""
    assert epoch_rows(1000, 6, 2, 3).tolist() == [314, 816, 656, 329, 865, 415]
    assert epoch_rows(10**9, 3, 2, 3).tolist() == [433760898, 433363370, 940420779]
