"""From a head's logits to predictions, and from predictions to scores."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.answers import MASKED
from ..models.encoded import ModelOutput, SpanBeam
from . import metrics
from .examples import EntityExample, Example, SpanExample
from .features import Features
from .labels import numbers
from .settings import FinetuneSettings
from .spans import SpanDecoder, SpanPrediction
from .tasks import Task

# Of every row what the head gives: sequence (logits [C],), regression ([1],), choice ([options],),
# tagging ([scored words, C],), entities ([E],); spans (start [L], end [L]), or a beam's start_index
# [K], start_log_probs [K], end_index [K, K], end_log_probs [K, K], and a number, the logit of no
# answer, if the head has it.
Outputs = list[tuple[Tensor, ...]]

# The tag of words outside of all entities.
OUTSIDE = "O"


# Windows that are decoded at a time.
_WINDOWS = 64


class Predicted(NamedTuple):
    """One value an example; how many words have no prediction of their own; spans' n best; of a
    text's classes the probabilities [N, C]."""

    values: list[Any]
    missed: int = 0
    spans: list[SpanPrediction] | None = None
    probabilities: Tensor | None = None


def tags(
    examples: Sequence[Any], features: Features, outputs: Outputs, names: Sequence[str]
) -> tuple[list[list[str]], int]:
    """Each sentence's tags, one a word, and how many words have none of their own: those beyond
    max_length, or of which the tokenizer leaves nothing. They get "O" if it is a tag, else the tag
    that is predicted most often."""
    assert features.words is not None
    found: list[list[str]] = [[""] * len(example.words) for example in examples]
    for row, (logits,) in enumerate(outputs):
        best = logits.argmax(-1).tolist()
        for word, tag in zip(features.words[row].tolist(), best, strict=True):
            found[row][word] = names[tag]
    counts = Counter(tag for sentence in found for tag in sentence)
    missed = counts.pop("", 0)
    usual = OUTSIDE if OUTSIDE in names or not counts else counts.most_common(1)[0][0]
    return [[tag or usual for tag in sentence] for sentence in found], missed


def entities(examples: Sequence[EntityExample], outputs: Outputs) -> list[str]:
    """Each question's likeliest entity, as its text has it; "" where there is none."""
    found = []
    for example, (logits,) in zip(examples, outputs, strict=True):
        best = example.entities[int(logits.argmax())] if len(logits) else (0, 0)
        found.append(example.text[slice(*best)])
    return found


def spans(
    examples: Sequence[SpanExample],
    features: Features,
    outputs: Outputs,
    settings: FinetuneSettings,
) -> list[SpanPrediction]:
    """Each question's n best answers, over all of its windows."""
    decoder = SpanDecoder(settings.max_answer_length, settings.n_best)
    found = zip(features.windows, outputs, strict=True)
    # A beam is narrower where all of a batch's sequences are shorter than it.
    for _, same in groupby(found, key=lambda pair: len(pair[1]) > 2 and len(pair[1][0])):
        while part := list(islice(same, _WINDOWS)):
            windows, rows = zip(*part, strict=True)
            decoder.add(windows, _span_output(rows, max(len(w.offsets) for w in windows)))
    return decoder.predictions([example.text for example in examples])


def _span_output(rows: Sequence[tuple[Tensor, ...]], length: int) -> ModelOutput:
    """The head's output for rows of `Outputs`."""
    columns = list(zip(*rows, strict=True))
    if len(columns) == 2:
        start, end = (pad_sequence(list(x), True, padding_value=MASKED) for x in columns)
        return ModelOutput(start, start_logits=start, end_logits=end)
    stacked = [torch.stack(list(x)) for x in columns]
    return ModelOutput(
        stacked[1],
        start_logits=torch.zeros(len(rows), length),
        beam=SpanBeam(*stacked[:4]),
        impossible_logits=stacked[4] if len(stacked) > 4 else None,
    )


def predict(
    task: Task,
    examples: Sequence[Any],
    features: Features,
    outputs: Outputs,
    names: Sequence[str],
    settings: FinetuneSettings,
) -> Predicted:
    """What the outputs for the examples' rows say.

    values: of each example a class's name, a number (regression), an option's number, a list of
    tags, or an answer's text.
    """
    if task.head == "token":
        return Predicted(*tags(examples, features, outputs, names))
    if task.head == "entity":
        return Predicted(entities(examples, outputs))
    if task.head == "span":
        found = spans(examples, features, outputs, settings)
        return Predicted([one.answer() for one in found], spans=found)
    if task.head == "sequence" and not names:
        return Predicted([float(logits) for (logits,) in outputs])
    if task.head == "choice":
        return Predicted([int(logits.argmax()) for (logits,) in outputs])
    logits = torch.stack([logits for (logits,) in outputs])
    best = logits.argmax(-1).tolist()
    return Predicted([names[i] for i in best], probabilities=logits.softmax(-1))


def abstaining(predicted: Predicted, threshold: float) -> Predicted:
    """The same with "" for the answers of questions whose no_answer is above the threshold."""
    found = predicted.spans or []
    return predicted._replace(values=[one.answer(threshold) for one in found])


def references(
    task: Task, examples: Sequence[Example], names: Sequence[str], where: str
) -> list[Any]:
    """What the metrics compare with: numbers of classes, of options, floats, lists of tags, or the
    texts of all right answers.

    Raises:
        ValueError: an example has no label, or one that is not among `names`.
    """
    found = numbers(examples, names, where)
    if task.head == "token":
        return [[names[i] for i in sentence] for sentence in found]
    if task.head == "span":
        return [[answer.text for answer in example.answers] for example in examples]  # type: ignore[union-attr]
    if task.head == "entity":
        return [list(example.answers) for example in examples]  # type: ignore[union-attr,arg-type]
    return found


def score(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Any],
    names: Sequence[str],
    where: str,
) -> dict[str, Any]:
    """The task's scores, the one to watch first; of classes also the confusion matrix and the
    accuracy of the most frequent label.

    Args:
        predictions: values of Predicted. where: what the examples are, for errors.

    Raises:
        ValueError: see `references`.
    """
    right = references(task, examples, names, where)
    given = list(predictions)
    classified = task.head == "sequence" and bool(names)
    if classified:
        given = [names.index(prediction) for prediction in predictions]
    scores: dict[str, Any] = {}
    for name in task.metrics:
        compared = right
        if name == "multirc":
            compared = [(e.group, x) for e, x in zip(examples, right, strict=True)]  # type: ignore[union-attr]
        scores |= metrics.METRICS[name](given, compared)
    if classified:
        whole = metrics.classification(right, given, names)
        scores |= {key: whole[key] for key in ("majority", "confusion")}
    return scores
