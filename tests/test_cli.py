"""The command line: exit status, one line for every mistake, and a run from text to classifier."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

import fastdeberta
from fastdeberta import cli
from fastdeberta import tokenizer as tokenizers
from fastdeberta.models import Model, from_pretrained
from fastdeberta.training import Diverged, Interrupted
from fastdeberta.training.reporting import read_metrics

CONFIG = {
    "device": "cpu",
    "vocab_size": 120,
    "sequence_length": 24,
    "held_out": 0.1,
    "steps": 12,
    "warmup_steps": 2,
    "batch_size": 8,
    "log_every": 4,
    "evaluate_every": 6,
    "checkpoint_every": 6,
    "learning_rate": 0.003,
    "discriminator": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a text, a config, labelled data and an untrained checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(tiny.documents()))
    write_config({})
    Path("data").mkdir()
    for name, count, seed in (("train", 48, 1), ("dev", 20, 2)):
        rows = [f"{topic}\t{content}" for content, topic in tiny.labelled(count, seed)]
        Path(f"data/{name}.tsv").write_text("\n".join(["label\ttext", *rows]))
    size = tiny.tokenizer().get_vocab_size()
    Model(tiny.config("electra", vocab_size=size)).save_pretrained("model")
    tokenizers.save(tiny.tokenizer(), "model")
    return tmp_path


def write_config(changes):
    values = {**CONFIG, "data": "text.txt", "output": "run", **changes}
    Path("config.yaml").write_text(yaml.safe_dump(values))


def run(capsys, *arguments):
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


PRETRAIN = ("pretrain", "config.yaml")
FINETUNE = ("finetune", "--model", "model", "--data-dir", "data", "output=run", "device=cpu")
FINETUNE += ("max_length=40",)


# What works


def test_from_text_to_a_classifier(place, capsys):
    status, out, err = run(capsys, *PRETRAIN, "tie=embeddings")
    assert (status, err) == (0, "")
    assert "mlm_accuracy: " in out and out.endswith("written: run\n")
    assert json.loads(Path("run/metrics.json").read_text())["step"] == 12
    assert [line["step"] for line in read_metrics(Path("run/metrics.jsonl"))] == [4, 6, 8, 12, 12]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["tie"] == "embeddings"
    for name, head in (("generator", "mlm"), ("discriminator", "rtd")):
        for directory in (f"run/{name}", f"run/checkpoint-12/{name}"):
            from_pretrained(directory, head)
    status, out, _ = run(capsys, *PRETRAIN, "tie=embeddings")
    assert status == 0 and "resuming run after step 12" in out

    status, out, err = run(
        capsys, "finetune", "--model", "run/discriminator", "--data-dir", "data", "output=fine",
        "device=cpu", "epochs=1", "batch_size=8", "max_length=40",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "accuracy: " in out and out.endswith("written: fine\n")
    assert json.loads(Path("fine/metrics.json").read_text())["step"] == 6
    assert len(Path("fine/predictions.jsonl").read_text().splitlines()) == 20
    assert from_pretrained("fine/model", "sequence").config.id2label == {0: "forest", 1: "sea"}


def test_info(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    assert f"torch: {torch.__version__}" in out and "reference: usable" in out


def test_info_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    values = json.loads(out)
    assert status == 0 and values["fastdeberta"] == fastdeberta.__version__
    assert values["backends"] == fastdeberta.available_backends()
    assert values["backends"]["reference"] is None
    assert all(text.startswith("auto takes ") for text in values["kernels"].values())


def test_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "fastdeberta", "info", "--json"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "backends" in json.loads(done.stdout)


# Bad input: status 2 and one line


def put(path, content):
    return lambda: Path(path).write_bytes(content)


def truncate():
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:1000])


def remove(path):
    return lambda: Path(path).unlink()


def nothing():
    pass


CASES = {
    "unknown key": (
        lambda: write_config({"learning_rat": 1}),
        PRETRAIN,
        "unknown config key 'learning_rat'; did you mean 'learning_rate'?",
    ),
    "unknown override": (
        nothing,
        (*PRETRAIN, "stepz=3"),
        "unknown config key 'stepz'; did you mean 'steps'?",
    ),
    "unknown nested key": (
        nothing,
        (*PRETRAIN, "discriminator.hidden_sise=3"),
        "unknown config key 'discriminator.hidden_sise'; did you mean 'discriminator.hidden_size'?",
    ),
    "unknown key of fine-tuning": (
        nothing,
        (*FINETUNE, "epoch=3"),
        "unknown config key 'epoch'; did you mean 'epochs'?",
    ),
    "wrong type": (nothing, (*PRETRAIN, "steps=many"), "steps must be int, got 'many'"),
    "not an override": (nothing, (*PRETRAIN, "steps"), "expected key=value, got 'steps'"),
    "not YAML": (put("config.yaml", b"a: [\nb: {"), PRETRAIN, "config.yaml is not valid YAML: "),
    "no config": (nothing, ("pretrain", "missing.yaml"), "no such config file: missing.yaml"),
    "no text": (nothing, (*PRETRAIN, "data=missing.txt"), "no such file: missing.txt"),
    "empty text": (put("text.txt", b" \n\n"), PRETRAIN, "data: no text in text.txt"),
    "not UTF-8": (
        put("text.txt", b"one\n\ntw\xffo"),
        PRETRAIN,
        "text.txt is not UTF-8: line 3, byte 3",
    ),
    "sequence too long": (
        nothing,
        (*PRETRAIN, "discriminator.model_type=electra", "sequence_length=513"),
        "sequence_length must be at most discriminator.max_position_embeddings = 512, got 513",
    ),
    "unknown backend": (
        nothing,
        (*PRETRAIN, "backend=nope"),
        "backend must be one of ",
    ),
    "unknown device": (nothing, (*PRETRAIN, "device=nope"), "device: no 'nope' here: "),
    "no model": (
        nothing,
        ("finetune", "--model", "./missing", "--data-dir", "data"),
        "no model directory at missing",
    ),
    "no weights": (remove("model/model.safetensors"), FINETUNE, "no weights at model/model.safet"),
    "no tokenizer": (remove("model/tokenizer.json"), FINETUNE, "no such file: model/tokenizer.js"),
    "truncated weights": (truncate, FINETUNE, "model/model.safetensors is damaged or truncated: "),
    "damaged config": (put("model/config.json", b"{"), FINETUNE, "model/config.json is not valid"),
    "no data": (
        remove("data/dev.tsv"),
        FINETUNE,
        "no file of split 'dev' in data; looked for dev.jsonl, dev.tsv, dev.csv",
    ),
    "no such column": (
        nothing,
        (*FINETUNE, "text_column=sentence"),
        "data/train.tsv, line 2: no 'sentence'; it has label, text",
    ),
    "unseen label": (
        put("data/dev.tsv", b"label\ttext\nsea\ta\nmoon\tb\n"),
        FINETUNE,
        "data/dev, example 2: label 'moon' is not among forest, sea",
    ),
    "data not UTF-8": (
        put("data/train.tsv", b"label\ttext\nsea\t\xff\n"),
        FINETUNE,
        "data/train.tsv is not UTF-8: line 2, byte 5",
    ),
    "longer than the positions": (
        nothing,
        (*FINETUNE, "max_length=49"),
        "max_length must be at most the model's max_position_embeddings = 48, got 49",
    ),
    "unknown backend of fine-tuning": (
        nothing,
        (*FINETUNE, "backend=nope"),
        "backend must be one of ",
    ),
    "unknown task": (
        nothing,
        (*FINETUNE, "--task", "parsing"),
        "unknown task 'parsing'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, place, capsys):
    prepare, arguments, message = CASES[case]
    prepare()
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith(f"fastdeberta: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")


def test_another_run_in_the_output(place, capsys):
    assert run(capsys, *PRETRAIN)[0] == 0
    status, _, err = run(capsys, *PRETRAIN, "steps=13")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("fastdeberta: output: run holds a run with other settings (steps: 12 ")


@pytest.mark.parametrize(
    "arguments",
    [(), ("nope",), ("pretrain",), ("info", "--nope"), ("finetune", "--model", "model")],
    ids=" ".join,
)
def test_wrong_usage(arguments, capsys):
    status, out, err = run(capsys, *arguments)
    assert status == 2 and "Usage: fastdeberta" in out + err and "Traceback" not in err


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(
        command in out for command in ("info", "demo", "prepare", "pretrain", "finetune", "export")
    )


# Failures: status 1


@pytest.mark.parametrize("arguments", [("--debug", *PRETRAIN), (*PRETRAIN, "--debug")])
def test_debug_shows_where(arguments, place):
    """In a process of its own Python prints the traceback."""
    write_config({"learning_rat": 1})
    with pytest.raises(ValueError, match="unknown config key"):
        cli.main(list(arguments))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Interrupted("SIGTERM: stopped"), "fastdeberta: SIGTERM: stopped\n"),
        (Diverged("step 3:\n nan"), "fastdeberta: step 3: nan\n"),
        (KeyboardInterrupt(), "fastdeberta: interrupted\n"),
        (RuntimeError("a\n b"), "fastdeberta: RuntimeError: a b (--debug shows where)\n"),
    ],
)
def test_failures(error, message, place, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("fastdeberta.pretraining.task.pretrain", fail)
    assert run(capsys, *PRETRAIN) == (1, "", message)


def test_without_the_packages_of_the_command_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "fastdeberta.cli")
    with pytest.raises(SystemExit, match=r"pip install 'fastdeberta\[train\]'"):
        importlib.import_module("fastdeberta.cli")
