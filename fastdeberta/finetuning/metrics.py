"""Scores of predictions, by the rules of each benchmark; all are fractions, 1.0 the best.

METRICS holds them by name. Each is called with the predictions and the references of a whole
split, in the same order, and returns its scores by name; the first is its headline, which early
stopping watches. All raise ValueError where the two differ in number or are empty.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Scores = dict[str, float]


def classification(
    labels: list[int], predictions: list[int], names: Sequence[str]
) -> dict[str, Any]:
    """accuracy, macro_f1, majority (accuracy of the most frequent label) and confusion.

    macro_f1 averages the F1 of every class that occurs among labels or predictions. confusion:
    confusion[i][j] counts label i predicted as j.
    """
    from sklearn.metrics import confusion_matrix, f1_score

    count = len(labels)
    return {
        "accuracy": sum(a == b for a, b in zip(labels, predictions, strict=True)) / count,
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
        "majority": max(labels.count(i) for i in set(labels)) / count,
        "confusion": confusion_matrix(labels, predictions, labels=list(range(len(names)))).tolist(),
    }


# Classes and numbers


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
    """The share of equal pairs."""
    _check(predictions, references)
    return {"accuracy": _mean([a == b for a, b in zip(predictions, references, strict=True)])}


def f1(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    """F1 of class 1 against class 0; 0 where class 1 occurs on neither side."""
    from sklearn.metrics import f1_score

    _check(predictions, references)
    return {"f1": float(f1_score(references, predictions, zero_division=0))}


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    """The mean F1 of the classes that occur among predictions or references (CommitmentBank)."""
    from sklearn.metrics import f1_score

    _check(predictions, references)
    score = f1_score(references, predictions, average="macro", zero_division=0)
    return {"macro_f1": float(score)}


def matthews(predictions: Sequence[int], references: Sequence[int]) -> Scores:
    """Matthews' correlation; 0 where one side has a single class."""
    from sklearn.metrics import matthews_corrcoef

    _check(predictions, references)
    if len(set(predictions)) < 2 or len(set(references)) < 2:
        return {"matthews": 0.0}
    return {"matthews": float(matthews_corrcoef(references, predictions))}


def pearson_spearman(predictions: Sequence[float], references: Sequence[float]) -> Scores:
    """Both correlations and, as the headline, their mean; 0 where a side is constant."""
    from scipy.stats import pearsonr, spearmanr

    _check(predictions, references)
    pearson = spearman = 0.0
    if len(set(predictions)) > 1 and len(set(references)) > 1:
        pearson = float(pearsonr(predictions, references).statistic)
        spearman = float(spearmanr(predictions, references).statistic)
    mean = (pearson + spearman) / 2
    return {"pearson_spearman": mean, "pearson": pearson, "spearman": spearman}


def multirc(predictions: Sequence[int], references: Sequence[tuple[str, int]]) -> Scores:
    """f1a, em and, as the headline, their mean, of answers that are right (1) or wrong (0).

    references: (question, label) of every answer; the name of a question must be unique over all
    paragraphs. f1a: F1 of the right answers, over the answers of all questions. em: the share of
    questions of which every answer is labelled correctly.

    Source: Khashabi et al. 2018 (NAACL), section 4; the means that SuperGLUE reports.
    """
    _check(predictions, references)
    whole: dict[str, bool] = {}
    for prediction, (question, label) in zip(predictions, references, strict=True):
        whole[question] = whole.get(question, True) and prediction == label
    f1a, em = f1(predictions, [label for _, label in references])["f1"], _mean(whole.values())
    return {"multirc": (f1a + em) / 2, "f1a": f1a, "em": em}


# Tags: one list a sentence, on both sides


def tag_accuracy(
    predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]
) -> Scores:
    """The share of right tags, over the words of all sentences."""
    _check_tags(predictions, references)
    right = [
        a == b
        for predicted, tags in zip(predictions, references, strict=True)
        for a, b in zip(predicted, tags, strict=True)
    ]
    return {"tag_accuracy": _mean(right) if right else 0.0}


def check_installed(names: Iterable[str]) -> None:
    """Raises ModuleNotFoundError where one of the metrics needs a package that is not there."""
    if "seqeval" in names and find_spec("seqeval") is None:
        raise ModuleNotFoundError(
            "the metric 'seqeval' needs one package more: pip install 'fastdeberta[ner]'"
        )


def seqeval(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Scores:
    """Entity-level f1, precision and recall by conlleval's rule, over all types.

    Tags are "O" or "B-" or "I-" with a type; an "I-" that continues nothing starts an entity. 0
    where nothing is an entity.
    """
    _check_tags(predictions, references)
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, score, _ = precision_recall_fscore_support(
        [list(tags) for tags in references],
        [list(tags) for tags in predictions],
        average="micro",
        zero_division=0,
    )
    return {"f1": float(score), "precision": float(precision), "recall": float(recall)}


# Texts: one predicted answer, and of each question all right ones


def normalize_answer(text: str) -> str:
    """What SQuAD's scripts compare: lower case, no ASCII punctuation, then none of the words a, an
    and the, then single spaces. Other scripts' punctuation and quotes stay."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def answer_scores(
    prediction: str, answers: Sequence[str], no_answer: bool = False
) -> tuple[float, float]:
    """Exact match and F1 of the words, both after normalisation, each against its best answer.

    no_answer: SQuAD 2.0's rules. Then () is a question without an answer, to which "" is the right
    reply; answers of which normalisation leaves nothing are passed over; and two empty texts have
    F1 1, where SQuAD 1.1's script says 0.
    """
    gold = [normalize_answer(answer) for answer in answers]
    if no_answer:
        gold = [answer for answer in gold if answer] or [""]
    ours = normalize_answer(prediction)
    return (
        max(float(ours == answer) for answer in gold),
        max(_word_f1(ours.split(), answer.split(), float(no_answer)) for answer in gold),
    )


def _word_f1(ours: list[str], gold: list[str], both_empty: float) -> float:
    if not ours and not gold:
        return both_empty
    # 2PR / (P + R), of which words in common are the only unknown; words count as often as they
    # occur.
    return 2 * sum((Counter(ours) & Counter(gold)).values()) / (len(ours) + len(gold))


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """f1 and exact_match of SQuAD 1.1; references: the right answers' texts, at least one."""
    scores = _answers(predictions, references)
    return {"f1": _mean([f for _, f in scores]), "exact_match": _mean([e for e, _ in scores])}


def squad2(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """f1 and exact_match of SQuAD 2.0, of all questions and, with has_answer_ and no_answer_ before
    their names, of those with an answer and those without (left out where there are none).

    predictions: "" says that there is no answer. references: the right answers' texts, or ().
    """
    _check(predictions, references)
    parts: dict[str, list[tuple[float, float]]] = {"": [], "has_answer_": [], "no_answer_": []}
    for prediction, answers in zip(predictions, references, strict=True):
        score = answer_scores(prediction, answers, no_answer=True)
        parts[""].append(score)
        parts["has_answer_" if answers else "no_answer_"].append(score)
    means: Scores = {}
    for part, scores in parts.items():
        if scores:
            means[f"{part}f1"] = _mean([f for _, f in scores])
            means[f"{part}exact_match"] = _mean([e for e, _ in scores])
    return means


def record(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """f1, em and, as the headline, their mean, of entities' texts against all right ones; the
    rules are SQuAD 1.1's (Zhang et al. 2018, arXiv:1810.12885)."""
    scores = _answers(predictions, references)
    score, em = _mean([f for _, f in scores]), _mean([e for e, _ in scores])
    return {"record": (score + em) / 2, "f1": score, "em": em}


def _answers(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[float, float]]:
    _check(predictions, references)
    for number, answers in enumerate(references):
        if not answers:
            raise ValueError(f"references: question {number + 1} has no right answer")
    return [answer_scores(p, a) for p, a in zip(predictions, references, strict=True)]


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], Scores]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson_spearman": pearson_spearman,
    "multirc": multirc,
    "tag_accuracy": tag_accuracy,
    "seqeval": seqeval,
    "squad": squad,
    "squad2": squad2,
    "record": record,
}

# Of each benchmark its tasks, and the scores whose mean is the task's. The papers' averages of
# eight GLUE tasks leave WNLI out.
GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
SUPERGLUE: dict[str, tuple[str, ...]] = {
    "boolq": ("accuracy",),
    "cb": ("accuracy", "macro_f1"),
    "copa": ("accuracy",),
    "multirc": ("f1a", "em"),
    "record": ("f1", "em"),
    "superglue-rte": ("accuracy",),
    "wic": ("accuracy",),
    "wsc": ("accuracy",),
}


def benchmark_average(
    scores: Mapping[str, Mapping[str, float]], benchmark: Mapping[str, Sequence[str]]
) -> float:
    """The mean over a benchmark's tasks of the mean of each task's scores.

    Args:
        scores: of each task its scores by name. Before a name may stand a split with a slash:
            "dev/accuracy" and "dev-mm/accuracy" of MNLI count half each.
        benchmark: GLUE, SUPERGLUE, or a part of one.

    Raises:
        ValueError: a task or a score of it is missing.
    """
    means = []
    for task, names in benchmark.items():
        if task not in scores:
            raise ValueError(f"scores: no task {task!r}; it has {', '.join(scores)}")
        parts = []
        for name in names:
            values = [v for key, v in scores[task].items() if key.rpartition("/")[2] == name]
            if not values:
                raise ValueError(
                    f"scores: {task} has no {name!r}; it has {', '.join(scores[task])}"
                )
            parts.append(_mean(values))
        means.append(_mean(parts))
    if not means:
        raise ValueError("benchmark has no task")
    return _mean(means)


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _check(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            "predictions and references must be equally many, and not none: "
            f"got {len(predictions)} and {len(references)}"
        )


def _check_tags(predictions: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]) -> None:
    _check(predictions, references)
    for i, (predicted, tags) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(tags):
            raise ValueError(
                f"predictions: sentence {i + 1} has {len(predicted)} tags, {len(tags)} words"
            )
