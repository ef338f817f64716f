"""Submissions: the files that each benchmark's server takes."""

import json
from pathlib import Path

import pytest

from fastdeberta.finetuning.submissions import write
from fastdeberta.finetuning.tasks import TASKS

DATA = Path(__file__).parent / "data"

GLUE = [
    ("cola", "test", "CoLA", ["0", "1"]),
    ("sst2", "test", "SST-2", ["0", "1"]),
    ("mrpc", "test", "MRPC", ["0", "1"]),
    ("qqp", "test", "QQP", ["0", "1"]),
    ("mnli", "test", "MNLI-m", ["contradiction", "entailment", "neutral"]),
    ("mnli", "test-mm", "MNLI-mm", ["contradiction", "entailment", "neutral"]),
    ("mnli", "ax", "AX", ["contradiction", "entailment", "neutral"]),
    ("ax", "test", "AX", ["contradiction", "entailment", "neutral"]),
    ("qnli", "test", "QNLI", ["entailment", "not_entailment"]),
    ("rte", "test", "RTE", ["entailment", "not_entailment"]),
    ("wnli", "test", "WNLI", ["0", "1"]),
]


@pytest.mark.parametrize(("name", "split", "file", "labels"), GLUE)
def test_glue(name, split, file, labels, tmp_path):
    task = TASKS[name]
    examples = task.read(DATA / "glue", split)
    assert sorted(task.labels) == labels
    predictions = {e.id: labels[int(e.id) % len(labels)] for e in reversed(examples)}
    (path,) = write(task, split, tmp_path / "new", predictions)
    assert path == tmp_path / "new" / f"{file}.tsv" and [*path.parent.iterdir()] == [path]
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert rows[0] == ["index", "prediction"]
    assert rows[1:] == [[str(i), labels[i % len(labels)]] for i in range(len(examples))]


def test_stsb_stays_in_its_range(tmp_path):
    predictions = {"10": 5.2, "2": -0.1, "1": 2.71828}
    (path,) = write(TASKS["stsb"], "test", tmp_path, predictions)
    assert path.read_text() == "index\tprediction\n1\t2.718\n2\t0.000\n10\t5.000\n"


SUPERGLUE = [
    ("boolq", "test", "BoolQ", ["false", "true"], ["false", "true"]),
    ("cb", "test", "CB", ["neutral", "entailment"], ["neutral", "entailment"]),
    ("copa", "test", "COPA", [1, 0], [1, 0]),
    ("record", "test", "ReCoRD", ["C\u00e1diz", 'the "Owl"'], ["C\u00e1diz", 'the "Owl"']),
    ("superglue-rte", "test", "RTE", ["entailment"], ["entailment"]),
    ("superglue-rte", "ax-b", "AX-b", ["not_entailment"], ["not_entailment"]),
    ("superglue-rte", "ax-g", "AX-g", ["entailment"], ["entailment"]),
    ("wic", "test", "WiC", ["true", "false"], ["true", "false"]),
    ("wsc", "test", "WSC", ["true", "false"], ["True", "False"]),
]


@pytest.mark.parametrize(("name", "split", "file", "given", "written"), SUPERGLUE)
def test_superglue(name, split, file, given, written, tmp_path):
    (path,) = write(TASKS[name], split, tmp_path, {str(9 + i): x for i, x in enumerate(given)})
    assert path == tmp_path / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"idx": 9 + i, "label": label} for i, label in enumerate(written)]


def test_multirc_is_nested(tmp_path):
    task = TASKS["multirc"]
    examples = task.read(DATA / "superglue", "dev")
    (path,) = write(task, "test", tmp_path, {e.id: e.label for e in examples[::-1]})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == {
        "idx": 4,
        "passage": {
            "questions": [
                {
                    "idx": 2,
                    "answers": [
                        {"idx": 5, "label": 1},
                        {"idx": 6, "label": 0},
                        {"idx": 7, "label": 1},
                    ],
                },
                {"idx": 3, "answers": [{"idx": 8, "label": 0}]},
            ]
        },
    }
    # What is written has the ids and labels of the distributed file.
    source = (DATA / "superglue" / "MultiRC" / "val.jsonl").read_text().splitlines()
    for row, line in zip(rows, source, strict=True):
        original = json.loads(line)
        for question in original["passage"]["questions"]:
            del question["question"]
            for answer in question["answers"]:
                del answer["text"]
        del original["version"], original["passage"]["text"]
        assert row == original


def test_squad(tmp_path):
    answers = {"a": "N\u00fcrnberg", "b": ""}
    (path,) = write(TASKS["squad"], "test", tmp_path, answers)
    assert path.name == "predictions.json"
    assert json.loads(path.read_text(encoding="utf-8")) == answers
    paths = write(TASKS["squad2"], "test", tmp_path, answers, {"a": 0.25, "b": 1})
    assert [path.name for path in paths] == ["predictions.json", "na_probs.json"]
    assert json.loads(paths[1].read_text()) == {"a": 0.25, "b": 1.0}


@pytest.mark.parametrize(
    ("name", "split", "predictions", "no_answer", "message"),
    [
        ("race", "test", {"0": 1}, None, "race has no test server"),
        (
            "cola",
            "dev",
            {"0": "1"},
            None,
            "split to submit for cola must be one of test; got 'dev'",
        ),
        ("cola", "test", {}, None, "predictions must not be empty"),
        ("cola", "test", {"x": "1"}, None, "must be the test file's index, got 'x'"),
        ("cola", "test", {"0": 1}, None, "a prediction of cola must be one of 0, 1; got 1"),
        ("mnli", "test", {"0": "LABEL_0"}, None, "must be one of contradiction, entail"),
        ("copa", "test", {"0": 2}, None, "a prediction of copa must be 0 or 1, got 2"),
        ("record", "test", {"0": 2}, None, "a prediction of record must be a text, got 2"),
        ("multirc", "test", {"0": "1"}, None, "must be paragraph-question-answer, got '0'"),
        ("squad", "test", {"0": None}, None, "prediction '0' of squad must be a text, got None"),
        ("squad", "test", {"0": ""}, {"0": 1.0}, "no_answer is for squad2, not for squad"),
        ("squad2", "test", {"0": ""}, {"1": 1.0}, "no_answer must have the ids of predictions"),
    ],
)
def test_errors(name, split, predictions, no_answer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(TASKS[name], split, tmp_path, predictions, no_answer)
    assert not [*tmp_path.iterdir()], "nothing is written"
