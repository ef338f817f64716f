"""The registry of objectives, and those of one network.

An objective is a module: called with a `Batch` it returns each loss's sum, by the names that its
`counts` has for the batch. What a step does where steps differ, the batch says (`Batch.phase`):
modules have no state but their weights.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..models import Config, Model
from .adversarial import AdversarialChosenDetection, AdversarialDetection
from .batches import CAUSAL, Batch
from .objective import Objective, guess_token, token_losses, weighted_sum
from .pair import AllTokensMLM, ChosenTokenDetection, ReplacedTokenDetection, ReplaceMLM


class LanguageModel(Objective):
    """`mlm`, BERT's masked language model; `mlm+ar`, also trained from left to right.

    A causal batch (phase "causal") is predicted by the same network and head under a causal mask.

    Source: BERT, section 3.1; DeBERTa, appendix (generation).
    """

    def __init__(self, config: Config, **options: Any):
        super().__init__()
        self.model = Model(config, "mlm")

    def networks(self) -> dict[str, list[nn.Module]]:
        return {"model": [self.model]}

    def models(self) -> dict[str, Model]:
        return {"model": self.model}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        losses, _ = token_losses(self.model, batch, batch.inputs, batch.phase == CAUSAL)
        return {_name(batch): weighted_sum(losses, batch)}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {_name(batch): batch.chosen}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        losses, guesses = token_losses(
            self.model, batch, batch.inputs, batch.phase == CAUSAL, guess_token
        )
        assert guesses is not None
        name = _name(batch)
        return {name: losses, name.replace("loss", "accuracy"): guesses == batch.targets}


def _name(batch: Batch) -> str:
    return "ar_loss" if batch.phase == CAUSAL else "mlm_loss"


# The name that users type -> the module.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "electra": ReplacedTokenDetection,
    "electra_15": ChosenTokenDetection,
    "replace_mlm": ReplaceMLM,
    "all_tokens_mlm": AllTokensMLM,
    "mlm": LanguageModel,
    "mlm+ar": LanguageModel,
}
# The same under the algorithm "adversarial".
ADVERSARIAL: dict[str, Callable[..., Objective]] = {
    "electra": AdversarialDetection,
    "electra_15": AdversarialChosenDetection,
}
