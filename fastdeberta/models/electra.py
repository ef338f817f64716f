"""ELECTRA: named configs, and the names that its checkpoints use."""

from typing import Any

from .config import Config

_ATTENTION = [
    (f".attention.self.{ours}.", f".attention.self.{theirs}.")
    for ours, theirs in (("query_proj", "query"), ("key_proj", "key"), ("value_proj", "value"))
]

_BACKBONE = [("backbone.embeddings.embed_proj.", "electra.embeddings_project.")]

# Our parameter names -> transformers' names, by head; longest prefix first.
KEYS: dict[str, list[tuple[str, str]]] = {
    "base": [*_BACKBONE, ("backbone.", "electra.")],
    "mlm": [
        ("head.bias", "generator_lm_head.bias"),
        ("head.", "generator_predictions."),
        *_BACKBONE,
        ("backbone.", "electra."),
    ],
    "rtd": [
        ("head.classifier.", "discriminator_predictions.dense_prediction."),
        ("head.", "discriminator_predictions."),
        *_BACKBONE,
        ("backbone.", "electra."),
    ],
    "sequence": [("head.", "classifier."), *_BACKBONE, ("backbone.", "electra.")],
}

# Names inside a layer that differ, wherever they stand.
INNER_KEYS = _ATTENTION

# What a checkpoint may carry beside one model: other heads.
OTHER_KEYS = (
    "generator_predictions.",
    "generator_lm_head.",
    "discriminator_predictions.",
    "classifier.",
    "qa_outputs.",
    "sequence_summary.",
)

ARCHITECTURES = {
    "base": "ElectraModel",
    "mlm": "ElectraForMaskedLM",
    "rtd": "ElectraForPreTraining",
    "sequence": "ElectraForSequenceClassification",
}


def _electra(layers: int, hidden: int, heads: int, embedding: int, **changes: Any) -> Config:
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


def small(**changes: Any) -> Config:
    """ELECTRA-Small: 12 layers of 256, embeddings of 128. Keywords change fields."""
    return _electra(12, 256, 4, 128, **changes)


def base(**changes: Any) -> Config:
    """ELECTRA-Base: 12 layers of 768. Keywords change fields."""
    return _electra(12, 768, 12, 768, **changes)


def large(**changes: Any) -> Config:
    """ELECTRA-Large: 24 layers of 1024. Keywords change fields."""
    return _electra(24, 1024, 16, 1024, **changes)
