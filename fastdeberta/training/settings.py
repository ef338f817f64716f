"""Settings: dataclasses filled from YAML and key=value pairs, with errors that name the key."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")

# The values of settings that are one of several names.
CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "schedule": ("linear", "constant", "cosine", "google"),
    "parallel": ("ddp", "fsdp"),
}


@dataclass
class TrainSettings:
    """What every training run has. Steps count optimiser steps."""

    output: str = "runs/run"  # directory of the run
    steps: int = 1000
    batch_size: int = 32  # sequences a step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches that each rank's share of a step is cut into
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    schedule: str = "linear"  # decay to zero; or "constant", "cosine", "google"
    weight_decay: float = 0.01  # not on biases and LayerNorm
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    bias_correction: bool = True  # of AdamW's moments; Google's ELECTRA has none
    max_grad_norm: float = 1.0
    ema: float = 0.0  # decay of averaged weights, which are then evaluated and exported
    precision: str = "fp32"  # or "bf16", "fp16": autocast, the latter with scaled losses
    compile: bool = False  # torch.compile of the encoders in training; dropout draws otherwise
    activation_checkpointing: bool = False  # layers run again in the backward pass: less memory
    workers: int = 0  # threads that make the batches of the next steps; 0: each when it is needed
    parallel: str = "ddp"  # of several ranks: whole copies; or "fsdp", each holds its share
    device: str = "auto"  # "cuda" where there is one, else "cpu"
    backend: str = "auto"  # of attention
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 500  # 0: at the end only
    checkpoint_every: int = 500  # 0: at the end only
    keep_checkpoints: int = 2

    def check(self) -> None:
        """Raises ValueError for a value out of range, naming its key."""
        for key, names in CHOICES.items():
            if getattr(self, key) not in names:
                raise ValueError(
                    f"{key} must be one of {', '.join(names)}; got {getattr(self, key)!r}"
                )
        for key in ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key in (
            "warmup_steps",
            "evaluate_every",
            "checkpoint_every",
            "weight_decay",
            "workers",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        for key in ("learning_rate", "max_grad_norm", "epsilon"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}")
        for key in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be in [0, 1), got {getattr(self, key)}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation must be at most batch_size = {self.batch_size}, "
                f"got {self.accumulation}"
            )


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a YAML mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such config file: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold key: value pairs")
    return values


def apply_overrides(values: dict[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """Adds "key=value" pairs; a dotted key reaches into a nested mapping. Values are YAML."""
    import yaml

    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        target = values
        *path, name = key.split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key}: {part!r} holds a value, not keys")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{key}: {text!r} is not a YAML value") from None
    return values


def build(cls: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """A settings dataclass from a mapping.

    Raises:
        ValueError: an unknown key (with the nearest valid one), or a value of the wrong type.
    """
    known = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    chosen = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(unknown_key(key, names, where))
        chosen[key] = convert(value, known[key], f"{where}{key}")
    settings = cls(**chosen)
    if isinstance(settings, TrainSettings):
        settings.check()
    return settings


def unknown_key(key: str, names: Iterable[str], where: str = "") -> str:
    """The message for a key that does not exist."""
    near = difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    hint = f"; did you mean {where + near[0]!r}?" if near else ""
    return f"unknown config key {where + key!r}{hint}"


def to_yaml(settings: Any) -> str:
    """Settings as YAML, every key resolved."""
    import yaml

    return yaml.safe_dump(asdict(settings), sort_keys=False)


def convert(value: Any, expected: Any, key: str) -> Any:
    """A value as the type hint `expected`; ValueError, naming the key, where it does not fit."""
    options = typing.get_args(expected) if _is_union(expected) else (expected,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is type(None) and value is None:
            return None
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 2e-3 as a string.
            except ValueError:
                continue
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(origin, type) and isinstance(value, origin):
            return value
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{key} must be {wanted}, got {value!r}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
