"""Fine-tuning beside a plain loop over transformers' models: the same weights come out."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from finetuned import settings_of

from benchmarks import finetuning as comparison
from fastdeberta import tokenizer as tokenizers
from fastdeberta.finetuning.run import finetune, load_model
from fastdeberta.finetuning.settings import find_task
from fastdeberta.training.order import epoch_rows

NAMES = ["forest", "sea"]
STEPS, WARMUP, BATCH = 15, 3, 8  # One epoch of the 120 texts.


pytestmark = pytest.mark.usefixtures("no_report")


def plain_loop(directory, settings):
    """transformers' model after the steps of `settings` on padded batches."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).train()
    assert model.config.hidden_dropout_prob == 0.0
    layers = model.config.num_hidden_layers
    groups = []
    for name, parameter in model.named_parameters():
        layer = re.search(r"layer\.(\d+)\.", name)
        depth = layers - int(layer[1]) if layer else layers + 1
        if name.startswith(("classifier", "pooler")):
            depth = 0
        rate = settings.learning_rate * settings.layer_decay**depth
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=settings.epsilon)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP)),
    )
    texts, tokenizer = tiny.labelled(120, 1), tokenizers.load(directory)
    for step in range(STEPS):
        rows = [texts[row] for row in epoch_rows(len(texts), BATCH, step, settings.seed).tolist()]
        ids = [tokenizer.encode(text).ids for text, _ in rows]
        ids = [torch.tensor([*x[:-1][:99], x[-1]]) for x in ids]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        labels = torch.tensor([NAMES.index(topic) for _, topic in rows])
        mask = (batch >= 0).long()
        model(input_ids=batch.clamp(min=0), attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", ["model", "electra"])
def test_the_weights_are_those_of_a_plain_loop(name, files, tmp_path):
    settings = settings_of(
        files,
        tmp_path / "run",
        model=str(files / name),
        epochs=1,
        batch_size=BATCH,
        warmup_fraction=WARMUP / STEPS,
        layer_decay=0.8,
        weight_decay=0.1,
        dropout=0.0,
        max_grad_norm=0.5,
        accumulation=2,
        epsilon=1e-4,  # Below it rounding decides about steps.
    )
    torch.manual_seed(settings.seed)
    start = load_model(settings, find_task(settings), NAMES)
    start.save_pretrained(tmp_path / "start")
    tokenizers.save(tiny.tokenizer(), tmp_path / "start")
    expected = plain_loop(tmp_path / "start", settings).state_dict()
    finetune(settings)
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    found = read(tmp_path / "run" / "model").state_dict()
    before = read(tmp_path / "start").state_dict()
    moved = 0.0
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=key)
        moved = max(moved, float((value - before[key]).abs().max()))
    assert moved > 1e-2


def write_sources(root):
    """Few rows in the layouts that the comparison reads."""
    texts = tiny.labelled(40, 3)
    for folder in ("CoLA", "RTE", "STS-B"):
        (root / "glue" / folder).mkdir(parents=True)
    for split in ("train", "dev"):
        files = {"CoLA": [], "RTE": ["index\tsentence1\tsentence2\tlabel"]}
        files["STS-B"] = ["\t".join([*"abcdefg", "sentence1", "sentence2", "score"])]
        for i, (text, topic) in enumerate(texts):
            sea = topic == "sea"
            files["CoLA"].append(f"x\t{int(sea)}\t\t{text}")
            label = "entailment" if sea else "not_entailment"
            files["RTE"].append(f"{i}\t{text}\tThe sea.\t{label}")
            files["STS-B"].append("\t".join([*"1234567", text, "The sea.", f"{5 * sea}.0"]))
        for folder, lines in files.items():
            (root / "glue" / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    paragraphs = []
    for i, (text, _) in enumerate(texts):
        word = text.split()[2]
        answers = [{"text": word, "answer_start": text.index(word)}]
        qas = [{"id": f"q{i}", "question": "Who?", "answers": answers}]
        paragraphs.append({"context": text, "qas": qas})
    (root / "squad").mkdir()
    (root / "squad" / "xquad.en.json").write_text(
        json.dumps({"data": [{"paragraphs": paragraphs}]})
    )
    (root / "ud").mkdir()
    sentence = "# text\n" + "\n".join(
        f"{i}\t{word}\t_\t{tag}"
        for i, (word, tag) in enumerate((("The", "DET"), ("owl", "NOUN"), ("hides", "VERB")), 1)
    )
    for split in ("dev", "test"):
        (root / "ud" / f"en_ewt-ud-{split}.conllu").write_text(f"{sentence}\n\n" * 12)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_comparison(tmp_path, monkeypatch, capsys):
    """Every task on both sides: scores that words give away."""
    write_sources(tmp_path / "sources")
    articles = [SimpleNamespace(text=text, topic=topic) for text, topic in tiny.labelled(50, 4)]
    monkeypatch.setattr(comparison, "wiki_leads", lambda: articles)
    runs = tmp_path / "runs"
    comparison.write_data(tmp_path / "sources", runs / "data")
    words = sorted(
        {w for text, _ in tiny.labelled(60, 3) for w in re.findall(r"\w+|[.,?]", text.lower())}
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join([*special, *words, "who", "?"]) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(
        tmp_path / "bert"
    )
    config = transformers.BertConfig(
        vocab_size=len(words) + 7,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    for name, recipe in comparison.RECIPES.items():
        changed = replace(recipe, epochs=10, learning_rate=3e-3, dropout=0.0, batch_size=8)
        monkeypatch.setitem(comparison.RECIPES, name, changed)
    for side in ("ours", "plain"):
        comparison.run(runs, tmp_path / "bert", side, list(comparison.RECIPES), seeds=1)
        results = json.loads((runs / f"results.{side}.json").read_text())
        for name, of_seeds in results.items():
            assert of_seeds["0"]["score"] > 0.8, (side, name)
    table = list(comparison.table(runs))
    assert len(table) == 2 + len(comparison.RECIPES)
    assert re.match(
        r"\| cola \| matthews \| 10 \| \d+\.\d \(1\) \| \d+\.\d \(1\) \| [+-]", table[2]
    )
