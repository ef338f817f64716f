"""Checkpoints of a run: everything that continues it exactly, whole or not there."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..files import atomic_directory, write_atomically

STATE = "state.json"
WEIGHTS = "training.safetensors"
OPTIMIZER = "optimizer.pt"


def save(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    export: Callable[[Path], None],
    keep: int,
) -> Path:
    """Writes output/checkpoint-STEP and removes all but the newest `keep` checkpoints.

    Args:
        state: what else the run needs, as JSON. export: writes the loadable models.
    """
    from safetensors.torch import save_model

    path = output / f"checkpoint-{step}"
    with atomic_directory(path) as fresh:
        save_model(model, str(fresh / WEIGHTS))
        torch.save(optimizer.state_dict(), fresh / OPTIMIZER)
        export(fresh)
        write_atomically(fresh / STATE, json.dumps({"step": step, **state}))
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)
    return path


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restores model and optimiser in place; returns the saved state.

    Raises:
        ValueError: the checkpoint is damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(model, str(path / WEIGHTS))
        optimizer.load_state_dict(torch.load(path / OPTIMIZER, weights_only=True))
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or of another model: {reason}") from None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def remove_unfinished(output: Path) -> None:
    """Removes what a killed run was writing when it died; see `files.atomic_directory`."""
    for kind in ("writing", "replaced"):
        for path in output.glob(f".checkpoint-*.{kind}-*"):
            shutil.rmtree(path, ignore_errors=True)
