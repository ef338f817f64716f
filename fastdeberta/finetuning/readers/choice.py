"""RACE (directories of JSON files) and SWAG (CSV), as distributed or from the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..examples import ChoiceExample
from . import hub
from .sources import files_of, find, nonempty, read_json, rows, value

LETTERS = "ABCDEFGH"
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
RACE_LEVELS = ("middle", "high")
SWAG_FILES = {"train": ("train.csv",), "dev": ("val.csv",), "test": ("test.csv",)}


def read_race(data_dir: str | Path, split: str) -> list[ChoiceExample]:
    """A split of RACE, both levels, or one with "-middle" or "-high" behind the split's name.

    The article is the text. An option is the question with the answer: in the place of its blank
    "_" if it has one, else behind it.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, or a bad file; says which.
    """
    split, _, level = split.partition("-")
    files_of(HUB_SPLITS, split, "race")
    if level and level not in RACE_LEVELS:
        raise ValueError(f"a level of race must be {' or '.join(RACE_LEVELS)}, got {level!r}")
    levels = (level,) if level else RACE_LEVELS
    if hub.is_hub(data_dir):
        found = hub.rows(data_dir, HUB_SPLITS[split], level or "all")
        examples = [
            _race(
                f"{name}-{i}",
                value(row, "article", where),
                value(row, "question", where),
                value(row, "options", where),
                row.get("answer"),
                where,
            )
            for i, (where, row) in enumerate(found)
            if (name := str(value(row, "example_id", where))).startswith(levels)
        ]
        return nonempty(examples, f"{data_dir}, split {split}")
    patterns = [f"{root}{split}/{name}/*.txt" for root in ("", "RACE/") for name in levels]
    paths = [path for pattern in patterns for path in Path(data_dir).glob(pattern)]
    if not paths:
        raise FileNotFoundError(
            f"no file of split {split!r} in {data_dir}; looked for {', '.join(patterns)}"
        )
    return [example for path in sorted(paths, key=_order) for example in _article(path)]


def _order(path: Path) -> tuple[str, int, str]:
    """By level, then by the number that is the file's name."""
    return path.parent.name, int(path.stem) if path.stem.isdigit() else -1, path.stem


def _article(path: Path) -> list[ChoiceExample]:
    where, content = str(path), read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    article, questions = value(content, "article", where), value(content, "questions", where)
    options = value(content, "options", where)
    answers = content.get("answers") or [None] * len(questions)
    if not len(questions) == len(options) == len(answers):
        raise ValueError(
            f"{path}: {len(questions)} questions, {len(options)} lists of options and "
            f"{len(answers)} answers"
        )
    name = str(content.get("id", path.name))
    return [
        _race(f"{name}-{i}", article, *row, where)
        for i, row in enumerate(zip(questions, options, answers, strict=True))
    ]


def _race(
    name: str, article: str, question: str, options: Sequence[str], letter: str | None, where: str
) -> ChoiceExample:
    label = None
    if letter is not None:
        label = LETTERS.find(letter) if len(letter) == 1 else -1
        if not 0 <= label < len(options):
            raise ValueError(
                f"{where}: answer must be one of {', '.join(LETTERS[: len(options)])}, "
                f"got {letter!r}"
            )
    full = [
        question.replace("_", option) if "_" in question else f"{question} {option}"
        for option in options
    ]
    return ChoiceExample(name, article, tuple(full), label)


def read_swag(data_dir: str | Path, split: str) -> list[ChoiceExample]:
    """A split of SWAG. The text is sent1; an option is sent2, which lacks its end, with an ending.

    Raises:
        FileNotFoundError: no file of this split; says what was looked for.
        ValueError: an unknown split, or a bad row; says where.
    """
    names = files_of(SWAG_FILES, split, "swag")
    if hub.is_hub(data_dir):
        source: str | Path = f"{data_dir}, split {split}"
        found = hub.rows(data_dir, HUB_SPLITS[split], "regular")
    else:
        source = find(data_dir, split, names, "SWAG")
        found = rows(source)
    examples = [_swag(i, row, split, where) for i, (where, row) in enumerate(found)]
    return nonempty(examples, source)


def _swag(number: int, row: Mapping[str, Any], split: str, where: str) -> ChoiceExample:
    start = value(row, "sent2", where)
    options = tuple(f"{start} {value(row, f'ending{i}', where)}" for i in range(4))
    label = str(row.get("label", ""))
    if label not in ("0", "1", "2", "3") and (split != "test" or label not in ("", "-1", "None")):
        raise ValueError(f"{where}: label must be 0, 1, 2 or 3, got {row.get('label')!r}")
    # The first column has no name: the row's number in the whole data set.
    name = str(row.get("") or number)
    known = label in ("0", "1", "2", "3")
    return ChoiceExample(name, value(row, "sent1", where), options, int(label) if known else None)
