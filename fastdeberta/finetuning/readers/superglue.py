"""SuperGLUE's eight tasks and its diagnostics: JSONL as super.gluebenchmark.com distributes it, or
the hub's `super_glue`.

How a task becomes examples:

boolq           (passage, question)
cb, rte         (premise, hypothesis); "ax-b" and "ax-g" are splits of rte
copa            premise and "because" or "so", with two options
multirc         (paragraph, question and one of its answers); a question's answers are one group
record          passage, query with its "@placeholder", entities as given; see `plain`
wic             both sentences, the word between asterisks in each
wsc             (text with the pronoun between asterisks, the candidate)
wsc-replaced    (text, text with the candidate in the pronoun's place)

A head on the sequence's first token sees no positions: asterisks tell it which occurrence of a
word, or which pronoun, is meant. Every vocabulary has them, and texts hardly do.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..examples import ChoiceExample, EntityExample, Example, TextExample
from . import hub
from .sources import files_of, find, known, nonempty, rows, value

FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "superglue-rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "wsc-replaced": "WSC",
}
FILES = {"train": ("train.jsonl",), "dev": ("val.jsonl", "dev.jsonl"), "test": ("test.jsonl",)}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
HUB_CONFIGS = {"superglue-rte": "rte", "wsc-replaced": "wsc", "ax-b": "axb", "ax-g": "axg"}
_CONNECTIVES = {"cause": "because", "effect": "so"}

Labels = Sequence[str] | None


def read(name: str, labels: Labels, data_dir: str | Path, split: str) -> list[Example]:
    """A split of a SuperGLUE task; ids are the file's idx, in MultiRC "paragraph-question-answer".

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, a bad row, or a label that the task does not have; says where.
    """
    splits = FILES
    if name == "superglue-rte":
        splits = FILES | {x: (f"{x[:2].upper()}-{x[3]}.jsonl",) for x in ("ax-b", "ax-g")}
    names = files_of(splits, split, name)
    if hub.is_hub(data_dir):
        diagnostic = split.startswith("ax")
        config = HUB_CONFIGS.get(split if diagnostic else name, name)
        source: str | Path = f"{data_dir}, split {split}"
        found = hub.rows(data_dir, HUB_SPLITS.get(split, "test"), config)
    else:
        folder = FOLDERS[name]
        if split.startswith("ax"):
            folder = names[0].removesuffix(".jsonl")
            # Its folder lies beside RTE's.
            names = (*names, f"../{folder}/{names[0]}")
        source = find(data_dir, split, names, folder)
        found = rows(source)
    examples = [
        example for where, row in found for example in _CONVERTERS[name](row, labels, where)
    ]
    for example in examples if split in ("train", "dev") else ():
        if getattr(example, "label", getattr(example, "answers", None)) is None:
            raise ValueError(f"{source}: example {example.id} has no label")
    return nonempty(examples, source)


def _label(row: Mapping[str, Any], labels: Sequence[str], where: str) -> str | None:
    """Files have true and false, names or numbers; the hub has names, or numbers in our order."""
    label = row.get("label")
    if label is None or label == -1 and not isinstance(label, bool):
        return None
    if isinstance(label, int) and int(label) in range(len(labels)):
        return labels[int(label)]
    if label in ("False", "True"):
        return labels[label == "True"]
    return known(label, labels, where)


def _id(row: Mapping[str, Any], where: str) -> str:
    return str(value(row, "idx", where))


def _pair(text: str, pair: str) -> Callable[..., Iterator[Example]]:
    def convert(row: Mapping[str, Any], labels: Sequence[str], where: str) -> Iterator[Example]:
        # The broad-coverage diagnostics name their sentences as GLUE does.
        a, b = (text, pair) if text in row else ("sentence1", "sentence2")
        yield TextExample(
            _id(row, where), value(row, a, where), value(row, b, where), _label(row, labels, where)
        )

    return convert


def _copa(row: Mapping[str, Any], labels: Labels, where: str) -> Iterator[Example]:
    question = value(row, "question", where)
    if question not in _CONNECTIVES:
        raise ValueError(f"{where}: question must be cause or effect, got {question!r}")
    premise = value(row, "premise", where).rstrip().rstrip(".")
    label = row.get("label")
    if label not in (None, -1, 0, 1):
        raise ValueError(f"{where}: label must be 0 or 1, got {label!r}")
    yield ChoiceExample(
        _id(row, where),
        f"{premise} {_CONNECTIVES[question]}",
        (value(row, "choice1", where), value(row, "choice2", where)),
        None if label is None or label == -1 else int(label),
    )


def _multirc(row: Mapping[str, Any], labels: Sequence[str], where: str) -> Iterator[Example]:
    if "paragraph" in row:  # The hub has a row for every answer.
        p, q, a = (value(row["idx"], key, where) for key in ("paragraph", "question", "answer"))
        pair = f"{value(row, 'question', where)} {value(row, 'answer', where)}"
        yield TextExample(
            f"{p}-{q}-{a}", row["paragraph"], pair, _label(row, labels, where), f"{p}-{q}"
        )
        return
    passage, p = value(row, "passage", where), _id(row, where)
    text = value(passage, "text", where)
    for question in value(passage, "questions", where):
        group = f"{p}-{_id(question, where)}"
        for answer in value(question, "answers", where):
            yield TextExample(
                f"{group}-{_id(answer, where)}",
                text,
                f"{value(question, 'question', where)} {value(answer, 'text', where)}",
                _label(answer, labels, where),
                group,
            )


def _record(row: Mapping[str, Any], labels: Labels, where: str) -> Iterator[Example]:
    if "qas" not in row:  # The hub has a row for every query, and ends that are not in the span.
        spans = value(row, "entity_spans", where)
        if isinstance(spans, dict):
            found = list(zip(spans["start"], spans["end"], strict=True))
        else:
            found = [(span["start"], span["end"]) for span in spans]
        text, entities = plain(value(row, "passage", where), found, where)
        idx = value(value(row, "idx", where), "query", where)
        # The hub's test rows have an empty list.
        answers = tuple(dict.fromkeys(row.get("answers") or ())) or None
        yield EntityExample(str(idx), text, value(row, "query", where), entities, answers)
        return
    passage = value(row, "passage", where)
    found = [(x["start"], x["end"] + 1) for x in value(passage, "entities", where)]
    text, entities = plain(value(passage, "text", where), found, where)
    for query in row["qas"]:
        given = query.get("answers")
        answers = None if given is None else tuple(dict.fromkeys(x["text"] for x in given))
        yield EntityExample(
            _id(query, where), text, value(query, "query", where), entities, answers
        )


def plain(
    text: str, entities: Sequence[tuple[int, int]], where: str
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A ReCoRD passage as running text, and its entities' spans in it, sorted, each once.

    Passages end in summary lines, each after a line "@highlight". This mark becomes a space, or
    ". " where the sentence before has no end, so that no vocabulary cuts it into pieces.

    Raises:
        ValueError: a span outside the text.
    """
    for start, end in entities:
        if not 0 <= start < end <= len(text):
            raise ValueError(f"{where}: entity [{start}, {end}) is not in its text")
    pieces, length, last = [], 0, 0
    ends, shifts = [0], [0]  # From each of `ends` on, a character moves by its shift.
    for mark in re.finditer(r"\s*@highlight\s*", text):
        before = text[last : mark.start()]
        pieces += [before, " " if not before or before[-1] in ".?!\"'" else ". "]
        length += len(pieces[-2]) + len(pieces[-1])
        last = mark.end()
        ends.append(last)
        shifts.append(length - last)
    pieces.append(text[last:])

    def moved(place: int) -> int:
        return place + shifts[bisect_right(ends, place) - 1]

    spans = {(moved(start), moved(end - 1) + 1) for start, end in entities}
    return "".join(pieces), tuple(sorted(spans))


def _wic(row: Mapping[str, Any], labels: Sequence[str], where: str) -> Iterator[Example]:
    first, second = (
        marked(
            value(row, f"sentence{i}", where),
            int(value(row, f"start{i}", where)),
            int(value(row, f"end{i}", where)),
            where,
        )
        for i in (1, 2)
    )
    yield TextExample(_id(row, where), first, second, _label(row, labels, where))


def marked(text: str, start: int, end: int, where: str) -> str:
    """The text with asterisks around text[start:end].

    Raises:
        ValueError: a span outside the text.
    """
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{where}: [{start}, {end}) is not in its text")
    return f"{text[:start]}*{text[start:end]}*{text[end:]}"


def _wsc(row: Mapping[str, Any], labels: Sequence[str], where: str) -> Iterator[Example]:
    text, candidate, start, end = _referents(row, where)
    label = _label(row, labels, where)
    yield TextExample(_id(row, where), marked(text, start, end, where), candidate, label)


def _wsc_replaced(row: Mapping[str, Any], labels: Sequence[str], where: str) -> Iterator[Example]:
    text, candidate, start, end = _referents(row, where)
    if text[start:end].lower() in ("his", "their", "its"):  # "her" is also no possessive.
        candidate += "'s"
    replaced = text[:start] + candidate + text[end:]
    yield TextExample(_id(row, where), text, replaced, _label(row, labels, where))


def _referents(row: Mapping[str, Any], where: str) -> tuple[str, str, int, int]:
    """Text, candidate, and the pronoun's span of characters."""
    text, target = value(row, "text", where), row.get("target", row)
    pronoun = value(target, "span2_text", where)
    index = value(target, "span2_index", where)
    # The file counts words between spaces, not always rightly, and leaves punctuation out of the
    # pronoun: of its occurrences as a word the nearest is meant.
    found = [
        (abs(len(text[: match.start() + 1].split()) - 1 - index), match.span())
        for match in re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text, re.IGNORECASE)
    ]
    if not found:
        raise ValueError(f"{where}: no {pronoun!r} in its text")
    return text, value(target, "span1_text", where), *min(found)[1]


_CONVERTERS: dict[str, Callable[..., Iterator[Example]]] = {
    "boolq": _pair("passage", "question"),
    "cb": _pair("premise", "hypothesis"),
    "superglue-rte": _pair("premise", "hypothesis"),
    "copa": _copa,
    "multirc": _multirc,
    "record": _record,
    "wic": _wic,
    "wsc": _wsc,
    "wsc-replaced": _wsc_replaced,
}
