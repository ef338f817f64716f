"""GLUE's ten tasks: TSV files as gluebenchmark.com distributes them, or the hub's `glue`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..examples import TextExample
from . import hub
from .sources import Rows, files_of, find, known, nonempty, number, tsv, value

FILES = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
DIAGNOSTIC = ("diagnostic.tsv", "AX.tsv", "diagnostic-full.tsv")
COLA = ("source", "label", "mark", "sentence")  # Its train and dev files have no header.


@dataclass(frozen=True)
class Layout:
    """One task's files and columns; of columns with several names, the first that is there.

    hub: the hub's label names, in its order, -> ours. hub_text, hub_pair: the hub's columns.
    """

    folder: str
    text: tuple[str, ...] = ("sentence1",)
    pair: tuple[str, ...] = ("sentence2",)
    label: tuple[str, ...] = ("label",)
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FILES)
    hub: Mapping[str, str] = field(default_factory=dict)
    hub_text: str = "sentence1"
    hub_pair: str | None = "sentence2"
    hub_splits: Mapping[str, str] = field(default_factory=lambda: HUB_SPLITS)


_NLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_SENTENCE: dict[str, Any] = {
    "text": ("sentence",),
    "pair": (),
    "hub_text": "sentence",
    "hub_pair": None,
}
_PREMISE: dict[str, Any] = {"hub_text": "premise", "hub_pair": "hypothesis", "hub": _NLI}

LAYOUTS = {
    "cola": Layout("CoLA", hub={"unacceptable": "0", "acceptable": "1"}, **_SENTENCE),
    "sst2": Layout("SST-2", hub={"negative": "0", "positive": "1"}, **_SENTENCE),
    "mrpc": Layout(
        "MRPC",
        ("#1 String",),
        ("#2 String",),
        ("Quality",),
        hub={"not_equivalent": "0", "equivalent": "1"},
    ),
    "stsb": Layout("STS-B", label=("score",)),
    "qqp": Layout(
        "QQP",
        ("question1",),
        ("question2",),
        ("is_duplicate",),
        hub={"not_duplicate": "0", "duplicate": "1"},
        hub_text="question1",
        hub_pair="question2",
    ),
    "mnli": Layout(
        "MNLI",
        label=("gold_label",),
        files={
            "train": ("train.tsv",),
            "dev": ("dev_matched.tsv", "dev.tsv"),
            "dev-mm": ("dev_mismatched.tsv",),
            "test": ("test_matched.tsv", "test.tsv"),
            "test-mm": ("test_mismatched.tsv",),
        },
        hub_splits={
            "train": "train",
            "dev": "validation_matched",
            "dev-mm": "validation_mismatched",
            "test": "test_matched",
            "test-mm": "test_mismatched",
        },
        **_PREMISE,
    ),
    "qnli": Layout(
        "QNLI",
        ("question",),
        ("sentence",),
        hub=_ENTAILMENT,
        hub_text="question",
        hub_pair="sentence",
    ),
    "rte": Layout("RTE", hub=_ENTAILMENT),
    "wnli": Layout("WNLI", hub={"not_entailment": "0", "entailment": "1"}),
    "ax": Layout(
        "",
        ("sentence1", "Premise"),
        ("sentence2", "Hypothesis"),
        ("label", "Label"),
        # GLUE's download calls the folder diagnostic; its submission is AX. Beside MNLI's, too.
        files={
            "test": tuple(
                root + name
                for root in ("", "diagnostic/", "AX/", "../diagnostic/", "../AX/")
                for name in DIAGNOSTIC
            )
        },
        hub_splits={"test": "test"},
        **_PREMISE,
    ),
}


def read(name: str, labels: Sequence[str], data_dir: str | Path, split: str) -> list[TextExample]:
    """A split of a GLUE task; ids are the file's index, or the row's number from 0.

    Test splits have no labels, unless their file does. MNLI's "ax" is the diagnostic set, in
    data_dir or beside it. Rows of QQP with another number of columns than the header (the
    published file has some) are left out with a warning; in other tasks they are errors.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, a bad row, or a label that the task does not have; says where.
    """
    if name == "mnli" and split == "ax":
        return read("ax", labels, data_dir, "test")
    layout = LAYOUTS[name]
    if hub.is_hub(data_dir):
        return _hub(name, layout, labels, data_dir, split)
    path = find(data_dir, split, files_of(layout.files, split, name), layout.folder)
    ragged: list[str] | None = [] if name == "qqp" else None
    headless = name == "cola" and split != "test"
    found = tsv(path, COLA if headless else (), ragged)
    convert = partial(_label, layout, labels, split)
    examples = [
        TextExample(
            str(row.get("index", row.get("id", i))),
            value(row, _column(row, layout.text), where),
            value(row, _column(row, layout.pair), where) if layout.pair else None,
            convert(row, where),
        )
        for i, (where, row) in enumerate(found)
    ]
    if ragged:
        warnings.warn(
            f"{path}: left out {len(ragged)} rows with missing columns, the first at {ragged[0]}",
            stacklevel=2,
        )
    return nonempty(examples, path)


def _column(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if name in row), names[0])


def _label(
    layout: Layout, labels: Sequence[str], split: str, row: Mapping[str, Any], where: str
) -> str | float | None:
    column = _column(row, layout.label)
    if split.startswith("test") and not row.get(column):
        return None
    label = value(row, column, where)
    return known(label, labels, where) if labels else number(label, where)


def _hub(
    name: str, layout: Layout, labels: Sequence[str], data_dir: str | Path, split: str
) -> list[TextExample]:
    rows: Rows = hub.rows(data_dir, files_of(layout.hub_splits, split, name), name)
    examples = [
        TextExample(
            str(row.get("idx", i)),
            value(row, layout.hub_text, where),
            value(row, layout.hub_pair, where) if layout.hub_pair else None,
            _hub_label(row.get("label"), layout, labels, split, where),
        )
        for i, (where, row) in enumerate(rows)
    ]
    return nonempty(examples, f"{data_dir}, split {split}")


def _hub_label(
    label: Any, layout: Layout, labels: Sequence[str], split: str, where: str
) -> str | float | None:
    """A number of the hub's order, where the file lost the names, or a name."""
    if split.startswith("test") and (label is None or label == -1):
        return None
    if not labels:
        return number(label, where)
    if isinstance(label, int) and 0 <= label < len(layout.hub):
        return list(layout.hub.values())[label]
    return known(layout.hub.get(label, label), labels, where)
