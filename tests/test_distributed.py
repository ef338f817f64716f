"""Runs of two processes: the same losses as one's, also sharded, killed and continued."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shared_run
import torch

from fastdeberta.models import from_pretrained
from fastdeberta.training import checkpoint
from fastdeberta.training.distributed import Weighted
from fastdeberta.training.reporting import read_metrics

RANKS = 2
TESTS = Path(__file__).parent


def launch(*runs):
    """Two processes, as a user starts them; returns the launcher's result."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*launcher, str(RANKS), str(TESTS / "shared_run.py"), *runs],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )


def curve(output):
    """Every number of metrics.jsonl, by step and name."""
    lines = read_metrics(output / "metrics.jsonl")
    return {(x["step"], name): value for x in lines for name, value in x.items()}


def differences(output, expected):
    """The largest relative difference of each kind of number from another curve's."""
    found = curve(output)
    assert found.keys() == expected.keys()
    worst = {}
    for (step, name), value in found.items():
        difference = abs(value - expected[step, name]) / max(abs(expected[step, name]), 1e-12)
        worst[name] = max(difference, worst.get(name, 0.0))
    return worst


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    output = tmp_path_factory.mktemp("one")
    shared_run.run(str(output))
    return curve(output)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of two processes: replicas, and shards in two micro-batches."""
    root = tmp_path_factory.mktemp("two")
    whole = launch(f"{root / 'ddp'}::", f"{root / 'fsdp'}::parallel=fsdp,accumulation=2")
    assert whole.returncode == 0, whole.stderr
    return root


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A sharded run whose rank 1 died: where, and what its launcher said."""
    output = tmp_path_factory.mktemp("killed")
    return output, launch(f"{output}:1@33:parallel=fsdp")


@pytest.mark.parametrize("changes", [{"accumulation": 3}, {"activation_checkpointing": True}])
def test_micro_batches_change_nothing(changes, one, tmp_path):
    shared_run.run(str(tmp_path), **changes)
    assert max(differences(tmp_path, one).values()) < 1e-5


def test_means_of_micro_batches_would_differ(one, tmp_path, monkeypatch):
    """A negative control: each micro-batch divided by its own count, as plain loops do."""
    parts = 3

    def forward(self, batch, factors):
        terms = self.model(batch)
        loss = 1.5 * terms["mlm"] / (batch.labels >= 0).sum() / parts
        return loss, {name: term.detach() for name, term in terms.items()}

    monkeypatch.setattr(Weighted, "forward", forward)
    shared_run.run(str(tmp_path), accumulation=parts)
    assert differences(tmp_path, one)["loss"] > 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(parallel, one, two):
    worst = differences(two / parallel, one)
    assert max(worst.values()) < 1e-5, worst
    names = {p.name for p in (two / parallel / "checkpoint-50").iterdir()}
    files = {"shards"} if parallel == "fsdp" else {"training.safetensors", "optimizer.pt"}
    assert names == {"model", "state.json", *files}


def test_shards_are_exported_whole(two):
    models = [from_pretrained(two / p / "checkpoint-50" / "model") for p in ("ddp", "fsdp")]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(killed):
    output, job = killed
    assert job.returncode != 0
    message = rf"rank 0 of 2: another rank is gone, at step 34; .* from {output}/checkpoint-30"
    assert re.search(message, job.stderr), job.stderr
    assert [p.name for p in checkpoint.checkpoints(output)] == ["checkpoint-15", "checkpoint-30"]


@pytest.mark.slow
def test_a_killed_job_goes_on(one, killed, tmp_path):
    """With as many ranks as before, or in one process: with the same losses."""
    output, _ = killed
    shutil.copytree(output, tmp_path / "alone")
    again = launch(f"{output}::parallel=fsdp")
    assert again.returncode == 0, again.stderr
    shared_run.run(str(tmp_path / "alone"), parallel="fsdp")
    for path in (output, tmp_path / "alone"):
        worst = differences(path, one)
        assert max(worst.values()) < 1e-5, worst


def test_replicas_go_on_in_one_process(one, two, tmp_path):
    shutil.copytree(two / "ddp", tmp_path / "ddp")
    shutil.rmtree(tmp_path / "ddp" / "checkpoint-50")
    shared_run.run(str(tmp_path / "ddp"))  # From step 45.
    worst = differences(tmp_path / "ddp", one)
    assert max(worst.values()) < 1e-5, worst


def test_too_few_rows_for_all_micro_batches(tmp_path):
    message = r"a step of 60 rows cannot be cut into 61 \(ranks: 1, accumulation: 61\)"
    with pytest.raises(ValueError, match=f"batch_size: {message}"):
        shared_run.run(str(tmp_path), batch_size=64, accumulation=61)
