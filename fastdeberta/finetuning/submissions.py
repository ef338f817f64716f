"""Test predictions as each benchmark's server or script wants them.

GLUE: NAME.tsv with index and prediction. SuperGLUE: NAME.jsonl with an idx and a label a line.
SQuAD: predictions.json, {id: text}, and na_probs.json, {id: probability of no answer}.

Sources: GLUE's and SuperGLUE's file names and labels are those of jiant, the benchmarks' own
toolkit; SQuAD's are those of its evaluation scripts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .readers.superglue import FOLDERS
from .tasks import Task

GLUE_FILES = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI-m",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
    "ax": "AX",
}
# Splits with a file of their own, whatever the task.
SPLIT_FILES = {"test-mm": "MNLI-mm", "ax": "AX", "ax-b": "AX-b", "ax-g": "AX-g"}


def write(
    task: Task,
    split: str,
    directory: str | Path,
    predictions: Mapping[str, Any],
    no_answer: Mapping[str, float] | None = None,
) -> list[Path]:
    """Writes the predictions of a test split, one for each example's id, and returns the files.

    Args:
        predictions: by the task's head. sequence: a name of task.labels, or a number (STS-B); also
            MultiRC's rows. choice: the option's number. entity: the answer's text. span: the
            answer's text, "" for none.
        no_answer: of SQuAD 2.0, the probability that the text does not hold the answer.

    Raises:
        ValueError: the task has no submission, the split is not one of its test splits, an id is
            not the benchmark's, or a prediction is none of the task's.
    """
    if task.submission is None:
        raise ValueError(f"{task.name} has no test server, and no layout to submit")
    if split not in task.test:
        raise ValueError(
            f"split to submit for {task.name} must be one of {', '.join(task.test)}; got {split!r}"
        )
    if not predictions:
        raise ValueError("predictions must not be empty")
    if no_answer is not None and task.name != "squad2":
        raise ValueError(f"no_answer is for squad2, not for {task.name}")
    files = WRITERS[task.submission](task, split, predictions)
    if no_answer is not None:
        if set(no_answer) != set(predictions):
            raise ValueError("no_answer must have the ids of predictions")
        files["na_probs.json"] = json.dumps({k: float(x) for k, x in no_answer.items()}) + "\n"
    for name, text in files.items():
        write_atomically(Path(directory) / name, text)
    return [Path(directory) / name for name in files]


def _glue(task: Task, split: str, predictions: Mapping[str, Any]) -> dict[str, str]:
    lines = ["index\tprediction"]
    for name, prediction in sorted(_numbered(predictions).items()):
        if task.labels:
            lines.append(f"{name}\t{_class(task, prediction)}")
        else:  # STS-B's scores are from 0 to 5, which a linear layer does not know.
            lines.append(f"{name}\t{min(5.0, max(0.0, float(prediction))):.3f}")
    stem = SPLIT_FILES.get(split, GLUE_FILES[task.name])
    return {f"{stem}.tsv": "\n".join(lines) + "\n"}


def _superglue(task: Task, split: str, predictions: Mapping[str, Any]) -> dict[str, str]:
    if task.name == "multirc":
        rows = _multirc(task, predictions)
    else:
        rows = [
            {"idx": name, "label": _superglue_label(task, prediction)}
            for name, prediction in sorted(_numbered(predictions).items())
        ]
    stem = SPLIT_FILES.get(split, FOLDERS[task.name])
    return {f"{stem}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def _superglue_label(task: Task, prediction: Any) -> str | int:
    if task.head == "choice":
        if prediction not in (0, 1):
            raise ValueError(f"a prediction of {task.name} must be 0 or 1, got {prediction!r}")
        return int(prediction)
    if task.head == "entity":
        if not isinstance(prediction, str):
            raise ValueError(f"a prediction of {task.name} must be a text, got {prediction!r}")
        return prediction
    name = _class(task, prediction)
    # Its server knows WSC's classes by Python's names, BoolQ's and WiC's by JSON's.
    return name.capitalize() if task.name == "wsc" else name


def _multirc(task: Task, predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a paragraph; in it every question, in this every answer."""
    nested: dict[int, dict[int, list[dict[str, int]]]] = {}
    keys = []
    for name, prediction in predictions.items():
        try:
            paragraph, question, answer = map(int, name.split("-"))
        except ValueError:
            raise ValueError(
                f"an id of multirc must be paragraph-question-answer, got {name!r}"
            ) from None
        keys.append((paragraph, question, answer, int(_class(task, prediction))))
    for paragraph, question, answer, label in sorted(keys):
        answers = nested.setdefault(paragraph, {}).setdefault(question, [])
        answers.append({"idx": answer, "label": label})
    return [
        {
            "idx": paragraph,
            "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]},
        }
        for paragraph, questions in nested.items()
    ]


def _squad(task: Task, split: str, predictions: Mapping[str, Any]) -> dict[str, str]:
    for name, text in predictions.items():
        if not isinstance(text, str):
            raise ValueError(f"prediction {name!r} of {task.name} must be a text, got {text!r}")
    content = json.dumps(dict(predictions), ensure_ascii=False, indent=1)
    return {"predictions.json": content + "\n"}


def _numbered(predictions: Mapping[str, Any]) -> dict[int, Any]:
    wrong = [name for name in predictions if not name.isdigit()]
    if wrong:
        raise ValueError(f"an id to submit must be the test file's index, got {wrong[0]!r}")
    return {int(name): prediction for name, prediction in predictions.items()}


def _class(task: Task, prediction: Any) -> str:
    if task.labels is None or prediction not in task.labels:
        raise ValueError(
            f"a prediction of {task.name} must be one of {', '.join(task.labels or ())}; "
            f"got {prediction!r}"
        )
    return prediction


WRITERS: dict[str, Callable[[Task, str, Mapping[str, Any]], dict[str, str]]] = {
    "glue": _glue,
    "superglue": _superglue,
    "squad": _squad,
}
