"""Runs killed again and again, at any moment: in the end the files are an uninterrupted run's."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from test_training import TIMING

from fastdeberta.cli import main
from fastdeberta.models import from_pretrained
from fastdeberta.training import checkpoint
from fastdeberta.training.reporting import read_metrics

STEPS = 220
KILLS = 20
REACH = 9  # The most steps by which a killed process gets on: 20 of them leave the run unfinished.
REAL = (6, 13)  # kills of processes that a user's command starts; the others are forks
PRELOADED = [
    "fastdeberta.cli",
    "fastdeberta.pretraining.task",
    "safetensors.torch",
    "tokenizers.implementations",
    "torch._dynamo",  # which torch.optim imports in its first step
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
]


class Forked:
    """`fastdeberta ARGUMENTS`, forked from a process that has imported everything and has started
    no thread; like subprocess.Popen."""

    def __init__(self, arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=main, args=(arguments,))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout):
        self.process.join(timeout)
        return self.process.exitcode


def command(arguments):
    """The same, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastdeberta", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def arguments_of(directory, name):
    """A pre-training run of a second or two."""
    config = directory / "config.yaml"
    if not config.exists():
        (directory / "text.txt").write_text("\n\n".join(tiny.documents()))
        values = {
            "data": str(directory / "text.txt"), "device": "cpu", "vocab_size": 120,
            "sequence_length": 24, "held_out": 0.1, "steps": STEPS, "warmup_steps": 5,
            "batch_size": 4, "log_every": 1, "evaluate_every": 40, "checkpoint_every": 3,
            "workers": 1, "layout": "packed",
            "discriminator": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        }  # fmt: skip
        config.write_text(json.dumps(values))  # JSON is YAML too.
    return ["pretrain", str(config), f"output={directory / name}"]


def newest(output):
    """The step that a process would go on from."""
    return max((int(p.name.split("-")[1]) for p in checkpoint.checkpoints(output)), default=0)


def logged(output):
    """The last step in metrics.jsonl, a line that is still written aside."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]
    return max(steps, default=0)


def writing(output):
    return list(output.glob(".checkpoint-*.writing-*"))


def stop(process, output, number, kind, draw):
    """Sends a signal at a moment of a kind: any time, soon after a step, or while a checkpoint is
    written; the latter two when there is a new checkpoint. At the latest when the process has made
    REACH steps. Returns the kind, or "reach"."""
    start = newest(output)
    deadline = time.monotonic() + draw.uniform(0, 1.5)
    step, delay = start + draw.randint(4, REACH - 1), draw.uniform(0, 0.02)
    hit = kind
    while process.poll() is None:
        reached = logged(output)
        if kind == "time" and time.monotonic() >= deadline:
            break
        if kind == "step" and reached >= step:
            time.sleep(delay)
            break
        if kind == "writing" and reached > start + 3 and writing(output):
            time.sleep(delay / 10)
            break
        if reached >= start + REACH:
            hit = "reach"
            break
        time.sleep(0.0005)
    process.send_signal(number)
    return hit


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_processes_leave_the_same_run(seed, one_thread, tmp_path):
    """SIGKILL twenty times, once also SIGTERM."""
    draw, output = random.Random(seed), tmp_path / "stopped"
    arguments = arguments_of(tmp_path, "stopped")
    whole = Forked(arguments_of(tmp_path, "whole"))
    story = []  # of every kill: its kind, where the process started and what it left half-written
    for number in range(KILLS):
        kind = ("time", "step", "writing")[number % 3]
        process = (command if number in REAL else Forked)(arguments)
        start = newest(output)
        hit = stop(process, output, signal.SIGKILL, kind, draw)
        status = process.wait(60)
        story.append((hit, start, logged(output), len(writing(output))))
        assert status == -signal.SIGKILL, (seed, story)
    assert len(story) == KILLS and newest(output) < STEPS, (seed, story)
    assert sum(left > 0 for *_, left in story) >= 3, (seed, story)
    assert len({start for _, start, *_ in story}) >= KILLS // 3, (seed, story)

    process = command(arguments)
    stop(process, output, signal.SIGTERM, "step", draw)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count("\n") == 1, stderr
    assert stderr.startswith("fastdeberta: SIGTERM: stopped after step ")
    saved = Path(stderr.split()[-1])
    assert saved == checkpoint.checkpoints(output)[-1]
    from_pretrained(saved / "discriminator", "rtd")
    from_pretrained(saved / "generator", "mlm")
    assert not writing(output)

    assert Forked(arguments).wait(60) == 0 and whole.wait(60) == 0, (seed, story)
    names = ["metrics.jsonl", "tokenizer.json"]
    names += [f"{model}/model.safetensors" for model in ("discriminator", "generator")]
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name, seed, story,
        )  # fmt: skip
    assert [x["step"] for x in read_metrics(output / "metrics.jsonl") if "loss" in x] == list(
        range(1, STEPS + 1)
    )
    results = [
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "stopped")
    ]
    assert {k: v for k, v in results[0].items() if k not in TIMING} == {
        k: v for k, v in results[1].items() if k not in TIMING
    }
