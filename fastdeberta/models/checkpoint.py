"""Checkpoints: transformers' layout in and out. Conversion is the KEYS table of each family."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_directory, write_atomically
from . import deberta, electra
from .config import Config
from .heads import HEADS
from .model import Model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

# What released files carry beside a model's parameters: position numbers, the positions of
# DeBERTa's mask decoder, and GDES differences, which their tables already contain.
_IGNORED = re.compile(
    r"\.position_ids$|\.embeddings\.position_embeddings\.|\.embeddings\.\w+\._weight$"
)


def from_pretrained(
    path_or_hub_id: str | Path, head: str = "base", allow_new_head: bool = False, **changes: Any
) -> Model:
    """Loads a model from a directory in transformers' layout, or from the Hugging Face Hub.

    Args:
        path_or_hub_id: a directory with config.json and model.safetensors (sharded or not), or
            pytorch_model.bin, which is read with weights_only=True; else the name of a hub
            repository.
        head: base, mlm, rtd or sequence.
        allow_new_head: let head parameters that the checkpoint lacks, or has in another shape,
            start from random values; otherwise they are an error.
        changes: fields of the config to override (id2label, dropout rates, ...).

    Raises:
        FileNotFoundError: no such directory and no such repository, or no weights in it.
        ValueError: unknown head or field, damaged file, or parameters that do not match.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}")
    directory = _directory(path_or_hub_id)
    values = Config.load(directory).to_dict()
    if "id2label" in changes:
        values.pop("label2id", None)
    unknown = set(changes) - set(Config.__dataclass_fields__)
    if unknown:
        raise ValueError(f"config has no field {sorted(unknown)[0]!r}")
    config = Config.from_dict({**values, **changes})
    model = Model(config, head)
    load(model, directory, allow_new_head)
    return model


def load(model: Model, directory: str | Path, allow_new_head: bool = False) -> None:
    """Loads the weights of `directory` into `model`, all of them or none; see from_pretrained."""
    family, table = _table(model)
    tensors = read_weights(directory)
    renamed = {_rename(_with_prefix(key, family), table, back=True): key for key in tensors}
    own = model.state_dict()
    wrong = [k for k in own if k in renamed and own[k].shape != tensors[renamed[k]].shape]
    missing = [k for k in own if k not in renamed]
    unexpected = [
        key
        for name, key in renamed.items()
        if name not in own and not key.startswith(family.OTHER_KEYS) and not _IGNORED.search(name)
    ]
    new_head = [k for k in (*missing, *wrong) if k.startswith("head.")]
    if new_head and not allow_new_head:
        raise ValueError(
            f"{directory} has no weights for head {model.head_name!r} ({_some(new_head)}); "
            "allow_new_head=True lets it start from random values"
        )
    problems = [
        f"{kind} {_some(keys)}"
        for kind, keys in (
            ("missing", [k for k in missing if not k.startswith("head.")]),
            ("unexpected", unexpected),
            ("of another shape", [k for k in wrong if not k.startswith("head.")]),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"{directory} does not match the model: {'; '.join(problems)}")
    chosen = {k: tensors[renamed[k]] for k in own if k not in new_head}
    model.load_state_dict(chosen, strict=False)


def save(model: Model, directory: str | Path) -> None:
    """Writes config.json and model.safetensors in transformers' layout, as a whole.

    Other files that `directory` holds (a tokenizer, metrics) are kept.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_directory(directory / ".model") as fresh:
        write_model(model, fresh)
    for name in (WEIGHTS, "config.json"):  # Each rename is atomic; the config goes last.
        (directory / ".model" / name).replace(directory / name)
    (directory / ".model").rmdir()


def write_model(model: Model, directory: Path) -> None:
    """Writes config.json and model.safetensors into a directory that nobody reads yet."""
    from safetensors.torch import save_file

    family, table = _table(model)
    tensors = {
        _rename(k, table): v.detach().cpu().contiguous() for k, v in model.state_dict().items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    architecture = family.ARCHITECTURES.get(model.head_name)
    values = model.config.to_dict()
    if architecture is not None:
        values["architectures"] = [architecture]
    text = json.dumps(values, indent=2, sort_keys=True)
    write_atomically(directory / "config.json", text + "\n")


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors (whole or sharded) or pickle file.

    Raises:
        FileNotFoundError: no weights there. ValueError: a damaged file.
    """
    directory = Path(directory)
    index, pickled = directory / INDEX, directory / PICKLE
    files = [directory / WEIGHTS]
    if index.exists():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is not a JSON object with a weight_map") from None
        files = [directory / name for name in sorted(set(names))]
    elif not files[0].exists() and pickled.exists():
        try:
            return torch.load(pickled, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, UnpicklingError):
            raise ValueError(f"{pickled} is damaged, or holds more than weights") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_safetensors(file))
    return tensors


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file, or one clear error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.exists():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated: {error}") from None


def _directory(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"no config.json in {path}")
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_hub_id)):
        raise FileNotFoundError(f"no model directory at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = snapshot_download(
            str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", PICKLE, "*.model"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model directory at {path}, and the hub has no answer for it: "
            f"{type(error).__name__}"
        ) from None
    return Path(files)


def _table(model: Model) -> tuple[ModuleType, list[tuple[str, str]]]:
    if model.config.model_type == "electra":
        return electra, electra.KEYS[model.head_name] + electra.INNER_KEYS
    head = model.head_name
    return deberta, deberta.KEYS["mlm_legacy" if head == "mlm" and model.config.legacy else head]


def _rename(key: str, table: Iterable[tuple[str, str]], back: bool = False) -> str:
    """Applies the first prefix that fits, and every inner name (those start with a dot)."""
    prefixed = False
    for pair in table:
        old, new = reversed(pair) if back else pair
        if old.startswith("."):
            key = key.replace(old, new)
        elif not prefixed and key.startswith(old):
            key, prefixed = new + key[len(old) :], True
    return key


def _with_prefix(key: str, family: ModuleType) -> str:
    """A bare backbone's checkpoint has keys without the family's prefix."""
    prefix = family.KEYS["base"][-1][1]
    bare = key.startswith(("embeddings.", "encoder.", "embeddings_project."))
    return prefix + key if bare else key


def _some(keys: list[str], shown: int = 3) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(sorted(keys)[:shown]) + more
