"""Which objectives, algorithms, ties and generators go together, and why others do not."""

from dataclasses import dataclass

from .tying import TIES

OBJECTIVES = ("electra", "electra_15", "replace_mlm", "all_tokens_mlm", "mlm", "mlm+ar")
ALGORITHMS = ("joint", "two_stage", "adversarial")
SAMPLINGS = ("multinomial", "gumbel")
GENERATORS = ("network", "unigram", "uniform")

SINGLE = ("mlm", "mlm+ar")  # objectives of one network


@dataclass(frozen=True)
class Refusal:
    """A combination of any of these is refused, with its reason."""

    reason: str
    objectives: tuple[str, ...] = OBJECTIVES
    algorithms: tuple[str, ...] = ALGORITHMS
    ties: tuple[str, ...] = TIES
    generators: tuple[str, ...] = GENERATORS


REFUSALS = (
    Refusal("it trains one network", SINGLE, algorithms=("two_stage", "adversarial")),
    Refusal("it has no second network to tie", SINGLE, ties=("embeddings", "all", "gdes")),
    Refusal("it has no generator", SINGLE, generators=("unigram", "uniform")),
    Refusal(
        "the generator's reward is the loss of a discriminator of replaced tokens",
        ("replace_mlm", "all_tokens_mlm"),
        algorithms=("adversarial",),
    ),
    Refusal(
        "the generator is frozen while the discriminator trains, and so would be what they share",
        algorithms=("two_stage",),
        ties=("embeddings", "all"),
    ),
    Refusal(
        "one encoder would have to raise and to lower the same loss",
        algorithms=("adversarial",),
        ties=("all",),
    ),
    Refusal(
        "a generator without a network has nothing to train",
        algorithms=("two_stage", "adversarial"),
        generators=("unigram", "uniform"),
    ),
    Refusal(
        "a generator without a network has no weights to tie",
        ties=("embeddings", "all", "gdes"),
        generators=("unigram", "uniform"),
    ),
)


def check_combination(objective: str, algorithm: str, tie: str, generator: str) -> None:
    """Raises ValueError, with the reason, for a combination that cannot be trained."""
    chosen = (objective, algorithm, tie, generator)
    for refusal in REFUSALS:
        sets = (refusal.objectives, refusal.algorithms, refusal.ties, refusal.generators)
        if all(value in values for value, values in zip(chosen, sets, strict=True)):
            raise ValueError(
                f"objective {objective!r}, algorithm {algorithm!r}, tie {tie!r}, generator_type "
                f"{generator!r} do not go together: {refusal.reason}"
            )


def default_tie(objective: str, generator: str) -> str:
    """The tie of a config that names none: GDES where there are two networks."""
    return "none" if objective in SINGLE or generator != "network" else "gdes"
