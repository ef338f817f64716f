"""The settings of a pre-training run: one flat YAML file."""

from dataclasses import dataclass, field
from typing import Any, get_type_hints

from ..models import Config, deberta
from ..training.settings import TrainSettings, convert, unknown_key
from .pair import TIES
from .text import EMBEDDED


@dataclass
class PretrainSettings(TrainSettings):
    """Replaced token detection (ELECTRA; DeBERTaV3) from text.

    discriminator: fields of its Config. generator: fields that differ from the discriminator's.
    """

    output: str = "runs/pretrain"
    data: str = EMBEDDED  # "wiki-leads", a .txt or .jsonl file, or a directory of them
    held_out: float = 0.02  # fraction of documents kept for evaluation
    tokenizer: str | None = None  # a tokenizer file or directory; None trains one on the text
    lowercase: bool = False
    vocab_size: int = 8192  # of a tokenizer trained here
    tokenizer_kind: str = "unigram"  # or "bpe", "wordpiece"
    sequence_length: int = 128
    tie: str = "gdes"  # or "embeddings", "none"
    mask_fraction: float = 0.15
    temperature: float = 1.0  # of the generator's samples
    rtd_weight: float = 50.0  # the discriminator's loss beside the generator's
    generator_learning_rate: float | None = None  # None: learning_rate
    discriminator: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.tie not in TIES:
            raise ValueError(f"tie must be one of {', '.join(TIES)}; got {self.tie!r}")
        for key in ("held_out", "mask_fraction"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key} must be in (0, 1), got {getattr(self, key)}")
        if self.rtd_weight < 0:
            raise ValueError(f"rtd_weight must not be negative, got {self.rtd_weight}")
        hints = get_type_hints(Config)
        del hints["extra"]
        hints["pos_att_type"] = list[str] | str  # Checkpoints also write "p2c|c2p".
        for part in ("discriminator", "generator"):
            values = dict(getattr(self, part))
            for key, value in values.items():
                if key not in hints:
                    raise ValueError(unknown_key(key, hints, f"{part}."))
                values[key] = convert(value, hints[key], f"{part}.{key}")
            setattr(self, part, values)

    def configs(self, vocab_size: int, pad_token_id: int) -> tuple[Config, Config]:
        """Configs of generator and discriminator for a tokenizer."""
        shared = {**_SHAPE, **self.discriminator}
        shared |= {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
        discriminator = Config.from_dict(shared)
        # A narrower generator projects the discriminator's tables: they keep their size.
        shared["embedding_size"] = discriminator.embedding_size
        generator = Config.from_dict({**shared, **self.generator})
        for part, config in (("discriminator", discriminator), ("generator", generator)):
            absolute = config.model_type == "electra" or config.position_biased_input
            if absolute and self.sequence_length > config.max_position_embeddings:
                raise ValueError(
                    f"sequence_length must be at most {part}.max_position_embeddings = "
                    f"{config.max_position_embeddings}, got {self.sequence_length}"
                )
        return generator, discriminator


# A DeBERTaV3 of a size for experiments; a config file changes what it wants.
_SHAPE: dict[str, Any] = {
    **deberta.V3,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
