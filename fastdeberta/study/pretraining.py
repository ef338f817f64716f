"""`fastdeberta study pretraining`: ELECTRA's ablations at one budget of compute."""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from .. import tokenizer as tokenizers
from ..files import write_atomically
from ..info import collect
from ..models import Config
from ..pretraining.task import Pretraining
from ..training.reporting import NoProgress, Progress, default_progress
from ..training.trainer import Interrupted, Trainer
from . import runs
from .arms import ARMS, FLOOR, Recipe, steps_for
from .report import show, write_report

PLAN = "plan.json"
MINUTES, QUICK_MINUTES = 50.0, 8.0
SEEDS, QUICK_SEEDS = 3, 2
# Of the time, what the runs may take by the measured speeds. Side by side they are slower than
# measured, and they start, evaluate and write checkpoints: a study planned with 0.92 took 1.28
# times its minutes.
_PLANNED = 0.72

Job = tuple[Any, ...]


def quick_recipe() -> Recipe:
    """Less fine-tuning, at the end only."""
    return Recipe(
        fractions=(1.0,),
        topics=800,
        topics_epochs=3.0,
        acceptability=1600,
        acceptability_dev=1000,
    )


def run(
    out: Path,
    minutes: float | None = None,
    seeds: int | None = None,
    quick: bool = False,
    recipe: Recipe | None = None,
    arms: Iterable[str] = tuple(ARMS),
    workers: int | None = None,
) -> dict[str, Any]:
    """Runs every arm from every seed; leaves study.json, report.html and plots in `out`.

    The compute that each run may take is set once, by the machine's speed, so that all take about
    `minutes` where nothing else runs; it is kept in out/plan.json. Finished runs are not run
    again, an interrupted one goes on from its last checkpoint.

    Args:
        minutes: None: 50, or with `quick` 8. seeds: None: 3, or with `quick` 2.
        workers: processes at a time, of one thread each; None: as many as there are cores.

    Returns:
        What study.json holds.

    Raises:
        ValueError: a number out of range, an unknown arm, or `out` holds a study with other
            settings. RuntimeError: a run failed. Interrupted: SIGTERM came.
    """
    minutes = minutes if minutes is not None else QUICK_MINUTES if quick else MINUTES
    seeds = seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    arms = list(arms)
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {arm!r}")
    recipe = recipe or (quick_recipe() if quick else Recipe())
    asked = {"minutes": minutes, "seeds": seeds, "arms": arms, "recipe": recipe.to_dict()}
    workers = workers or os.cpu_count() or 1
    progress = default_progress()
    with _terminable(out):
        plan = _plan(out, asked, workers, progress)
        _run_all(out, plan, workers, progress)
    results = [
        json.loads(runs.result_path(out, arm, seed).read_text())
        for arm in arms
        for seed in range(seeds)
    ]
    study = {"plan": plan, "installation": collect(), "results": results}
    write_atomically(out / "study.json", json.dumps(study, indent=2) + "\n")
    write_report(out, study)
    show(study)
    print(f"written: {out / 'report.html'}, {out / 'study.json'}")
    return study


def _plan(out: Path, asked: dict[str, Any], workers: int, progress: Progress) -> dict[str, Any]:
    """The plan in `out`; if there is none, one by the measured speeds, which is kept there."""
    path = out / PLAN
    if path.exists():
        plan = json.loads(path.read_text())
        for key, value in asked.items():
            if plan[key] != value:
                raise ValueError(
                    f"out: {out} holds a study with other settings ({key}: {plan[key]!r} there, "
                    f"{value!r} now); continue it with its own, or choose another directory"
                )
        progress.say(f"going on with the study in {out}")
        return plan
    started = _processor_seconds(workers)
    recipe = Recipe.from_dict(asked["recipe"])
    progress.say("making the tokenizer and measuring the speed of every arm")
    runs.make_tokenizer(recipe, out / "tokenizer")
    trained = [arm for arm in asked["arms"] if arm != FLOOR]
    parts = [part for n in range(workers) if (part := asked["arms"][n::workers])]
    paths = [out / f"speed-{n}.json" for n in range(len(parts))]
    _processes(
        measure,
        [(asked["recipe"], part, out, path) for part, path in zip(parts, paths, strict=True)],
        workers,
        lambda job: None,
    )
    speed: dict[str, dict[str, Any]] = {}
    for file in paths:
        speed |= json.loads(file.read_text())
        file.unlink()
    # Of very few minutes measuring may take all: the runs get half of them at least.
    left = max(
        60 * asked["minutes"] - (_processor_seconds(workers) - started), 30 * asked["minutes"]
    )
    budget = plan_budget(speed, left * workers * _PLANNED, asked["seeds"])
    plan = asked | {
        "budget": budget,
        "steps": {arm: steps_for(budget, speed[arm]["stages"]) for arm in trained}
        | ({FLOOR: 0} if FLOOR in asked["arms"] else {}),
        "speed": speed,
        "workers": workers,
    }
    write_atomically(path, json.dumps(plan, indent=2) + "\n")
    return plan


def plan_budget(speed: dict[str, dict[str, Any]], seconds: float, seeds: int) -> float:
    """The operations of pre-training that every run may take, so that all take `seconds`.

    Args:
        speed: of each arm what `measure` found. seconds: of one core, for all arms and seeds.
            What fine-tuning takes comes first; pre-training gets a tenth of the time at least.
    """
    fixed = seeds * sum(arm["other_seconds"] for arm in speed.values())
    # two_stage's stages have equally many steps: the seconds of all stages, by their operations.
    per_operation = sum(
        sum(arm["seconds"]) / sum(arm["stages"]) for arm in speed.values() if arm["stages"]
    )
    if not per_operation:
        return 1.0
    return max(seconds - fixed, 0.1 * seconds) / seeds / per_operation


def measure(recipe_values: dict[str, Any], arms: list[str], out: Path, path: Path) -> None:
    """Writes for each arm: stages (operations a step), seconds (a step, of each stage) and
    other_seconds (of a run, for all that is not pre-training).

    Seconds are of the processor: where other programs run too the study takes longer, but its
    models do not become smaller.
    """
    recipe = Recipe.from_dict(recipe_values)
    started = time.process_time()
    tokenizer = tokenizers.load(out / "tokenizer")
    corpus = runs.make_corpus(recipe, tokenizer)
    data = runs.make_finetuning_data(recipe, tokenizer)
    loading = time.process_time() - started
    size = tokenizer.get_vocab_size()
    _, config = recipe.settings("mlm", "").configs(size, tokenizers.special_id(tokenizer, "[PAD]"))
    scoring = sum(_finetuning_seconds(recipe, part, tokenizer, config) for part in data.values())
    found: dict[str, dict[str, Any]] = {}
    for arm in arms:
        points = 1 if arm == FLOOR else len(recipe.fractions)
        found[arm] = {"stages": [], "seconds": [], "other_seconds": loading + points * scoring}
        if arm == FLOOR:
            continue
        task = Pretraining(recipe.settings(arm, str(out / "speed"), steps=40), corpus)
        trainer = Trainer(task, task.settings)
        found[arm]["stages"] = runs.stage_flops(task)
        for _ in found[arm]["stages"]:
            found[arm]["seconds"].append(_seconds_a_step(trainer, 5, 15))
    write_atomically(path, json.dumps(found) + "\n")


def _finetuning_seconds(
    recipe: Recipe, data: runs.FinetuningData, tokenizer: Any, config: Config
) -> float:
    """What fine-tuning and scoring take."""
    task = runs.finetuning_task(recipe, data, tokenizer, config, 0, Path())
    seconds = _seconds_a_step(Trainer(task, task.settings), 3, 10) * task.settings.steps
    started = time.process_time()
    task.evaluate()
    return seconds + time.process_time() - started


def _seconds_a_step(trainer: Trainer, first: int, steps: int) -> float:
    """Of `steps` steps behind the `first`, which are slower."""
    trainer.measure(first)
    started = time.process_time()
    trainer.measure(steps)
    return (time.process_time() - started) / steps


def _processor_seconds(workers: int) -> float:
    """Of this process, and of those that it waited for, `workers` at a time."""
    times = os.times()
    own, children = times.user + times.system, times.children_user + times.children_system
    return own + children / workers


def _run_all(out: Path, plan: dict[str, Any], workers: int, progress: Progress) -> None:
    """Runs what has no result yet; of one seed all arms, then of the next."""
    jobs = [(arm, seed) for seed in range(plan["seeds"]) for arm in plan["arms"]]
    todo = [job for job in jobs if not runs.result_path(out, *job).exists()]
    done = len(jobs) - len(todo)
    progress.start("runs", done, len(jobs))

    def finished(job: Job) -> None:
        nonlocal done
        done += 1
        arm, seed = job[1:3]
        point = json.loads(runs.result_path(out, arm, seed).read_text())["points"][-1]
        progress.say(
            f"{arm}, seed {seed}: topics {point['topics']:.1f}, "
            f"acceptability {point['acceptability']:.1f}"
        )
        progress.update(done, "")

    try:
        _processes(
            _one,
            [(plan["recipe"], arm, seed, plan["steps"][arm], out) for arm, seed in todo],
            workers,
            finished,
        )
    finally:
        progress.stop()


def _one(recipe: dict[str, Any], arm: str, seed: int, steps: int, out: Path) -> None:
    runs.run(Recipe.from_dict(recipe), arm, seed, steps, out, _WhileParentLives())


@contextmanager
def _terminable(out: Path) -> Iterator[None]:
    """Makes SIGTERM an exception, so that children are stopped before this process ends."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"SIGTERM: stopped; the same command goes on with {out}")

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Only a program's main thread may handle signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


class _WhileParentLives(NoProgress):
    """Stops a run, with a checkpoint, when the process that started it is gone."""

    def update(self, step: int, note: str) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            signal.raise_signal(signal.SIGTERM)


def _processes(
    target: Callable[..., None],
    jobs: list[Job],
    workers: int,
    finished: Callable[[Job], None],
) -> None:
    """Calls target(*job) in a process of its own for each job, `workers` at a time.

    Raises:
        RuntimeError: a process failed; it said why. The others are stopped then.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), dict[int, tuple[Any, Job]]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = context.Process(target=_alone, args=(target, job))
                process.start()
                running[process.sentinel] = process, job
            for sentinel in connection.wait(list(running)):
                process, job = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    named = ", ".join(str(v) for v in job if isinstance(v, (str, int)))
                    raise RuntimeError(f"{target.__name__.strip('_')} failed: {named}")
                finished(job)
    finally:
        for process, _ in running.values():
            process.terminate()  # A run leaves a checkpoint first.
        for process, _ in running.values():
            process.join()


def _alone(target: Callable[..., None], job: Job) -> None:
    """A child's whole work: one thread, and a signal from its parent only (not by Ctrl-C)."""
    os.setpgrp()
    torch.set_num_threads(1)
    # Without this every fine-tuning would say that its classifier's head is new.
    logging.getLogger("fastdeberta.models").setLevel(logging.ERROR)
    try:
        target(*job)
    except Interrupted:
        sys.exit(1)
