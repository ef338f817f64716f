"""The demo's course: compare, pre-train, fine-tune with a control, report."""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import tokenizer as tokenizers
from ..datasets import wiki_leads
from ..files import write_atomically
from ..finetuning.examples import TextExample
from ..finetuning.features import Features
from ..finetuning.finetuning import Finetuning, Split
from ..finetuning.labels import encode
from ..finetuning.recipes import reinitialize
from ..finetuning.settings import FinetuneSettings
from ..finetuning.tasks import TASKS
from ..info import collect, render
from ..models import Config, Model, from_pretrained
from ..pretraining import text
from ..pretraining.corpus import baselines, load_corpus
from ..pretraining.settings import PretrainSettings
from ..pretraining.task import Pretraining
from ..training.reporting import default_progress, read_metrics
from ..training.settings import TrainSettings
from ..training.trainer import Task, Trainer
from . import attention
from .report import write_report

HELD_OUT = 0.1
PRETRAINING = 0.5  # of the time left after the comparison of attention
FINETUNING = 0.35  # of the whole time, at least, also where the machine turned out slower
FEW = 500  # labelled topics of the second comparison
TASK = TASKS["classification"]


def run(out: Path, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Runs the demo in about `minutes`; leaves report.html, metrics.json and models in `out`.

    Raises:
        ValueError: minutes is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    console, threads = Console(highlight=False), torch.get_num_threads()
    started = time.monotonic()
    deadline = started + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "pretrain", *out.glob("topics-*")):  # An earlier demo's runs.
        shutil.rmtree(old, ignore_errors=True)

    def section(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  ({(time.monotonic() - started) / 60:.1f} min)")

    section("This installation")
    installation = collect()
    console.print(render(installation), markup=False)

    section("Attention: transformers' eager code and ours")
    rows, reason = [], None
    try:
        rows = attention.compare(min(10.0, 3 * minutes))
        console.print(_attention_table(rows))
    except ImportError as error:
        reason = f"left out: {error}"
        console.print(reason)

    section("Pre-training: replaced token detection on 9/10 of the embedded text")
    settings = pretrain_settings(out, seed)
    corpus = load_corpus(settings)
    budget = PRETRAINING * (deadline - time.monotonic())
    settings.steps = _steps_in(Pretraining(settings, corpus), settings, budget, threads)
    settings.warmup_steps = max(10, min(500, settings.steps // 20))
    settings.evaluate_every = max(1, settings.steps // (10 if minutes >= 5 else 3))
    settings.checkpoint_every = max(1, settings.steps // 4)
    task = Pretraining(settings, corpus)
    sizes = task.parameters()
    console.print(
        f"{len(corpus.train)} rows of {settings.sequence_length} tokens; {settings.steps} steps; "
        f"discriminator {sizes['discriminator']['total'] / 1e6:.2f}M parameters, "
        f"generator {sizes['generator']['total'] / 1e6:.2f}M"
    )
    pretraining = Trainer(task, settings, default_progress()).run()
    task.export(out / "pretrain")
    special = [tokenizers.special_id(corpus.tokenizer, t) for t in tokenizers.SPECIAL_TOKENS]
    base = baselines(corpus, special)
    console.print(_pretraining_table(pretraining, base))

    section(f"Fine-tuning on the topics of {1 - HELD_OUT:.0%}, scored on the other {HELD_OUT:.0%}")
    topics = _Topics(corpus.tokenizer, seed, threads)
    left = max(deadline - time.monotonic(), FINETUNING * 60 * minutes)
    finetuning = topics.compare(out, out / "pretrain" / "discriminator", 0.5 * left, None)
    few = topics.compare(out, out / "pretrain" / "discriminator", 0.4 * left, FEW)
    console.print(_topics_table(finetuning, few))

    section("Report")
    curves = read_metrics(out / "pretrain" / "metrics.jsonl")
    results = {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "seed": seed,
        "installation": installation,
        "attention": rows or reason,
        "pretraining": {**pretraining, "baseline": base, "settings": vars(settings)},
        "topics": finetuning,
        f"topics_{FEW}": few,
        "topic_names": topics.names,
    }
    write_atomically(out / "metrics.json", json.dumps(results, indent=2) + "\n")
    write_report(out / "report.html", results, curves)
    torch.set_num_threads(threads)
    console.print(f"written: {out / 'report.html'}, {out / 'metrics.json'}")
    return results


def pretrain_settings(out: Path, seed: int) -> PretrainSettings:
    """The recipe: a small DeBERTaV3, GDES, and a discriminator slower than its generator."""
    return PretrainSettings(
        output=str(out / "pretrain"),
        held_out=HELD_OUT,
        seed=seed,
        lowercase=True,
        vocab_size=4096,
        sequence_length=64,
        batch_size=16,
        precision="bf16",
        tie="gdes",
        rtd_weight=20.0,
        learning_rate=1e-3,
        generator_learning_rate=2e-3,
        epsilon=1e-8,
        log_every=20,
        keep_checkpoints=1,
        discriminator={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "position_buckets": 32,
            "max_relative_positions": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            # 0.02 belongs to widths of 768 and more; narrow layers start too flat with it.
            "initializer_range": 0.1,
        },
        generator={"num_hidden_layers": 1},
    )


def _steps_in(task: Task, settings: TrainSettings, seconds: float, threads: int) -> int:
    """How many steps of a task fit into a time, at the better of one thread and `threads`, which
    is left set; the task is used up.

    Layers this narrow gain little from threads, and lose much where other programs run.
    """
    trainer = Trainer(task, settings)
    trainer.measure(3)
    times = {}
    for count in {1, threads}:
        torch.set_num_threads(count)
        times[trainer.measure(8)] = count
    best = min(times)
    torch.set_num_threads(times[best])
    return max(20, int(seconds / best))


class _Topics:
    """The topic classification: data, and the comparison of pre-trained and fresh models."""

    def __init__(self, tokenizer: Any, seed: int, threads: int):
        self.tokenizer, self.seed, self.threads = tokenizer, seed, threads
        # The split is that of pre-training: a test article was not read there either.
        rest, test = text.split(wiki_leads(), HELD_OUT, seed)
        self.articles, test = (
            [TextExample("", a.text, label=a.topic) for a in part if a.topic != "Uncategorized"]
            for part in (rest, test)
        )
        self.names = sorted({str(article.label) for article in self.articles})
        self.train = self._encode(self.articles, training=True)
        self.test = Split(test, self._encode(test, training=False))

    def compare(
        self, out: Path, checkpoint: Path, seconds: float, labelled: int | None
    ) -> dict[str, Any]:
        """Fine-tunes the pre-trained model and, as its control, the same model from random
        weights, each for half of `seconds` (with few labels: for each of three seeds)."""
        train = self.train
        if labelled is not None:
            train = self._encode(self.articles[:labelled], training=True)
        seeds = [self.seed] if labelled is None else [self.seed + i for i in range(3)]
        seconds /= 2 * len(seeds)
        config = Config.load(checkpoint)
        results: dict[str, Any] = {"labelled": len(train)}
        steps = None
        for name in ("pretrained", "control"):
            runs = []
            for seed in seeds:
                settings = self._settings(out / f"topics-{len(train)}" / f"{name}-{seed}", seed)

                def task(name: str = name, settings: FinetuneSettings = settings) -> Any:
                    torch.manual_seed(settings.seed)
                    model = self._model(name, checkpoint, config)
                    dev = {"test": self.test}
                    return Finetuning(TASK, model, settings, self.tokenizer, train, dev)

                if steps is None:  # The same number for both.
                    steps = _steps_in(task(), settings, seconds, self.threads)
                settings.steps, settings.warmup_steps = steps, steps // 10
                run = task()
                Trainer(run, settings, default_progress()).run()
                runs.append(run.scores)
            results[name] = {
                "accuracy": statistics.mean(r["accuracy"] for r in runs),
                "macro_f1": statistics.mean(r["macro_f1"] for r in runs),
                "accuracies": [r["accuracy"] for r in runs],
                "confusion": runs[0]["confusion"],
            }
            results["majority"] = runs[0]["majority"]
        results["steps"] = steps
        return results

    def _encode(self, articles: list[TextExample], training: bool) -> Features:
        settings = FinetuneSettings(max_length=96)
        where = "train" if training else "test"
        return encode(TASK.head, self.tokenizer, articles, self.names, settings, training, where)

    def _settings(self, output: Path, seed: int) -> FinetuneSettings:
        return FinetuneSettings(
            output=str(output),
            seed=seed,
            batch_size=16,
            learning_rate=5e-4,
            epsilon=1e-8,
            precision="bf16",
            evaluate_every=0,
            checkpoint_every=0,
        )

    def _model(self, name: str, checkpoint: Path, config: Config) -> Model:
        changes: dict[str, Any] = {
            "id2label": dict(enumerate(self.names)),
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        }
        if name == "pretrained":
            model = from_pretrained(checkpoint, "sequence", allow_new_head=True, **changes)
            # The upper layers have come to look for replaced tokens only: topics are read from
            # the tables and the first layer.
            reinitialize(model, config.num_hidden_layers - 1)
            return model
        values = {**config.to_dict(), **changes}
        values.pop("label2id")
        return Model(Config.from_dict(values), "sequence")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _attention_table(rows: list[dict[str, float]]) -> Table:
    columns = ["length", "largest difference"]
    columns += ["eager fwd", "ours", "ratio", "eager fwd+bwd", "ours", "ratio"]
    table = _table("one layer of v3-base shape, batch 1, float32, medians in ms", *columns)
    for r in rows:
        cells = [f"{r['length']}", f"{r['difference']:.1e}"]
        for kind in ("forward", "full"):
            eager, ours = r[f"eager_{kind}"], r[f"ours_{kind}"]
            cells += [f"{eager:.1f}", f"{ours:.1f}", f"{eager / ours:.2f}x"]
        table.add_row(*cells)
    return table


def _pretraining_table(result: dict[str, Any], base: dict[str, float]) -> Table:
    table = _table("held-out text", "score", "model", "without a model")
    frequent, unigram = base["most_frequent"], base["unigram"]
    table.add_row(
        "generator: masked-token accuracy",
        f"{result['mlm_accuracy']:.1%} = {result['mlm_accuracy'] / frequent:.1f}x",
        f"most frequent token {frequent:.1%}, unigram sampler {unigram:.1%}",
    )
    chance = result["replaced_fraction"]
    table.add_row("discriminator: AUC", f"{result['rtd_auc']:.3f}", "0.500")
    table.add_row(
        "discriminator: accuracy on replaced tokens",
        f"{result['rtd_accuracy_replaced']:.1%}",
        f"{chance:.1%}",
    )
    table.add_row(
        "discriminator: accuracy on original tokens",
        f"{result['rtd_accuracy_original']:.1%}",
        f"{1 - chance:.1%}",
    )
    return table


def _topics_table(*results: dict[str, Any]) -> Table:
    table = _table(
        "topics, held-out tenth", "model", "labelled", "accuracy", "macro-F1", "majority"
    )
    for result in results:
        for name, title in (("pretrained", "pre-trained"), ("control", "random weights (control)")):
            scores = result[name]
            table.add_row(
                title,
                f"{result['labelled']}",
                f"{scores['accuracy']:.1%}",
                f"{scores['macro_f1']:.3f}",
                f"{result['majority']:.1%}",
            )
    return table
