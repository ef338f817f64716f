"""Checkpoints of a run: everything that continues it exactly, whole or not there."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files import atomic_directory, write_atomically
from .distributed import Ranks

STATE = "state.json"
WEIGHTS = "training.safetensors"
OPTIMIZER = "optimizer.pt"
AVERAGES = "averages.safetensors"
SHARDS = "shards"


class Weights(NamedTuple):
    """What training changes; averages: by parameter name, empty without them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, Tensor]


def save(
    output: Path,
    step: int,
    weights: Weights,
    state: dict[str, Any],
    export: Callable[[Path], None],
    keep: int,
    ranks: Ranks,
    sharded: bool = False,
) -> Path:
    """Writes output/checkpoint-STEP and removes all but the newest `keep` checkpoints.

    Called by every rank. With `sharded` each rank writes its part (torch.distributed.checkpoint),
    which any number of ranks can read; else rank 0 writes all.

    Args:
        state: what else the run needs, as JSON. export: writes the loadable models; every rank
            calls it.
    """
    from safetensors.torch import save_file, save_model

    path = output / f"checkpoint-{step}"
    with _shared_directory(path, ranks) as fresh:
        if sharded:
            _save_shards(fresh / SHARDS, weights)
        elif ranks.main:
            save_model(weights.model, str(fresh / WEIGHTS))
            torch.save(weights.optimizer.state_dict(), fresh / OPTIMIZER)
            if weights.averages:
                save_file(weights.averages, fresh / AVERAGES)
        export(fresh)
        if ranks.main:
            write_atomically(fresh / STATE, json.dumps({"step": step, **state}))
    for old in checkpoints(output)[:-keep] if ranks.main else []:
        shutil.rmtree(old)
    return path


def load(path: Path, weights: Weights, sharded: bool = False) -> dict[str, Any]:
    """Restores model, optimiser and averages in place; returns the saved state.

    Raises:
        ValueError: the checkpoint is damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        if sharded:
            _load_shards(path / SHARDS, weights)
        else:
            load_model(weights.model, str(path / WEIGHTS))
            state = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
            weights.optimizer.load_state_dict(state)
            for name, value in load_file(path / AVERAGES).items() if weights.averages else ():
                weights.averages[name].copy_(value)
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (
        SafetensorError,
        UnpicklingError,
        CheckpointException,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        OSError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or of another model: {reason}") from None


@contextmanager
def _shared_directory(path: Path, ranks: Ranks) -> Iterator[Path]:
    """`atomic_directory` of rank 0, on every rank; ends when the directory is in its place."""
    if ranks.main:
        with atomic_directory(path) as fresh:
            ranks.share(str(fresh))
            yield fresh
    else:
        yield Path(ranks.share(None))
    ranks.wait()


def _save_shards(path: Path, weights: Weights) -> None:
    from torch.distributed import checkpoint as dcp

    with _quiet():
        dcp.save(_named(weights), checkpoint_id=path)


def _load_shards(path: Path, weights: Weights) -> None:
    from torch.distributed import checkpoint as dcp

    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    optimizer = weights.optimizer
    for name, parameter in weights.model.named_parameters():
        # AdamW's state exists once a parameter has had a gradient.
        if f"optimizer.exp_avg.{name}" in saved and not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    named = _named(weights)
    if named.keys() != saved.keys():
        raise ValueError(f"unexpected {sorted(named.keys() ^ saved.keys())[0]}")
    with _quiet():
        dcp.load(named, checkpoint_id=path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process: a sharded run may go on in one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _named(weights: Weights) -> dict[str, Tensor]:
    """All tensors of a run, which share memory with it, by names that do not depend on ranks."""
    parameters = dict(weights.model.named_parameters())
    buffers = weights.model.state_dict().keys() & dict(weights.model.named_buffers()).keys()
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"model.{name}": weights.model.get_buffer(name) for name in sorted(buffers)}
    tensors |= {f"average.{name}": value for name, value in weights.averages.items()}
    for name, parameter in parameters.items():
        for key, value in weights.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def remove_unfinished(output: Path) -> None:
    """Removes what a killed run was writing when it died; see `files.atomic_directory`."""
    for kind in ("writing", "replaced"):
        for path in output.glob(f".checkpoint-*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
