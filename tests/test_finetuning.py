"""Fine-tuning: labelled files, batches, scores, and a run that must learn."""

import json
import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fastdeberta import tokenizer as tokenizers
from fastdeberta.finetuning import metrics
from fastdeberta.finetuning.classification import (
    FinetuneSettings,
    SequenceClassification,
    finetune,
    reinitialize,
)
from fastdeberta.finetuning.data import (
    Encoded,
    Example,
    collate,
    encode,
    label_names,
    read_examples,
    truncate,
)
from fastdeberta.models import Model, from_pretrained
from fastdeberta.pretraining.corpus import load_corpus
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.task import Pretraining
from fastdeberta.training.draws import Draws
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import build

PAD, CLS, SEP = 0, 1, 2

# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", '{"text": "a \\"b\\"", "label": 1}\n\n{"label": "no", "text": "c\\nd"}\n'),
        ("x.csv", 'x,label,text\r\n0,1,"a ""b"""\r\n,no,"c\nd"\r\n'),
        ("x.tsv", 'label\ttext\tx\n1\ta "b"\t0\nno\tc d\t\n'),  # Quotes are nothing special.
    ],
)
def test_read_examples(name, content, tmp_path):
    (tmp_path / name).write_text(content, newline="")
    second = "c d" if name == "x.tsv" else "c\nd"
    expected = [Example('a "b"', None, "1"), Example(second, None, "no")]
    assert read_examples(tmp_path / name) == expected


def test_columns(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes("\ufeffid\ts1\ts2\tgold\n1\tone\tcaf\u00e9\tyes\n".encode())
    assert read_examples(path, "s1", "s2", "gold") == [Example("one", "caf\u00e9", "yes")]
    assert read_examples(path, "s2", label=None) == [Example("caf\u00e9", None, None)]
    assert read_examples(path, "id", label="s1") == [Example("1", None, "one")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b"}',
            "x.jsonl, line 2: no 'label'; it has text",
        ),
        ("x.jsonl", b'{"text": null, "label": 1}', "x.jsonl, line 1: no 'text'"),
        ("x.jsonl", b"\n{'text'}", "x.jsonl, line 2: not JSON: "),
        ("x.jsonl", b"[1]", "x.jsonl, line 1: expected a JSON object"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n"\xff', "x.jsonl is not UTF-8: line 2, byte 2"),
        ("x.jsonl", b"", "no example in .*x.jsonl"),
        ("x.csv", b"", "no example in .*x.csv"),
        ("x.csv", b"text,label\n", "no example in .*x.csv"),
        ("x.csv", b"txt,label\na,b\n", "x.csv, line 2: no 'text'; it has txt, label"),
        ("x.csv", b"text,label\na,b\nc\n", "x.csv, line 3: no 'label'"),
        ("x.tsv", b"text\tlabel\na\t1\n\n\xfe\t1\n", "x.tsv is not UTF-8: line 4, byte 1"),
        ("x.csv", b"text,label\n" + 200_000 * b"x" + b",1\n", "x.csv, line .: field larger than"),
        ("x.txt", b"a", "x.txt: expected a .jsonl, .tsv or .csv file"),
    ],
)
def test_unreadable(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*x.jsonl"):
        read_examples(tmp_path / "x.jsonl")


def test_label_names():
    examples = [Example("", None, label) for label in ("b", "a", None, "b", "10", "9")]
    assert label_names(examples) == ["10", "9", "a", "b"]


# Encoding

tokens = st.lists(st.integers(5, 9), max_size=40)


@given(tokens, st.one_of(st.none(), tokens), st.integers(3, 60))
def test_truncate(a, b, limit):
    first, second = truncate(a, b, limit)
    assert first == a[: len(first)]
    if b is None:
        assert second is None and len(first) == min(len(a), limit - 2)
        return
    assert second == b[: len(second)]
    assert len(first) + len(second) == min(len(a) + len(b), limit - 3), "no more than needed"
    cut_a, cut_b = len(a) - len(first), len(b) - len(second)
    if cut_a:
        assert len(first) >= len(second) - 1
    if cut_b:
        assert len(second) >= len(first) - 1


def test_encode():
    tokenizer = tiny.tokenizer()
    examples = [
        Example("the old crab", None, "b"),
        Example("the owl", "the big old whale", "a"),
        Example("the owl", None, None),
    ]
    encoded = encode(tokenizer, examples, ["a", "b"], 100, "train")
    assert encoded.labels.tolist() == [1, 0, -1]
    for example, ids, types in zip(examples, encoded.ids, encoded.types, strict=True):
        theirs = tokenizer.encode(*(x for x in example[:2] if x is not None))
        assert ids == theirs.ids and types == theirs.type_ids


@given(st.integers(4, 40), st.booleans())
def test_encoded_length(limit, pairs):
    long = " ".join(["the old crab"] * 5)
    examples = [Example(long, "the owl" if pairs else None, None), Example("owl", None, None)]
    encoded = encode(tiny.tokenizer(), examples, [], limit, "train")
    assert len(encoded.ids[0]) <= limit and encoded.ids[0][0] == CLS
    assert [len(x) for x in encoded.ids] == [len(x) for x in encoded.types]
    assert [x.count(SEP) for x in encoded.ids] == [1 + pairs, 1]
    assert encoded.ids[0][-1] == SEP


def test_unseen_label():
    examples = [Example("a", None, "yes"), Example("b", None, "maybe")]
    message = "dev.csv, example 2: label 'maybe' was not seen in training; known are no, yes"
    with pytest.raises(ValueError, match=message):
        encode(tiny.tokenizer(), examples, ["no", "yes"], 10, "dev.csv")


def test_collate():
    encoded = Encoded(
        [[1, 7, 2], [1, 2], [1, 8, 9, 2]], [[0, 0, 1], [0, 0], [0] * 4], torch.arange(3)
    )
    batch = collate(encoded, [1, 0], pad_id=6)
    assert batch.input_ids.tolist() == [[1, 2, 6], [1, 7, 2]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert batch.labels.tolist() == [1, 0]


# Scores

labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(labels)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_classification_scores(pairs):
    gold, predicted = (list(side) for side in zip(*pairs, strict=True))
    scores = metrics.classification(gold, predicted, ["a", "b", "c", "d"])
    assert scores["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    expected = f1_score(gold, predicted, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected)
    constant = max(accuracy_score(gold, [i] * len(gold)) for i in range(4))
    assert scores["majority"] == pytest.approx(constant)
    table = [[pairs.count((i, j)) for j in range(4)] for i in range(4)]
    assert scores["confusion"] == table


# Runs


def write_data(path, count, seed):
    """The topics of tiny texts, one JSON object a line."""
    lines = [json.dumps({"text": t, "label": topic}) for t, topic in tiny.labelled(count, seed)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained checkpoint with its tokenizer, and labelled texts."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    size = tiny.tokenizer().get_vocab_size()
    changes = {"vocab_size": size, "max_position_embeddings": 128, "initializer_range": 0.1}
    Model(tiny.config(**changes)).save_pretrained(root / "model")
    Model(tiny.config("electra", **changes)).save_pretrained(root / "electra")
    for name in ("model", "electra"):
        tokenizers.save(tiny.tokenizer(), root / name)
    write_data(root / "train.jsonl", 120, 1)
    write_data(root / "dev.jsonl", 40, 2)
    return root


def settings_of(files, output, **changes):
    values = {
        "output": str(output),
        "model": str(files / "model"),
        "device": "cpu",
        "train_file": str(files / "train.jsonl"),
        "dev_file": str(files / "dev.jsonl"),
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 0.002,
        "max_length": 64,
    }
    return build(FinetuneSettings, values | changes)


def logits_of(model, encoded):
    model.eval()
    return torch.cat([model(torch.tensor([ids])).logits for ids in encoded.ids])


@pytest.mark.parametrize("name", ["model", "electra"])
def test_a_run_learns_and_its_model_predicts_the_same(name, files, tmp_path):
    result = finetune(settings_of(files, tmp_path, model=str(files / name), epochs=8))
    assert result["accuracy"] > 0.9 > result["majority"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert sum(map(sum, result["confusion"])) == 40
    assert result["step"] == 8 * 120 / 16
    rows = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(row["text"], row["label"]) for row in rows] == list(tiny.labelled(40, 2))
    hits = [row["label"] == row["prediction"] for row in rows]
    assert sum(hits) / 40 == pytest.approx(result["accuracy"])
    model = from_pretrained(tmp_path / "model", "sequence")
    assert result["parameters"] == model.num_parameters()
    assert model.config.id2label == {0: "forest", 1: "sea"}
    tokenizer = tokenizers.load(tmp_path / "model")
    examples = read_examples(files / "dev.jsonl")
    encoded = encode(tokenizer, examples, ["forest", "sea"], 64, "dev")
    predicted = logits_of(model, encoded).argmax(-1).tolist()
    assert [model.config.id2label[i] for i in predicted] == [row["prediction"] for row in rows]


def test_schedule(files, tmp_path):
    settings = settings_of(files, tmp_path, epochs=2.5, warmup_fraction=0.2)
    settings.set_steps(120)
    assert (settings.steps, settings.warmup_steps) == (round(2.5 * 120 / 16), round(0.2 * 19))
    settings = settings_of(files, tmp_path, epochs=0.01)
    settings.set_steps(3)
    assert (settings.steps, settings.warmup_steps) == (1, 0)


def task_of(files, tmp_path, model=None, examples=None, **changes):
    settings = settings_of(files, tmp_path, **changes)
    config = tiny.config(type_vocab_size=2, vocab_size=tiny.tokenizer().get_vocab_size())
    examples = examples or read_examples(files / "dev.jsonl")
    encoded = encode(tiny.tokenizer(), examples, label_names(examples), 40, "dev")
    model = model or tiny.randomize(Model(config, "sequence"))
    return SequenceClassification(model, settings, encoded, encoded, tiny.tokenizer())


def test_layer_wise_rates(files, tmp_path):
    model = Model(tiny.config(conv_kernel_size=3), "sequence")
    task = task_of(files, tmp_path, model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = task.parameter_groups()
    rates = {names[id(p)]: group["peak_lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    for name, rate in rates.items():
        if name.startswith("head."):
            expected = 1.0
        elif name.startswith("backbone.encoder.layer."):
            expected = 0.5 ** (3 - int(name.split(".")[3]))
        else:  # What every layer stands on: embeddings, relative table, convolution.
            expected = 0.5**4
        assert rate == expected, name
    for group in groups:
        plain = all(p.dim() < 2 for p in group["params"])
        assert group["weight_decay"] == (0.0 if plain else 0.1)


def test_pairs_have_types(files, tmp_path):
    """Where the model has types; predictions come in the order of the examples."""
    examples = [
        Example("the old crab", "the owl sleeps near the oak", "a"),
        Example("the owl", "the crab", "b"),
        Example("the small crab swims", "the owl", "a"),
    ]
    task = task_of(files, tmp_path, examples=examples, batch_size=3)
    batch = task.batch(torch.tensor([2, 0, 1]), Draws(0, 0, 0, 3, 3))
    assert batch.token_type_ids.any(1).all()
    loss = task.model(batch)["loss"] / task.counts(batch)["loss"]
    logits = [
        task.classifier(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0]
        for ids, types in zip(task.dev.ids, task.dev.types, strict=True)
    ]
    order = [task.dev.ids.index(x[m].tolist()) for x, m in zip(*batch[:2], strict=True)]
    losses = [torch.nn.functional.cross_entropy(logits[i], task.dev.labels[i]) for i in order]
    torch.testing.assert_close(loss, sum(losses) / 3)
    assert task.predictions(batch_size=2) == [int(x.argmax()) for x in logits]
    assert task.tokens(batch) == sum(map(len, task.dev.ids))
    alone = [task.batch(torch.tensor([i]), Draws(0, 0, i, 1, 3)) for i in range(3)]
    assert 0 < task.compute(batch) == pytest.approx(sum(map(task.compute, alone)))
    without = task.classifier(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
    assert (without - loss).abs() > 1e-3


def test_pair_column(files, tmp_path):
    rows = [{"s": a, "t": b, "label": str(a == b)} for a in "xy" for b in "xy"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict.fromkeys(("train_file", "dev_file"), str(tmp_path / "pairs.jsonl"))
    columns = {"text_column": "s", "pair_column": "t"}
    result = finetune(settings_of(files, tmp_path / "run", epochs=1, **data, **columns))
    assert result["step"] == 1 and result["majority"] == 0.5


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


def test_the_same_seed_gives_the_same_run(files, tmp_path):
    lines = []
    for run, seed in enumerate((0, 0, 1)):
        finetune(settings_of(files, tmp_path / f"{run}", epochs=1, seed=seed, log_every=1))
        lines.append(read_metrics(tmp_path / f"{run}" / "metrics.jsonl"))
    assert lines[0] == lines[1] != lines[2]
    assert all(math.isfinite(line.get("loss", 0)) for line in lines[0])


def test_dropout_of_the_task_layer(files, tmp_path):
    for name, field in (("model", "cls_dropout"), ("electra", "classifier_dropout")):
        output = tmp_path / name
        finetune(settings_of(files, output, model=str(files / name), epochs=0.1, dropout=0.35))
        config = from_pretrained(output / "model", "sequence").config
        assert getattr(config, field) == 0.35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model must be given"),
        ({"train_file": ""}, "train_file must be given"),
        ({"dev_file": ""}, "dev_file must be given"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"reinit_layers": -1}, "reinit_layers must not be negative, got -1"),
        ({"reinit_layers": 4}, "reinit_layers must be at most the model's 3, got 4"),
        ({"layer_decay": 0}, r"layer_decay must be in \(0, 1\], got 0"),
        ({"layer_decay": 1.1}, r"layer_decay must be in \(0, 1\], got 1.1"),
        ({"warmup_fraction": 1}, r"warmup_fraction must be in \[0, 1\), got 1"),
        ({"max_length": 3}, "max_length must be at least 4, got 3"),
        ({"text_column": "txt"}, "train.jsonl, line 1: no 'txt'; it has text, label"),
    ],
)
def test_errors(changes, message, files, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(settings_of(files, tmp_path, **changes))


def test_longer_than_the_models_positions(files, tmp_path):
    electra = str(files / "electra")
    message = "max_length must be at most the model's max_position_embeddings = 128, got 129"
    with pytest.raises(ValueError, match=message):
        finetune(settings_of(files, tmp_path, model=electra, max_length=129))


def test_one_label_is_nothing_to_learn(files, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    with pytest.raises(ValueError, match="train.jsonl has one label, 'x': nothing to learn"):
        finetune(settings_of(files, tmp_path / "run", train_file=str(tmp_path / "train.jsonl")))


def test_reinitialize_restarts_the_top_layers_only():
    model = Model(tiny.config(num_hidden_layers=3), "sequence")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reinitialize(model, 2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert {name.split(".")[3] for name in changed if ".layer." in name} == {"1", "2"}
    assert all(".layer." in name for name in changed)
    with pytest.raises(ValueError, match="reinit_layers must be at most the model's 3, got 4"):
        reinitialize(model, 4)
