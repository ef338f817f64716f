"""The demo's course on a fraction of its text, with a fraction of its model."""

import json
import sys

import pytest
import torch

import fastdeberta
from fastdeberta.datasets import wiki_leads
from fastdeberta.demo import attention, run

# The package exports the function under its module's name.
course = sys.modules["fastdeberta.demo.run"]


@pytest.fixture
def small(monkeypatch):
    articles, recipe = wiki_leads()[:400], course.pretrain_settings

    def settings(out, seed):
        smaller = recipe(out, seed)
        smaller.vocab_size, smaller.sequence_length, smaller.batch_size = 400, 32, 4
        smaller.discriminator |= {"hidden_size": 32, "intermediate_size": 64}
        return smaller

    monkeypatch.setattr(course, "pretrain_settings", settings)
    monkeypatch.setattr(course, "wiki_leads", lambda: articles)
    monkeypatch.setattr("fastdeberta.pretraining.text.wiki_leads", lambda: articles)
    monkeypatch.setattr(course, "FEW", 50)
    monkeypatch.setattr(attention, "LENGTHS", (16, 24))


def test_leaves_a_report_scores_and_models(small, tmp_path, capsys):
    threads = torch.get_num_threads()
    (tmp_path / "pretrain" / "checkpoint-7").mkdir(parents=True)  # Of an earlier demo.
    run(tmp_path, minutes=0.02)
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    for part in ("backends:", "eager fwd", "AUC", "macro-F1", "report.html"):
        assert part in shown

    results = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["length"] for row in results["attention"]] == [16, 24]
    assert all(row["difference"] < 1e-4 for row in results["attention"])
    assert 0 <= results["pretraining"]["mlm_accuracy"] <= 1
    assert results["pretraining"]["baseline"]["most_frequent"] > 0
    for labelled, seeds in (("topics", 1), ("topics_50", 3)):
        for name in ("pretrained", "control"):
            assert len(results[labelled][name]["accuracies"]) == seeds
    confusion = results["topics"]["pretrained"]["confusion"]
    assert len(confusion) == len(results["topic_names"])

    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    fastdeberta.models.from_pretrained(tmp_path / "pretrain" / "discriminator", "rtd")


def test_does_without_transformers(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    results = run(tmp_path, minutes=0.02)
    assert results["attention"].startswith("left out: ")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3


def test_minutes_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="minutes"):
        run(tmp_path, minutes=0)
