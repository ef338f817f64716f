"""A fine-tuning run: from settings to scores, predictions and a model."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import tokenizer as tokenizers
from ..attention import set_backend
from ..files import write_atomically
from ..models import Model, from_pretrained
from ..models.checkpoint import local_directory
from ..models.encoder import initialize
from ..training.distributed import is_main, resolve_device
from ..training.reporting import NoProgress, Progress
from ..training.settings import to_yaml
from ..training.trainer import CONFIG, Trainer
from . import submissions
from .decoding import Outputs, Predicted, references
from .examples import Example, TextExample
from .finetuning import Finetuning, Split
from .labels import class_names, encode
from .metrics import check_installed
from .recipes import reinitialize
from .report import write_report
from .settings import FinetuneSettings, config_of, find_task, position_limit
from .stopping import StoppingTrainer
from .tasks import Task

METRICS = "metrics.json"


class Data(NamedTuple):
    """What a task's files hold: examples of every split that is there, and the classes."""

    train: Sequence[Example]
    dev: dict[str, Sequence[Example]]
    test: dict[str, Sequence[Example]]
    names: list[str]


class Outcome(NamedTuple):
    """What a run leaves: the content of metrics.json, of this the names of scores that are numbers,
    and its dev and test splits' outputs."""

    result: dict[str, Any]
    scored: list[str]
    outputs: dict[str, Outputs]


def finetune(settings: FinetuneSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Fine-tunes `settings.model` for a task and scores it.

    Leaves in `settings.output` metrics.json, report.html, the model, predictions.jsonl (of the dev
    split; of others predictions-SPLIT.jsonl) and, where the benchmark has a test server, the files
    for it in submission/. With several seeds every run has its own directory seed-N; metrics.json
    holds each score's median, mean and standard deviation, the model and its predictions are those
    of the run to keep, and ensemble/ has those of all runs' averaged logits. With `ensemble`
    nothing is trained.

    Returns:
        The scores, as written to metrics.json.

    Raises:
        FileNotFoundError, ValueError: bad settings, data or checkpoint.
    """
    task = find_task(settings)
    if not settings.data_dir:
        raise ValueError("data_dir must be given")
    if settings.ensemble:
        return _ensemble(task, settings, progress or NoProgress())
    if not settings.model:
        raise ValueError("model must be given")
    data = read(task, settings, progress or NoProgress())
    if settings.seeds > 1:
        return _seeds(task, data, settings, progress)
    return _train(task, data, settings, progress).result


def read(task: Task, settings: FinetuneSettings, progress: Progress) -> Data:
    """All of a task's splits. A test split may be missing.

    Raises:
        FileNotFoundError, ValueError: see Task.read; or a dev label is missing or unknown.
        ModuleNotFoundError: see `check_installed`.
    """
    check_installed(task.metrics)
    directory = Path(settings.data_dir)
    train = task.read(directory, "train")
    names = class_names(task, train)
    dev = {split: task.read(directory, split) for split in task.dev}
    for split, examples in dev.items():
        references(task, examples, names, f"{directory / split}")
    return Data(train, dev, _tests(task, directory, progress), names)


def load_model(settings: FinetuneSettings, task: Task, names: Sequence[str]) -> Model:
    """The checkpoint with the task's head, new where it has none of this kind and size.

    The last layer of a head that predicts other classes starts anew, also where there are as many;
    what lies below it is kept.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or it does not fit the settings.
    """
    changes: dict[str, Any] = {}
    classes = dict(enumerate(names)) or {0: "LABEL_0"}
    before = config_of(settings.model)
    if task.head in ("sequence", "token"):
        changes["id2label"] = classes
    if task.head == "sequence":
        kind = "single_label_classification" if names else "regression"
        changes["problem_type"] = kind
    if settings.dropout is not None:
        rates = ("cls_dropout", "classifier_dropout", "summary_last_dropout")
        changes |= dict.fromkeys(rates, settings.dropout)
    if settings.span_head is not None:
        changes["span_head"] = settings.span_head
    model = from_pretrained(settings.model, task.head, allow_new_head=True, **changes)
    if task.head in ("sequence", "token") and before.id2label != classes:
        last = list(model.head.children())[-1]  # type: ignore[union-attr]
        initialize(last, model.config.initializer_range)
    reinitialize(model, settings.reinit_layers)
    limit = position_limit(model.config)
    if limit is not None and settings.max_length > limit:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {limit}, "
            f"got {settings.max_length}"
        )
    return model


def _train(
    task: Task, data: Data, settings: FinetuneSettings, progress: Progress | None
) -> Outcome:
    """One run."""
    tokenizer = tokenizers.load(local_directory(settings.model))
    torch.manual_seed(settings.seed)  # A new head's weights.
    model = load_model(settings, task, data.names)
    encoded = partial(encode, task.head, tokenizer, names=data.names, settings=settings)
    where = f"{Path(settings.data_dir) / 'train'}"
    train = encoded(data.train, training=True, where=where)
    dev = {
        name: Split(examples, encoded(examples, training=False, where=name))
        for name, examples in data.dev.items()
    }
    settings = replace(settings)
    settings.set_steps(len(train))
    run = Finetuning(task, model, settings, tokenizer, train, dev)
    trainer: Trainer
    if settings.early_stopping:
        trainer = StoppingTrainer(run, settings, settings.early_stopping, progress)
    else:
        trainer = Trainer(run, settings, progress)
    result = trainer.run()
    if not trainer.main:
        return Outcome(result, [], {})
    model.to(trainer.device)
    if isinstance(trainer, StoppingTrainer) and trainer.best:
        if trainer.best != trainer.step:
            trainer.load_best()
            result |= run.evaluate()
        result["best_step"] = trainer.best
    output = Path(settings.output)
    run.export(output)
    result |= run.scores
    result["parameters"] = model.num_parameters()
    outputs = dict(run.outputs)
    tests = {}
    for name, examples in data.test.items():
        tests[name] = Split(examples, encoded(examples, training=False, where=name))
        outputs[name] = run.run(tests[name].features)
    _write_predictions(run, tests, outputs, output)
    _write_result(result, output)
    return Outcome(result, list(_numbers(run.scores)), outputs)


def _seeds(
    task: Task, data: Data, settings: FinetuneSettings, progress: Progress | None
) -> dict[str, Any]:
    """A run for each seed; the summary."""
    output = Path(settings.output)
    outcomes = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        own = replace(settings, seed=seed, seeds=1, output=str(output / f"seed-{seed}"))
        outcomes.append(_train(task, data, own, progress))
    if not is_main():
        return outcomes[0].result
    results = [outcome.result for outcome in outcomes]
    scored = outcomes[0].scored
    summary: dict[str, Any] = {"seeds": settings.seeds}
    for name in scored:
        values = [result[name] for result in results]
        summary[name] = statistics.median(values)
        summary[f"{name}_mean"] = statistics.mean(values)
        summary[f"{name}_std"] = statistics.stdev(values)
        summary[f"{name}_by_seed"] = values
    watched = [result[scored[0]] if scored else 0.0 for result in results]
    ranked = sorted(range(len(results)), key=lambda i: (-watched[i], i))
    chosen = ranked[0 if settings.keep == "best" else len(ranked) // 2]
    summary["kept_seed"] = settings.seed + chosen
    summary["parameters"] = results[0]["parameters"]
    kept = output / f"seed-{settings.seed + chosen}"
    judge = _judge(task, data, replace(settings, model=str(kept / "model")))
    tests = {name: judge.dev.pop(name) for name in data.test}
    judge.judge({name: outcomes[chosen].outputs[name] for name in judge.dev})
    judge.export(output)
    _write_predictions(judge, tests, outcomes[chosen].outputs, output)
    summary |= {k: v for k, v in judge.scores.items() if isinstance(v, list)}
    averaged = average([outcome.outputs for outcome in outcomes])
    if averaged is not None:
        judge.judge({name: averaged[name] for name in judge.dev})
        _write_predictions(judge, tests, averaged, output / "ensemble")
        summary["ensemble"] = _numbers(judge.scores)
    write_atomically(output / CONFIG, to_yaml(settings))
    _write_result(summary, output)
    return summary


def _ensemble(task: Task, settings: FinetuneSettings, progress: Progress) -> dict[str, Any]:
    """Scores and predictions of several models' averaged logits, without training."""
    directory, output = Path(settings.data_dir), Path(settings.output)
    dev = {split: task.read(directory, split) for split in task.dev}
    names = list(task.labels or ())
    if task.labels is None and task.head in ("sequence", "token"):
        names = list(config_of(settings.ensemble[0]).id2label.values())
    data = Data([], dev, _tests(task, directory, progress), names)
    if not data.dev and not data.test:
        raise ValueError(f"data_dir: no split of {task.name} in {directory}")
    vocabulary, found, result = "", [], {"models": len(settings.ensemble)}
    for model in settings.ensemble:
        judge = _judge(task, data, replace(settings, model=model), trained=True)
        vocabulary = vocabulary or judge.tokenizer.to_str()
        if judge.tokenizer.to_str() != vocabulary:
            raise ValueError(
                f"ensemble: {model} and {settings.ensemble[0]} have different tokenizers, so that "
                "their logits are not of the same tokens"
            )
        found.append({name: judge.run(split.features) for name, split in judge.dev.items()})
        progress.say(f"{model}: done")
    averaged = average(found)
    if averaged is None:
        raise ValueError("ensemble: the logits of a beam's span head cannot be averaged")
    tests = {name: judge.dev.pop(name) for name in data.test}
    judge.judge({name: averaged[name] for name in judge.dev})
    _write_predictions(judge, tests, averaged, output)
    result |= judge.scores
    write_atomically(output / CONFIG, to_yaml(settings))
    _write_result(result, output)
    return result


def average(outputs: Sequence[dict[str, Outputs]]) -> dict[str, Outputs] | None:
    """The mean of several models' logits, row by row; None: they are a beam's, whose places
    differ from model to model."""
    if any(len(row) > 2 for split in outputs[0].values() for row in split):
        return None
    return {
        name: [
            tuple(torch.stack(logits).mean(0) for logits in zip(*rows, strict=True))
            for rows in zip(*(model[name] for model in outputs), strict=True)
        ]
        for name in outputs[0]
    }


def _judge(task: Task, data: Data, settings: FinetuneSettings, trained: bool = False) -> Finetuning:
    """A fine-tuned model with dev and test splits (all in `dev`), without training rows.

    Raises:
        ValueError: trained, and the model's classes are not the task's.
    """
    tokenizer = tokenizers.load(local_directory(settings.model))
    if trained and task.head in ("sequence", "token"):
        own = list(config_of(settings.model).id2label.values())
        if own != (data.names or ["LABEL_0"]):
            raise ValueError(
                f"ensemble: {settings.model} predicts {', '.join(own)}; "
                f"the task's are {', '.join(data.names) or 'numbers'}"
            )
    model = load_model(replace(settings, reinit_layers=0), task, data.names)
    set_backend(model.to(resolve_device(settings.device)), settings.backend)
    splits = {
        name: Split(
            examples, encode(task.head, tokenizer, examples, data.names, settings, False, name)
        )
        for name, examples in {**data.dev, **data.test}.items()
    }
    empty = next(iter(splits.values())).features
    return Finetuning(task, model, settings, tokenizer, empty, splits)


def _tests(task: Task, directory: Path, progress: Progress) -> dict[str, Sequence[Example]]:
    found: dict[str, Sequence[Example]] = {}
    for split in task.test:
        try:
            found[split] = task.read(directory, split)
        except FileNotFoundError as error:
            progress.say(f"no predictions for {split}: {error}")
    return found


def _write_predictions(
    run: Finetuning, tests: dict[str, Split], outputs: dict[str, Outputs], output: Path
) -> None:
    """A file for every split, and the submission of those of `tests`."""
    for number, (name, split) in enumerate(run.dev.items()):
        file = "predictions.jsonl" if number == 0 else f"predictions-{name}.jsonl"
        _write_lines(output / file, split.examples, run.predicted[name], run.names)
    for name, split in tests.items():
        predicted = run.predict(split, outputs[name])
        _write_lines(output / f"predictions-{name}.jsonl", split.examples, predicted, run.names)
        if run.task.submission is None:
            continue
        ids = [example.id for example in split.examples]
        none = None
        if run.task.name == "squad2":
            scores = torch.tensor([one.no_answer for one in predicted.spans or []])
            none = dict(zip(ids, scores.sigmoid().tolist(), strict=True))
        values = dict(zip(ids, predicted.values, strict=True))
        submissions.write(run.task, name, output / "submission", values, none)


def _write_lines(
    path: Path, examples: Sequence[Example], predicted: Predicted, names: Sequence[str]
) -> None:
    """One JSON object an example: its id, its text if it is one, its label, the prediction, of
    classes the probabilities, and of spans the n best."""
    lines = []
    for number, (example, value) in enumerate(zip(examples, predicted.values, strict=True)):
        line: dict[str, Any] = {"id": example.id}
        if isinstance(example, TextExample):
            line["text"] = example.text
            line |= {} if example.pair is None else {"pair": example.pair}
        values = example._asdict()
        right = next((values[key] for key in ("label", "tags", "answers") if key in values), None)
        if right is not None:
            line["label"] = right
        line["prediction"] = value
        if predicted.probabilities is not None:
            shares = predicted.probabilities[number].tolist()
            line["probabilities"] = dict(zip(names, shares, strict=True))
        if predicted.spans is not None:
            own = predicted.spans[number]
            line["no_answer"] = own.no_answer if abs(own.no_answer) < float("inf") else None
            line["n_best"] = [vars(span) for span in own.spans]
        lines.append(json.dumps(line))
    write_atomically(path, "\n".join(lines) + "\n")


def _write_result(result: dict[str, Any], output: Path) -> None:
    """metrics.json and, where matplotlib is installed, report.html."""
    write_atomically(output / METRICS, json.dumps(result, indent=2) + "\n")
    if find_spec("matplotlib") is not None:
        write_report(output)


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}
