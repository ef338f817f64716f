"""Adversarial training of the generator, by policy gradient."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ..models import Config
from .batches import POLICY, Batch
from .objective import vocabulary_losses, weighted_sum
from .pair import ChosenTokenDetection, ReplacedTokenDetection


class AdversarialDetection(ReplacedTokenDetection):
    """`electra` whose generator is to raise the discriminator's loss, by REINFORCE.

    The reward of a sample is the discriminator's loss at its position, R = -log p(what it is).
    From it a baseline b = -log sigmoid(w h), h being the generator's state there, is subtracted;
    w is trained by the cross-entropy between exp(-R) and sigmoid(w h), and moves nothing else. In
    the phase "policy" the generator follows the policy's gradient, before it its masked language
    model's (warm start).

    Source: ELECTRA, appendix F (adversarial training).
    """

    def __init__(self, config: Config, **options: Any):
        super().__init__(config, **options)
        assert self.generator is not None
        self.baseline = nn.Linear(self.generator.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.baseline.weight)

    def networks(self) -> dict[str, list[nn.Module]]:
        assert self.generator is not None
        return {"generator": [self.generator, self.baseline], "discriminator": [self.discriminator]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert self.generator is not None
        outcome = self.generate(batch)
        assert outcome.losses is not None and outcome.samples is not None
        assert outcome.hidden is not None
        policy = batch.phase == POLICY
        mlm = outcome.losses.detach() if policy else outcome.losses
        detection = self.detection_losses(batch, outcome.corrupted)
        reward = detection.detach()[batch.positions]
        estimate = self.baseline(outcome.hidden.detach()).squeeze(-1).to(reward.dtype)
        baseline = binary_cross_entropy_with_logits(estimate, (-reward).exp(), reduction="none")
        sums = {
            "mlm_loss": weighted_sum(mlm, batch),
            self.name: detection[self.judged(batch)].sum(),
            "baseline_loss": weighted_sum(baseline, batch),
        }
        if policy:
            surprise, _ = vocabulary_losses(
                self.generator, outcome.hidden, outcome.samples, temperature=self.temperature
            )
            advantage = reward - softplus(-estimate.detach())
            sums["policy_loss"] = weighted_sum(advantage * surprise, batch)
        return sums

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = {**super().counts(batch), "baseline_loss": batch.chosen}
        return {**counts, "policy_loss": batch.chosen} if batch.phase == POLICY else counts


class AdversarialChosenDetection(AdversarialDetection, ChosenTokenDetection):
    """`electra_15` with the generator of `AdversarialDetection`."""
