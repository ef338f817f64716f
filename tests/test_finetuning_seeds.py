"""Fine-tuning: seeds, ensembles, early stopping, resuming."""

import json
import math
import statistics

import pytest
import tiny
import torch
from finetuned import finetuning_of, lines_of, settings_of

from fastdeberta import tokenizer as tokenizers
from fastdeberta.finetuning.examples import TextExample
from fastdeberta.finetuning.finetuning import Finetuning
from fastdeberta.finetuning.run import average, finetune
from fastdeberta.finetuning.stopping import StoppingTrainer
from fastdeberta.models import Config, Model, from_pretrained
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.trainer import Interrupted, Trainer

pytestmark = pytest.mark.usefixtures("no_report")


def test_the_same_seed_gives_the_same_run(files, tmp_path):
    lines = []
    for run, seed in enumerate((0, 0, 1)):
        finetune(settings_of(files, tmp_path / f"{run}", epochs=1, seed=seed, log_every=1))
        lines.append(read_metrics(tmp_path / f"{run}" / "metrics.jsonl"))
    assert lines[0] == lines[1] != lines[2]
    assert all(math.isfinite(line.get("loss", 0)) for line in lines[0])


@pytest.mark.parametrize("keep", ["best", "median"])
def test_seeds(keep, files, tmp_path):
    more = {"epochs": 2, "seeds": 3, "seed": 5, "keep": keep, "reinit_layers": 1}
    result = finetune(settings_of(files, tmp_path, **more))
    own = [json.loads((tmp_path / f"seed-{i}" / "metrics.json").read_text()) for i in (5, 6, 7)]
    scores = [one["accuracy"] for one in own]
    assert len(set(scores)) > 1, "seeds that differ"
    assert result["accuracy_by_seed"] == scores
    assert result["accuracy"] == statistics.median(scores)
    assert result["accuracy_mean"] == pytest.approx(sum(scores) / 3)
    assert result["accuracy_std"] == pytest.approx(statistics.stdev(scores))
    wanted = max(scores) if keep == "best" else statistics.median(scores)
    kept = tmp_path / f"seed-{result['kept_seed']}"
    assert scores[result["kept_seed"] - 5] == wanted
    for file in ("model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (kept / file).read_bytes()
    ours, theirs = (lines_of(path / "predictions.jsonl") for path in (tmp_path, kept))
    assert ours == theirs
    # The same runs' models, together and without training.
    models = [str(tmp_path / f"seed-{i}" / "model") for i in (5, 6, 7)]
    together = settings_of(files, tmp_path / "together", model="", ensemble=models)
    again = finetune(together)
    assert again["accuracy"] == result["ensemble"]["accuracy"]
    averaged = lines_of(tmp_path / "ensemble" / "predictions.jsonl")
    for a, b in zip(averaged, lines_of(tmp_path / "together" / "predictions.jsonl"), strict=True):
        assert a["prediction"] == b["prediction"]
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_average():
    rows = [[(torch.tensor([1.0, 3.0]),)], [(torch.tensor([3.0, -1.0]),)]]
    (found,) = average([{"dev": one} for one in rows])["dev"]
    assert found[0].tolist() == [2.0, 1.0]
    assert average([{"dev": [tuple(torch.zeros(5, 1))]}]) is None


class Scripted(Finetuning):
    """Scores by hand, one an evaluation; the weights tell them apart."""

    scripted = (0.2, 0.6, 0.6, 0.4, float("nan"), 0.9)

    def evaluate(self):
        super().evaluate()
        return {"score": self.scripted[self.evaluations[0]], "other": 0.0}


def scripted_of(files, output, patience=3, **changes):
    settings = settings_of(files, output, early_stopping=patience, evaluate_every=2, **changes)
    settings.steps, settings.log_every = 12, 1
    examples = [
        TextExample("", text, None, f"LABEL_{i % 2}")
        for i, (text, _) in enumerate(tiny.labelled(8))
    ]
    run = finetuning_of(files, output, examples)
    run.__class__ = Scripted
    run.evaluations = [0]
    run.settings = settings

    class Counting(StoppingTrainer):
        def _evaluate(self, log):
            run.evaluations[0] = self.step // 2 - 1
            return super()._evaluate(log)

    return run, Counting(run, settings, patience)


def test_early_stopping(files, tmp_path):
    run, trainer = scripted_of(files, tmp_path / "a")
    result = trainer.run()
    assert result["step"] == 10, "three evaluations after step 4 are not better"
    assert trainer.best == 4
    last = {n: p.detach().clone() for n, p in run.classifier.named_parameters()}
    trainer.load_best()
    assert any(not torch.equal(last[n], p) for n, p in run.classifier.named_parameters())
    best = from_pretrained(tmp_path / "a" / "best" / "model", "sequence").state_dict()
    assert run.classifier.state_dict().keys() == best.keys()
    for name, value in run.classifier.state_dict().items():
        assert torch.equal(value, best[name])
    # Without patience for it the run goes on to the better score at its end.
    _, patient = scripted_of(files, tmp_path / "c", patience=4)
    assert patient.run()["step"] == 12 and patient.best == 12
    # A run that has stopped stays so, and still knows its best.
    again, trainer = scripted_of(files, tmp_path / "a")
    assert trainer.run()["step"] == 10 and trainer.best == 4
    trainer.load_best()
    for name, value in again.classifier.state_dict().items():
        assert torch.equal(value, best[name])


def test_an_early_stopped_run_leaves_its_best(files, tmp_path):
    result = finetune(settings_of(files, tmp_path, epochs=40, early_stopping=2, learning_rate=5e-3))
    assert result["step"] < 40 * 120 / 16
    lines = [
        line for line in read_metrics(tmp_path / "metrics.jsonl") if "held_out/accuracy" in line
    ]
    scores = {line["step"]: line["held_out/accuracy"] for line in lines}
    assert result["accuracy"] == max(scores.values()) == scores[result["best_step"]]
    rows = lines_of(tmp_path / "predictions.jsonl")
    hits = [row["label"] == row["prediction"] for row in rows]
    assert sum(hits) / len(rows) == pytest.approx(result["accuracy"])


def test_resuming_changes_nothing(files, tmp_path, monkeypatch):
    """Interrupted in the middle: the same curve, scores and weights; also with early stopping."""
    more = {"epochs": 3, "log_every": 1, "checkpoint_every": 3, "evaluate_every": 4}
    more |= {"early_stopping": 3, "dropout": 0.2}
    whole = finetune(settings_of(files, tmp_path / "whole", **more))

    def killed(trainer, shares):
        if trainer.step == 11:
            raise Interrupted("killed")
        step(trainer, shares)

    step = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(Interrupted):
        finetune(settings_of(files, tmp_path / "cut", **more))
    monkeypatch.undo()
    cut = finetune(settings_of(files, tmp_path / "cut", **more))
    files_of = [tmp_path / name for name in ("whole", "cut")]
    curves = [(path / "metrics.jsonl").read_bytes() for path in files_of]
    assert curves[0] == curves[1]
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in files_of]
    assert weights[0] == weights[1]
    assert {k: cut[k] for k in ("accuracy", "step", "best_step", "tokens")} == {
        k: whole[k] for k in ("accuracy", "step", "best_step", "tokens")
    }


def test_errors_of_ensembles(files, tmp_path):
    for name, vocabulary in (("sea", 0), ("owl", 1)):
        torch.manual_seed(0)
        config = Config.load(files / "model")
        config.id2label = {0: name, 1: "x"}
        Model(config, "sequence").save_pretrained(tmp_path / name)
        tokenizer = tiny.tokenizer()
        if vocabulary:
            tokenizer = tokenizers.train(tiny.documents()[:60], 110)
        tokenizers.save(tokenizer, tmp_path / name)
    sea, owl = str(tmp_path / "sea"), str(tmp_path / "owl")
    settings = settings_of(files, tmp_path / "run", model="", ensemble=[sea, owl])
    with pytest.raises(ValueError, match="owl predicts owl, x; the task's are sea, x"):
        finetune(settings)
    config = Config.load(owl)
    config.id2label = {0: "sea", 1: "x"}
    config.save(owl)
    rows = [{"text": "the owl", "label": label} for label in ("sea", "x")]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings.data_dir = str(tmp_path)
    with pytest.raises(ValueError, match="sea have different tokenizers, so that"):
        finetune(settings)
    settings.ensemble = [sea, sea]
    assert finetune(settings)["models"] == 2
    settings.backend = "unknown"
    with pytest.raises(ValueError, match="backend must be one of"):
        finetune(settings)
