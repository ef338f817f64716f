"""Span decoding against brute force over all pairs of tokens, and thresholds against all others."""

import itertools
import math
import random
from functools import cache

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeberta import tokenizer as tokenizers
from fastdeberta.datasets import wiki_leads
from fastdeberta.finetuning.metrics import squad2
from fastdeberta.finetuning.spans import (
    Span,
    SpanDecoder,
    SpanPrediction,
    Window,
    best_threshold,
    best_thresholds,
    visible_offsets,
)
from fastdeberta.models import Config, Model
from fastdeberta.models.answers import MASKED, BeamSpanHead
from fastdeberta.models.encoded import Encoded, ModelOutput, Targets

TEXTS = ["zero one two three four five six", "a bc  def g\u00e9h", "x"]
LENGTH = 9


def windows_of(texts, room=3, step=2, front=2):
    """Windows over words, two tokens of a question before them; the last window is shorter."""
    windows = []
    for example, text in enumerate(texts):
        words, place = [], 0
        for word in text.split():
            place = text.index(word, place)
            words.append((place, place + len(word)))
            place += len(word)
        for first in range(0, max(1, len(words) - room + step), step):
            offsets = torch.full((front + room + 1, 2), -1)
            part = torch.tensor(words[first : first + room])
            offsets[front : front + len(part)] = part
            windows.append(Window(example, offsets[: front + len(part) + 1]))
    return windows


WINDOWS = windows_of(TEXTS)


def brute_force(windows, scores, empty, texts, longest, n_best, relative=True):
    """scores(row, start, end) of every pair of tokens; the n best of every question."""
    results = []
    for example, text in enumerate(texts):
        found, none = {}, math.inf
        for row, window in enumerate(windows):
            if window.example != example:
                continue
            none = min(none, empty[row])
            tokens = list(enumerate(window.offsets.tolist()))
            for (i, (a, _)), (j, (c, b)) in itertools.product(tokens, tokens):
                if a >= 0 and c >= 0 and i <= j < i + longest:
                    score = scores(row, i, j)
                    if score is not None:
                        found[a, b] = max(score, found.get((a, b), -math.inf))
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:n_best]
        total = sum(math.exp(score) for _, score in ranked)
        spans = [(text[a:b], a, b, score, math.exp(score) / total) for (a, b), score in ranked]
        if not ranked:
            none = math.inf
        elif relative:
            none -= ranked[0][1]
        results.append((spans, none))
    return results


def assert_same(predictions, expected):
    assert len(predictions) == len(expected)
    for prediction, (spans, none) in zip(predictions, expected, strict=True):
        assert [(s.text, s.start, s.end) for s in prediction.spans] == [s[:3] for s in spans]
        for span, (*_, score, probability) in zip(prediction.spans, spans, strict=True):
            assert span.score == pytest.approx(score, rel=1e-6)
            assert span.probability == pytest.approx(probability, rel=1e-6)
        assert prediction.no_answer == pytest.approx(none, rel=1e-6, abs=1e-9)
        best = spans[0][0] if spans else ""
        assert prediction.answer() == prediction.answer(prediction.no_answer) == best
        if none > -math.inf:
            assert prediction.answer(prediction.no_answer - 1e-6) == (
                best if none == math.inf else ""
            )


def decode(outputs, windows=WINDOWS, texts=TEXTS, **options):
    decoder, row = SpanDecoder(**options), 0
    for output in outputs:
        count = len(output.start_logits)
        decoder.add(windows[row : row + count], output)
        row += count
    return decoder.predictions(texts)


def linear_output(start, end):
    return ModelOutput(torch.empty(0), start_logits=start, end_logits=end)


# Linear head


@pytest.mark.parametrize("levels", [None, 4, 1])  # values a logit may have; few make ties
@pytest.mark.parametrize(("longest", "n_best"), [(30, 20), (2, 3), (1, 1)])
def test_linear_is_brute_force(levels, longest, n_best):
    generator = torch.Generator().manual_seed(longest)
    for _ in range(5):
        logits = 3 * torch.randn(2, len(WINDOWS), LENGTH, generator=generator)
        if levels:
            logits = torch.randint(levels, logits.shape, generator=generator).float()
        start, end = logits.double()
        expected = brute_force(
            WINDOWS,
            lambda row, i, j: float(start[row, i] + end[row, j]),  # noqa: B023
            (start + end)[:, 0].tolist(),
            TEXTS,
            longest,
            n_best,
        )
        halves = [linear_output(*logits[:, :3]), linear_output(*logits[:, 3:])]
        options = {"max_answer_tokens": longest, "n_best": n_best}
        assert_same(decode(halves, **options), expected)
        # In whatever order the windows come.
        order = torch.randperm(len(WINDOWS), generator=generator)
        shuffled = [WINDOWS[i] for i in order]
        assert_same(decode([linear_output(*logits[:, order])], shuffled, **options), expected)


def test_the_empty_answer_of_the_surest_window_counts():
    start, end = torch.zeros(2, len(WINDOWS), LENGTH)
    start[:, 0] = torch.arange(len(WINDOWS)) + 5.0
    predictions = decode([linear_output(start, end)])
    first = [[w.example for w in WINDOWS].index(example) for example in range(len(TEXTS))]
    assert [p.no_answer for p in predictions] == [5.0 + row for row in first]


def test_questions_special_tokens_and_padding_hold_no_answer():
    start, end = torch.zeros(2, len(WINDOWS), LENGTH)
    outside = torch.ones(len(WINDOWS), LENGTH, dtype=torch.bool)
    for row, window in enumerate(WINDOWS):
        outside[row, : len(window.offsets)] = window.offsets[:, 0] < 0
    start[outside] = end[outside] = 50.0
    for prediction, text in zip(decode([linear_output(start, end)]), TEXTS, strict=True):
        assert all(s.text == text[s.start : s.end] != "" for s in prediction.spans)
        assert {s.score for s in prediction.spans} == {0.0}


def test_half_precision_and_masked_logits():
    start, end = torch.full((2, 1, 4), MASKED, dtype=torch.float16)
    start[0, 1] = end[0, 1] = 2.0
    window = Window(0, torch.tensor([[-1, -1], [0, 1], [1, 2]]))
    (prediction,) = decode([linear_output(start, end)], [window], ["ab"])
    assert prediction.spans[0] == Span("a", 0, 1, 4.0, 1.0)
    assert prediction.no_answer == 2 * MASKED - 4


# Beam head


def beam_head(beam_size, answerable):
    torch.manual_seed(0)
    config = Config(
        hidden_size=6,
        num_attention_heads=2,
        span_hidden_size=5,
        span_beam_size=beam_size,
        span_answerable=answerable,
    )
    head = BeamSpanHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.9)
    return head.double().eval().requires_grad_(False)


@pytest.mark.parametrize("beam_size", [1, 2, 3, LENGTH, 50])
@pytest.mark.parametrize("answerable", [True, False])
def test_beam_is_brute_force(beam_size, answerable):
    """Over all starts and ends if the beam holds all, else over those that it keeps."""
    head, count = beam_head(beam_size, answerable), len(WINDOWS)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, LENGTH, 6, generator=generator, dtype=torch.float64)
    mask, answers = torch.zeros(2, count, LENGTH, dtype=torch.bool)
    for row, window in enumerate(WINDOWS):
        mask[row, : len(window.offsets)] = True
        answers[row, : len(window.offsets)] = window.offsets[:, 0] >= 0

    def fill(**targets):
        output, targets = ModelOutput(hidden), Targets(**targets)
        inputs = {"mask": mask, "answer_mask": answers}
        head.fill(output, Encoded(hidden, torch.zeros(1, 6), **inputs), targets)
        return output

    output = fill()
    start = output.start_logits.log_softmax(-1)
    ends = []
    for place in range(LENGTH):
        given = torch.full((count,), place)
        ends.append(fill(start_positions=given, end_positions=given).end_logits.log_softmax(-1))
    ends = torch.stack(ends, 1)  # [B, start, end]

    def kept(values):
        return set(sorted(range(LENGTH), key=lambda i: -values[i])[:beam_size])

    def score(row, i, j):
        if i not in kept(start[row].tolist()) or j not in kept(ends[row, i].tolist()):
            return None
        return float(start[row, i] + ends[row, i, j])

    empty = output.impossible_logits.tolist() if answerable else [-math.inf] * count
    expected = brute_force(WINDOWS, score, empty, TEXTS, 30, 20, relative=False)
    predictions = decode([output])
    assert_same(predictions, expected)
    if beam_size >= LENGTH:  # It holds all spans of each window, which share some of one word.
        assert [len(p.spans) for p in predictions] == [3 * 6 - 2, 6 + 3 - 1, 1]
    if not answerable:
        assert all(p.answer(-1e9) for p in predictions if p.spans)


@pytest.mark.parametrize("span_head", ["linear", "beam"])
def test_a_packed_model(span_head):
    """Packed rows give what each gives alone."""
    torch.manual_seed(0)
    config = tiny.config(span_head=span_head, span_beam_size=50)
    model = tiny.randomize(Model(config, "span")).eval()
    sizes = [len(window.offsets) for window in WINDOWS]
    ids = torch.randint(5, 67, (sum(sizes),))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    allowed = torch.cat([window.offsets[:, 0] >= 0 for window in WINDOWS])
    with torch.no_grad():
        packed = model(ids, cu_seqlens=cu_seqlens, max_seqlen=max(sizes), answer_mask=allowed)
        alone = [
            model(row.unsqueeze(0), answer_mask=may.unsqueeze(0))
            for row, may in zip(ids.split(sizes), allowed.split(sizes), strict=True)
        ]
    together, apart = decode([packed]), decode(alone)
    for a, b in zip(together, apart, strict=True):
        assert [s.text for s in a.spans] == [s.text for s in b.spans] != []
        np.testing.assert_allclose(a.no_answer, b.no_answer, atol=1e-4)


# Real text

ODD = (
    "  caf\u00e9 na\u00efve\u00a0\u00c5ngstr\u00f6m, \u4e2d\u6587 "
    "\U0001f600\U0001f44d\U0001f3fd end "
    "cafe\u0301\u2009thin \u00bd x\u00b2 \ufb01ne\tand\nmore \u201cquoted\u201d  "
)


@cache
def trained(kind):
    lines = [lead.text for lead in wiki_leads()[:200]]
    return tokenizers.train(lines, kind=kind, vocab_size=600)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_real_text(kind):
    tokenizer = trained(kind)
    texts = [lead.text for lead in wiki_leads()[300:304]] + [ODD]
    windows, offsets = [], []
    for example, text in enumerate(texts):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        offsets.append(torch.from_numpy(visible_offsets(text, encoding.offsets)))
        for first in range(0, len(offsets[-1]), 20):
            edge = torch.full((4, 2), -1)
            part = offsets[-1][first : first + 40]
            windows.append(Window(example, torch.cat([edge, part, edge[:1]])))
    generator = torch.Generator().manual_seed(0)
    start, end = 3 * torch.randn(2, len(windows), 45, generator=generator, dtype=torch.float64)

    bounds = [window.offsets.tolist() for window in windows]

    def score(row, i, j):
        """Bytes of one character are one token, told by their neighbours within the window."""
        before, first, last, after = (bounds[row][place] for place in (i - 1, i, j, j + 1))
        if before[0] == first[0] or last[1] == after[1]:
            return None
        return float(start[row, i] + end[row, j])

    empty = (start + end)[:, 0].tolist()
    expected = brute_force(windows, score, empty, texts, 8, 5)
    output = linear_output(start, end)
    assert_same(decode([output], windows, texts, max_answer_tokens=8, n_best=5), expected)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordpiece"])
def test_a_words_tokens_give_the_word(kind):
    """Every word of a text with odd characters, found from the tokens that cover it."""
    encoding = trained(kind).encode(ODD, add_special_tokens=False)
    offsets = visible_offsets(ODD, encoding.offsets)
    covered = offsets[offsets[:, 0] >= 0]
    assert len(covered)
    words, place = 0, 0
    for word in ODD.split():
        a = place = ODD.index(word, place)
        b = place = a + len(word)
        inside = np.flatnonzero((offsets[:, 0] < b) & (offsets[:, 1] > a))
        if not len(inside) or (offsets[inside[0], 0], offsets[inside[-1], 1]) != (a, b):
            continue  # A combining mark that the tokenizer leaves out.
        words += 1
        start, end = torch.zeros(2, 1, len(offsets))
        start[0, inside[0]] = end[0, inside[-1]] = 9.0
        window = Window(0, torch.from_numpy(offsets))
        (prediction,) = decode([linear_output(start, end)], [window], [ODD], max_answer_tokens=60)
        best = prediction.spans[0]
        assert (best.text, best.start, best.end) == (word, a, b)
        assert best.probability > 0.9
    assert words >= len(ODD.split()) - 2


def test_visible_offsets():
    text = " ab \u00a0c\t"
    offsets = [(0, 3), (0, 1), (3, 6), (3, 5), (6, 7), (2, 2), (1, 2)]
    visible = [(1, 3), (-1, -1), (5, 6), (-1, -1), (-1, -1), (-1, -1), (1, 2)]
    assert visible_offsets(text, offsets).tolist() == [list(pair) for pair in visible]
    assert visible_offsets("", []).shape == (0, 2)
    assert visible_offsets(text, np.array(offsets)).dtype == np.int64


# Errors


def test_errors():
    for options in ({"n_best": 0}, {"max_answer_tokens": -1}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be positive, got"):
            SpanDecoder(**options)
    decoder, (start, end) = SpanDecoder(), torch.zeros(2, 1, 4)
    fits, wide = Window(0, torch.full((4, 2), -1)), Window(0, torch.full((5, 2), -1))
    for windows in ([], [fits, fits], [wide]):
        with pytest.raises(ValueError, match="windows must be 1 of at most 4 tokens"):
            decoder.add(windows, linear_output(start, end))
    with pytest.raises(ValueError, match="no start_logits"):
        decoder.add([fits], ModelOutput(start))
    with pytest.raises(ValueError, match="made in training"):
        decoder.add([fits], linear_output(start, None))
    assert decoder.predictions([]) == []
    decoder.add([fits], linear_output(start, end))
    with pytest.raises(ValueError, match="question 1 of 2 has no window"):
        decoder.predictions(["", ""])
    with pytest.raises(ValueError, match="question 0 of 0 has no text"):
        decoder.predictions([])
    assert decoder.predictions([""]) == [SpanPrediction((), math.inf)]
    assert decoder.predictions([""])[0].answer() == ""


# Thresholds

NUMBERS = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9
)


@given(NUMBERS)
def test_best_threshold_is_the_best(rows):
    """Scores in quarters, so that sums are exact, and many equal no_answer."""
    scores, answered, abstained = (list(map(float, column)) for column in zip(*rows, strict=True))
    answered, abstained = [[x / 4 for x in column] for column in (answered, abstained)]

    def score(threshold):
        pairs = zip(scores, answered, abstained, strict=True)
        return sum(yes if x <= threshold else no for x, yes, no in pairs) / len(scores)

    best = best_threshold(scores, answered, abstained)
    choices = [min(scores) - 1, *scores]
    assert best.score == max(map(score, choices)) == score(best.value)
    # And the lowest of the best.
    assert all(
        score(x) < best.score for x in choices if x < best.value and best.value > min(scores)
    )


def test_best_threshold_by_hand():
    # Answering the first two is right, the third has no answer, the fourth is answered wrongly.
    no_answer, answered, abstained = [-2.0, -1.0, 0.5, 3.0], [1, 1, 0, 0], [0, 0, 1, 0]
    assert best_threshold(no_answer, answered, abstained) == (-1.0, 0.75)
    assert best_threshold([5.0], [1], [0]) == (5.0, 1.0)
    value, score = best_threshold([5.0, 6.0], [0, 0], [1, 1])
    assert value < 5.0 and score == 1.0
    # Of two with one score both are answered or neither.
    assert best_threshold([1.0, 1.0, 2.0], [1, 0, 0.25], [0, 1, 0]) == (2.0, 1.25 / 3)


def test_best_threshold_errors():
    for arguments in ([[], [], []], [[1.0], [1], [0, 1]]):
        with pytest.raises(ValueError, match="equally many, and not none"):
            best_threshold(*arguments)
    for number in (-math.inf, math.nan):
        with pytest.raises(ValueError, match="above -inf"):
            best_threshold([number, 1.0], [0, 0], [1, 1])


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_best_thresholds_of_a_synthetic_set(seed):
    """Against SQuAD 2.0's score of the answers that every possible threshold gives."""
    draw = random.Random(seed)
    words = ["a", "red", "fox", "the red fox", "", "fox!"]
    predictions, references = [], []
    for _ in range(draw.randint(1, 40)):
        text = draw.choice(words)
        spans = (Span(text, 0, len(text), 1.0, 1.0),) if text else ()
        predictions.append(SpanPrediction(spans, round(draw.gauss(0, 2), draw.choice([0, 3]))))
        references.append(draw.choices(words, k=draw.randint(0, 2)))
    best = best_thresholds(predictions, references)
    cuts = [p.no_answer for p in predictions]
    for name in ("f1", "exact_match"):

        def score(threshold, name=name):
            return squad2([p.answer(threshold) for p in predictions], references)[name]

        reached = score(best[f"best_{name}_threshold"])
        assert reached == pytest.approx(best[f"best_{name}"], abs=1e-12)
        assert reached == pytest.approx(max(map(score, [min(cuts) - 1, *cuts])), abs=1e-12)
