"""Presets: the published sizes and recipes of pre-training, by name, and a miniature of each."""

from pathlib import Path
from typing import Any

from ..models import Config
from ..training.settings import load_yaml

DIRECTORY = Path(__file__).parent.parent / "presets"

# Keys of a preset that say how its text becomes tokens; `fastdeberta prepare` takes these.
TEXT = ("held_out", "tokenizer_kind", "vocab_size", "lowercase")

# What a miniature changes: sizes, and what a short run on 5 MB of text needs. A third and a quarter
# of its width are whole numbers; of four layers a generator of half the depth has two, which its
# mask decoder needs.
WIDTH, HEADS, POSITIONS = 96, 3, 64
MINIATURE: dict[str, Any] = {
    "steps": 2000,
    "warmup_steps": 200,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "sequence_length": POSITIONS,
    "vocab_size": 4096,
    "held_out": 0.02,
    "log_every": 10,
    "evaluate_every": 500,
    "checkpoint_every": 500,
}
MINIATURE_NETWORK: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}


def names() -> list[str]:
    """The shipped presets."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def find(config: str | Path) -> Path:
    """The file of a config: a path, or a shipped preset's NAME or presets/NAME.yaml.

    Raises:
        FileNotFoundError: neither; the message lists the presets.
    """
    path = Path(config)
    if path.is_file():
        return path
    shipped = DIRECTORY / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path(), Path("presets")) and shipped.is_file():
        return shipped
    raise FileNotFoundError(f"no such config file: {config}; presets: {', '.join(names())}")


def pretraining_values(config: str | Path, small: bool = False) -> dict[str, Any]:
    """What a config file or a preset says of pre-training; a preset's output is runs/NAME.

    Args:
        small: the preset's miniature, see `miniature`; its output is runs/NAME-miniature.

    Raises:
        FileNotFoundError, ValueError: no such file or preset; not YAML; a miniature of another
            file.
    """
    path = find(config)
    values = load_yaml(path)
    if not _is_shipped(path):
        if small:
            raise ValueError(f"--miniature takes a preset ({', '.join(names())}), got {config}")
        return values
    values = miniature(values) if small else values
    return {"output": f"runs/{path.stem}{'-miniature' if small else ''}", **values}


def preparation_values(config: str | Path) -> dict[str, Any]:
    """What a config file says of `fastdeberta prepare`; of a preset: its tokenizer, and how much
    text is held out.

    Raises:
        FileNotFoundError, ValueError: no such file or preset; not YAML.
    """
    path = find(config)
    values = load_yaml(path)
    return {key: values[key] for key in TEXT} if _is_shipped(path) else values


def miniature(values: dict[str, Any]) -> dict[str, Any]:
    """A preset's values at a size that trains in minutes on two cores, on the embedded text.

    One rule for all. The network gets 4 layers of 96 in heads of 32, its inner layers and
    embeddings in proportion, its initial weights wider by the root of how much narrower it is, and
    64 positions, its buckets in proportion. The run gets MINIATURE's steps, batch, length,
    vocabulary and learning rate. Everything else is the preset's: objective, algorithm, tie,
    masking, the generator's share of width or depth, loss weight, schedule, the optimiser's
    constants, dropout, attention's terms, mask decoder, convolution, kind of tokenizer.
    """
    network = values["discriminator"]
    width = WIDTH / network["hidden_size"]
    length = POSITIONS / network["max_position_embeddings"]
    scaled: dict[str, Any] = {
        key: round(network[key] * factor)
        for key, factor in (
            ("intermediate_size", width),
            ("embedding_size", width),
            ("position_buckets", length),
        )
        if key in network
    }
    scaled["initializer_range"] = Config.initializer_range * width**-0.5
    small = {**values, **MINIATURE, "discriminator": {**network, **MINIATURE_NETWORK, **scaled}}
    if "generator_width" in values:  # It would have one head up to a width of 127.
        heads = max(1, round(HEADS * values["generator_width"]))
        small["generator"] = {**values.get("generator", {}), "num_attention_heads": heads}
    return small


def _is_shipped(path: Path) -> bool:
    return path.resolve().parent == DIRECTORY.resolve()
