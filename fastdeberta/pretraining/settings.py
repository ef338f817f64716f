"""The settings of a pre-training run: one flat YAML file."""

from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from ..models import Config, deberta, electra
from ..training.settings import CHOICES, TrainSettings, convert, unknown_key
from .combinations import (
    ALGORITHMS,
    GENERATORS,
    OBJECTIVES,
    SAMPLINGS,
    SINGLE,
    check_combination,
    default_tie,
)
from .examples import LAYOUTS
from .text import EMBEDDED
from .tying import TIES

_CHOICES = {
    "objective": OBJECTIVES,
    "algorithm": ALGORITHMS,
    "layout": tuple(LAYOUTS),
    "tie": TIES,
    "generator_type": GENERATORS,
    "sampling": SAMPLINGS,
    "generator_schedule": CHOICES["schedule"],
}


@dataclass
class PretrainSettings(TrainSettings):
    """Pre-training from text, as ELECTRA, DeBERTa and DeBERTaV3 have it.

    discriminator: fields of its Config; of the only network's where the objective has one.
    generator: fields in which the generator differs, after generator_width and
    generator_half_depth.
    """

    output: str = "runs/pretrain"
    data: str = EMBEDDED  # a directory that `fastdeberta prepare` wrote, or see `text.Corpus`
    held_out: float = 0.02  # fraction of documents kept for evaluation
    tokenizer: str | None = None  # a tokenizer file or directory; None trains one on the text
    lowercase: bool = False
    vocab_size: int = 8192  # of a tokenizer trained here
    tokenizer_kind: str = "unigram"  # or "bpe", "wordpiece"
    sequence_length: int = 128
    layout: str = "stream"  # or "segments" (ELECTRA's pairs), "packed" (documents of their own)
    objective: str = "electra"  # or electra_15, replace_mlm, all_tokens_mlm, mlm, mlm+ar
    algorithm: str = "joint"  # or "two_stage", "adversarial"
    tie: str | None = None  # "none", "embeddings", "all" or "gdes"; None: gdes where it can be
    generator_type: str = "network"  # or "unigram", "uniform": samples without a network
    generator_width: float | None = None  # of the discriminator's (ELECTRA); None: the same
    generator_half_depth: bool = False  # half of the discriminator's layers (DeBERTaV3)
    generator_steps: int | None = None  # of two_stage's first stage; None: half of them
    warm_start_steps: int = 0  # adversarial: steps of the generator's own loss before its reward
    mask_fraction: float = 0.15
    mask_replacement: bool = False  # draw positions with replacement, as Google's ELECTRA
    mask_token_fraction: float | None = None  # of the chosen; None: 0.8 for mlm objectives, else 1
    random_token_fraction: float | None = None  # None: 0.1 for mlm objectives, else 0
    max_ngram: int = 1  # above 1: spans of up to so many words
    whole_words: bool | None = None  # None: with spans
    sampling: str = "multinomial"  # or "gumbel", whose draws depend on the number of ranks
    temperature: float = 1.0  # of the generator's samples
    rtd_weight: float = 50.0  # the discriminator's loss beside the generator's
    generator_learning_rate: float | None = None  # None: learning_rate; so with the next four
    generator_warmup_steps: int | None = None
    generator_schedule: str | None = None
    generator_weight_decay: float | None = None
    generator_max_grad_norm: float | None = None
    discriminator: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        for key, names in _CHOICES.items():
            value = getattr(self, key)
            if value is not None and value not in names:
                raise ValueError(f"{key} must be one of {', '.join(names)}; got {value!r}")
        self._check_numbers()
        if self.tie is None:
            self.tie = default_tie(self.objective, self.generator_type)
        check_combination(self.objective, self.algorithm, self.tie, self.generator_type)
        if self.mask_replacement and self.max_ngram > 1:
            raise ValueError("mask_replacement must be false with max_ngram above 1: spans are")
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

    def _check_numbers(self) -> None:
        for key in ("held_out", "mask_fraction"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key} must be in (0, 1), got {getattr(self, key)}")
        for key in (
            "rtd_weight",
            "warm_start_steps",
            "generator_warmup_steps",
            "generator_weight_decay",
        ):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise ValueError(f"{key} must not be negative, got {value}")
        for key in ("temperature", "generator_learning_rate", "generator_max_grad_norm"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"{key} must be positive, got {value}")
        if self.max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {self.max_ngram}")
        if self.generator_steps is not None and not 0 < self.generator_steps < self.steps:
            raise ValueError(
                f"generator_steps must be in (0, steps = {self.steps}), got {self.generator_steps}"
            )
        mask, other = self.mask_split
        if min(mask, other) < 0 or mask + other > 1:
            raise ValueError(
                "mask_token_fraction and random_token_fraction must not be negative, nor above 1 "
                f"together; got {mask} and {other}"
            )

    @property
    def mask_split(self) -> tuple[float, float]:
        """Of the chosen tokens, those that become [MASK] and those that become another token."""
        given = self.mask_token_fraction, self.random_token_fraction
        usual = (0.8, 0.1) if self.objective in SINGLE else (1.0, 0.0)
        mask = usual[0] if given[0] is None else given[0]
        return mask, min(usual[1], 1 - mask) if given[1] is None else given[1]

    @property
    def first_stage(self) -> int:
        """Steps of two_stage in which the generator trains."""
        return self.steps // 2 if self.generator_steps is None else self.generator_steps

    def configs(self, vocab_size: int, pad_token_id: int) -> tuple[Config, Config]:
        """Configs of generator and discriminator for a tokenizer.

        Where there is no generator's network, its settings are left alone and both are one.
        """
        family = self.discriminator.get("model_type", "deberta-v2")
        shared = {**_SIZE, **_FAMILIES.get(family, {}), **self.discriminator}
        shared |= {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
        discriminator = Config.from_dict(shared)
        # A narrower generator projects the discriminator's tables: they keep their size.
        generator = discriminator
        if self.objective not in SINGLE and self.generator_type == "network":
            if self.generator_width is not None:
                generator = electra.generator(generator, self.generator_width)
            if self.generator_half_depth:
                generator = deberta.generator(generator)
            generator = replace(generator, **self.generator)
        if self.objective == "mlm+ar" and discriminator.conv_kernel_size > 0:
            raise ValueError(
                "objective 'mlm+ar' needs discriminator.conv_kernel_size = 0: a convolution shows "
                "every token the next one"
            )
        for part, config in (("discriminator", discriminator), ("generator", generator)):
            absolute = config.model_type == "electra" or config.position_biased_input or config.emd
            if absolute and self.sequence_length > config.max_position_embeddings:
                raise ValueError(
                    f"sequence_length must be at most {part}.max_position_embeddings = "
                    f"{config.max_position_embeddings}, got {self.sequence_length}"
                )
        return generator, discriminator


# A size for experiments, and what is usual in a family; a config file changes what it wants.
_SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "deberta": deberta.V1,
    "deberta-v2": deberta.V3,
    "electra": {"model_type": "electra"},
}
