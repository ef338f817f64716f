"""What the study compares: its arms, the recipe that they share, and each one's steps."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..pretraining.settings import PretrainSettings

# Fine-tuning without pre-training.
FLOOR = "random"

_SMALL = {"tie": "embeddings"}  # with the recipe's small generator
_SAME = {"generator_width": None}  # generator and discriminator of one size

# Each arm's settings, where they differ from the recipe.
ARMS: dict[str, dict[str, Any]] = {
    "electra": _SMALL,
    "electra_15": {"objective": "electra_15", **_SMALL},
    "replace_mlm": {"objective": "replace_mlm", **_SMALL},
    "all_tokens_mlm": {"objective": "all_tokens_mlm", **_SMALL},
    "mlm": {"objective": "mlm", "tie": "none"},
    "tie_none": {"tie": "none", **_SAME},
    "tie_embeddings": {"tie": "embeddings", **_SAME},
    "tie_all": {"tie": "all", **_SAME},
    "two_stage": {"algorithm": "two_stage", "tie": "none", **_SAME},
    "adversarial": {"algorithm": "adversarial", **_SMALL},
    FLOOR: {},
}


@dataclass(frozen=True)
class Comparison:
    """Arms that one experiment of ELECTRA's paper compares.

    paper: the arms with their scores there (GLUE, dev), or None where it has a plot only.
    above: the pairs (better, worse) that the paper orders.
    """

    title: str
    paper: dict[str, float | None]
    above: tuple[tuple[str, str], ...]


def _ordered(scores: dict[str, float]) -> tuple[tuple[str, str], ...]:
    return tuple((a, b) for a in scores for b in scores if scores[a] > scores[b])


_OBJECTIVES = {
    "electra": 85.0,
    "all_tokens_mlm": 84.3,
    "replace_mlm": 82.4,
    "electra_15": 82.4,
    "mlm": 82.2,
}
_TIES = {"tie_all": 84.4, "tie_embeddings": 84.3, "tie_none": 83.6}
_PLOTTED = dict[str, float | None]

# Source: ELECTRA, table 5 (objectives), section 3.2 (ties; a generator of the discriminator's
# size) and figure 3 (algorithms).
COMPARISONS = (
    Comparison("objectives", _PLOTTED(_OBJECTIVES), _ordered(_OBJECTIVES)),
    Comparison("ties", _PLOTTED(_TIES), _ordered(_TIES)),
    Comparison(
        "algorithms",
        {"electra": 85.0, "adversarial": None, "tie_none": 83.6, "two_stage": None},
        (("electra", "adversarial"), ("tie_none", "two_stage")),
    ),
)


def _encoder() -> dict[str, Any]:
    return {
        # The demo's encoder, but for one layer: its recipe was tuned for few minutes.
        "model_type": "deberta-v2",
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "position_buckets": 32,
        "max_relative_positions": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # 0.02 belongs to widths of 768 and more; narrow layers start too flat with it.
        "initializer_range": 0.1,
    }


@dataclass(frozen=True)
class Recipe:
    """What all arms share: data, encoder, pre-training and fine-tuning.

    documents: of the embedded text; None: all. labelled, dev: the fractions of them that give
    the examples for fine-tuning and for its scores; pre-training reads the others.
    fractions: of the compute, ascending to 1, after which a model is fine-tuned and scored.
    """

    documents: int | None = None
    labelled: float = 0.2
    dev: float = 0.1
    vocab_size: int = 4096
    sequence_length: int = 64
    batch_size: int = 16
    learning_rate: float = 1e-3
    generator_learning_rate: float = 2e-3
    rtd_weight: float = 20.0
    generator_width: float = 0.25
    precision: str = "bf16"
    encoder: dict[str, Any] = field(default_factory=_encoder)
    fractions: tuple[float, ...] = (0.5, 1.0)
    finetune_batch_size: int = 32
    finetune_learning_rate: float = 5e-4
    finetune_dropout: float = 0.0
    finetune_length: int = 64
    topics: int = 1000
    topics_epochs: float = 4.0
    acceptability: int = 4000
    acceptability_epochs: float = 3.0
    acceptability_dev: int = 2000

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe that a study wrote: tuples are lists in JSON."""
        fractions = tuple(values["fractions"])
        return cls(**{f.name: values[f.name] for f in fields(cls)} | {"fractions": fractions})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fractions": list(self.fractions)}

    def settings(self, arm: str, output: str, seed: int = 0, steps: int = 2) -> PretrainSettings:
        """Pre-training of an arm: seeds set initialisation, data order and masks.

        Raises:
            ValueError: an unknown arm.
        """
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}; got {arm!r}")
        quarter = max(1, steps // 4)
        values: dict[str, Any] = {
            "output": output,
            "seed": seed,
            "steps": steps,
            "warmup_steps": max(1, steps // 20),
            "lowercase": True,
            "vocab_size": self.vocab_size,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "generator_learning_rate": self.generator_learning_rate,
            "rtd_weight": self.rtd_weight,
            "generator_width": self.generator_width,
            "precision": self.precision,
            "epsilon": 1e-8,
            "device": "cpu",
            "discriminator": self.encoder,
            "log_every": quarter,
            "evaluate_every": quarter,
            "checkpoint_every": quarter,
            "keep_checkpoints": 6,  # All of them: quarters, and the last step.
        }
        return PretrainSettings(**{**values, **ARMS[arm]})


def steps_for(budget: float, stages: list[float]) -> int:
    """How many steps take `budget` operations, at least one of each stage.

    Args:
        stages: operations a step, of stages that have equally many steps (one, or two of
            two_stage). The steps are a multiple of their number, and what they take is within one
            step of the budget.

    Raises:
        ValueError: the budget is not positive.
    """
    if not budget > 0:
        raise ValueError(f"budget must be positive, got {budget}")
    return len(stages) * max(1, round(budget / sum(stages)))
