"""DeBERTa v1, v2 and v3: named configs, as released. Keywords change fields."""

from dataclasses import replace
from typing import Any

from .config import Config

V1: dict[str, Any] = {
    "model_type": "deberta",
    "vocab_size": 50265,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["c2p", "p2c"],
    "legacy": False,
}
V2: dict[str, Any] = {
    "model_type": "deberta-v2",
    "vocab_size": 128100,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "legacy": False,
}
# In its encoder a DeBERTaV3 is a v2 without the convolution.
V3 = V2
V2_CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}


def v1_base(**changes: Any) -> Config:
    """microsoft/deberta-base: 12 layers of 768, 100M backbone parameters."""
    return _config(V1, 12, 768, 12, changes)


def v1_large(**changes: Any) -> Config:
    """microsoft/deberta-large: 24 layers of 1024, 350M backbone parameters."""
    return _config(V1, 24, 1024, 16, changes)


def v1_xlarge(**changes: Any) -> Config:
    """microsoft/deberta-xlarge: 48 layers of 1024, 700M backbone parameters."""
    return _config(V1, 48, 1024, 16, changes)


def v2_xlarge(**changes: Any) -> Config:
    """microsoft/deberta-v2-xlarge: 24 layers of 1536, 710M backbone parameters."""
    return _config(V2 | V2_CONVOLUTION, 24, 1536, 24, changes)


def v2_xxlarge(**changes: Any) -> Config:
    """microsoft/deberta-v2-xxlarge: 48 layers of 1536, 1320M backbone parameters."""
    return _config(V2 | V2_CONVOLUTION, 48, 1536, 24, changes)


def v3_xsmall(**changes: Any) -> Config:
    """microsoft/deberta-v3-xsmall: 12 layers of 384, 22M backbone parameters."""
    return _config(V3, 12, 384, 6, changes)


def v3_small(**changes: Any) -> Config:
    """microsoft/deberta-v3-small: 6 layers of 768, 44M backbone parameters."""
    return _config(V3, 6, 768, 12, changes)


def v3_base(**changes: Any) -> Config:
    """microsoft/deberta-v3-base: 12 layers of 768, 86M backbone parameters."""
    return _config(V3, 12, 768, 12, changes)


def v3_large(**changes: Any) -> Config:
    """microsoft/deberta-v3-large: 24 layers of 1024, 304M backbone parameters."""
    return _config(V3, 24, 1024, 16, changes)


def mdeberta_v3_base(**changes: Any) -> Config:
    """microsoft/mdeberta-v3-base: v3-base with 251,000 tokens of 100 languages."""
    return _config(V3 | {"vocab_size": 251000}, 12, 768, 12, changes)


def generator(discriminator: Config, **changes: Any) -> Config:
    """A v3 generator: as wide as its discriminator and half as deep (DeBERTaV3, section 4.1)."""
    return replace(discriminator, num_hidden_layers=discriminator.num_hidden_layers // 2, **changes)


def _config(
    family: dict[str, Any], layers: int, hidden: int, heads: int, changes: dict[str, Any]
) -> Config:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return Config(**{**family, **size, **changes})
