"""One config for every model: the fields, names and defaults of transformers' configs."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_atomically

MODEL_TYPES = ("deberta", "deberta-v2", "electra")

SPAN_HEADS = ("linear", "beam")

# Where a family's checkpoints, which omit defaults, mean something else than this class does.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "deberta": {
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "deberta-v2": {},
    "electra": {
        "vocab_size": 30522,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
}


@dataclass
class Config:
    """Shape and settings of one DeBERTa (v1, v2, v3) or ELECTRA encoder and its head.

    Fields mean what they mean in transformers' DebertaConfig, DebertaV2Config and ElectraConfig;
    emd and emd_passes, sequence_head and the span_* fields are this package's. Keys this class does
    not know stay in `extra` and are written back by `save`.

    Raises:
        ValueError: an unknown model_type or kind of head, or sizes that do not fit together.
    """

    model_type: str = "deberta-v2"
    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    embedding_size: int | None = None  # None: hidden_size
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    pad_token_id: int = 0
    position_biased_input: bool = True
    relative_attention: bool = False
    max_relative_positions: int = -1  # below 1: max_position_embeddings
    position_buckets: int = -1  # below 1: linear positions
    pos_att_type: list[str] = field(default_factory=list)
    share_att_key: bool = False
    talking_head: bool = False  # v1 only
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0  # 0: no convolution
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None  # None: hidden_dropout_prob
    classifier_dropout: float | None = None  # ELECTRA; None: hidden_dropout_prob
    summary_activation: str = "gelu"  # ELECTRA's choice head
    summary_last_dropout: float = 0.1
    legacy: bool = True  # DeBERTa's MLM head: cls.predictions (True) or lm_predictions
    emd: bool | None = None  # enhanced mask decoder below the MLM head; None: as the checkpoint
    emd_passes: int = 2
    is_decoder: bool = False  # causal attention in every layer
    sequence_head: str = "pooled"  # "linear": Google's ELECTRA, no dense layer
    span_head: str = "linear"  # "beam": XLNet's, ends conditioned on starts, and answerability
    span_beam_size: int = 20  # beam
    span_hidden_size: int = 512  # beam: layer below the end and the answerability logits
    span_answerable: bool = True  # beam: does the text hold an answer?
    span_answerable_weight: float = 0.5  # of that logit's loss
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type must be one of {', '.join(MODEL_TYPES)}; got {self.model_type!r}"
            )
        for name, kinds in (("sequence_head", ("pooled", "linear")), ("span_head", SPAN_HEADS)):
            if getattr(self, name) not in kinds:
                raise ValueError(
                    f"{name} must be one of {', '.join(kinds)}; got {getattr(self, name)!r}"
                )
        if isinstance(self.pos_att_type, str):
            self.pos_att_type = self.pos_att_type.split("|")
        self.pos_att_type = [term.strip() for term in self.pos_att_type if term.strip()]
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, got {self.conv_kernel_size}")
        if self.emd and (self.num_hidden_layers < 2 or self.emd_passes < 1):
            raise ValueError(
                "emd needs num_hidden_layers >= 2 and emd_passes >= 1, got "
                f"{self.num_hidden_layers} and {self.emd_passes}"
            )
        for name in ("span_beam_size", "span_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        positions = self.extra.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"position_embedding_type must be 'absolute', got {positions!r}")

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def label2id(self) -> dict[str, int]:
        return {label: i for i, label in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From the keys of a transformers config.json."""
        values = dict(values)
        known = {f.name for f in fields(cls)} - {"extra"}
        values = {**_FAMILY_DEFAULTS.get(values.get("model_type", ""), {}), **values}
        if "num_labels" in values and "id2label" not in values:
            values["id2label"] = {i: f"LABEL_{i}" for i in range(values["num_labels"])}
        chosen = {k: v for k, v in values.items() if k in known and v is not None}
        if "id2label" in chosen:
            chosen["id2label"] = {int(i): label for i, label in chosen["id2label"].items()}
        derived = known | {"num_labels", "label2id"}
        return cls(**chosen, extra={k: v for k, v in values.items() if k not in derived})

    def to_dict(self) -> dict[str, Any]:
        """The keys of a config.json that transformers reads."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        optional = {f.name for f in fields(self) if f.default is None}
        values = {k: v for k, v in values.items() if v is not None or k not in optional}
        return {**self.extra, **values, "label2id": self.label2id}

    @classmethod
    def load(cls, directory: str | Path) -> "Config":
        """From `directory`/config.json.

        Raises:
            FileNotFoundError, ValueError: no such file, or not a JSON object.
        """
        path = Path(directory) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(f"{path} must hold a JSON object with a model_type")
        return cls.from_dict(values)

    def save(self, directory: str | Path) -> None:
        """Writes `directory`/config.json."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        write_atomically(Path(directory) / "config.json", text + "\n")
