"""Prepared directories: what is in them, resumed runs, damage."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fastdeberta import cli
from fastdeberta import tokenizer as tokenizers
from fastdeberta.pretraining import prepare as prepare_module
from fastdeberta.pretraining import text
from fastdeberta.pretraining.prepare import PrepareSettings, prepare
from fastdeberta.pretraining.shards import Part, is_prepared, open_prepared

DOCUMENTS = 400


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with text in two files and a tokenizer; batches of text that are small."""
    monkeypatch.setattr(prepare_module, "_BATCH", 1000)
    documents = tiny.documents(DOCUMENTS)
    (tmp_path / "text").mkdir()
    lines = [json.dumps({"text": document}) for document in documents[:150]]
    (tmp_path / "text/a.jsonl").write_text("\n".join(lines))
    (tmp_path / "text/b.txt").write_text("\n\n".join(documents[150:]))
    tokenizers.save(tiny.tokenizer(), tmp_path / "tokenizer")
    return tmp_path


def make(place, name="data", **changes):
    values = {"data": str(place / "text"), "tokenizer": str(place / "tokenizer"), "workers": 1}
    values |= {"held_out": 0.1, "shard_tokens": 2000, "output": str(place / name)}
    return PrepareSettings(**values | changes)


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


# Preparing


def test_prepared_text(place):
    meta = prepare(make(place))
    data = open_prepared(place / "data", verify=True)
    assert meta == data.meta == json.loads((place / "data/meta.json").read_text())
    assert meta["shards"] == len(data.train.shards) > 5
    assert meta["documents"] == {"train": len(data.train), "held_out": len(data.held_out)}
    assert data.tokenizer.to_str() == tokenizers.load(place / "tokenizer").to_str()
    assert isinstance(data.train.shards[0].tokens, np.memmap)
    assert data.train.shards[0].tokens.dtype == np.uint16

    decoded = {
        name: [data.tokenizer.decode(part[i].tolist()) for i in range(len(part))]
        for name, part in (("train", data.train), ("held_out", data.held_out))
    }
    written = tiny.documents(DOCUMENTS)
    assert sorted(decoded["train"] + decoded["held_out"]) == sorted(written)
    held_out = set(decoded["held_out"])
    assert decoded["train"] == [d for d in written if d not in held_out], "in their order"
    assert decoded["held_out"] == [d for d in written if d in held_out], "no text on both sides"
    assert 15 <= len(data.held_out) <= 80  # of 400, 40 expected; 5.8 standard deviations

    whole = Part([text.tokenize(data.tokenizer, decoded["train"])])
    for field in ("tokens", "sentences"):
        arrays = [getattr(shard, field) for shard in data.train.shards]
        starts = np.cumsum([0, *(len(shard.tokens) for shard in data.train.shards)])
        if field == "sentences":
            arrays = [array + start for array, start in zip(arrays, starts, strict=False)]
        assert np.array_equal(np.concatenate(arrays), getattr(whole.shards[0], field))
    size = data.tokenizer.get_vocab_size()
    assert torch.equal(data.train.token_counts(size), whole.token_counts(size))
    assert data.train.tokens == whole.tokens == int(sum(len(whole[i]) for i in range(len(whole))))
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_another_seed_holds_out_other_documents(place):
    kept = []
    for seed in (0, 1):
        prepare(make(place, f"data{seed}", seed=seed))
        held_out = open_prepared(place / f"data{seed}").held_out
        kept.append({tuple(held_out[i].tolist()) for i in range(len(held_out))})
    assert len(kept[0] & kept[1]) < len(kept[0]) / 2


def test_a_tokenizer_is_trained_on_a_sample(place, monkeypatch):
    """The same one whatever interrupts the run; not on what is held out; on as much as asked."""
    given = []
    train = tokenizers.train
    monkeypatch.setattr(tokenizers, "train", lambda d, *a: given.append(list(d)) or train(d, *a))
    for name, megabytes in (("all", 64.0), ("some", 0.006), ("again", 0.006)):
        prepare(make(place, name, tokenizer=None, vocab_size=120, tokenizer_megabytes=megabytes))
    every, some, again = given
    data = open_prepared(place / "all")
    assert len(every) == len(data.train)
    assert some == again and set(some) < set(every)
    assert 2000 < sum(map(len, some)) <= 6000
    assert any(d in tiny.documents(DOCUMENTS)[-100:] for d in some), "from all of the text"
    assert contents(place / "some/shard-00000") == contents(place / "again/shard-00000")


def test_a_stream_gives_its_beginning_to_the_tokenizer(place, monkeypatch):
    corpus = text.Corpus("datasets:some")
    documents = tiny.documents(DOCUMENTS)
    monkeypatch.setattr(corpus, "_stream", lambda skip: iter(documents[skip:]))
    some = prepare_module._sample(corpus, make(place, held_out=0.0, tokenizer_megabytes=0.002))
    assert some == documents[: len(some)] and 2000 < sum(map(len, some)) < 2300


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_an_interrupted_run_goes_on(place, stop, monkeypatch):
    """Wherever it stops, the shards are those of a run that did not; what is done stays."""
    prepare(make(place, "whole"))
    tokenize, calls = prepare_module._tokenize, 0

    def fail(*args):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return tokenize(*args)

    monkeypatch.setattr(prepare_module, "_tokenize", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(make(place))
    with pytest.raises(ValueError, match=r"is not complete: run `fastdeberta prepare` again"):
        open_prepared(place / "data")
    done = {path: path.stat().st_mtime_ns for path in (place / "data").glob("shard-*/*")}
    assert bool(done) == (stop > 5)
    (place / "data/.shard-00003.writing-1").mkdir()
    monkeypatch.setattr(prepare_module, "_tokenize", tokenize)
    prepare(make(place))
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert contents(place / "data") == contents(place / "whole")
    prepare(make(place))  # complete: nothing is left to do
    assert contents(place / "data") == contents(place / "whole")


def test_every_number_of_workers_gives_the_same(place):
    prepare(make(place, "one"))
    prepare(make(place, "two", workers=2))
    assert contents(place / "one") == contents(place / "two")


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_killed_runs_go_on(tmp_path):
    """SIGKILL at random moments, with two workers, which end too; then the same bytes."""
    documents = tiny.documents(4000)
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    tokenizers.save(tiny.tokenizer(), tmp_path / "tokenizer")
    script = (
        "import sys, json\n"
        "from fastdeberta.pretraining import prepare\n"
        "prepare._BATCH = 2000\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(prepare.PrepareSettings(**json.loads(sys.argv[1])))\n"
    )
    (tmp_path / "run.py").write_text(script)
    values = make(tmp_path, data=str(tmp_path / "a.txt"), workers=2, shard_tokens=3000)
    command = [sys.executable, str(tmp_path / "run.py"), json.dumps(asdict(values))]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    draw, kills, seen = random.Random(0), 0, set()
    while kills < 2:
        process = subprocess.Popen(command, env=environment)
        # Its first new shard, and then some.
        while process.poll() is None and seen >= set((tmp_path / "data").glob("shard-*")):
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
        seen = set((tmp_path / "data").glob("shard-*"))
        deadline = time.monotonic() + 30
        while any(
            Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in workers
        ):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    assert kills >= 1
    subprocess.run(command, env=environment, check=True)
    values.output, values.workers = str(tmp_path / "whole"), 2
    subprocess.run([*command[:2], json.dumps(asdict(values))], env=environment, check=True)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert len(seen) < json.loads((tmp_path / "data/meta.json").read_text())["shards"]


def test_a_worker_that_dies(place, monkeypatch):
    settings = make(place, workers=2)
    start = prepare_module.multiprocessing.get_context("spawn").Process.start

    def killed(process):
        start(process)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", killed)
    with pytest.raises(RuntimeError, match="a worker died"):
        prepare(settings)


# Damage and bad settings


def test_half_a_surrogate_pair_does_not_stop_a_run(place):
    (place / "text/a.jsonl").write_text('{"text": "the \\ud800 crab"}\n')
    prepare(make(place))


def change(name, edit):
    def apply(directory):
        path = directory / name
        path.write_bytes(edit(path.read_bytes()))

    return apply


def flip(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def edited(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


TOKENS = "shard-00001/train.tokens"
DAMAGE = {
    "short tokens": (change(TOKENS, lambda d: d[:-1]), r"train.tokens is damaged or truncated: "),
    "long tokens": (change(TOKENS, lambda d: d + d), r"train.tokens is damaged or truncated: "),
    "no tokens": (lambda d: (d / TOKENS).unlink(), r"train.tokens is damaged or truncated: miss"),
    "no shard": (lambda d: shutil.rmtree(d / "shard-00001"), r"shard-00001 is missing or damaged"),
    "other bits": (change(TOKENS, flip), r"train.tokens is damaged: its checksum"),
    "counts": (change("shard-00001/meta.json", lambda d: d[:-9]), r"meta.json is damaged: "),
    "no counts": (change("shard-00001/meta.json", lambda d: b"{}"), r"it lacks counts"),
    "another tokenizer": (change("tokenizer.json", lambda d: d + b" "), r"is not the tokenizer of"),
    "meta": (change("meta.json", lambda d: d[:50]), r"meta.json is damaged: "),
    "format": (change("meta.json", edited(format=9)), r"meta.json: format 9 is unknown, 1 is read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case, place):
    prepare(make(place))
    damage, message = DAMAGE[case]
    damage(place / "data")
    with pytest.raises(ValueError, match=message):
        open_prepared(place / "data", verify=True)


def test_not_prepared(tmp_path):
    assert not is_prepared(tmp_path)
    with pytest.raises(FileNotFoundError, match="was not made by `fastdeberta prepare`"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"tokenizer_megabytes": 0.0}, "tokenizer_megabytes must be positive"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"shard_tokens": 0}, r"shard_tokens must be in \[1, 2147483648\], got 0"),
        ({"held_out": 1e-9}, "held_out: none of 400 documents was drawn at 1e-09"),
    ],
)
def test_bad_settings(changes, message, place):
    with pytest.raises(ValueError, match=message):
        prepare(make(place, **changes))


def test_shards_without_a_meta(place):
    prepare(make(place))
    (place / "data/meta.json").unlink()
    with pytest.raises(ValueError, match="data holds shards without a meta.json; delete them"):
        prepare(make(place))
    shutil.rmtree(place / "data")
    (place / "data/rows/segments-128-0").mkdir(parents=True)
    prepare(make(place))
    assert not (place / "data/rows").exists(), "tables of other shards"


@pytest.mark.parametrize("changes", [{"seed": 1}, {"shard_tokens": 3000}, {"files": None}])
def test_another_run_in_the_output(changes, place):
    prepare(make(place))
    if "files" in changes:
        with (place / "text/b.txt").open("a") as stream:
            stream.write("\n\nmore")
    (key,) = changes
    with pytest.raises(ValueError, match=f"output: .*data holds shards made with another {key} "):
        prepare(make(place, **{k: v for k, v in changes.items() if k != "files"}))


def test_no_text(place):
    for path in (place / "text").iterdir():
        path.write_text("\n")
    with pytest.raises(ValueError, match="data: no text to train on in "):
        prepare(make(place))


def test_without_held_out_documents(place):
    prepare(make(place, held_out=0.0))
    assert len(open_prepared(place / "data").held_out) == 0


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_command(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    Path("prepare.yaml").write_text("data: text\noutput: data\ntokenizer: tokenizer\nworkers: 1\n")
    status, out, err = run(capsys, "prepare", "prepare.yaml", "held_out=0.1")
    assert (status, err) == (0, "")
    data = open_prepared("data")
    assert f"train: {len(data.train)} documents, " in out and out.endswith("written: data\n")
    assert run(capsys, "prepare", "prepare.yaml", "held_out=0.1")[0] == 0
    for override, message in (
        ("held_out=0.2", "output: data holds shards made with another held_out (0.1 there, 0.2"),
        ("held_ot=0.2", "unknown config key 'held_ot'; did you mean 'held_out'?"),
        ("data=missing", "no such file: missing"),
    ):
        status, _, err = run(capsys, "prepare", "prepare.yaml", override)
        assert status == 2 and err.startswith(f"fastdeberta: {message}") and err.count("\n") == 1
