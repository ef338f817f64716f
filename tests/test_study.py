"""The ablation study of pre-training: its data, its budget, its rule, its course."""

import json
import multiprocessing

import pytest
import torch

from fastdeberta.cli import main
from fastdeberta.pretraining.task import Pretraining
from fastdeberta.study import acceptability, pretraining, runs
from fastdeberta.study.arms import ARMS, COMPARISONS, FLOOR, Recipe, steps_for
from fastdeberta.study.report import rows, scores_of
from fastdeberta.study.verdicts import HOLDS, REVERSED, UNDECIDED, judge, summary, verdicts
from fastdeberta.training.draws import Draws
from fastdeberta.training.order import epoch_rows
from fastdeberta.training.trainer import Interrupted

TINY = Recipe(
    documents=300,
    labelled=0.3,
    dev=0.2,
    vocab_size=400,
    sequence_length=32,
    batch_size=4,
    encoder={**Recipe().encoder, "hidden_size": 64, "num_hidden_layers": 1},
    generator_width=0.5,
    finetune_length=32,
    topics=40,
    topics_epochs=1.0,
    acceptability=40,
    acceptability_epochs=1.0,
    acceptability_dev=60,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory with the tiny study's tokenizer, and its corpus."""
    out = tmp_path_factory.mktemp("study")
    tokenizer = runs.make_tokenizer(TINY, out / "tokenizer")
    return out, tokenizer, runs.make_corpus(TINY, tokenizer)


@pytest.fixture(scope="module")
def judged():
    documents = [article.text for article in runs.split(Recipe()).dev]
    return acceptability.examples(documents, 1000, seed=3)


def test_acceptability_is_balanced_and_the_same_for_a_seed(judged):
    documents = [article.text for article in runs.split(Recipe()).dev]
    assert judged == acceptability.examples(documents, 1000, seed=3)
    assert judged != acceptability.examples(documents, 1000, seed=4)
    labels = [example.label for example in judged]
    assert {name: labels.count(name) for name in acceptability.LABELS} == {
        acceptability.ACCEPTABLE: 500,
        acceptability.UNACCEPTABLE: 500,
    }


def test_corrupted_sentences_differ_in_their_words(judged):
    real = {e.text for e in judged if e.label == acceptability.ACCEPTABLE}
    for good, bad in zip(judged[::2], judged[1::2], strict=True):
        assert (good.label, bad.label) == acceptability.LABELS
        assert good.text.lower() != bad.text.lower() and bad.text not in real
        assert abs(len(good.text.split()) - len(bad.text.split())) <= 1
    # Every kind of error occurs: two change the number of words, two do not.
    changes = {
        (len(bad.text.split()) - len(good.text.split()), sorted_words(good) == sorted_words(bad))
        for good, bad in zip(judged[::2], judged[1::2], strict=True)
    }
    assert changes == {(-1, False), (1, False), (0, True), (0, False)}


def sorted_words(example):
    return sorted(example.text.removesuffix(".").split())


def test_sentences_end_behind_words():
    text = "He lives in St. Louis in the U.S. state of Missouri. It has 3 towns, e.g. one. No."
    assert acceptability.sentences(text) == [
        "He lives in St. Louis in the U.S. state of Missouri.",
        "It has 3 towns, e.g. one.",
    ]


def test_acceptability_wants_enough_sentences():
    with pytest.raises(ValueError, match="3 examples asked for, the text has 2"):
        acceptability.examples(["The cat is on the old mat."], 3)


def test_no_document_is_in_two_parts():
    parts = [{article.text for article in part} for part in runs.split(Recipe())]
    assert all(parts)
    for i, part in enumerate(parts):
        assert not part & set().union(*(p for j, p in enumerate(parts) if j != i))
    sentences = [{s for text in part for s in acceptability.sentences(text)} for part in parts]
    # Different articles may share a sentence; few do.
    assert len(sentences[2] & (sentences[0] | sentences[1])) < 0.01 * len(sentences[2])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != FLOOR])
def test_every_arm_takes_the_budget_within_a_step(arm, prepared):
    out, _, corpus = prepared
    budget = 1e9
    stages = runs.stage_flops(Pretraining(TINY.settings(arm, str(out / "x"), 1, 20), corpus))
    assert len(stages) == (2 if arm == "two_stage" else 1)
    steps = steps_for(budget, stages)
    task = Pretraining(TINY.settings(arm, str(out / "x"), 1, steps), corpus)
    each = []
    for step in range(steps):
        data = epoch_rows(task.rows, TINY.batch_size, step, 1)
        each.append(task.compute(task.batch(data, Draws(1, step, 0, len(data), len(data)))))
    assert steps > 5 and abs(sum(each) - budget) <= max(each)


def test_the_data_order_is_that_of_the_seed_in_every_arm(prepared):
    out, _, corpus = prepared
    tasks = [
        Pretraining(TINY.settings(arm, str(out / "x"), 2, 8), corpus)
        for arm in ("electra", "mlm", "tie_all")
    ]
    data = epoch_rows(tasks[0].rows, TINY.batch_size, 3, 2)
    batches = [task.batch(data, Draws(2, 3, 0, 4, 4)) for task in tasks]
    for batch in batches[1:]:
        assert torch.equal(batch.input_ids, batches[0].input_ids)
        assert torch.equal(batch.positions, batches[0].positions)


def test_the_budget_fills_the_time():
    speed = {
        "fast": {"stages": [2.0], "seconds": [1.0], "other_seconds": 5.0},
        "slow": {"stages": [2.0, 6.0], "seconds": [3.0, 5.0], "other_seconds": 5.0},
        FLOOR: {"stages": [], "seconds": [], "other_seconds": 10.0},
    }
    budget = pretraining.plan_budget(speed, 340.0, seeds=2)
    taken = sum(
        steps_for(budget, s["stages"]) / len(s["stages"]) * sum(s["seconds"])
        for s in speed.values()
        if s["stages"]
    )
    assert 2 * (taken + 20) == pytest.approx(340, abs=16)
    assert pretraining.plan_budget(speed, 20.0, seeds=2) > 0  # Fine-tuning alone would take 40.
    with pytest.raises(ValueError, match="budget must be positive"):
        steps_for(0.0, [1.0])


def test_a_pair_counts_beyond_its_spread_only():
    # s = 1 and n = 3 on both sides: the error is sqrt(2/3), t(0.975, 4) = 2.776.
    difference, margin, verdict = judge([83, 84, 85], [80, 81, 82])
    assert (difference, verdict) == (3, HOLDS)
    assert margin == pytest.approx(2.776 * (2 / 3) ** 0.5, rel=1e-3)
    assert judge([80, 81, 82], [83, 84, 85])[2] == REVERSED
    assert judge([82, 83, 84], [80, 81, 82])[2] == UNDECIDED
    assert judge([90], [10]) == (80, None, UNDECIDED)


def test_what_was_found_names_every_pair_of_the_paper():
    scores = {arm: [50.0 + i, 50.2 + i, 50.4 + i] for i, arm in enumerate(ARMS)}
    found = verdicts(scores)
    assert len(found) == 9 + 3 + 2 == sum(len(c.above) for c in COMPARISONS)
    text = summary(scores, "the average")
    assert "of 14 orderings" in text and "electra over mlm (-4.0, needs" in text
    assert f"{[v.verdict for v in found].count(HOLDS)} hold here: all_tokens_mlm over" in text
    # Scores that do not differ decide nothing.
    same = {arm: [50.0, 51.0, 52.0] for arm in ARMS}
    assert {v.verdict for v in verdicts(same)} == {UNDECIDED}
    assert "Above fine-tuning without pre-training (51.0) by the same rule: none." in summary(
        same, "the average"
    )


def in_this_process(target, jobs, workers, finished):
    for job in jobs:
        target(*job)
        finished(job)


def test_a_study_leaves_its_report_and_runs_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "_processes", in_this_process)
    arms = ("electra", FLOOR)
    study = pretraining.run(tmp_path, 0.05, 1, recipe=TINY, arms=arms, workers=1)
    assert json.loads((tmp_path / "study.json").read_text()) == study
    assert [r["arm"] for r in study["results"]] == list(arms)
    points = study["results"][0]["points"]
    assert [p["fraction"] for p in points] == [0.5, 1.0]
    budget = study["plan"]["budget"]
    assert abs(points[1]["flops"] - budget) <= study["plan"]["speed"]["electra"]["stages"][0]
    assert all(0 <= p["topics"] <= 100 and -100 <= p["acceptability"] <= 100 for p in points)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "paper: GLUE" in page
    assert (tmp_path / "flops.png").stat().st_size and (tmp_path / "arms.png").stat().st_size
    assert rows(study)[1][0] == "electra" and scores_of(study)[FLOOR]
    assert not any((tmp_path / "runs").iterdir())
    assert "electra, seed 0: topics" in capsys.readouterr().out

    # The missing result alone is made, to the same figures.
    runs.result_path(tmp_path, "electra", 0).unlink()
    ran = []
    monkeypatch.setattr(
        pretraining, "_one", lambda *job, one=pretraining._one: (ran.append(job[1:3]), one(*job))
    )
    again = pretraining.run(tmp_path, 0.05, 1, recipe=TINY, arms=arms, workers=1)
    assert ran == [("electra", 0)] and again["plan"] == study["plan"]
    for old, new in zip(points, again["results"][0]["points"], strict=True):
        assert {k: v for k, v in old.items() if "seconds" not in k} == {
            k: v for k, v in new.items() if "seconds" not in k
        }
    with pytest.raises(ValueError, match=r"holds a study with other settings \(seeds: 1 there, 2"):
        pretraining.run(tmp_path, 0.05, 2, recipe=TINY, arms=arms, workers=1)


def test_an_interrupted_run_goes_on_from_its_checkpoint(prepared):
    out, *_ = prepared

    class Stop:
        """Interrupts once, behind the first checkpoint."""

        def __init__(self):
            self.steps = []

        def start(self, title, step, steps):
            self.steps.append(step)

        def update(self, step, note):
            if step == 6 and self.steps == [0]:
                raise Interrupted("now")

        def say(self, line):
            pass

        def stop(self):
            pass

    progress = Stop()
    with pytest.raises(Interrupted):
        runs.run(TINY, "mlm", 0, 8, out, progress)
    interrupted = runs.run(TINY, "mlm", 0, 8, out, progress)
    assert progress.steps[1] == 4
    whole = runs.run(TINY, "mlm", 0, 8, out)
    scores = [
        [(p["topics"], p["acceptability"]) for p in r["points"]] for r in (interrupted, whole)
    ]
    assert scores[0] == scores[1]


def test_two_stage_is_scored_where_it_has_a_discriminator(prepared):
    out, *_ = prepared
    result = runs.run(TINY, "two_stage", 0, 8, out)
    assert [point["fraction"] for point in result["points"]] == [1.0]


def work(path, number):
    if number < 0:
        raise SystemExit(3)
    path.with_name(f"{number}").write_text(f"{torch.get_num_threads()}")


def test_processes_have_one_thread_and_a_failure_is_named(tmp_path):
    done = []
    pretraining._processes(work, [(tmp_path / "x", n) for n in (1, 2)], 2, done.append)
    assert sorted(job[1] for job in done) == [1, 2]
    assert [(tmp_path / f"{n}").read_text() for n in (1, 2)] == ["1"] * 2
    with pytest.raises(RuntimeError, match="work failed: -1"):
        pretraining._processes(work, [(tmp_path / "x", -1)], 2, done.append)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "study must be one of pretraining; got 'attention'"),
        (["pretraining", "--minutes", "0"], "minutes must be positive, got 0.0"),
        (["pretraining", "--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_arms_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arm must be one of electra, .*; got 'bert'"):
        pretraining.run(tmp_path, arms=["bert"])
    with pytest.raises(ValueError, match="arm must be one of"):
        TINY.settings("bert", str(tmp_path))
