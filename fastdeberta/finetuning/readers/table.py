"""Users' own data: TSV, CSV or JSONL, and what a small task file (YAML) says of it.

A task file, every key but `task` optional:

    task: classification        # regression, choice, tagging, span
    name: topics                # else the file's own name
    files:                      # else train.*, dev.* and test.* of the data's directory
      train: train.csv          # .csv and .tsv with a header line, .jsonl
      dev: dev.csv
    columns:                    # where they are called otherwise than here
      id: id                    # else the row's number, from 0
      text: text
      pair: pair                # a second text; none, unless it is named here
      label: label
    labels: [no, yes]           # classes in the order of their numbers; else the training data's
    metrics: [accuracy]         # the first chooses the best model; else the task's
    recipe: {epochs: 5}         # settings of this task; what is given for a run wins

classification, regression: text, pair, label: a class or a number.

choice: text, options, label. options: the names of the options' columns, or that of one column
    which holds a list (JSONL). label_type says what the label is: "index", from 0; "letter", from
    A; "text", the right option itself.

tagging: words, tags: columns with lists (JSONL) or separated by spaces. Of a file with another
    ending they are the columns' numbers, 0 and -1 (of .conllu 1 and 3), one word a line; see
    readers.conll.read_columns.

span: question, text, answer, start: the answer and its first character's place; without start,
    the answer's first occurrence; an empty answer: the text does not hold it. JSONL may have
    several, answers: [{"text": ..., "start": ...}]. A .json file is read in SQuAD's layout.

Test files need no label, tags or answer, nor a column for it. A directory in the hub's layout (see
readers.hub) is read by its columns.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...training.settings import load_yaml, unknown_key
from ..examples import Answer, ChoiceExample, Example, SpanExample, TaggedExample, TextExample
from . import conll, hub, squad
from .sources import Rows, files_of, find, known, nonempty, number, rows, value

SPLITS = {"train": "train", "dev": "validation", "test": "test"}  # ours -> the hub's
LABEL_TYPES = ("index", "letter", "text")
_TEXT: dict[str, Any] = {"id": "id", "text": "text", "pair": None, "label": "label"}
# Each task's columns, and what they are called where the file does not say.
COLUMNS: dict[str, dict[str, Any]] = {
    "classification": _TEXT,
    "regression": _TEXT,
    "choice": {"id": "id", "text": "text", "options": "options", "label": "label"},
    "tagging": {"id": "id", "words": "words", "tags": "tags"},
    "span": {
        "id": "id",
        "question": "question",
        "text": "text",
        "answer": "answer",
        "start": "start",
        "answers": "answers",
    },
}
_ENDINGS = (".jsonl", ".tsv", ".csv")
_OTHER_ENDINGS = {"tagging": (".conll", ".conllu", ".bio", ".txt"), "span": (".json",)}


@dataclass(frozen=True)
class TaskFile:
    """What a task file says; see this module. folder: where it lies."""

    task: str
    name: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    label_type: str = "index"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def column(self, name: str) -> Any:
        return self.columns.get(name, COLUMNS[self.task][name])


def load(path: str | Path) -> TaskFile:
    """A task file.

    Raises:
        FileNotFoundError: no such file. ValueError: an unknown key, or a bad value; says which.
    """
    values = load_yaml(path)
    names = [f.name for f in fields(TaskFile) if f.name != "folder"]
    for key in values:
        if key not in names:
            raise ValueError(f"{path}: {unknown_key(str(key), names)}")
    task = values.get("task")
    if task not in COLUMNS:
        raise ValueError(f"{path}: task must be one of {', '.join(COLUMNS)}; got {task!r}")
    for key in ("files", "columns", "recipe"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must hold key: value pairs, got {values[key]!r}")
    for key in ("labels", "metrics"):
        if not isinstance(values.get(key, []), list):
            raise ValueError(f"{path}: {key} must be a list, got {values[key]!r}")
        # YAML reads an unquoted no as a truth value; the data's files say "no".
        wrong = [x for x in values.get(key, []) if isinstance(x, bool)]
        if wrong:
            raise ValueError(f"{path}: {key}: YAML reads {wrong[0]!r} there; put it in quotes")
        values[key] = tuple(str(x) for x in values.get(key, []))
    for key, allowed in (("files", SPLITS), ("columns", COLUMNS[task])):
        for name in values.get(key, {}):
            if name not in allowed:
                raise ValueError(f"{path}: {unknown_key(str(name), allowed, f'{key}.')}")
    for name, file in values.get("files", {}).items():
        if not isinstance(file, str):
            raise ValueError(f"{path}: files.{name} must be a file's name, got {file!r}")
    for name, column in values.get("columns", {}).items():
        _check_column(f"{path}: columns.{name}", name, column)
    kind = values.get("label_type", "index")
    if kind not in LABEL_TYPES:
        raise ValueError(
            f"{path}: label_type must be one of {', '.join(LABEL_TYPES)}; got {kind!r}"
        )
    for key in ("label_type", "labels"):
        wanted = {"label_type": ("choice",), "labels": ("classification", "tagging")}[key]
        if values.get(key) and task not in wanted:
            raise ValueError(f"{path}: {key} is for {' and '.join(wanted)}, not for {task}")
    if len(set(values["labels"])) != len(values["labels"]):
        raise ValueError(f"{path}: labels has one of them twice: {', '.join(values['labels'])}")
    return TaskFile(**values, folder=Path(path).parent)


def _check_column(where: str, name: str, column: Any) -> None:
    if name == "options" and isinstance(column, list):
        if len(column) < 2 or not all(isinstance(x, str) for x in column):
            raise ValueError(f"{where} must name at least two columns, got {column!r}")
    elif name in ("words", "tags"):
        if not isinstance(column, str | int):
            raise ValueError(f"{where} must be a column's name or number, got {column!r}")
    elif not isinstance(column, str):
        raise ValueError(f"{where} must be a column's name, got {column!r}")


def read(file: TaskFile, data_dir: str | Path, split: str) -> list[Example]:
    """A split of a user's data; its file is looked for in data_dir, then beside the task file.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, a missing column, or a bad value; says which line.
    """
    files_of(SPLITS, split, file.task)
    if hub.is_hub(data_dir) and split not in file.files:
        source: str | Path = f"{data_dir}, split {split}"
        found: Rows = hub.rows(data_dir, SPLITS[split])
    else:
        source = path = _path(file, data_dir, split)
        if file.task == "span" and path.suffix == ".json":
            return list(squad.read_file(path))
        if file.task == "tagging" and path.suffix not in _ENDINGS:
            return list(_columns(file, path, split))
        found = rows(path)
    convert = {
        "classification": _text,
        "regression": _text,
        "choice": _choice,
        "tagging": _tagged,
        "span": _span,
    }[file.task]
    examples = [
        convert(file, str(row.get(file.column("id"), i)), row, split, where)
        for i, (where, row) in enumerate(found)
    ]
    return nonempty(examples, source)


def _path(file: TaskFile, data_dir: str | Path, split: str) -> Path:
    if split not in file.files:
        endings = _ENDINGS + _OTHER_ENDINGS.get(file.task, ())
        return find(data_dir, split, [split + ending for ending in endings])
    name = file.files[split]
    folders = [Path(data_dir)] + ([] if file.folder is None else [file.folder])
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"no file {name} of split {split!r} in {' or '.join(map(str, folders))}"
    )


def _given(row: Mapping[str, Any], column: str, split: str, where: str) -> Any:
    """A cell that only a test file may lack; None: it does."""
    cell = row.get(column)
    if cell is None or cell == "":
        if split == "test":
            return None
        if cell == "":
            raise ValueError(f"{where}: {column!r} is empty")
        value(row, column, where)
    return cell


def _text(file: TaskFile, name: str, row: Mapping[str, Any], split: str, where: str) -> TextExample:
    pair = file.column("pair")
    label = _given(row, file.column("label"), split, where)
    if label is not None and file.task == "regression":
        label = number(label, where)
    elif label is not None:
        label = known(str(label), file.labels or (str(label),), where)
    return TextExample(
        name,
        str(value(row, file.column("text"), where)),
        None if pair is None else str(value(row, pair, where)),
        label,
    )


def _choice(
    file: TaskFile, name: str, row: Mapping[str, Any], split: str, where: str
) -> ChoiceExample:
    columns = file.column("options")
    if isinstance(columns, str):
        options = value(row, columns, where)
        if not isinstance(options, list) or len(options) < 2:
            raise ValueError(f"{where}: {columns!r} must be a list of options, got {options!r}")
    else:
        options = [value(row, column, where) for column in columns]
    options = tuple(map(str, options))
    label = _given(row, file.column("label"), split, where)
    if label is not None:
        names = {
            "index": [str(i) for i in range(len(options))],
            "letter": list(string.ascii_uppercase[: len(options)]),
            "text": list(options),
        }[file.label_type]
        label = names.index(known(str(label), names, where))
    return ChoiceExample(name, str(value(row, file.column("text"), where)), options, label)


def _columns(file: TaskFile, path: Path, split: str) -> list[TaggedExample]:
    defaults = (conll.FORM, conll.TAG) if path.suffix == ".conllu" else (0, -1)
    word = file.columns.get("words", defaults[0])
    tag = file.columns.get("tags", defaults[1])
    for key, place in (("words", word), ("tags", tag)):
        if not isinstance(place, int):
            raise ValueError(
                f"columns.{key} must be a number for {path.name}, which has no header; "
                f"got {place!r}"
            )
    examples = conll.read_columns(path, word, tag)
    for example in examples if file.labels else ():
        for label in example.tags or ():
            known(label, file.labels, f"{path}, sentence {example.id}")
    return examples


def _tagged(
    file: TaskFile, name: str, row: Mapping[str, Any], split: str, where: str
) -> TaggedExample:
    words = _listed(value(row, file.column("words"), where), where)
    tags = _given(row, file.column("tags"), split, where)
    if tags is not None:
        tags = _listed(tags, where)
        if len(tags) != len(words):
            raise ValueError(f"{where}: {len(words)} words, but {len(tags)} tags")
        for tag in tags if file.labels else ():
            known(tag, file.labels, where)
    return TaggedExample(name, words, tags)


def _listed(cell: Any, where: str) -> tuple[str, ...]:
    items = cell.split() if isinstance(cell, str) else cell
    if not isinstance(items, list):
        raise ValueError(f"{where}: expected a list, or words between spaces, got {cell!r}")
    return tuple(map(str, items))


def _span(file: TaskFile, name: str, row: Mapping[str, Any], split: str, where: str) -> SpanExample:
    text = str(value(row, file.column("text"), where))
    question = str(value(row, file.column("question"), where))
    found: tuple[Answer, ...] | None
    several, one = row.get(file.column("answers")), row.get(file.column("answer"))
    if several is not None:
        if not isinstance(several, list) or not all(isinstance(x, dict) for x in several):
            raise ValueError(f"{where}: answers must be a list of objects, got {several!r}")
        found = tuple(
            _answer(text, value(x, "text", where), x.get("start"), where) for x in several
        )
    elif one is not None:
        found = () if one == "" else (_answer(text, one, row.get(file.column("start")), where),)
    else:
        found = None
        if split != "test":
            value(row, file.column("answer"), where)
    return SpanExample(name, question, text, found)


def _answer(text: str, answer: Any, start: Any, where: str) -> Answer:
    if start is None or start == "":
        start = text.find(str(answer))
        if start < 0:
            raise ValueError(f"{where}: answer {answer!r} is not in its text")
    return squad.answer(text, {"text": str(answer), "answer_start": number(start, where)}, where)
