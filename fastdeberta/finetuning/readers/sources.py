"""What every reader does: finds its file, and takes it row by row with errors that say where."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import json_object, read_lines

# A row and where it stands, for errors: "dev.tsv, line 3".
Rows = Iterator[tuple[str, dict[str, Any]]]


def find(data_dir: str | Path, split: str, names: Iterable[str], folder: str = "") -> Path:
    """The first of `names`, which may hold "*", in data_dir, or in its folder `folder`.

    Raises:
        FileNotFoundError: none is there; the message lists what was looked for.
    """
    data_dir = Path(data_dir)
    patterns = list(names)
    if folder:
        patterns += [f"{folder}/{name}" for name in patterns]
    for pattern in patterns:
        found = sorted(data_dir.glob(pattern)) if "*" in pattern else [data_dir / pattern]
        for path in found:
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"no file of split {split!r} in {data_dir}; looked for {', '.join(patterns)}"
    )


def files_of(splits: Mapping[str, Any], split: str, task: str) -> Any:
    """splits[split].

    Raises:
        ValueError: the task has no such split.
    """
    if split not in splits:
        raise ValueError(f"split of {task} must be one of {', '.join(splits)}; got {split!r}")
    return splits[split]


def rows(path: Path) -> Rows:
    """The rows of a .jsonl, .tsv or .csv file (UTF-8; TSV and CSV with a header line).

    Raises:
        FileNotFoundError: no such file. ValueError: another ending, not UTF-8, no JSON object, or
            a row with more or fewer columns than the header.
    """
    readers = {".jsonl": _jsonl, ".tsv": tsv, ".csv": _csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a .jsonl, .tsv or .csv file")
    return readers[path.suffix](path)


def tsv(path: Path, header: Sequence[str] = (), ragged: list[str] | None = None) -> Rows:
    """The rows of a TSV file whose quotes are ordinary characters, as in GLUE's.

    Args:
        header: the columns' names; none given: the first line holds them.
        ragged: a list that receives where rows with another number of columns stand, which are
            then left out; None: they are errors.
    """
    names = list(header)
    for number, line in read_lines(path):
        if not line:
            continue
        cells = line.split("\t")
        if not names:
            names = cells
        elif len(cells) == len(names):
            yield f"{path}, line {number}", dict(zip(names, cells, strict=True))
        elif ragged is not None:
            ragged.append(f"line {number}")
        else:
            raise ValueError(_columns(path, number, names, len(cells)))


def _csv(path: Path) -> Rows:
    # With its end: a quoted field may go on in the next line.
    reader = csv.reader(line + "\n" for _, line in read_lines(path))
    names: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
            elif len(cells) != len(names):
                raise ValueError(_columns(path, reader.line_num, names, len(cells)))
            else:
                yield f"{path}, line {reader.line_num}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _columns(path: Path, number: int, names: Sequence[str], got: int) -> str:
    return f"{path}, line {number}: expected {len(names)} columns, {', '.join(names)}; got {got}"


def _jsonl(path: Path) -> Rows:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield where, json_object(line, where)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: not UTF-8, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None


def value(row: Mapping[str, Any], key: str, where: str) -> Any:
    """row[key].

    Raises:
        ValueError: there is none.
    """
    if row.get(key) is None:
        raise ValueError(f"{where}: no {key!r}; it has {', '.join(map(str, row))}")
    return row[key]


def number(text: Any, where: str) -> float:
    """A finite number from a cell.

    Raises:
        ValueError: it is none.
    """
    try:
        result = float(text)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{where}: expected a number as label, got {text!r}")
    return result


def known(label: str, labels: Sequence[str], where: str) -> str:
    """The label.

    Raises:
        ValueError: it is not among labels.
    """
    if label not in labels:
        raise ValueError(f"{where}: label must be one of {', '.join(labels)}; got {label!r}")
    return label


def nonempty(examples: list, where: str | Path) -> list:
    """The examples.

    Raises:
        ValueError: there is none.
    """
    if not examples:
        raise ValueError(f"no example in {where}")
    return examples
