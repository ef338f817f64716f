"""Tasks: what each one reads, predicts, is scored by and is trained with, in one table.

TASKS is the registry; find_task also takes the path of a task file (see readers.table).
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .examples import Example
from .metrics import METRICS
from .readers import choice, conll, coreference, glue, squad, superglue, table


@dataclass(frozen=True)
class Task:
    """One task.

    head: a name of fastdeberta.models.heads.HEADS: "sequence", "choice", "token", "span", "entity".
    read: (data_dir, split) -> its examples. Splits are "train" and those in dev and test.
        data_dir: the files as the benchmark distributes them (its own folder or the one above),
        a directory that `datasets` has saved, or "datasets:NAME", a hub's data set.
    labels: classes in the order of their numbers; (): a number is predicted; None: the classes
        are those of the training data, or the head has none.
    metrics: names in metrics.METRICS; the first is the one that early stopping watches.
    dev, test: the splits that are scored, and those to submit.
    recipe: defaults of this task's settings; what a user gives wins.
    submission: a name in submissions.WRITERS, or None.
    """

    name: str
    head: str
    read: Callable[[Path, str], Sequence[Example]]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    submission: str | None = None


# ELECTRA's recipe (arXiv 2003.10555, appendix B); the learning rate goes by the model's size.
# Its length of 128 is for sentences; longer texts have their own below.
RECIPE = {
    "epochs": 3.0,
    "batch_size": 32,
    "warmup_fraction": 0.1,
    "layer_decay": 0.8,
    "weight_decay": 0.0,
    "max_length": 128,
}
SMALL = {"epochs": 10.0}  # A few thousand examples or fewer.
LONG = {"max_length": 512}
SPANS = {"epochs": 2.0, "max_length": 384, "stride": 128}

# The numbers of the classes are those of BERT's, ELECTRA's and SuperGLUE's own code.
BINARY = ("0", "1")
TRUTH = ("false", "true")
NLI = ("contradiction", "entailment", "neutral")
ENTAILMENT = ("entailment", "not_entailment")
ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
UPOS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON"),
    *("PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)


def _glue(name: str, labels: tuple[str, ...], *metrics: str, **fields: Any) -> Task:
    fields["recipe"] = RECIPE | fields.get("recipe", {})
    read = partial(glue.read, name, labels)
    return Task(name, "sequence", read, labels, metrics, submission="glue", **fields)


def _superglue(
    name: str, head: str, labels: tuple[str, ...] | None, *metrics: str, **fields: Any
) -> Task:
    fields["recipe"] = RECIPE | fields.get("recipe", {})
    read = partial(superglue.read, name, labels)
    return Task(name, head, read, labels, metrics, submission="superglue", **fields)


def _user(kind: str, head: str, labels: tuple[str, ...] | None, *metrics: str) -> Task:
    recipe = RECIPE | (SPANS if kind == "span" else {"max_length": 256})
    return Task(
        kind, head, partial(table.read, table.TaskFile(kind)), labels, metrics, recipe=recipe
    )


_ALL = (
    _glue("cola", BINARY, "matthews"),
    _glue("sst2", BINARY, "accuracy"),
    _glue("mrpc", BINARY, "accuracy", "f1"),
    _glue("stsb", (), "pearson_spearman", recipe=SMALL),
    _glue("qqp", BINARY, "accuracy", "f1"),
    _glue("mnli", NLI, "accuracy", dev=("dev", "dev-mm"), test=("test", "test-mm", "ax")),
    _glue("qnli", ENTAILMENT, "accuracy"),
    _glue("rte", ENTAILMENT, "accuracy", recipe=SMALL),
    _glue("wnli", BINARY, "accuracy"),
    # Scored with MNLI's model; it has no training data.
    _glue("ax", NLI, "matthews", dev=()),
    _superglue("boolq", "sequence", TRUTH, "accuracy", recipe=LONG),
    _superglue(
        "cb",
        "sequence",
        ("entailment", "contradiction", "neutral"),
        "accuracy",
        "macro_f1",
        recipe=SMALL | {"max_length": 256},
    ),
    _superglue("copa", "choice", None, "accuracy", recipe=SMALL),
    _superglue("multirc", "sequence", BINARY, "multirc", recipe=LONG),
    _superglue("record", "entity", None, "record", recipe=LONG | {"epochs": 2.0}),
    _superglue(
        "superglue-rte",
        "sequence",
        ENTAILMENT,
        "accuracy",
        test=("test", "ax-b", "ax-g"),
        recipe=SMALL | {"max_length": 256},
    ),
    _superglue("wic", "sequence", TRUTH, "accuracy"),
    _superglue("wsc", "sequence", TRUTH, "accuracy", recipe=SMALL),
    Task(
        "squad",
        "span",
        partial(squad.read, "1.1"),
        None,
        ("squad",),
        recipe=RECIPE | SPANS,
        submission="squad",
    ),
    Task(
        "squad2",
        "span",
        partial(squad.read, "2.0"),
        None,
        ("squad2",),
        recipe=RECIPE | SPANS,
        submission="squad",
    ),
    Task("race", "choice", choice.read_race, None, ("accuracy",), recipe=RECIPE | LONG),
    Task("swag", "choice", choice.read_swag, None, ("accuracy",), recipe=RECIPE),
    Task("conll2003", "token", conll.read_conll2003, ENTITIES, ("seqeval",), recipe=RECIPE),
    Task("upos", "token", conll.read_upos, UPOS, ("tag_accuracy",), recipe=RECIPE),
    # Winograd schemas as a choice among candidates; see readers.coreference.
    Task(
        "wnli-choice",
        "choice",
        partial(coreference.read, partial(glue.read, "wnli", BINARY)),
        None,
        ("accuracy",),
        recipe=RECIPE | SMALL,
    ),
    Task(
        "wsc-choice",
        "choice",
        partial(coreference.read, partial(superglue.read, "wsc-replaced", TRUTH)),
        None,
        ("accuracy",),
        recipe=RECIPE | SMALL,
    ),
    _user("classification", "sequence", None, "accuracy", "macro_f1"),
    _user("regression", "sequence", (), "pearson_spearman"),
    _user("choice", "choice", None, "accuracy"),
    _user("tagging", "token", None, "tag_accuracy"),
    _user("span", "span", None, "squad"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str | Path) -> Task:
    """The task of that name in TASKS, or the one that a task file (.yaml, .yml) describes.

    Raises:
        ValueError: an unknown name, or a bad task file. FileNotFoundError: no such file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        file = table.load(name)
        for metric in file.metrics:
            if metric not in METRICS:
                raise ValueError(
                    f"{name}: metrics must be among {', '.join(METRICS)}; got {metric!r}"
                )
        base = TASKS[file.task]
        return replace(
            base,
            name=file.name or Path(name).stem,
            read=partial(table.read, file),
            labels=file.labels or base.labels,
            metrics=file.metrics or base.metrics,
            recipe={**base.recipe, **file.recipe},
        )
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown task {str(name)!r}{hint} Known are {', '.join(TASKS)}, "
            "or the path of a task file (.yaml)"
        )
    return TASKS[str(name)]
