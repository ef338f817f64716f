"""Metrics against hand-worked examples and the rules that the benchmarks' scripts document."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeberta.finetuning.metrics import (
    GLUE,
    METRICS,
    SUPERGLUE,
    answer_scores,
    benchmark_average,
    normalize_answer,
)


def score(name, predictions, references):
    """The scores of a metric, of which the first is what early stopping watches."""
    if name == "seqeval":
        pytest.importorskip("seqeval", reason="seqeval is not installed")
    return METRICS[name](predictions, references)


# Classes and numbers

PREDICTED, LABELS = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]  # 2 true positives, 1 false, 1 missed


def test_classes_by_hand():
    assert score("accuracy", PREDICTED, LABELS) == {"accuracy": pytest.approx(4 / 6)}
    assert score("f1", PREDICTED, LABELS) == {"f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    # (2 * 2 - 1 * 1) / sqrt(3 * 3 * 3 * 3)
    assert score("matthews", PREDICTED, LABELS) == {"matthews": pytest.approx(3 / 9)}
    three = score("macro_f1", [0, 1, 1, 2], [0, 1, 2, 2])
    assert three == {"macro_f1": pytest.approx((1 + 2 / 3 + 2 / 3) / 3)}


def test_f1_is_of_the_class_1():
    flipped = [1 - x for x in PREDICTED], [1 - x for x in LABELS]
    assert score("f1", [1, 0, 0], [1, 1, 0]) == {"f1": pytest.approx(2 / 3)}
    assert score("f1", [0, 1, 1], [0, 0, 1]) == {"f1": pytest.approx(2 / 3)}
    assert score("f1", *flipped) == {"f1": pytest.approx(2 / 3)}
    assert score("f1", [0, 0], [0, 0]) == {"f1": 0.0}


@pytest.mark.filterwarnings("error")
@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20))
def test_classes_from_their_counts(pairs):
    ours, gold = map(list, zip(*pairs, strict=True))
    tp, fp, fn, tn = (
        sum(pair == case for pair in pairs) for case in [(1, 1), (1, 0), (0, 1), (0, 0)]
    )
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / spread if spread else 0.0
    assert score("matthews", ours, gold)["matthews"] == pytest.approx(expected, abs=1e-12)
    expected = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
    assert score("f1", ours, gold)["f1"] == pytest.approx(expected)
    assert score("accuracy", ours, gold)["accuracy"] == pytest.approx((tp + tn) / len(pairs))


def test_correlations_by_hand():
    # Of x and x cubed ranks agree; with means 2.5 and 25 the sums are 79.25, 5 and 1380.
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 8.0, 27.0, 64.0]
    products = sum((a - 2.5) * (b - 25) for a, b in zip(x, y, strict=True))
    pearson = products / math.sqrt(5 * sum((b - 25) ** 2 for b in y))
    scores = score("pearson_spearman", x, y)
    assert list(scores) == ["pearson_spearman", "pearson", "spearman"]
    assert scores["pearson"] == pytest.approx(pearson) and scores["spearman"] == pytest.approx(1)
    assert scores["pearson_spearman"] == pytest.approx((pearson + 1) / 2)
    # Ties share the mean of their ranks: 1.5, 1.5, 3 against 1, 2, 3.
    tied = score("pearson_spearman", [0.0, 0.0, 1.0], [5.0, 6.0, 7.0])
    assert tied["spearman"] == pytest.approx(1.5 / math.sqrt(1.5 * 2))


@pytest.mark.filterwarnings("error")
def test_a_constant_side_correlates_with_nothing():
    for pair in (([2.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [2.0, 2.0])):
        assert set(score("pearson_spearman", *pair).values()) == {0.0}
    assert score("matthews", [0, 0, 0], [0, 1, 0]) == {"matthews": 0.0}


# MultiRC


def test_multirc_by_hand():
    rows = [  # question, label, prediction
        ("p1-q1", 1, 1),
        ("p1-q1", 0, 0),
        ("p1-q2", 1, 1),
        ("p2-q1", 1, 0),
        ("p1-q2", 0, 1),  # A question's answers need not stand together.
        ("p2-q1", 1, 1),
        ("p2-q2", 0, 0),
    ]
    scores = score("multirc", [r[2] for r in rows], [(r[0], r[1]) for r in rows])
    # Over all answers: 3 right, 1 too many, 1 missed. Whole: p1-q1 and p2-q2, of 4 questions.
    assert scores == {
        "multirc": pytest.approx((0.75 + 0.5) / 2),
        "f1a": pytest.approx(0.75),
        "em": 0.5,
    }
    assert list(scores)[0] == "multirc"


def test_multirc_f1a_is_not_the_mean_of_questions():
    """A question's own F1 (F1m) would give (1 + 0.5) / 2 here."""
    references = [("a", 1), *[("b", 1)] * 3]
    scores = score("multirc", [1, 1, 0, 0], references)
    assert scores["f1a"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    assert scores["em"] == 0.5


# Tags


def test_tag_accuracy_counts_words():
    scores = score("tag_accuracy", [["N", "V", "N"], ["N"], []], [["N", "N", "N"], ["V"], []])
    assert scores == {"tag_accuracy": 0.5}


def test_seqeval_by_hand():
    gold = [
        ["B-PER", "I-PER", "O", "B-LOC", "O"],
        ["O", "B-ORG", "B-ORG", "I-ORG"],
    ]
    predicted = [
        ["B-PER", "I-PER", "O", "B-ORG", "O"],  # Right span, wrong type.
        ["O", "B-ORG", "I-ORG", "I-ORG"],  # Two entities joined.
    ]
    scores = score("seqeval", predicted, gold)
    precision, recall = 1 / 3, 1 / 4
    assert scores == {
        "f1": pytest.approx(2 * precision * recall / (precision + recall)),
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
    }
    assert list(scores)[0] == "f1"


@pytest.mark.filterwarnings("error")
def test_seqeval_reads_tags_as_conlleval():
    """An I- that continues nothing, or another type, starts an entity; so in CoNLL-2003's IOB1."""
    iob1 = [["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG"]]
    iob2 = [["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "B-ORG"]]
    assert score("seqeval", iob1, iob2)["f1"] == 1.0
    assert score("seqeval", [["B-PER", "B-PER"]], [["B-PER", "I-PER"]])["f1"] == 0.0
    assert score("seqeval", [["O", "O"]], [["O", "O"]]) == dict.fromkeys(
        ("f1", "precision", "recall"), 0.0
    )
    # Nothing predicted: no warning of a division by zero.
    assert score("seqeval", [["O"]], [["B-PER"]])["f1"] == 0.0


# Answers


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        ("an apple, a day;the rest", "apple daythe rest"),  # Punctuation goes first.
        ("A", ""),
        ("\tTHE\n", ""),
        ("theatre banana another", "theatre banana another"),
        ("U.S.A.", "usa"),
        ("a.m.", "am"),  # Not the article a.
        ("vitamin A-rich", "vitamin arich"),
        ("$1,000.50 (50%)", "100050 50"),
        # Punctuation beyond ASCII stays, and its neighbours are articles then.
        (
            "\u201cthe\u201d caf\u00e9\u2019s \u2014 a\u2026",
            "\u201c \u201d caf\u00e9\u2019s \u2014 \u2026",
        ),
        ("\u00c9COLE\u00a0normale", "\u00e9cole normale"),  # Other spaces are spaces.
        ("", ""),
        ("!?", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3 * 1) / (1 / 3 + 1)),
        ("Paris", ["London", "Paris, France", "paris"], 1, 1),  # The best of several.
        ("Paris", ["London", "Paris, France"], 0, 2 / 3),
        ("very very good", ["very good very"], 0, 1),
        ("very very good", ["very good"], 0, 2 * (2 / 3 * 1) / (2 / 3 + 1)),  # Words are counted.
        ("London", ["Paris"], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", ["Paris"], 0, 0),
        ("\u201cParis\u201d", ["Paris"], 0, 0),  # Quotes beyond ASCII are part of the word.
        ('"Paris"', ["Paris"], 1, 1),
    ],
)
def test_answers_of_both_versions(prediction, answers, exact, f1):
    expected = (exact, pytest.approx(f1))
    assert answer_scores(prediction, answers) == expected
    assert answer_scores(prediction, answers, no_answer=True) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "first", "second"),
    [
        # Two texts of which nothing is left: version 1.1 finds no word in common.
        ("the", ["A"], (1, 0), (1, 1)),
        ("", ["!"], (1, 0), (1, 1)),
        # Version 2.0 passes such answers over where there are others.
        ("", ["the", "Paris"], (1, 0), (0, 0)),
        ("Paris", ["the"], (0, 0), (0, 0)),
    ],
)
def test_answers_of_which_nothing_is_left(prediction, answers, first, second):
    assert answer_scores(prediction, answers) == first
    assert answer_scores(prediction, answers, no_answer=True) == second


def test_questions_without_an_answer():
    assert answer_scores("", [], no_answer=True) == (1, 1)
    assert answer_scores("the", [], no_answer=True) == (1, 1)
    assert answer_scores("Paris", [], no_answer=True) == (0, 0)


def test_squad():
    scores = score("squad", ["Paris", "in London", ""], [["paris"], ["London", "York"], ["x"]])
    assert scores == {
        "f1": pytest.approx((1 + 2 / 3 + 0) / 3),
        "exact_match": pytest.approx(1 / 3),
    }
    assert list(scores)[0] == "f1"
    with pytest.raises(ValueError, match="question 2 has no right answer"):
        score("squad", ["a", "b"], [["a"], []])


def test_squad2_and_its_parts():
    predictions = ["in London", "", "", "York", "Rome"]
    references = [["London"], ["Paris"], [], [], ["Rome", "rome"]]
    scores = score("squad2", predictions, references)
    assert scores == {
        "f1": pytest.approx((2 / 3 + 0 + 1 + 0 + 1) / 5),
        "exact_match": pytest.approx(2 / 5),
        "has_answer_f1": pytest.approx((2 / 3 + 0 + 1) / 3),
        "has_answer_exact_match": pytest.approx(1 / 3),
        "no_answer_f1": 0.5,
        "no_answer_exact_match": 0.5,
    }
    assert list(scores)[0] == "f1"
    assert not any(name.startswith("no_answer") for name in score("squad2", ["a"], [["a"]]))
    assert not any(name.startswith("has_answer") for name in score("squad2", ["a"], [()]))


def test_record():
    scores = score("record", ["Barack Obama", "Kenya"], [["Obama", "Barack Obama"], ["The US"]])
    assert scores == {"record": 0.5, "f1": 0.5, "em": 0.5}
    scores = score("record", ["Obama"], [["Mr. Obama", "Barack Hussein Obama"]])
    assert scores == {"record": pytest.approx(1 / 3), "f1": pytest.approx(2 / 3), "em": 0.0}


# All of them


@pytest.mark.parametrize("name", METRICS)
def test_numbers_must_agree(name):
    for lists in (([], []), ([1], []), ([1, 0], [1])):
        with pytest.raises(ValueError, match=f"got {len(lists[0])} and {len(lists[1])}"):
            score(name, *lists)


@pytest.mark.parametrize("name", ["tag_accuracy", "seqeval"])
def test_a_sentence_needs_a_tag_a_word(name):
    with pytest.raises(ValueError, match="sentence 2 has 1 tags, 2 words"):
        score(name, [["O"], ["O"]], [["O"], ["O", "O"]])


def perfect(name):
    """References, and predictions that are right."""
    draw = random.Random(0)
    labels = [0, 1, *(draw.randint(0, 1) for _ in range(20))]
    if name == "multirc":
        return labels, [(str(i // 3), label) for i, label in enumerate(labels)]
    if name in ("tag_accuracy", "seqeval"):
        tags = [["B-X" if label else "O" for label in labels]]
        return tags, tags
    if name in ("squad", "squad2", "record"):
        return ["Paris"] * 3, [["London", "paris"]] * 3
    return labels, labels


@pytest.mark.parametrize("name", METRICS)
def test_fractions_of_one(name):
    scores = score(name, *perfect(name))
    assert all(value == pytest.approx(1.0) and type(value) is float for value in scores.values())


# Benchmarks


def test_glue_average_by_hand():
    scores = {
        "cola": {"matthews": 0.6},
        "sst2": {"accuracy": 0.9},
        "mrpc": {"accuracy": 0.8, "f1": 0.9},
        "stsb": {"pearson_spearman": 0.0, "pearson": 0.9, "spearman": 0.8},
        "qqp": {"accuracy": 0.9, "f1": 0.8},
        "mnli": {"dev/accuracy": 0.8, "dev-mm/accuracy": 0.9, "dev/majority": 0.3},
        "qnli": {"accuracy": 0.9},
        "rte": {"accuracy": 0.7},
        "wnli": {"accuracy": 0.5},
    }
    eight = 0.6 + 0.9 + 4 * 0.85 + 0.9 + 0.7
    assert benchmark_average(scores, GLUE) == pytest.approx((eight + 0.5) / 9)
    del scores["wnli"]
    with pytest.raises(ValueError, match="no task 'wnli'; it has cola, sst2"):
        benchmark_average(scores, GLUE)
    papers = {task: names for task, names in GLUE.items() if task != "wnli"}
    assert benchmark_average(scores, papers) == pytest.approx(eight / 8)
    with pytest.raises(ValueError, match="rte has no 'accuracy'; it has f1"):
        benchmark_average(scores | {"rte": {"f1": 1.0}}, papers)
    with pytest.raises(ValueError, match="no task"):
        benchmark_average(scores, {})


def test_superglue_average_is_the_papers():
    """DeBERTa's test scores (arXiv:2006.03654, table 5), whose average is 89.9."""
    scores = {
        "boolq": {"accuracy": 90.4},
        "cb": {"accuracy": 97.2, "macro_f1": 94.9},
        "copa": {"accuracy": 96.8},
        "multirc": {"multirc": 0, "f1a": 88.2, "em": 63.7},
        "record": {"record": 0, "f1": 94.5, "em": 94.1},
        "superglue-rte": {"accuracy": 93.2},
        "wic": {"accuracy": 76.4},
        "wsc": {"accuracy": 95.9},
    }
    assert round(benchmark_average(scores, SUPERGLUE), 1) == 89.9


def test_benchmarks_are_in_the_task_table():
    from fastdeberta.finetuning.tasks import TASKS

    for benchmark in (GLUE, SUPERGLUE):
        for task, names in benchmark.items():
            found = {name for m in TASKS[task].metrics for name in score(m, *perfect(m))}
            assert set(names) <= found
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)
