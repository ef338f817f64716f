"""What the tests of fine-tuning runs start from: tiny checkpoints, texts and settings."""

import json

import tiny
import torch

from fastdeberta import tokenizer as tokenizers
from fastdeberta.finetuning.finetuning import Finetuning, Split
from fastdeberta.finetuning.labels import encode
from fastdeberta.finetuning.settings import FinetuneSettings
from fastdeberta.finetuning.tasks import TASKS
from fastdeberta.models import Model
from fastdeberta.training.settings import build


def write_data(path, count, seed, **names):
    """The topics of tiny texts, one JSON object a line."""
    rows = [
        {"text": t, "label": names.get(topic, topic)} for t, topic in tiny.labelled(count, seed)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def write_files(root):
    """Untrained checkpoints with their tokenizer, and labelled texts."""
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
        "data_dir": str(files),
        "device": "cpu",
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 0.002,
        "max_length": 100,
    }
    return build(FinetuneSettings, values | changes)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def finetuning_of(files, tmp_path, examples, **changes):
    settings = settings_of(files, tmp_path, **changes)
    config = tiny.config(type_vocab_size=2, vocab_size=tiny.tokenizer().get_vocab_size())
    model = tiny.randomize(Model(config, "sequence"))
    names = list(model.config.id2label.values())
    features = [
        encode("sequence", tiny.tokenizer(), examples, names, settings, training, "x")
        for training in (True, False)
    ]
    dev = {"dev": Split(examples, features[1])}
    task = TASKS["classification"]
    return Finetuning(task, model, settings, tiny.tokenizer(), features[0], dev)
