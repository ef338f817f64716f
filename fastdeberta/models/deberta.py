"""DeBERTa-v2 and v3: named configs, and the names that their checkpoints use."""

from typing import Any

from .config import Config

# Our parameter names -> transformers' (and microsoft's) names, by head; longest prefix first.
KEYS: dict[str, list[tuple[str, str]]] = {
    "base": [("backbone.", "deberta.")],
    "mlm": [("head.", "lm_predictions.lm_head."), ("backbone.", "deberta.")],
    "mlm_legacy": [
        ("head.dense.", "cls.predictions.transform.dense."),
        ("head.LayerNorm.", "cls.predictions.transform.LayerNorm."),
        ("head.bias", "cls.predictions.bias"),
        ("backbone.", "deberta."),
    ],
    "rtd": [("head.", "mask_predictions."), ("backbone.", "deberta.")],
    "sequence": [
        ("head.pooler.", "pooler."),
        ("head.classifier.", "classifier."),
        ("backbone.", "deberta."),
    ],
}

# What a checkpoint may carry beside one model: other heads, and transformers' tied duplicates.
OTHER_KEYS = ("cls.", "lm_predictions.", "mask_predictions.", "pooler.", "classifier.")

ARCHITECTURES = {
    "base": "DebertaV2Model",
    "mlm": "DebertaV2ForMaskedLM",
    "sequence": "DebertaV2ForSequenceClassification",
}


# What makes a DeBERTaV3, whatever its size.
V3: dict[str, Any] = {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "legacy": False,
}


def _v3(layers: int, hidden: int, heads: int, **changes: Any) -> Config:
    size = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return Config(**{**V3, **size, **changes})


def v3_xsmall(**changes: Any) -> Config:
    """DeBERTaV3-xsmall: 12 layers of 384, 22M backbone parameters. Keywords change fields."""
    return _v3(12, 384, 6, **changes)


def v3_small(**changes: Any) -> Config:
    """DeBERTaV3-small: 6 layers of 768, 44M backbone parameters. Keywords change fields."""
    return _v3(6, 768, 12, **changes)


def v3_base(**changes: Any) -> Config:
    """DeBERTaV3-base: 12 layers of 768, 86M backbone parameters. Keywords change fields."""
    return _v3(12, 768, 12, **changes)


def v3_large(**changes: Any) -> Config:
    """DeBERTaV3-large: 24 layers of 1024, 304M backbone parameters. Keywords change fields."""
    return _v3(24, 1024, 16, **changes)
