"""One run of the study: an arm pre-trained from a seed, then fine-tuned and scored."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import tokenizer as tokenizers
from ..datasets import Article, wiki_leads
from ..files import write_atomically
from ..finetuning.examples import TextExample
from ..finetuning.features import Features
from ..finetuning.finetuning import Finetuning, Split
from ..finetuning.labels import encode
from ..finetuning.settings import FinetuneSettings
from ..finetuning.tasks import TASKS, Task
from ..models import Config, Model, from_pretrained
from ..pretraining import text
from ..pretraining.corpus import Corpus
from ..pretraining.examples import make_examples
from ..pretraining.shards import Part
from ..pretraining.task import Pretraining
from ..training.draws import Draws
from ..training.order import epoch_rows
from ..training.reporting import Progress, read_metrics
from ..training.trainer import Trainer
from . import acceptability
from .arms import FLOOR, Recipe


class Documents(NamedTuple):
    """The embedded text in three parts that share no document, the same for every seed."""

    pretraining: list[Article]
    labelled: list[Article]
    dev: list[Article]


class FinetuningData(NamedTuple):
    """One task of fine-tuning: its labels and examples, and epochs. Its first metric is scored."""

    task: Task
    names: list[str]
    train: Features
    dev: Split
    epochs: float


# Acceptability is scored as CoLA is.
TASK_OF = {
    "topics": TASKS["classification"],
    "acceptability": replace(TASKS["classification"], metrics=("matthews",)),
}


def split(recipe: Recipe) -> Documents:
    """The documents of a recipe's parts."""
    rest, dev = text.split(wiki_leads()[: recipe.documents], recipe.dev)
    pretraining, labelled = text.split(rest, recipe.labelled / (1 - recipe.dev))
    return Documents(pretraining, labelled, dev)


def make_tokenizer(recipe: Recipe, directory: Path) -> Any:
    """Trains the tokenizer of all arms on the text of pre-training, and keeps it."""
    documents = [article.text for article in split(recipe).pretraining]
    tokenizers.save(tokenizers.train(documents, recipe.vocab_size, True), directory)
    return tokenizers.load(directory)


def make_corpus(recipe: Recipe, tokenizer: Any) -> Corpus:
    """The rows of pre-training, and those of the dev documents for held-out scores."""
    documents = split(recipe)
    rows = (
        make_examples(
            "stream",
            Part([text.tokenize(tokenizer, [article.text for article in part])]),
            tokenizer,
            recipe.sequence_length,
        )
        for part in (documents.pretraining, documents.dev)
    )
    return Corpus(tokenizer, *rows)


def make_finetuning_data(recipe: Recipe, tokenizer: Any) -> dict[str, FinetuningData]:
    """Topics of whole documents, and acceptability of their sentences.

    Raises:
        ValueError: the documents give too few examples.
    """
    documents = split(recipe)
    parts = documents.labelled, documents.dev
    topics = [
        [TextExample("", a.text, label=a.topic) for a in part if a.topic != "Uncategorized"]
        for part in parts
    ]
    if len(topics[0]) < recipe.topics:
        raise ValueError(f"topics: {recipe.topics} asked for, the text has {len(topics[0])}")
    topics[0] = topics[0][: recipe.topics]
    judged = [
        acceptability.examples([article.text for article in part], count, seed)
        for seed, (part, count) in enumerate(
            zip(parts, (recipe.acceptability, recipe.acceptability_dev), strict=True)
        )
    ]
    data = {}
    for name, (train, dev), epochs in (
        ("topics", topics, recipe.topics_epochs),
        ("acceptability", judged, recipe.acceptability_epochs),
    ):
        task, settings = TASK_OF[name], FinetuneSettings(max_length=recipe.finetune_length)
        names = sorted({str(example.label) for example in train})
        known = [example for example in dev if example.label in names]
        features, held_out = (
            encode(task.head, tokenizer, part, names, settings, training, name)
            for part, training in ((train, True), (known, False))
        )
        data[name] = FinetuningData(task, names, features, Split(known, held_out), epochs)
    return data


def stage_flops(task: Pretraining) -> list[float]:
    """Operations of one step in each of an arm's stages: one, or two of two_stage."""
    settings = task.settings
    steps = [0, settings.steps - 1] if settings.algorithm == "two_stage" else [0]
    found = []
    for step in steps:
        rows = epoch_rows(task.rows, settings.batch_size, step, settings.seed)
        draws = Draws(settings.seed, step, 0, len(rows), len(rows))
        found.append(task.compute(task.batch(rows, draws)))
    return found


def run(
    recipe: Recipe, arm: str, seed: int, steps: int, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Pre-trains an arm for `steps` steps and scores it; writes and returns its result.

    What an interrupted run left in out/runs/ARM-SEED is gone on with, and deleted at the end.

    Raises:
        Interrupted, Diverged: see Trainer.
    """
    tokenizer = tokenizers.load(out / "tokenizer")
    data = make_finetuning_data(recipe, tokenizer)
    directory = out / "runs" / f"{arm}-{seed}"
    settings = recipe.settings(arm, str(directory / "pretrain"), seed, steps or 1)
    task = Pretraining(settings, make_corpus(recipe, tokenizer))
    (network,) = set(task.objective.models()) - {"generator"}

    def scored(point: dict[str, Any], source: Config | Path) -> dict[str, Any]:
        started = time.perf_counter()
        for name, part in data.items():
            output = directory / f"{name}-{point['step']}"
            point[name] = finetune(recipe, part, tokenizer, source, seed, output, progress)
        point["average"] = sum(point[name] for name in data) / len(data)
        return point | {"finetune_seconds": round(time.perf_counter() - started, 1)}

    result: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps}
    if arm == FLOOR:
        start = {"fraction": 0.0, "step": 0, "tokens": 0, "flops": 0.0}
        result["points"] = [scored(start, task.objective.models()[network].config)]
    else:
        scores = Trainer(task, settings, progress).run()
        logged = {
            line["step"]: {"tokens": line["tokens"], "flops": line["flops"]}
            for line in read_metrics(directory / "pretrain" / "metrics.jsonl")
            if "flops" in line
        }
        result |= {"pretraining": scores, "parameters": task.parameters(), "points": []}
        for fraction in recipe.fractions:
            step = steps if fraction == 1 else round(4 * fraction) * settings.checkpoint_every
            if settings.algorithm == "two_stage" and step <= settings.first_stage:
                continue  # There is no discriminator yet.
            checkpoint = directory / "pretrain" / f"checkpoint-{step}" / network
            point = {"fraction": fraction, "step": step, **logged[step]}
            result["points"].append(scored(point, checkpoint))
    write_atomically(result_path(out, arm, seed), json.dumps(result, indent=2) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    return result


def result_path(out: Path, arm: str, seed: int) -> Path:
    return out / "results" / f"{arm}-{seed}.json"


def finetune(
    recipe: Recipe,
    data: FinetuningData,
    tokenizer: Any,
    source: Config | Path,
    seed: int,
    output: Path,
    progress: Progress | None = None,
) -> float:
    """Fine-tunes a checkpoint, or fresh weights of a config; returns 100 times its score."""
    task = finetuning_task(recipe, data, tokenizer, source, seed, output)
    result = Trainer(task, task.settings, progress).run()
    return 100 * float(result[data.task.metrics[0]])


def finetuning_task(
    recipe: Recipe,
    data: FinetuningData,
    tokenizer: Any,
    source: Config | Path,
    seed: int,
    output: Path,
) -> Finetuning:
    """What `finetune` trains."""
    settings = FinetuneSettings(
        output=str(output),
        seed=seed,
        epochs=data.epochs,
        batch_size=recipe.finetune_batch_size,
        learning_rate=recipe.finetune_learning_rate,
        epsilon=1e-8,
        precision=recipe.precision,
        device="cpu",
    )
    settings.set_steps(len(data.train))
    settings.log_every = settings.steps
    changes: dict[str, Any] = {
        "id2label": dict(enumerate(data.names)),
        "hidden_dropout_prob": recipe.finetune_dropout,
        "attention_probs_dropout_prob": recipe.finetune_dropout,
    }
    torch.manual_seed(seed)  # The new head's weights, or all.
    if isinstance(source, Config):
        values = {**source.to_dict(), **changes}
        values.pop("label2id", None)
        model = Model(Config.from_dict(values), "sequence")
    else:
        model = from_pretrained(source, "sequence", allow_new_head=True, **changes)
    return Finetuning(data.task, model, settings, tokenizer, data.train, {"dev": data.dev})
