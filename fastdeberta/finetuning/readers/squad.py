"""SQuAD 1.1 and 2.0: JSON as rajpurkar.github.io distributes it, or the hub's `squad`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..examples import Answer, SpanExample
from . import hub
from .sources import files_of, find, nonempty, read_json, value

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def read(version: str, data_dir: str | Path, split: str) -> list[SpanExample]:
    """A split of SQuAD `version` "1.1" or "2.0"; XQuAD's English file counts as dev.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, another layout, or an answer that its text does not hold at
            its place; says where.
    """
    files = {x: [f"{x}-v{version}.json", f"{x}.json"] for x in HUB_SPLITS}
    files["dev"].append("xquad.en.json")
    name = "squad" if version == "1.1" else "squad_v2"
    names = files_of(files, split, name)
    if hub.is_hub(data_dir):
        rows = hub.rows(data_dir, HUB_SPLITS[split])
        examples = [hub_example(row, where) for where, row in rows]
        return nonempty(examples, f"{data_dir}, split {split}")
    return read_file(find(data_dir, split, names))


def read_file(path: Path) -> list[SpanExample]:
    """The questions of one file in SQuAD's layout.

    A question without "answers" has none known; one with "is_impossible", or an empty list, has
    the answer that the text does not hold it. (2.0's "plausible_answers" are left aside.)
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError(f'{path}: expected SQuAD\'s layout, an object with a list "data"')
    return nonempty(list(_questions(content["data"], path)), path)


def _questions(articles: list[dict[str, Any]], path: Path) -> Iterator[SpanExample]:
    for number, article in enumerate(articles):
        for place, paragraph in enumerate(
            value(article, "paragraphs", f"{path}, article {number}")
        ):
            where = f"{path}, article {number}, paragraph {place}"
            text = value(paragraph, "context", where)
            for row in value(paragraph, "qas", where):
                name = str(value(row, "id", where))
                found = row.get("answers")
                if row.get("is_impossible"):
                    found = []
                if found is not None:
                    found = tuple(answer(text, x, f"{path}, question {name}") for x in found)
                yield SpanExample(name, value(row, "question", where), text, found)


def answer(text: str, row: Mapping[str, Any], where: str) -> Answer:
    """An answer from {"text": ..., "answer_start": ...}.

    Raises:
        ValueError: the text does not hold it there.
    """
    found = Answer(value(row, "text", where), int(value(row, "answer_start", where)))
    held = text[max(0, found.start) : found.start + len(found.text)]
    if held != found.text or not found.text:
        raise ValueError(
            f"{where}: answer {found.text!r} is not at character {found.start} of its text, "
            f"where {held!r} stands"
        )
    return found


def hub_example(row: Mapping[str, Any], where: str) -> SpanExample:
    """From a row of the hub's layout, whose answers are a list of texts and one of starts."""
    text, found = value(row, "context", where), row.get("answers")
    if found is not None:
        pairs = zip(found["text"], found["answer_start"], strict=True)
        found = tuple(answer(text, {"text": a, "answer_start": b}, where) for a, b in pairs)
    return SpanExample(str(value(row, "id", where)), value(row, "question", where), text, found)
