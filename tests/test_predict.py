"""Batch inference: the input's order, bad lines, interruptions, memory."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from predicted import read, save, texts, write

from fastdeberta import cli
from fastdeberta.finetuning import predict as prediction
from fastdeberta.finetuning.predict import predict
from fastdeberta.finetuning.predictors import load


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(prediction, "_WINDOW_LINES", 7)


def run(capsysbinary, *arguments):
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", *map(str, arguments)])
    captured = capsysbinary.readouterr()
    return caught.value.code, captured.out.decode(), captured.err.decode()


# Lines


def test_order_ids_and_unicode(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "_WINDOW_LINES", 100)
    rows = texts(60)
    random.Random(0).shuffle(rows)
    for i, row in enumerate(rows):
        row["id"] = [f"é{i}", i, None, {"a": [1, "日本"]}][i % 4]
        row["text"] = ["", "日本語 🦌 " * 9, "naïve\u0000\u2028 text", row["text"]][i % 4]
    predict(predictor, write(tmp_path / "a", rows), tmp_path / "together")
    together = read(tmp_path / "together")
    assert [r["line"] for r in together] == list(range(1, 61))
    assert [r["id"] for r in together] == [row["id"] for row in rows]
    for row, result in zip(rows, together, strict=True):
        (alone,) = predictor.predict([predictor.read(row)])
        assert result["scores"] == pytest.approx(alone["scores"], abs=1e-5)
    assert "日本" in (tmp_path / "together").read_text("utf-8")


def test_lines_are_cut_as_the_file_has_them(predictor, tmp_path):
    """A byte order mark, CRLF, blank lines, no newline at the end; U+2028 ends no line."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n  \n{"text": "c"}\n\n{"text": "d"}'.encode()
    )
    counts = predict(predictor, source, tmp_path / "out")
    assert [r["line"] for r in read(tmp_path / "out")] == [1, 4, 6]
    assert (counts.predicted, counts.skipped) == (3, 0)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_nothing_in_nothing_out(predictor, content, tmp_path):
    (tmp_path / "in").write_bytes(content)
    assert predict(predictor, tmp_path / "in", tmp_path / "out").predicted == 0
    assert (tmp_path / "out").read_bytes() == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


NESTED = b"[" * 100_000 + b"]" * 100_000
BAD = {
    b'{"text": "a"': "not JSON: ",
    b"[1]": "expected a JSON object",
    b'{"txt": "a"}': "no 'text'; it has txt",
    b"{}": "no 'text'; it has no key",
    b'{"text": null}': "no 'text'",
    b'{"text": 3}': "'text' must be a string, got 3",
    b'{"text": "a", "pair": ["b"]}': "'pair' must be a string",
    b'{"text": "\xff"}': "not UTF-8: byte 11",
    b'{"text": "\\ud800"}': "'text' holds half of a surrogate pair",
    b'{"text": "a", "id": "\\ud800"}': "'id' cannot be written",
    b'{"text": "a", "id": 1e999}': "'id' cannot be written",
    b'{"text": "a", "id": NaN}': "not JSON: NaN",
    b'{"text": ' + NESTED + b"}": "not JSON that can be read: nested too deeply",
    b'{"text": ' + b"1" * 5000 + b"}": "",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_and_stops_or_is_skipped(predictor, line, tmp_path):
    rows = [*texts(10), line, *texts(5)]
    source, out = write(tmp_path / "in", rows), tmp_path / "out"
    with pytest.raises(ValueError, match="line 11: ") as caught:
        predict(predictor, source, out)
    assert str(caught.value).startswith(f"{source}, line 11: {BAD[line]}")
    assert not out.exists()
    reports = []
    counts = predict(predictor, source, out, "skip", report=reports.append)
    assert reports == [str(caught.value)]
    assert (counts.predicted, counts.skipped, counts.new) == (15, 1, 9)  # A window was there.
    results = read(out)
    assert [r["line"] for r in results] == list(range(1, 17))
    assert list(results[10]) == ["line", "error"]
    assert all("label" in r for r in results[:10] + results[11:])


# Interruptions


class Killed(BaseException):
    pass


def at(count, function):
    """The function, which on its count-th call is the last thing that happens."""
    calls = iter(range(1, 10**9))

    def call(*args, **kwargs):
        if next(calls) == count:
            raise Killed
        return function(*args, **kwargs)

    return call


STAGES = ["before reading", "reading", "model", "written in part", "not synced", "renaming", "end"]


@pytest.mark.parametrize("stage", STAGES)
def test_continued_after_a_stop_in_any_stage(stage, predictor, tmp_path, monkeypatch):
    rows = [*texts(40), b"bad", b"", *texts(9)]
    source, out = write(tmp_path / "in", rows), tmp_path / "out"
    reports = []
    predict(predictor, source, tmp_path / "whole", "skip", report=reports.append)
    expected = (tmp_path / "whole").read_bytes()
    output = prediction._FileOutput

    def half(self, results):
        if results[0]["line"] > 20:
            data = prediction._encoded(results)
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()
            raise Killed
        write_whole(self, results)

    write_whole = output.write
    with monkeypatch.context() as patch:
        if stage == "before reading":
            patch.setattr(prediction, "_windows", at(1, prediction._windows))
        elif stage == "reading":
            patch.setattr(type(predictor), "read", at(30, type(predictor).read))
        elif stage == "model":
            patch.setattr(type(predictor), "predict", at(3, type(predictor).predict))
        elif stage == "written in part":
            patch.setattr(output, "write", half)
        elif stage == "not synced":
            patch.setattr(prediction.os, "fsync", at(5, os.fsync))  # The first is the sidecar's.
        elif stage == "renaming":
            patch.setattr(Path, "replace", at(2, Path.replace))
        else:
            patch.setattr(Path, "unlink", at(2, Path.unlink))
        with pytest.raises(Killed):
            predict(predictor, source, out, "skip", report=reports.append)
    if stage != "end":
        assert not out.exists() and (tmp_path / "out.partial").exists()
        had = len((tmp_path / "out.partial").read_bytes().splitlines())
        assert (had > 0) == (stage != "before reading")
    counts = predict(predictor, source, out, "skip", report=reports.append)
    assert out.read_bytes() == expected
    assert (counts.predicted, counts.skipped) == (49, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.slow
def test_killed_again_and_again(checkpoint, tmp_path):
    """SIGKILL at moments of chance, until a run comes through."""
    source = write(tmp_path / "in", [*texts(60), b"{", *texts(60)])
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from fastdeberta.finetuning import predict as p\n"
        "from fastdeberta.finetuning.predictors import load\n"
        "p._WINDOW_LINES = 2\n"
        "predictor = load(sys.argv[1], device='cpu')\n"
        "print('loaded', flush=True)\n"
        "p.predict(predictor, sys.argv[2], sys.argv[3], 'skip')\n"
    )
    arguments = [sys.executable, "-c", code, str(checkpoint), str(source)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(out):
        process = subprocess.Popen(
            [*arguments, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None and process.stdout.readline() == b"loaded\n"
        return process

    process = start(tmp_path / "whole")
    began = time.monotonic()
    process.communicate()
    seconds = time.monotonic() - began
    kills, draw = 0, random.Random(0)
    for _ in range(4):
        process = start(tmp_path / "out")
        time.sleep(draw.uniform(0, seconds / 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    process = start(tmp_path / "out")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert kills >= 1
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [r["line"] for r in read(tmp_path / "out")] == list(range(1, 122))


@pytest.fixture
def unfinished(predictor, tmp_path, monkeypatch):
    """A source, and an output of which two windows of seven lines are there."""
    source = write(tmp_path / "in", texts(30))
    with monkeypatch.context() as patch:
        patch.setattr(type(predictor), "predict", at(3, type(predictor).predict))
        with pytest.raises(Killed):
            predict(predictor, source, tmp_path / "out")
    assert len(read(tmp_path / "out.partial")) == 14
    return source, tmp_path / "out"


@pytest.mark.parametrize("change", ["input", "model", "length", "lost", "damaged", "order", "more"])
def test_results_of_another_run_are_refused(change, unfinished, checkpoint, tmp_path):
    source, out = unfinished
    partial, about = tmp_path / "out.partial", tmp_path / "out.partial.json"
    options, directory = {}, checkpoint
    if change == "input":
        write(source, texts(31))
        reason = "input's size or time differs"
    elif change == "model":
        directory, reason = save(tmp_path / "other"), "model differs"
    elif change == "length":
        options, reason = {"max_length": 20}, "max_length differs"
    elif change == "lost":
        about.unlink()
        reason = "no out.partial.json"
    elif change == "damaged":
        about.write_text("{")
        reason = "out.partial.json is damaged"
    elif change == "order":
        lines = partial.read_bytes().splitlines(keepends=True)
        partial.write_bytes(b"".join(lines[:-1] + lines[:1]))
        reason = "result 14 is not of line 14"
    else:
        partial.write_bytes(partial.read_bytes() * 9)
        reason = "more lines than the input"
    before = partial.read_bytes()
    with pytest.raises(ValueError, match=f"{partial} is not of this run .*{reason}.*: delete it"):
        predict(load(directory, device="cpu", **options), source, out)
    assert partial.read_bytes() == before and not out.exists()


def test_what_may_change_between_two_runs(unfinished, checkpoint):
    source, out = unfinished
    counts = predict(load(checkpoint, device="cpu", tokens=200), source, out, "skip")
    assert (counts.predicted, counts.new) == (30, 16)
    assert [r["line"] for r in read(out)] == list(range(1, 31))


def test_only_one_process_writes(unfinished, predictor, tmp_path):
    source, out = unfinished
    held = prediction._FileOutput(out, json.loads((tmp_path / "out.partial.json").read_text()), "x")
    with held, pytest.raises(ValueError, match="another process is writing"):
        predict(predictor, source, out)
    predict(predictor, source, out)


# The command


def test_command_from_file_to_file(checkpoint, tmp_path, capsysbinary):
    source = write(tmp_path / "in", [*texts(3), b"{", *texts(40)])
    command = ("--model", checkpoint, "--input", source, "--out", tmp_path / "o" / "out")
    status, out, err = run(capsysbinary, *command)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fastdeberta: {source}, line 4: not JSON: ")
    status, out, err = run(capsysbinary, *command, "--on-error", "skip", "--max-length", 20)
    assert status == 0 and out == f"written: {tmp_path / 'o' / 'out'}\n"
    first, *_, lines, truncated = err.splitlines()
    assert first.startswith(f"{source}, line 4: not JSON")
    assert lines.startswith("lines: 43 predicted, 1 skipped; ")
    results = read(tmp_path / "o" / "out")
    cut = sum(r.get("truncated", False) for r in results)
    assert truncated == f"truncated: {cut}, to 20 tokens" and 0 < cut < 44
    assert len(results) == 44


def test_command_from_stdin_to_stdout(checkpoint, tmp_path, capsysbinary, monkeypatch):
    source = write(tmp_path / "in", texts(20))
    predict(load(checkpoint), source, tmp_path / "out")

    def again(*more):
        stdin = io.TextIOWrapper(io.BytesIO(source.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        return run(capsysbinary, "--model", checkpoint, "--input", "-", *more)

    status, out, err = again()
    assert status == 0 and out == (tmp_path / "out").read_text("utf-8")
    lines, truncated = err.splitlines()
    assert lines.startswith("lines: 20 predicted, 0 skipped; ") and "truncated" in truncated
    # What an interrupted run from stdin left cannot be continued, and is done anew.
    with monkeypatch.context() as patch:
        patch.setattr(prediction._FileOutput, "finish", at(1, None))
        with pytest.raises(Killed):
            again("--out", tmp_path / "out2")
    assert (tmp_path / "out2.partial").exists()
    assert again("--out", tmp_path / "out2")[0] == 0
    assert (tmp_path / "out2").read_bytes() == (tmp_path / "out").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "./nowhere"}, "no model directory at nowhere"),
        ({"--model": "{base}"}, "{base}/config.json names the head 'base'; --head says which"),
        ({"--model": "{base}", "--head": "sequence"}, "has no weights for head 'sequence'"),
        ({"--head": "mlm"}, "head must be one of sequence, token, choice"),
        ({"--input": "nowhere"}, "no such file: nowhere"),
        ({"--out": "."}, "out must be a file, . is a directory"),
        ({"--out": "{input}"}, "out and input are one file"),
        ({"--on-error": "x"}, "on_error must be one of fail, skip; got 'x'"),
        ({"--precision": "fp8"}, "precision must be one of fp32, bf16; got 'fp8'"),
        ({"--tokens": "0"}, "tokens must be at least 1, got 0"),
        ({"--max-length": "3"}, "max_length must be at least 4, got 3"),
    ],
)
def test_wrong_usage_is_one_line(changes, message, checkpoint, tmp_path, capsysbinary):
    base = tmp_path / "base"
    if "{base}" in changes.get("--model", ""):
        save(base, "base")
    source = write(tmp_path / "in", texts(2))
    values = {"--model": checkpoint, "--input": source, "--out": tmp_path / "out"}
    for name, value in changes.items():
        values[name] = value.format(base=base, input=source)
    status, out, err = run(capsysbinary, *(part for pair in values.items() for part in pair))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fastdeberta: ") and message.format(base=base) in err
    assert source.exists() and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(checkpoint, tmp_path):
    """Peak memory of a process for 2,000 and for 20,000 lines."""
    code = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from fastdeberta.finetuning.predict import predict\n"
        "from fastdeberta.finetuning.predictors import load\n"
        "predict(load(sys.argv[1], device='cpu'), sys.argv[2], sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    peaks = []
    for count in (2_000, 20_000):
        source = write(tmp_path / f"in{count}", texts(200) * (count // 200))
        command = [sys.executable, "-c", code, checkpoint, source, tmp_path / f"out{count}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 25, peaks
