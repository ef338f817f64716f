"""Fine-tuning runs: files in, scores, predictions and a model out."""

import json

import huggingface_hub
import pytest
import tiny
import torch
from finetuned import finetuning_of, lines_of, settings_of, write_data

from fastdeberta import cli
from fastdeberta import tokenizer as tokenizers
from fastdeberta.finetuning.examples import TextExample
from fastdeberta.finetuning.predictors import load
from fastdeberta.finetuning.recipes import layer_groups, recipe, reinitialize
from fastdeberta.finetuning.run import finetune
from fastdeberta.finetuning.settings import FinetuneSettings, find_task, resolve
from fastdeberta.finetuning.tasks import TASKS
from fastdeberta.models import Config, Model, deberta, electra, from_pretrained
from fastdeberta.pretraining.corpus import load_corpus
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.task import Pretraining
from fastdeberta.training.draws import Draws
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import build

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize("name", ["model", "electra"])
def test_a_run_learns_and_its_model_predicts_the_same(name, files, tmp_path):
    result = finetune(settings_of(files, tmp_path, model=str(files / name), epochs=8))
    assert result["accuracy"] > 0.9 > result["majority"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert sum(map(sum, result["confusion"])) == 40
    assert result["step"] == 8 * 120 / 16
    rows = lines_of(tmp_path / "predictions.jsonl")
    assert [(row["text"], row["label"]) for row in rows] == list(tiny.labelled(40, 2))
    hits = [row["label"] == row["prediction"] for row in rows]
    assert sum(hits) / 40 == pytest.approx(result["accuracy"])
    model = from_pretrained(tmp_path / "model", "sequence").eval()
    assert result["parameters"] == model.num_parameters()
    assert model.config.id2label == {0: "forest", 1: "sea"}
    tokenizer = tokenizers.load(tmp_path / "model")
    whole = [row for row in rows if len(tokenizer.encode(row["text"]).ids) <= 100]
    assert 10 < len(whole) < 40
    for row in whole:
        ids = torch.tensor([tokenizer.encode(row["text"]).ids])
        shares = model(ids).logits[0].softmax(-1).tolist()
        assert shares == pytest.approx(list(row["probabilities"].values()), abs=1e-4)
        assert list(row["probabilities"]) == ["forest", "sea"]


def test_a_report(files, tmp_path, monkeypatch):
    monkeypatch.undo()
    finetune(settings_of(files, tmp_path, epochs=0.1))
    page = (tmp_path / "report.html").read_text()
    assert "Calibration" in page and "Confusion matrix" in page and "Learning curves" in page


def test_test_files_are_predicted(files, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev"):
        (data / f"{name}.jsonl").write_text((files / f"{name}.jsonl").read_text())
    (data / "test.jsonl").write_text('{"text": "The old crab"}\n{"text": "The old owl", "id": "o"}')
    finetune(settings_of(files, tmp_path / "run", data_dir=str(data), epochs=0.2))
    rows = lines_of(tmp_path / "run" / "predictions-test.jsonl")
    assert [row["id"] for row in rows] == ["0", "o"]
    assert all(row["prediction"] in ("forest", "sea") and "label" not in row for row in rows)


def test_schedule(files, tmp_path):
    settings = settings_of(files, tmp_path, epochs=2.5, warmup_fraction=0.2)
    settings.set_steps(120)
    assert (settings.steps, settings.warmup_steps) == (round(2.5 * 120 / 16), round(0.2 * 19))
    assert settings.evaluate_every == 0
    settings = settings_of(files, tmp_path, epochs=0.01, early_stopping=1)
    settings.set_steps(3)
    assert (settings.steps, settings.warmup_steps, settings.evaluate_every) == (1, 0, 1)


# Recipes


def test_rates_by_depth():
    """Of three layers, by hand: a half for each step down, with the quirk one more below the
    head."""
    model = Model(tiny.config(conv_kernel_size=3), "sequence")
    names = {id(p): name for name, p in model.named_parameters()}
    table = {"head": (1.0, 1.0), "2": (0.5, 0.25), "1": (0.25, 0.125), "0": (0.125, 0.0625)}
    below = (
        0.0625,
        0.03125,
    )  # What every layer stands on: embeddings, relative table, convolution.
    for quirk in (False, True):
        groups = layer_groups(model, 1.0, 0.1, 0.5, quirk)
        rates = {names[id(p)]: group["peak_lr"] for group in groups for p in group["params"]}
        assert rates.keys() == set(names.values())
        assert sum(len(group["params"]) for group in groups) == len(names)
        for name, rate in rates.items():
            place = "head" if name.startswith("head.") else name.split(".")[3]
            assert rate == table.get(place, below)[quirk], name
        for group in groups:
            plain = all(p.dim() < 2 for p in group["params"])
            assert group["weight_decay"] == (0.0 if plain else 0.1)


@pytest.mark.parametrize(
    ("config", "name", "rate", "decay", "dropout"),
    [
        (electra.small(), "electra-small", 3e-4, 0.8, 0.1),
        (electra.base(), "electra-base", 1e-4, 0.8, 0.1),
        (electra.large(), "electra-large", 5e-5, 0.9, 0.1),
        (deberta.v1_base(), "deberta-v1-base", 3e-5, 1.0, 0.1),
        (deberta.v1_xlarge(), "deberta-v1-xlarge", 5e-6, 1.0, 0.3),
        (deberta.v2_xlarge(), "deberta-v2-xlarge", 4e-6, 1.0, 0.25),
        (deberta.v2_xxlarge(), "deberta-v2-xxlarge", 3e-6, 1.0, 0.3),
        (deberta.v3_xsmall(), "deberta-v3-xsmall", 4.5e-5, 1.0, 0.1),
        (deberta.v3_small(), "deberta-v3-small", 4.5e-5, 1.0, 0.2),
        (deberta.v3_base(), "deberta-v3-base", 1.5e-5, 1.0, 0.1),
        (deberta.v3_large(), "deberta-v3-large", 7e-6, 1.0, 0.3),
        (tiny.config("electra"), "electra-small", 3e-4, 0.8, 0.1),
    ],
)
def test_recipes_of_sizes(config, name, rate, decay, dropout):
    found, values = recipe(config)
    assert found == name
    chosen = (values["learning_rate"], values["layer_decay"], values["dropout"])
    assert chosen == (rate, decay, dropout)


def test_what_is_given_wins(files, tmp_path):
    given = {"model": str(files / "electra"), "data_dir": str(files), "task": "rte"}
    settings, line = resolve(given, ["batch_size=7"])
    assert (settings.epochs, settings.learning_rate, settings.layer_decay) == (10, 3e-4, 0.8)
    assert (settings.batch_size, settings.weight_decay, settings.max_length) == (7, 0.0, 128)
    assert line.startswith("recipe of electra-small for rte: ")
    assert "learning_rate=0.0003" in line and "batch_size" not in line
    # DeBERTa has no decay of layers, and a table of positions has an end.
    settings, _ = resolve(given | {"model": str(files / "model")})
    assert (settings.layer_decay, settings.batch_size) == (1.0, 64)
    settings, _ = resolve(given | {"task": "boolq"})
    assert settings.max_length == 128
    path = tmp_path / "mine.yaml"
    path.write_text("task: classification\nrecipe: {layer_decay: 0.8, epochs: 2}\n")
    settings, line = resolve(given | {"model": str(files / "model"), "task_file": str(path)})
    assert (settings.layer_decay, settings.epochs) == (0.8, 2.0) and "for mine" in line


def test_task_layers_dropout(files, tmp_path):
    for name, field in (("model", "cls_dropout"), ("electra", "classifier_dropout")):
        output = tmp_path / name
        finetune(settings_of(files, output, model=str(files / name), epochs=0.1, dropout=0.35))
        config = from_pretrained(output / "model", "sequence").config
        assert getattr(config, field) == 0.35


# Columns and types


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_have_types(packed, files, tmp_path):
    """Where the model has types; predictions come in the order of the examples."""
    examples = [
        TextExample("", "the old crab", "the owl sleeps near the oak", "LABEL_0"),
        TextExample("", "the owl", "the crab", "LABEL_1"),
        TextExample("", "the small crab swims", "the owl", "LABEL_0"),
    ]
    run = finetuning_of(files, tmp_path, examples, packed=packed)
    batch = run.batch(torch.tensor([2, 0, 1]), Draws(0, 0, 0, 3, 3))
    loss = run.model(batch)["loss"] / run.counts(batch)["loss"]
    encodings = [tiny.tokenizer().encode(e.text, e.pair) for e in examples]
    logits = [
        run.classifier(torch.tensor([e.ids]), token_type_ids=torch.tensor([e.type_ids])).logits[0]
        for e in encodings
    ]
    labels = torch.tensor([0, 1, 0])
    expected = torch.nn.functional.cross_entropy(torch.stack(logits), labels)
    torch.testing.assert_close(loss, expected)
    run.evaluate()
    best = [f"LABEL_{int(x.argmax())}" for x in logits]
    assert run.predicted["dev"].values == best
    assert run.tokens(batch) == sum(len(e.ids) for e in encodings)
    alone = [run.batch(torch.tensor([i]), Draws(0, 0, i, 1, 3)) for i in range(3)]
    assert 0 < run.compute(batch) == pytest.approx(sum(map(run.compute, alone)))
    plain = [run.classifier(torch.tensor([e.ids])).logits[0] for e in encodings]
    without = torch.nn.functional.cross_entropy(torch.stack(plain), labels)
    assert (without - loss).abs() > 1e-3


def test_columns(files, tmp_path):
    rows = [{"s": a, "t": b, "same": str(a == b)} for a in "xy" for b in "xy"]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"text_column": "s", "pair_column": "t", "label_column": "same"}
    data = {"data_dir": str(tmp_path), "epochs": 1}
    result = finetune(settings_of(files, tmp_path / "run", **data, **columns))
    assert result["step"] == 1 and result["majority"] == 0.5
    rows = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert rows[1]["text"] == "x" and rows[1]["pair"] == "y" and rows[1]["label"] == "False"


def test_regression(files, tmp_path):
    values = {"sea": 4.0, "forest": 1.0}
    for name, count in (("train", 80), ("dev", 20), ("test", 3)):
        write_data(tmp_path / f"{name}.jsonl", count, count, **values)
    more = {"data_dir": str(tmp_path), "task": "regression", "epochs": 8}
    result = finetune(settings_of(files, tmp_path / "run", **more))
    assert result["pearson"] > 0.9
    model = from_pretrained(tmp_path / "run" / "model", "sequence")
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    rows = lines_of(tmp_path / "run" / "predictions.jsonl")
    assert all(isinstance(row["prediction"], float) for row in rows)
    assert "probabilities" not in rows[0]


# Tasks as distributed, and the command line


def command(capsys, *arguments):
    """What `fastdeberta finetune` prints; it must succeed."""
    with pytest.raises(SystemExit) as done:
        cli.main(["finetune", *map(str, arguments), "device=cpu"])
    assert done.value.code == 0
    return capsys.readouterr().out


def test_a_benchmark_with_a_test_set(files, tmp_path, capsys):
    """RTE as GLUE has it, over two seeds: a submission of the kept and of the averaged model."""
    (tmp_path / "RTE").mkdir()
    names = {"sea": "entailment", "forest": "not_entailment"}
    for split, count in (("train", 24), ("dev", 8), ("test", 5)):
        lines = ["index\tsentence1\tsentence2" + "\tlabel" * (split != "test")]
        for i, (text, topic) in enumerate(tiny.labelled(count, count)):
            label = [] if split == "test" else [names[topic]]
            lines.append("\t".join([str(i), text, "The owl.", *label]))
        (tmp_path / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    output = tmp_path / "run"
    out = command(
        capsys, "--task", "rte", "--data-dir", tmp_path, "--model", files / "electra",
        "epochs=1", "seeds=2", f"output={output}", "learning_rate=0.002",
    )  # fmt: skip
    assert "recipe of electra-small for rte: batch_size=32, " in out
    assert "accuracy_std: " in out and "kept_seed: " in out
    for directory in (output, output / "ensemble", output / "seed-0", output / "seed-1"):
        lines = (directory / "submission" / "RTE.tsv").read_text().splitlines()
        assert len(lines) == 6 and lines[0] == "index\tprediction"
        assert {line.split("\t")[1] for line in lines[1:]} <= set(names.values())
    result = json.loads((output / "metrics.json").read_text())
    assert result["seeds"] == 2 and set(result["ensemble"]) == {"accuracy", "majority"}


@pytest.mark.parametrize("head", ["linear", "beam"])
def test_questions(head, files, tmp_path, capsys):
    """SQuAD 2.0 from its JSON to predictions, n best answers and a threshold."""
    for split, name in (("train", "train-v2.0"), ("dev", "dev-v2.0")):
        paragraphs = []
        for i, (text, topic) in enumerate(tiny.labelled(16 if split == "train" else 6, 3)):
            word = text.split()[1]
            answers = [{"text": word, "answer_start": text.index(word)}] if topic == "sea" else []
            qa = {
                "id": f"q{i}",
                "question": "What?",
                "answers": answers,
                "is_impossible": not answers,
            }
            paragraphs.append({"context": text, "qas": [qa]})
        content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    output = tmp_path / "run"
    command(
        capsys, "--task", "squad2", "--data-dir", tmp_path, "--model", files / "model",
        "epochs=1", f"output={output}", f"span_head={head}", "max_length=40", "stride=10",
        "max_query_length=5", "n_best=3", "batch_size=8",
    )  # fmt: skip
    result = json.loads((output / "metrics.json").read_text())
    assert {"f1", "exact_match", "best_f1", "best_f1_threshold", "no_answer_f1"} <= result.keys()
    assert result["f1"] == pytest.approx(result["best_f1"])
    rows = lines_of(output / "predictions.jsonl")
    assert len(rows) == 6 and all(len(row["n_best"]) <= 3 for row in rows)
    for row in rows:
        best = row["n_best"][0]["text"]
        answered = row["no_answer"] <= result["best_f1_threshold"]
        assert row["prediction"] == (best if answered else "")
    config = from_pretrained(output / "model", "span").config
    assert config.span_head == head
    assert config.extra["no_answer_threshold"] == result["best_f1_threshold"]


def test_a_task_file_and_sift(files, tmp_path, capsys):
    rows = [{"w": ["the", "crab", "swims"], "t": ["D", "N", "V"]}] * 6
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        "task: tagging\nfiles: {train: words.jsonl, dev: words.jsonl}\n"
        "columns: {words: w, tags: t}\nrecipe: {epochs: 4, batch_size: 3, learning_rate: 0.003}\n"
    )
    output = tmp_path / "run"
    out = command(
        capsys, "--task-file", tmp_path / "mine.yaml", "--data-dir", tmp_path, "--sift",
        "--model", files / "model", f"output={output}", "log_every=1",
    )  # fmt: skip
    assert "for mine: " in out and "batch_size=3" in out
    lines = read_metrics(output / "metrics.jsonl")
    assert all(line["sift_loss"] > 0 and line["sift_skipped"] == 0 for line in lines[:-1])
    result = json.loads((output / "metrics.json").read_text())
    assert result["missed_words"] == 0 and 0 <= result["tag_accuracy"] <= 1
    assert from_pretrained(output / "model", "token").config.id2label == {0: "D", 1: "N", 2: "V"}
    (row, *_) = lines_of(output / "predictions.jsonl")
    assert row["label"] == ["D", "N", "V"] and len(row["prediction"]) == 3


# Checkpoints that a run starts from


def test_from_a_pretraining_export(files, tmp_path):
    """The discriminator of a run, its rtd head left behind."""
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.documents()))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"data": str(tmp_path / "text.txt"), "vocab_size": 120, "discriminator": shape}
    pretraining = build(PretrainSettings, values | {"output": str(tmp_path / "pretrain")})
    task = Pretraining(pretraining, load_corpus(pretraining))
    task.export(tmp_path / "pretrain")
    checkpoint = str(tmp_path / "pretrain" / "discriminator")
    settings = settings_of(files, tmp_path / "run", model=checkpoint, epochs=1, learning_rate=1e-9)
    finetune(settings)
    model = from_pretrained(tmp_path / "run" / "model", "sequence")
    for name, expected in from_pretrained(checkpoint).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-6)


def test_from_the_hub(files, tmp_path, monkeypatch):
    """Model and tokenizer, also for predictions."""
    hub = {"someone/model": str(files / "model"), "someone/tuned": str(tmp_path / "here" / "model")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: hub[name])
    for model in ("someone/model", str(files / "model")):
        output = tmp_path / ("hub" if model == "someone/model" else "here")
        finetune(settings_of(files, output, epochs=0.2, model=model))
    here, there = (tmp_path / name / "predictions.jsonl" for name in ("here", "hub"))
    assert here.read_bytes() == there.read_bytes()
    assert load("someone/tuned").labels == ["forest", "sea"]


@pytest.mark.parametrize("name", ["model", "electra"])
def test_from_a_model_of_another_task(name, files, tmp_path):
    """MNLI's model for RTE, STS-B and what has other classes: all but the last layer is kept."""
    tokenizer, head = tiny.tokenizer(), tmp_path / "mnli"
    config = Config.load(files / name)
    config.id2label = dict(enumerate(TASKS["mnli"].labels))
    source = tiny.randomize(Model(config, "sequence"))
    source.save_pretrained(head)
    tokenizers.save(tokenizer, head)
    last = "classifier" if name == "model" else "out_proj"
    cases = {
        "two": ("sea", "forest"),
        "three": ("sea", "x", "forest"),
        "same": TASKS["mnli"].labels,
    }
    for case, names in cases.items():
        data = tmp_path / case
        data.mkdir()
        rows = [{"text": "the owl", "label": label} for label in names]
        for split in ("train", "dev"):
            (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        more = {"model": str(head), "data_dir": str(data), "learning_rate": 1e-9, "epochs": 0.1}
        finetune(settings_of(files, data / "run", **more))
        ours = from_pretrained(data / "run" / "model", "sequence")
        assert ours.config.id2label == dict(enumerate(sorted(names)))
        for key, expected in source.state_dict().items():
            fresh = f".{last}." in key and case != "same"
            value = ours.state_dict()[key]
            kept = value.shape == expected.shape and torch.allclose(value, expected, 0, 1e-6)
            assert kept != fresh, (case, key)


def test_top_layers_start_anew(files, tmp_path):
    model = tiny.randomize(Model(tiny.config(), "sequence"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reinitialize(model, 2)
    for name, parameter in model.named_parameters():
        fresh = name.startswith(("backbone.encoder.layer.1.", "backbone.encoder.layer.2."))
        assert torch.equal(parameter, before[name]) != fresh, name
        if fresh and "LayerNorm.weight" in name:
            assert (parameter == 1).all()
        elif fresh and name.endswith("bias"):
            assert not parameter.any()
        elif fresh:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    finetune(settings_of(files, tmp_path, reinit_layers=3, epochs=0.1, learning_rate=1e-9))
    trained = from_pretrained(tmp_path / "model", "sequence").state_dict()
    for name, start in from_pretrained(files / "model").state_dict().items():
        kept = torch.allclose(trained[name], start, rtol=0, atol=1e-6)
        matrix = name.startswith("backbone.encoder.layer.") and start.dim() > 1
        assert kept != matrix, name


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model must be given"),
        ({"data_dir": ""}, "data_dir must be given"),
        ({"task": "rtee"}, "unknown task 'rtee'; did you mean 'rte'.* Known are cola, .*, span"),
        ({"task": "rte", "text_column": "x"}, "text_column is for classification and regression"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"sift_alpha": 0}, "sift_alpha must be positive, got 0"),
        ({"reinit_layers": -1}, "reinit_layers must not be negative, got -1"),
        ({"reinit_layers": 4}, "reinit_layers must be at most the model's 3, got 4"),
        ({"early_stopping": -1}, "early_stopping must not be negative, got -1"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"keep": "last"}, "keep must be one of best, median; got 'last'"),
        ({"span_head": "x"}, "span_head must be one of linear, beam; got 'x'"),
        ({"layer_decay": 0}, r"layer_decay must be in \(0, 1\], got 0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got 1.1"),
        ({"warmup_fraction": 1}, r"warmup_fraction must be in \[0, 1\), got 1"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"max_length": 3}, "max_length must be at least 4, got 3"),
        ({"evaluation_tokens": 0}, "evaluation_tokens must be at least 1, got 0"),
        ({"text_column": "txt"}, "train.jsonl, line 1: no 'txt'; it has text, label"),
    ],
)
def test_errors(changes, message, files, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(settings_of(files, tmp_path, **changes))
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_errors_of_resolving(files):
    for given, message in (
        ({"data_dir": "x"}, "model must be given"),
        ({"model": "x"}, "data_dir must be given"),
        ({"model": "x", "data_dir": "x", "task": "no"}, "unknown task 'no'"),
        ({"model": "x", "data_dir": "x", "epoch": 1}, "unknown config key 'epoch'; did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(given)
    assert find_task(FinetuneSettings(task="regression", pair_column="b")).labels == ()


def test_longer_than_the_models_positions(files, tmp_path):
    electra = str(files / "electra")
    message = "max_length must be at most the model's max_position_embeddings = 128, got 129"
    with pytest.raises(ValueError, match=message):
        finetune(settings_of(files, tmp_path, model=electra, max_length=129))


def test_an_unknown_dev_label(files, tmp_path):
    """Found before the training."""
    for name, label in (("train", "forest"), ("dev", "moon")):
        rows = [{"text": "a", "label": label}, {"text": "a", "label": "sea"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="/dev, example 1: label 'moon' is not among forest, sea"):
        finetune(settings_of(files, tmp_path / "run", data_dir=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_one_label_is_nothing_to_learn(files, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    with pytest.raises(ValueError, match="data of classification have one label, 'x': nothing to"):
        finetune(settings_of(files, tmp_path / "run", data_dir=str(tmp_path)))
