"""Answers in texts: from the logits of overlapping windows to spans of characters, and the best
threshold for "the text does not hold the answer"."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.encoded import ModelOutput, SpanBeam
from .metrics import answer_scores

# In config.json: of a fine-tuned model the no_answer above which a question has none.
THRESHOLD = "no_answer_threshold"


@dataclass(frozen=True)
class Window:
    """One row of a span task: a question with a part of its text.

    example: the question's number; its windows share it. offsets: int64 [L, 2], for every token of
    the row the characters [start, end) of the text that it covers, as `visible_offsets` gives them;
    (-1, -1) for tokens outside the text: [CLS], the question, [SEP].
    """

    example: int
    offsets: Tensor


@dataclass(frozen=True)
class Span:
    """text[start:end] of the question's text.

    score: the sum of the start's and the end's logits, or log-probabilities of the beam's head.
    probability: softmax of the scores over the question's n best.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


@dataclass(frozen=True)
class SpanPrediction:
    """A question's n best answers, the best first, and its score of having none.

    no_answer: of the linear head the lowest logit of the empty answer (start and end at [CLS])
    over the windows, less the best span's score; of the beam's head the lowest logit of
    "impossible". -inf: a beam's head that does not judge this. inf: no span was possible.
    """

    spans: tuple[Span, ...]
    no_answer: float

    def answer(self, threshold: float = math.inf) -> str:
        """The best span's text, or "" where no_answer is above the threshold."""
        return self.spans[0].text if self.spans and self.no_answer <= threshold else ""


def visible_offsets(text: str, offsets: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Offsets [L, 2] of a text's tokens without the white space at their edges, int64.

    A token of nothing else gets (-1, -1). SentencePiece's tokens include the space before a word,
    and answers do not.
    """
    solid = np.array([not character.isspace() for character in text], dtype=bool)
    places = np.flatnonzero(solid)
    before = np.concatenate([[0], np.cumsum(solid)])  # of each place, the solid ones before it
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    first, last = before[bounds].T
    result = np.full(bounds.shape, -1, dtype=np.int64)
    some = first < last
    result[some, 0] = places[first[some]]
    result[some, 1] = places[last[some] - 1] + 1
    return result


class _Candidates(NamedTuple):
    """Spans of characters with their questions' numbers; arrays of equal length."""

    example: np.ndarray
    start: np.ndarray
    end: np.ndarray
    score: np.ndarray


class SpanDecoder:
    """Collects the windows' outputs batch by batch, and then gives every question's answers.

    A span starts and ends with tokens of the text, has at most max_answer_tokens of them, and
    counts in every window that holds it, with its best score there. (Google's code asks besides
    that its start have more context there than in any other window; nothing is asked here.) Tokens
    that share a character, such as the bytes of an emoji, count as one: only their first may start
    a span and only their last may end it. Of equal scores the earlier start comes first, then the
    shorter span.

    Raises:
        ValueError: max_answer_tokens or n_best is not positive.
    """

    def __init__(self, max_answer_tokens: int = 30, n_best: int = 20):
        for name, value in (("max_answer_tokens", max_answer_tokens), ("n_best", n_best)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.max_answer_tokens, self.n_best = max_answer_tokens, n_best
        self._candidates: list[_Candidates] = []
        self._empty: list[tuple[np.ndarray, np.ndarray]] = []
        self._relative = False  # Is the empty answer's score one to compare with the best span's?

    @torch.no_grad()
    def add(self, windows: Sequence[Window], output: ModelOutput) -> None:
        """One batch: a span head's output and the window of each of its rows, all of which start
        with [CLS] in the first column.

        Raises:
            ValueError: another number of windows than rows, or a window longer than the rows.
        """
        if output.start_logits is None:
            raise ValueError("output must be of a span head, but has no start_logits")
        # Scores are compared across batches, so as precisely as the sums can be told apart.
        start = output.start_logits.double()
        size, length = start.shape
        longest = max((len(window.offsets) for window in windows), default=0)
        if len(windows) != size or longest > length:
            raise ValueError(
                f"windows must be {size} of at most {length} tokens, as the output has rows; "
                f"got {len(windows)} of up to {longest}"
            )
        offsets = torch.full((size, length, 2), -1)
        for row, window in enumerate(windows):
            offsets[row, : len(window.offsets)] = window.offsets
        bounds = _bounds(offsets.to(start.device))
        example = np.array([window.example for window in windows])
        if output.beam is not None:
            spans = _in_beam(output.beam, *bounds, self.max_answer_tokens)
            empty = output.impossible_logits
            empty = start.new_full((size,), -math.inf) if empty is None else empty.double()
        elif output.end_logits is not None:
            end = output.end_logits.double()
            spans = _in_band(start, end, *bounds, self.max_answer_tokens)
            empty = start[:, 0] + end[:, 0]
        else:
            raise ValueError("output has neither end_logits nor a beam: was it made in training?")
        self._relative = output.beam is None
        rows, first, last, score = (x.cpu().numpy() for x in _best(*spans, self.n_best))
        self._candidates.append(_Candidates(example[rows], first, last, score))
        self._empty.append((example, empty.cpu().numpy()))

    def predictions(self, texts: Sequence[str]) -> list[SpanPrediction]:
        """Of every question the answers in its text, texts[example].

        Raises:
            ValueError: a question without a window, or a window without its question's text.
        """
        seen = {number for examples, _ in self._empty for number in examples.tolist()}
        wrong = seen.symmetric_difference(range(len(texts)))
        if wrong:
            lack = "text" if min(wrong) in seen else "window"
            raise ValueError(f"texts: question {min(wrong)} of {len(texts)} has no {lack}")
        if not seen:
            return []
        empty = np.full(len(texts), math.inf)
        for examples, scores in self._empty:
            np.minimum.at(empty, examples, scores)
        spans, bounds = self._ranked(len(texts))
        predictions = []
        for text, none, first, last in zip(texts, empty, bounds, bounds[1:], strict=False):
            score = spans.score[first:last]
            weight = np.exp(score - score[0]) if len(score) else score
            shares = weight / weight.sum()
            chosen = tuple(
                Span(text[a:b], int(a), int(b), float(s), float(p))
                for a, b, s, p in zip(
                    spans.start[first:last], spans.end[first:last], score, shares, strict=True
                )
            )
            if not chosen:
                none = math.inf
            elif self._relative:
                none = none - score[0]
            predictions.append(SpanPrediction(chosen, float(none)))
        return predictions

    def _ranked(self, count: int) -> tuple[_Candidates, np.ndarray]:
        """The n best different spans of every question, and where each question's begin."""
        columns = [np.concatenate(column) for column in zip(*self._candidates, strict=True)]
        # First by span, so that a span's windows meet, the best of them first; then by score.
        order = np.lexsort((-columns[3], *columns[2::-1]))
        example, start, end, score = (column[order] for column in columns)
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = (np.diff(example) != 0) | (np.diff(start) != 0) | (np.diff(end) != 0)
        example, start, end, score = (x[fresh] for x in (example, start, end, score))
        order = np.lexsort((end, start, -score, example))
        begins = np.searchsorted(example[order], np.arange(count + 1))
        rank = np.arange(len(order)) - begins[example[order]]
        order = order[rank < self.n_best]
        bounds = np.searchsorted(example[order], np.arange(count + 1))
        return _Candidates(*(x[order] for x in (example, start, end, score))), bounds


def _bounds(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The characters at which each token may start and end a span, [B, L]; -1: at none."""
    start, end = offsets.unbind(-1)
    starts, ends = start.clone(), end.clone()
    starts[:, 1:][start[:, 1:] == start[:, :-1]] = -1
    ends[:, :-1][end[:, :-1] == end[:, 1:]] = -1
    return starts, ends


def _in_band(
    start: Tensor, end: Tensor, starts: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, L, D] of all spans of 1..D tokens, and their characters; impossible: -inf."""
    width = min(longest, start.size(1))
    room = (0, width - 1)
    score = start.unsqueeze(-1) + pad(end, room).unfold(1, width, 1)
    ends = pad(ends, room, value=-1).unfold(1, width, 1)
    starts = starts.unsqueeze(-1).expand_as(ends)
    return score.masked_fill((starts < 0) | (ends <= starts), -math.inf), starts, ends


def _in_beam(
    beam: SpanBeam, starts: Tensor, ends: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, K, K] of the beam's spans, and their characters; impossible: -inf."""
    score = beam.start_log_probs.double().unsqueeze(-1) + beam.end_log_probs.double()
    tokens = beam.end_index - beam.start_index.unsqueeze(-1) + 1
    first = starts.gather(1, beam.start_index).unsqueeze(-1).expand_as(score)
    last = ends.gather(1, beam.end_index.flatten(1)).view_as(score)
    possible = (first >= 0) & (last > first) & (tokens >= 1) & (tokens <= longest)
    # Below it the beam was filled up with tokens that cannot hold answers.
    possible &= score > -1000
    return score.masked_fill(~possible, -math.inf), first, last


def _best(score: Tensor, first: Tensor, last: Tensor, count: int) -> tuple[Tensor, ...]:
    """Row, start, end and score of each row's `count` best spans, and of all that tie with the
    last of them."""
    score, first, last = score.flatten(1), first.flatten(1), last.flatten(1)
    floor = score.topk(min(count, score.size(1))).values[:, -1:]
    chosen = (score >= floor) & (score > -math.inf)
    return chosen.nonzero()[:, 0], first[chosen], last[chosen], score[chosen]


class Threshold(NamedTuple):
    """Answering the questions whose no_answer is at most `value` scores `score`, on average."""

    value: float
    score: float


def best_threshold(
    no_answer: Sequence[float], answered: Sequence[float], abstained: Sequence[float]
) -> Threshold:
    """The threshold for no_answer with the best mean score: exactly the best there is.

    It is one of the no_answer scores, or just below the lowest: then no question is answered. Of
    equally good ones the lowest. Equal scores are never told apart, which SQuAD 2.0's script does.

    Args:
        no_answer: of every question. answered, abstained: its score for the text that is predicted
            and for "".

    Raises:
        ValueError: none, another number of one than of the other, or a no_answer that is NaN or
            -inf.
    """
    x, yes, no = (np.asarray(v, dtype=np.float64) for v in (no_answer, answered, abstained))
    if not len(x) == len(yes) == len(no) > 0:
        raise ValueError(
            "no_answer, answered and abstained must be equally many, and not none: "
            f"got {len(x)}, {len(yes)} and {len(no)}"
        )
    if not (x > -math.inf).all():
        raise ValueError("no_answer must be numbers above -inf: does this head judge answers?")
    order = np.argsort(x, kind="stable")
    x, gains = x[order], (yes - no)[order]
    totals = no.sum() + np.concatenate([[0.0], np.cumsum(gains)])  # of the first k answered
    # The first k alone can be answered only where the next one's score is higher.
    cuts = np.flatnonzero(np.concatenate([[True], np.diff(x) > 0, [True]]))
    best = int(cuts[np.argmax(totals[cuts])])
    value = x[best - 1] if best else np.nextafter(x[0], -math.inf)
    return Threshold(float(value), float(totals[best] / len(x)))


def best_thresholds(
    predictions: Sequence[SpanPrediction], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """best_f1 and best_exact_match by SQuAD 2.0's rules, each with its own best threshold, under
    its name and _threshold.

    references: of every question the right answers' texts, or ().

    Raises:
        ValueError: see best_threshold.
    """
    answered = [
        answer_scores(prediction.answer(), answers, no_answer=True)
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    abstained = [answer_scores("", answers, no_answer=True) for answers in references]
    no_answer = [prediction.no_answer for prediction in predictions]
    scores: dict[str, float] = {}
    for name, i in (("f1", 1), ("exact_match", 0)):
        best = best_threshold(no_answer, [s[i] for s in answered], [s[i] for s in abstained])
        scores |= {f"best_{name}": best.score, f"best_{name}_threshold": best.value}
    return scores
