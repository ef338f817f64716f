"""Checkpoints of every released layout in, transformers' layout out. Names: layouts.py."""

import json
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import atomic_directory, write_atomically
from . import layouts
from .config import MODEL_TYPES, Config
from .heads import HEADS
from .model import Model
from .weights import (
    INDEX,
    find_weights,
    from_tensorflow,
    read_weights,
    write_safetensors,
    written,
)

_CONFIG, _MICROSOFT_CONFIG = "config.json", "model_config.json"
_GENERATOR_CONFIG = "generator_config.json"

# Where a discriminator's generator may lie, seen from the discriminator's directory.
_GENERATORS = (
    "pytorch_model.generator.bin",
    "pytorch_model.generator.safetensors",
    "model.generator.safetensors",
    "generator",
    "../generator",
)

_log = logging.getLogger(__name__)


@dataclass
class Report:
    """How a file's names met a model's.

    missing, reshaped: our names of backbone parameters that the file lacks, or has in another
    shape. new: our names of head parameters of either kind, which keep their random values where
    that was allowed. unexpected: names in the file without a meaning, as transformers spells
    them. left_out: names of other heads, of tables that this model does not use, and of what is no
    parameter.
    """

    missing: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class CheckpointError(ValueError):
    """Weights that do not match a model; `report` holds every name."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


def from_pretrained(
    path_or_hub_id: str | Path,
    head: str = "base",
    allow_new_head: bool = False,
    *,
    weights: str | None = None,
    generator: str | Path | None = None,
    **changes: Any,
) -> Model:
    """Loads a model from a directory, or from the Hugging Face Hub.

    Read are transformers' layout of every version, Microsoft's files of DeBERTa v1 to v3 (also
    their model_config.json), BERT encoders (as ELECTRA, without their heads), and Google's ELECTRA
    as arrays (see `weights.read_arrays`; head "mlm" is its generator, sizes come from the arrays,
    with a head for every 64 columns unless num_attention_heads says otherwise). What the weights
    hold decides over the config where the two are known to disagree: which masked language model
    head there is, and, unless the config says `emd`, whether a mask decoder stands below it
    (position embeddings in a file whose input has none). Names that were left out are logged.

    Args:
        path_or_hub_id: a directory with config.json and model.safetensors or pytorch_model.bin,
            either sharded or not (pickles are read with weights_only=True); or with arrays; else
            the name of a hub repository.
        head: base, mlm, rtd, causal, sequence, token, span, choice or entity.
        allow_new_head: let head parameters that the checkpoint lacks, or has in another shape,
            start from random values; otherwise they are an error.
        weights: the name of the file to read where it is none of the usual ones. The generator in
            a DeBERTaV3 directory is weights="pytorch_model.generator.bin"; its
            generator_config.json is taken if it is there.
        generator: file or directory of the generator whose tables are added to GDES differences
            (`_weight`). Read only where a file holds the difference alone; None: looked for
            beside the weights.
        changes: fields of the config to override (id2label, dropout rates, ...).

    Raises:
        FileNotFoundError: no such directory and no such repository, or no weights in it.
        ValueError: unknown head or field, damaged file, or parameters that do not match
            (CheckpointError, with a report of every name).
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}")
    unknown = set(changes) - set(Config.__dataclass_fields__)
    if unknown:
        raise ValueError(f"config has no field {sorted(unknown)[0]!r}")
    directory = local_directory(path_or_hub_id, weights, generator)
    values = _config_values(directory, weights)
    source = find_weights(directory, weights)
    tensors = read_weights(source)
    if _is_tensorflow(tensors):
        tensors = from_tensorflow(tensors, head in ("mlm", "causal"))
        values = {**(values or {}), **_sizes(tensors, values or {})}
    elif values is None:
        raise FileNotFoundError(f"no {_CONFIG} in {directory}")
    values = _known_family(values, tensors, directory)
    tensors = _current(tensors, values["model_type"], source)
    config = Config.from_dict({**values, **changes})
    config = _follow_weights(config, head, tensors, changes, source)
    _add_generator(tensors, config, head, directory, generator)
    model = Model(config, head)
    report = _fill(model, tensors, source, allow_new_head)
    if report.new:
        _log.warning("%s: start from random values: %s", source, ", ".join(report.new))
    if report.left_out:
        _log.info("%s: left out: %s", source, ", ".join(report.left_out))
    return model


def load(
    model: Model,
    directory: str | Path,
    allow_new_head: bool = False,
    *,
    weights: str | None = None,
    generator: str | Path | None = None,
) -> Report:
    """Loads the weights of `directory` into `model`, all of them or none; see from_pretrained.

    The model's config decides what it has; the directory's is not read.
    """
    source = find_weights(Path(directory), weights)
    tensors, config = read_weights(source), model.config
    if _is_tensorflow(tensors):
        tensors = from_tensorflow(tensors, model.head_name in ("mlm", "causal"))
    tensors = _current(tensors, config.model_type, source)
    _add_generator(tensors, config, model.head_name, Path(directory), generator)
    return _fill(model, tensors, source, allow_new_head)


def save(model: Model, directory: str | Path, max_shard_size: int | str | None = None) -> None:
    """Writes config.json and model.safetensors in transformers' layout, as a whole.

    Weights larger than `max_shard_size` (bytes, or as "2GB"; None: no limit) become numbered
    files and model.safetensors.index.json. Other files that `directory` holds (a tokenizer,
    metrics) are kept; weights of an earlier save are replaced.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / ".model"
    with atomic_directory(fresh) as unfinished:
        write_model(model, unfinished, max_shard_size)
    before, now = (written(p.name for p in place.iterdir()) for place in (directory, fresh))
    # Each rename is atomic. An old index goes first, lest it name new shards; the new one comes
    # after its shards, and the config last.
    if INDEX in before and INDEX in now:
        (directory / INDEX).unlink()
    for name in sorted(now, key=lambda name: name == INDEX):
        (fresh / name).replace(directory / name)
    for name in set(before) - set(now):
        (directory / name).unlink()
    (fresh / _CONFIG).replace(directory / _CONFIG)
    fresh.rmdir()


def write_model(model: Model, directory: Path, max_shard_size: int | str | None = None) -> None:
    """Writes config.json and weights into a directory that nobody reads yet."""
    table = layouts.rows(model.config, model.head_name)
    tensors = {
        layouts.rename(k, table): v.detach().cpu().contiguous()
        for k, v in model.state_dict().items()
    }
    write_safetensors(tensors, directory, max_shard_size)
    write_config(model, directory)


def write_config(model: Model, directory: Path) -> None:
    """Writes config.json, with transformers' class for the model where it has one."""
    values = model.config.to_dict()
    values.pop("architectures", None)
    architecture = layouts.architecture(model.config, model.head_name)
    if architecture is not None:
        values["architectures"] = [architecture]
    text = json.dumps(values, indent=2, sort_keys=True)
    write_atomically(directory / _CONFIG, text + "\n")


def local_directory(
    path_or_hub_id: str | Path, weights: str | None = None, generator: str | Path | None = None
) -> Path:
    """A checkpoint's directory; of a hub repository, what `from_pretrained` and the tokenizer need
    is downloaded where the hub's cache lacks it.

    Raises:
        FileNotFoundError: no such directory and no such repository.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path_or_hub_id)):
        raise FileNotFoundError(f"no model directory at {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = str(path_or_hub_id)
    wanted = ["*.json", "*.model", "*.txt", *([] if generator is None else [str(generator)])]
    first = ["model*.safetensors"] if weights is None else [weights]
    second = ["pytorch_model.bin", "pytorch_model-*.bin", "*.npz", "*.npy"]
    try:
        files = snapshot_download(name, allow_patterns=[*wanted, *first])
        if weights is None and not written(p.name for p in Path(files).iterdir()):
            files = snapshot_download(name, allow_patterns=[*wanted, *second])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model directory at {path}, and the hub has no answer for it: "
            f"{type(error).__name__}"
        ) from None
    return Path(files)


# Configs


def _config_values(directory: Path, weights: str | None) -> dict[str, Any] | None:
    """The directory's config as Config.from_dict takes it; None: there is none."""
    names = [_CONFIG, _MICROSOFT_CONFIG]
    if weights is not None and "generator" in weights:
        names.insert(0, _GENERATOR_CONFIG)
    path = next((directory / name for name in names if (directory / name).exists()), None)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or not {"model_type", "hidden_size"} & set(values):
        raise ValueError(f"{path} must hold a JSON object with a model_type")
    for theirs, ours in layouts.MICROSOFT_FIELDS:
        outer, _, inner = theirs.partition(".")
        value = values.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value is not None:
            values.setdefault(ours, value)
    return values


def _known_family(
    values: dict[str, Any], tensors: dict[str, Tensor], directory: Path
) -> dict[str, Any]:
    """The config with a model_type of ours, whatever names the file's family."""
    family = values.get("model_type") or layouts.family_of(tensors)
    allowed = ", ".join((*MODEL_TYPES, "bert"))
    if family is None:
        raise ValueError(
            f"{directory} has a config without a model_type, which must be one of {allowed}, and "
            "the names of its weights are of none of these"
        )
    if family not in (*MODEL_TYPES, "bert"):
        raise ValueError(f"model_type must be one of {allowed}; got {family!r}")
    values = {**values, "model_type": family}
    if family == "bert":
        values = {**layouts.BERT_DEFAULTS, **values, "model_type": "electra"}
        return {**values, "embedding_size": values["hidden_size"]}
    if family == "deberta" and layouts.family_of(tensors) == "deberta-v2":
        # As v1 reads it first: it has other defaults.
        return {**Config.from_dict(values).to_dict(), **layouts.REARRANGED_V1}
    return values


def _sizes(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The config of Google's ELECTRA, as far as shapes show it."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    try:
        vocab, embedding = shapes["electra.embeddings.word_embeddings.weight"]
        intermediate, hidden = shapes["electra.encoder.layer.0.intermediate.dense.weight"]
        sizes = {
            "model_type": "electra",
            "vocab_size": vocab,
            "embedding_size": embedding,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": len(
                {m[1] for name in shapes if (m := re.search(r"\.layer\.(\d+)\.", name))}
            ),
            "max_position_embeddings": shapes["electra.embeddings.position_embeddings.weight"][0],
            "type_vocab_size": shapes["electra.embeddings.token_type_embeddings.weight"][0],
        }
    except KeyError as error:
        raise ValueError(f"the arrays are not Google's ELECTRA: no {error.args[0]}") from None
    if values.get("hidden_size") != hidden:
        sizes["num_attention_heads"] = max(1, hidden // 64)
    if "classifier.weight" in shapes:
        sizes["sequence_head"] = "linear"
        if "id2label" not in values:
            sizes["num_labels"] = shapes["classifier.weight"][0]
    if "qa_outputs.end_dense.weight" in shapes:
        sizes["span_head"] = "beam"
        sizes["span_hidden_size"] = shapes["qa_outputs.end_dense.weight"][0]
        sizes["span_answerable"] = "qa_outputs.impossible.weight" in shapes
    return sizes


def _follow_weights(
    config: Config,
    head: str,
    tensors: dict[str, Tensor],
    changes: dict[str, Any],
    source: Path,
) -> Config:
    """The config with what released ones leave open, or leave out, as the weights tell it."""
    if config.model_type == "electra":
        return config
    heads = [p for p in ("lm_predictions.lm_head.", "cls.predictions.") if _some_of(tensors, p)]
    if len(heads) == 1 and "legacy" not in changes:
        config = replace(config, legacy=heads == ["cls.predictions."])
    if head != "mlm":
        return config
    stem = layouts.prefix(config.model_type) + "embeddings.position_embeddings."
    has_positions = _some_of(tensors, stem)
    if config.emd and not has_positions:
        raise ValueError(f"emd=True needs {stem}weight, which {source} does not hold")
    if config.emd is None:
        return replace(config, emd=has_positions and not config.position_biased_input)
    return config


# Weights


def _is_tensorflow(tensors: dict[str, Tensor]) -> bool:
    return any("/" in name for name in tensors)


def _current(tensors: dict[str, Tensor], family: str, source: Path) -> dict[str, Tensor]:
    """The tensors under transformers' names of today, a new dict."""
    renamed: dict[str, Tensor] = {}
    # Only BERT's files have this prefix or a pooler; their heads are not ELECTRA's.
    bert = family == "electra" and any(n.startswith(("bert.", "pooler.")) for n in tensors)
    for name, tensor in tensors.items():
        new = layouts.current(name, family)
        if new in renamed:
            raise ValueError(f"{source} holds {new} twice, under two names")
        if bert and not new.startswith(layouts.prefix(family)):
            new = f"bert.{new}"
        renamed[new] = tensor
    for duplicate, name in layouts.TIED:
        name = name.format(prefix=layouts.prefix(family))
        if duplicate in renamed and name not in renamed:
            renamed[name] = renamed[duplicate]
    return renamed


def _add_generator(
    tensors: dict[str, Tensor],
    config: Config,
    head: str,
    directory: Path,
    generator: str | Path | None,
) -> None:
    """Makes tables of GDES differences that stand alone: generator's table + difference.

    Source: DeBERTaV3, section 3.3; microsoft/DeBERTa saves the difference as `_weight`.
    """
    positions = config.position_biased_input or (head == "mlm" and config.emd)
    of_generator: dict[str, Tensor] | None = None
    for table in ("word_embeddings", *(["position_embeddings"] if positions else [])):
        stem = f"{layouts.prefix(config.model_type)}embeddings.{table}."
        weight, difference = stem + "weight", stem + "_weight"
        if weight in tensors or difference not in tensors:
            continue
        if of_generator is None:
            path = _generator_path(directory, generator, difference)
            of_generator = _current(read_weights(path), config.model_type, path)
        if weight not in of_generator or of_generator[weight].shape != tensors[difference].shape:
            raise ValueError(
                f"generator must hold {weight} {list(tensors[difference].shape)}, to which "
                f"{difference} is added; {path} does not"
            )
        tensors[weight] = of_generator[weight] + tensors[difference]


def _generator_path(directory: Path, given: str | Path | None, difference: str) -> Path:
    if given is not None:
        path = directory / given if (directory / given).exists() else Path(given)
        if not path.exists():
            raise FileNotFoundError(f"generator: nothing at {given}")
        return path
    for name in _GENERATORS:
        if (directory / name).exists():
            return directory / name
    raise ValueError(
        f"{directory} holds {difference} alone: the difference (GDES) to the generator's table. "
        "Give the generator's weights as generator=, or put them beside the file as "
        f"{_GENERATORS[0]}"
    )


def _fill(model: Model, tensors: dict[str, Tensor], source: Path, allow_new_head: bool) -> Report:
    """Loads tensors under transformers' names into a model, all or none."""
    table = layouts.rows(model.config, model.head_name)
    own = model.state_dict()
    found = {layouts.rename(name, table, back=True): name for name in tensors}
    report = Report()
    other_head = any(
        name.startswith(layouts.BEFORE_CLASSIFIER) and ours not in own
        for ours, name in found.items()
    )
    for name, parameter in own.items():
        missing = name not in found or (other_head and found[name].startswith("classifier."))
        if missing or tensors[found[name]].shape != parameter.shape:
            kind = report.missing if missing else report.reshaped
            (report.new if name.startswith("head.") else kind).append(name)
    for ours, name in found.items():
        if ours in own:
            continue
        known = name.startswith(layouts.OTHER_HEADS) or layouts.NO_PARAMETERS.search(name)
        (report.left_out if known else report.unexpected).append(name)
    if report.new and not allow_new_head:
        raise CheckpointError(
            f"{source} has no weights for head {model.head_name!r} ({_some(report.new)}); "
            "allow_new_head=True lets it start from random values",
            report,
        )
    kinds = {
        "missing": report.missing,
        "unexpected": report.unexpected,
        "of another shape": report.reshaped,
    }
    problems = [f"{kind} {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not match the model: {'; '.join(problems)}", report)
    chosen = {name: tensors[found[name]] for name in own if name not in report.new}
    model.load_state_dict(chosen, strict=False)
    return report


def _some_of(tensors: dict[str, Tensor], start: str) -> bool:
    return any(name.startswith(start) for name in tensors)


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more
