"""ELECTRA: named configs, as released. Keywords change fields."""

from dataclasses import replace
from typing import Any

from .config import Config


def small(**changes: Any) -> Config:
    """google/electra-small-discriminator: 12 layers of 256, embeddings of 128, 14M parameters.

    Its released generator is of the same width, where the paper has a quarter.
    """
    return _config(12, 256, 4, 128, changes)


def base(**changes: Any) -> Config:
    """google/electra-base-discriminator: 12 layers of 768, 110M parameters."""
    return _config(12, 768, 12, 768, changes)


def large(**changes: Any) -> Config:
    """google/electra-large-discriminator: 24 layers of 1024, 335M parameters."""
    return _config(24, 1024, 16, 1024, changes)


def generator(discriminator: Config, width: float = 0.25, **changes: Any) -> Config:
    """A generator as deep as its discriminator and a fraction as wide (ELECTRA, section 3.2).

    Tables keep the discriminator's embedding_size, so that the two can share them. The paper's
    fractions: small 1/4, base 1/3, large 1/4.

    Raises:
        ValueError: width outside of (0, 1].
    """
    if not 0 < width <= 1:
        raise ValueError(f"width must be in (0, 1], got {width}")
    hidden = round(discriminator.hidden_size * width)
    heads = max(1, hidden // 64)
    size = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return replace(discriminator, **{**size, **changes})


def _config(
    layers: int, hidden: int, heads: int, embedding: int, changes: dict[str, Any]
) -> Config:
    values: dict[str, Any] = {
        "model_type": "electra",
        "vocab_size": 30522,
        "embedding_size": embedding,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        **changes,
    }
    return Config(**values)
