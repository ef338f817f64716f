"""Batches made ahead by threads: the same run, whatever their number, and none left behind."""

import os
import signal
import threading
import time
import traceback

import pytest
import shared_run
import tiny
import torch

from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.task import Pretraining, load_corpus, pretrain
from fastdeberta.training import Draws, Interrupted
from fastdeberta.training.prefetch import prefetched
from fastdeberta.training.settings import build

WORKERS = [1, 3]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def none_left():
    yield
    assert not threads()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(tiny.documents()))
    return path


def settings_of(output, text, **changes):
    network = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {
        "output": str(output), "data": str(text), "device": "cpu", "vocab_size": 120,
        "sequence_length": 24, "held_out": 0.1, "steps": 8, "warmup_steps": 2, "batch_size": 6,
        "log_every": 1, "checkpoint_every": 3, "evaluate_every": 4, "discriminator": network,
    }  # fmt: skip
    return build(PretrainSettings, {**values, **changes})


# The iterator


def test_order_and_reach():
    """In order, though some take longer; never more than 2 * workers ahead of what is taken."""
    made, taken = [], []

    def make(step):
        assert step - 3 < len(taken) + 1 + 4
        time.sleep(0.01 * (step % 3 == 0))
        made.append(step)
        return step * step

    with prefetched(make, range(3, 20), 2) as squares:
        for square in squares:
            taken.append(square)
            assert len(threads()) <= 2
    assert taken == [step * step for step in range(3, 20)] and sorted(made) == list(range(3, 20))


def test_steps_are_made_ahead_and_at_once():
    barrier = threading.Barrier(3, timeout=20)  # Broken unless three threads meet.
    with prefetched(lambda step: barrier.wait() >= 0, range(3), 3) as met:
        assert all(met)


def test_without_workers_nothing_is_made_ahead():
    made = []
    with prefetched(made.append, range(5), 0) as steps:
        assert not made
        next(steps)
        assert made == [0] and not threads()


@pytest.mark.parametrize("workers", [0, *WORKERS])
def test_an_error_comes_at_its_step(workers):
    def make(step):
        return 1 // (4 - step)

    taken = []
    with pytest.raises(ZeroDivisionError) as caught:  # noqa: SIM117
        with prefetched(make, range(9), workers) as made:
            for value in made:
                taken.append(value)
    assert taken == [0, 0, 0, 1]
    assert "return 1 // (4 - step)" in "".join(traceback.format_exception(caught.value))


def test_what_was_not_taken_is_dropped():
    started = []

    def make(step):
        started.append(step)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt), prefetched(make, range(1000), 2) as made:
        next(made)
        raise KeyboardInterrupt
    assert len(started) <= 5


# Runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    """Runs without workers, by layout."""
    root = tmp_path_factory.mktemp("alone")
    for layout in ("segments", "packed"):
        pretrain(settings_of(root / layout, text, layout=layout))
    return root


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("layout", ["segments", "packed"])
def test_workers_change_nothing(layout, workers, alone, text, tmp_path):
    pretrain(settings_of(tmp_path, text, layout=layout, workers=workers))
    for name in ("metrics.jsonl", "discriminator/model.safetensors", "generator/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (alone / layout / name).read_bytes(), name


def test_a_run_goes_on_with_other_workers(alone, text, tmp_path, monkeypatch):
    """And a signal, which stops it between two steps, leaves no thread."""
    batch = Pretraining.batch

    def stopping(self, rows, draws):
        if draws.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, rows, draws)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "batch", stopping)
        with pytest.raises(Interrupted, match="SIGTERM: stopped after step [1-7];"):
            pretrain(settings_of(tmp_path, text, layout="packed", workers=3))
        assert not threads()
    pretrain(settings_of(tmp_path, text, layout="packed", workers=1))
    metrics = [(path / "metrics.jsonl").read_bytes() for path in (tmp_path, alone / "packed")]
    assert metrics[0] == metrics[1]


def test_micro_batches_of_workers(tmp_path):
    lines = []
    for workers in (0, 2):
        output = tmp_path / str(workers)
        shared_run.run(str(output), workers=workers, accumulation=3, steps=24)
        lines.append((output / "metrics.jsonl").read_bytes())
    assert lines[0] == lines[1]


def test_an_error_ends_the_run_at_its_step(text, tmp_path, monkeypatch):
    batch = Pretraining.batch

    def failing(self, rows, draws):
        if draws.step == 5:
            raise RuntimeError("no such row")
        return batch(self, rows, draws)

    monkeypatch.setattr(Pretraining, "batch", failing)
    with pytest.raises(RuntimeError, match="no such row"):
        pretrain(settings_of(tmp_path, text, workers=3))
    assert not threads()
    assert (tmp_path / "metrics.jsonl").read_text().count('"loss"') == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "stream", "objective": "mlm"},
        {"layout": "segments", "mask_replacement": True},
        {"layout": "packed", "max_ngram": 3},
        {"generator_type": "unigram"},
        {"objective": "mlm+ar"},
        {"algorithm": "two_stage", "sampling": "gumbel"},
    ],
)
def test_batches_are_functions_of_rows_and_draws(changes, text, tmp_path):
    """They neither take from torch's generator nor change it, nor ask for the step begun."""
    settings = settings_of(tmp_path, text, **changes)
    task = Pretraining(settings, load_corpus(settings))
    found = []
    for seed, begun in ((0, 0), (1, 4)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        task.begin(begun)
        batches = [task.batch(torch.arange(6), Draws(0, step, 0, 6, 6)) for step in (2, 7)]
        assert torch.equal(torch.get_rng_state(), state)
        found.append([(*b, *task.counts(b).items(), task.tokens(b)) for b in batches])
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_wrong_workers(text, tmp_path):
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        settings_of(tmp_path, text, workers=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a CUDA device")
def test_batches_are_pinned(tmp_path):
    trainer = shared_run.trainer(str(tmp_path), device="cuda", workers=2)
    with trainer._shares(3) as shares:
        for share in shares:
            for batch in share.batches:
                assert all(tensor.is_pinned() for tensor in batch)
