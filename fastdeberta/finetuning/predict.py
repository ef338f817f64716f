"""Batch inference: JSON lines in, JSON lines out, in the input's order and in bounded memory.

Input is read in windows. Each is tokenised, sorted by length, cut into packed batches, put back in
order and written before the next one is read. Windows depend on the input alone: a run that goes
on behind the last complete one does what an uninterrupted run would have done.
"""

import codecs
import contextlib
import ctypes
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..files import write_atomically
from ..training.reporting import NoProgress, Progress
from .predictors import Predictor

ON_ERROR = ("fail", "skip")

# A window is complete when it has so many bytes (some 30,000 tokens) or lines.
_WINDOW_BYTES, _WINDOW_LINES = 1 << 17, 1024

_STANDARD = "-"

# By these a changed model is noticed.
_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "*.model", "vocab.*")

_TIME = "input's size or time"  # Only of what can be read again.


@dataclass
class Counts:
    """Lines with a result (truncated: of a text that was cut), and lines without (skipped).

    Those that an earlier run had written are counted too, but not in new, which took `seconds`.
    """

    predicted: int = 0
    truncated: int = 0
    skipped: int = 0
    new: int = 0
    seconds: float = 0.0

    def add(self, result: dict[str, Any]) -> None:
        self.skipped += "error" in result
        self.predicted += "error" not in result
        self.truncated += result.get("truncated", False)


class _Line(NamedTuple):
    number: int
    content: bytes


def predict(
    predictor: Predictor,
    source: str | Path,
    out: str | Path | IO[bytes],
    on_error: str = "fail",
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Counts:
    """Writes what a predictor says of every line of a file.

    Each line that is not blank gives one, {"line": its number, "id": as in the line, ...}, with the
    predictor's keys or, of a bad line, "error".

    A file `out` appears when it is complete. Until then results are in `out`.partial, to which the
    same call adds after an interruption, of a regular `source`, what is missing. `out`.partial.json
    says what they belong to.

    Args:
        source: UTF-8, a JSON object a line; "-": standard input.
        out: a file's path, or a stream.
        on_error: of a line that is no JSON object, or without what the predictor needs: "fail"
            stops, "skip" goes on.
        report: gets a line of text for each line that is skipped. None: printed on standard error.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a bad line, or unfinished results of another source, model or setting.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; got {on_error!r}")
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    progress = progress or NoProgress()
    counts = Counts()
    with contextlib.ExitStack() as stack:
        stream, total = _opened(source, stack)
        output: _StreamOutput | _FileOutput
        if isinstance(out, (str, Path)):
            about = _description(predictor, source, total is not None)
            output = stack.enter_context(_FileOutput(Path(out), about, source))
        else:
            output = _StreamOutput(out)
        windows = output.missing(_windows(stream), counts)
        if total is None:
            progress = NoProgress()
        started = time.monotonic()
        progress.start("predicting", output.line, total or 0)
        try:
            for window in windows:
                results = list(_results(predictor, window))
                for line, result in zip(window, results, strict=True):
                    if "error" in result:
                        reason = f"{source}, line {line.number}: {result['error']}"
                        if on_error == "fail":
                            raise ValueError(reason)
                        report(reason)
                output.write(results)
                _trim()
                counts.new += len(results)
                for result in results:
                    counts.add(result)
                note = f"{counts.skipped} skipped" if counts.skipped else ""
                progress.update(window[-1].number, note)
        finally:
            progress.stop()
        output.finish()
        counts.seconds = time.monotonic() - started
    return counts


def _results(predictor: Predictor, window: list[_Line]) -> Iterator[dict[str, Any]]:
    """One result a line."""
    headers: list[dict[str, Any]] = []
    outcomes: list[Any] = []  # An error, or None where the model has yet to say something.
    examples = []
    for line in window:
        header: dict[str, Any] = {"line": line.number}
        headers.append(header)
        try:
            row = _row(line.content)
            if "id" in row:
                header |= {"id": _passed(row["id"])}
            examples.append(predictor.read(row))
            outcomes.append(None)
        except ValueError as error:
            outcomes.append(error)
    predicted = iter(predictor.predict(examples))
    for header, outcome in zip(headers, outcomes, strict=True):
        result = next(predicted) if outcome is None else outcome
        yield header | ({"error": str(result)} if isinstance(result, ValueError) else result)


def _trim() -> None:
    """Gives freed memory back, which glibc keeps in pieces: with batches of every size its peak
    grows for hours."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    return row


def _no_number(name: str) -> None:
    raise ValueError(f"not JSON: {name}")


def _passed(identifier: Any) -> Any:
    """An id, if it can be written."""
    try:
        json.dumps(identifier, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("'id' cannot be written: half of a surrogate pair, or infinite") from None
    return identifier


# Input


def _opened(source: str | Path, stack: contextlib.ExitStack) -> tuple[IO[bytes], int | None]:
    """A stream, and its number of lines if it is a file that can be read again."""
    if str(source) == _STANDARD:
        return sys.stdin.buffer, None
    path = Path(source)
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    stream = stack.enter_context(path.open("rb"))
    if not path.is_file():  # A pipe.
        return stream, None
    blocks = iter(lambda: stream.read(1 << 20), b"")
    total, last = 0, b"\n"
    for block in blocks:
        total, last = total + block.count(b"\n"), block[-1:]
    stream.seek(0)
    return stream, total + (last != b"\n")


def _windows(stream: IO[bytes]) -> Iterator[list[_Line]]:
    window: list[_Line] = []
    size = 0
    for number, content in enumerate(stream, 1):
        if number == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
        content = content.strip()
        if not content:
            continue
        window.append(_Line(number, content))
        size += len(content)
        if size >= _WINDOW_BYTES or len(window) >= _WINDOW_LINES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _description(predictor: Predictor, source: str | Path, regular: bool) -> dict[str, Any]:
    """What results belong to. How batches are made is no part of it, nor what errors do."""
    parameter = next(predictor.model.parameters())
    about: dict[str, Any] = {
        "input": str(Path(source).resolve()) if regular else str(source),
        "head": predictor.model.head_name,
        "precision": str(parameter.dtype).removeprefix("torch."),
        "max_length": predictor.max_length,
        "columns": [*predictor.text, *predictor.beside],
    }
    if regular:
        about[_TIME] = _state(Path(source))
    if predictor.directory is not None:
        about["model"] = str(predictor.directory.resolve())
        files = sorted(f for kind in _MODEL_FILES for f in predictor.directory.glob(kind))
        about["model's files"] = [[file.name, *_state(file)] for file in files]
    return about


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


# Output


def _encoded(results: list[dict[str, Any]]) -> bytes:
    lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    return "".join(lines).encode()


class _StreamOutput:
    line = 0

    def __init__(self, stream: IO[bytes]):
        self.stream = stream

    def missing(self, windows: Iterator[list[_Line]], counts: Counts) -> Iterator[list[_Line]]:
        return windows

    def write(self, results: list[dict[str, Any]]) -> None:
        self.stream.write(_encoded(results))
        self.stream.flush()

    def finish(self) -> None:
        pass


class _FileOutput:
    """OUT.partial, which becomes OUT when it is complete.

    Attributes:
        line: the number of the last input line whose result is there.
    """

    def __init__(self, path: Path, about: dict[str, Any], source: str | Path):
        if path.is_dir():
            raise ValueError(f"out must be a file, {path} is a directory")
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise ValueError(f"out and input are one file, {path}")
        self.path, self.line = path, 0
        self.partial = path.with_name(path.name + ".partial")
        self.about_file = path.with_name(path.name + ".partial.json")
        self.about = about

    def __enter__(self) -> "_FileOutput":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = self.partial.open("a+b")
        try:
            self._claim()
        except BaseException:
            self.stream.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.partial}") from None
        if os.fstat(self.stream.fileno()).st_size == 0:
            write_atomically(self.about_file, json.dumps(self.about, indent=2) + "\n")
            return
        if not self.about_file.exists():
            raise self._foreign(f"there is no {self.about_file.name}")
        try:
            before = json.loads(self.about_file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise self._foreign(f"{self.about_file.name} is damaged")
        for name in sorted(before.keys() | self.about.keys()):
            if before.get(name) != self.about.get(name):
                raise self._foreign(f"the {name} differs")

    def _foreign(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.partial} is not of this run ({reason}): delete it to start anew, "
            "or give another --out"
        )

    def missing(self, windows: Iterator[list[_Line]], counts: Counts) -> Iterator[list[_Line]]:
        """The windows that have not been written, once what follows the others is cut off."""
        self.stream.seek(0)
        complete = sum(line.endswith(b"\n") for line in self.stream)
        if _TIME not in self.about:
            complete = 0
        kept, first = 0, None
        for window in windows:
            if kept + len(window) > complete:
                first = window
                break
            kept += len(window)
            self.line = window[-1].number
        if first is None and kept < complete:
            raise self._foreign("it has more lines than the input")
        self.stream.seek(0)
        size, last = 0, {"line": 0}
        for _ in range(kept):
            line = self.stream.readline()
            size += len(line)
            last = self._parsed(line)
            counts.add(last)
        if last.get("line") != self.line:
            raise self._foreign(f"result {kept} is not of line {self.line}")
        self.stream.truncate(size)
        return self._from(first, windows)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            result = json.loads(line)
        except ValueError:
            result = None
        if not isinstance(result, dict):
            raise self._foreign("it is damaged")
        return result

    def _from(
        self, first: list[_Line] | None, rest: Iterator[list[_Line]]
    ) -> Iterator[list[_Line]]:
        if first is not None:
            yield first
        yield from rest

    def write(self, results: list[dict[str, Any]]) -> None:
        self.stream.write(_encoded(results))
        self._sync()

    def _sync(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def finish(self) -> None:
        self._sync()
        self.partial.replace(self.path)
        self.about_file.unlink()
