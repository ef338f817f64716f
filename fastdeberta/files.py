"""Files: read line by line with clear errors; written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a fresh directory that becomes `path` when the block ends without an error.

    An existing `path` is replaced as a whole; files of the old one are not kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for file in fresh.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if path.exists():
        old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old)
    else:
        fresh.rename(path)


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8) that is never seen half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file.

    Raises:
        FileNotFoundError: no such file. ValueError: not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                encoding = "utf-8-sig" if number == 1 else "utf-8"  # A file may open with a mark.
                yield number, line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: line {number}, byte {error.start + 1}"
                ) from None


def json_object(line: str, where: str) -> dict[str, Any]:
    """A line of JSON lines.

    Raises:
        ValueError: it is not JSON, or no object; `where` says which line it is.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object")
    return value
