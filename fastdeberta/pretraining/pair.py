"""Objectives of two networks: a generator that proposes tokens, a discriminator that reads them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..models import Config, Model
from .batches import DISCRIMINATOR, GENERATOR, Batch
from .corruption import gumbel_sample, sample
from .losses import Reader, accumulator, copy_cross_entropy
from .objective import (
    Objective,
    chosen_states,
    guess_token,
    model_inputs,
    real,
    token_losses,
    token_rows,
    vocabulary_losses,
    weighted_sum,
)
from .tying import check_same_size, tie_weights


class Outcome(NamedTuple):
    """What the generator made of a batch.

    corrupted: int64 like input_ids. losses: float32 [N], of its masked language model; samples,
    guesses: int64 [N]; hidden: [N, hidden]; None without a network.
    """

    corrupted: Tensor
    losses: Tensor | None = None
    samples: Tensor | None = None
    guesses: Tensor | None = None
    hidden: Tensor | None = None


class Pair(Objective):
    """A masked language model that proposes tokens, and a network that reads them.

    Args:
        config: of the discriminator. generator: of the generator; None: the batches' `inputs` are
            samples already.
        tie: see `tie_weights`. same_size: the generator must have the discriminator's size.
        temperature, sampling: of the generator's samples; see `corruption`.

    Raises:
        ValueError: configs that cannot be tied so.

    Source: ELECTRA, section 3.
    """

    head = "mlm"
    name = ""  # of the discriminator's loss

    def __init__(
        self,
        config: Config,
        *,
        generator: Config | None = None,
        tie: str = "none",
        same_size: str | None = None,
        temperature: float = 1.0,
        sampling: str = "multinomial",
    ):
        super().__init__()
        self.temperature, self.sampling = temperature, sampling
        self.generator = None if generator is None else Model(generator, "mlm")
        self.discriminator = Model(config, self.head)
        if self.generator is not None:
            if same_size is not None:
                check_same_size(self.generator, self.discriminator, same_size)
            tie_weights(self.generator, self.discriminator, tie)

    def networks(self) -> dict[str, list[nn.Module]]:
        networks: dict[str, list[nn.Module]] = {}
        if self.generator is not None:
            networks["generator"] = [self.generator]
        networks["discriminator"] = [self.discriminator]
        return networks

    def models(self) -> dict[str, Model]:
        models = {} if self.generator is None else {"generator": self.generator}
        return {**models, "discriminator": self.discriminator}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        frozen = batch.phase == DISCRIMINATOR
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            outcome = self.generate(batch)
        sums = {} if outcome.losses is None else {"mlm_loss": weighted_sum(outcome.losses, batch)}
        if batch.phase != GENERATOR:
            sums[self.name] = self.discriminate(batch, outcome.corrupted).sum()
        return sums

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = {} if self.generator is None else {"mlm_loss": batch.chosen}
        if batch.phase != GENERATOR:
            counts[self.name] = float(self.scored(batch))
        return counts

    def generate(self, batch: Batch, guess: bool = False) -> Outcome:
        """Samples a token at every chosen position; no gradient flows through the samples.

        Args:
            guess: also find the likeliest tokens.
        """
        if self.generator is None:
            return Outcome(batch.inputs)

        def read(logits: Tensor, rows: slice) -> Tensor:
            if self.sampling == "gumbel":
                found = gumbel_sample(logits, self.temperature)
            else:
                assert batch.numbers is not None
                found = sample(logits, batch.numbers[rows], self.temperature)
            return torch.stack([found, logits.argmax(-1)], -1) if guess else found[:, None]

        hidden = chosen_states(self.generator, batch, batch.inputs)
        losses, found = vocabulary_losses(self.generator, hidden, batch.targets, read)
        assert found is not None
        samples = found[:, 0]
        ids = batch.input_ids
        corrupted = ids.flatten().index_copy(0, batch.positions, samples).view_as(ids)
        return Outcome(corrupted, losses, samples, found[:, 1] if guess else None, hidden)

    def discriminate(self, batch: Batch, corrupted: Tensor) -> Tensor:
        """The discriminator's loss on every token that it is scored on, float32 [n]."""
        raise NotImplementedError

    def scored(self, batch: Batch) -> int:
        """How many tokens the discriminator is scored on: all real ones."""
        return batch.tokens

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        outcome = self.generate(batch, guess=True)
        observed = self.observe_discriminator(batch, outcome.corrupted)
        if outcome.losses is not None and outcome.guesses is not None:
            observed["mlm_loss"] = outcome.losses
            observed["mlm_accuracy"] = outcome.guesses == batch.targets
        return observed

    def observe_discriminator(self, batch: Batch, corrupted: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class ReplacedTokenDetection(Pair):
    """`electra`: was this token replaced? Binary cross-entropy over all real tokens.

    A sample that equals the original token was not replaced. Source: ELECTRA, section 3.1.
    """

    head = "rtd"
    name = "rtd_loss"

    def judged(self, batch: Batch) -> Tensor | slice:
        """The tokens of the flattened batch that are scored."""
        return real(batch)

    def discriminate(self, batch: Batch, corrupted: Tensor) -> Tensor:
        return self.detection_losses(batch, corrupted)[self.judged(batch)]

    def detection_losses(self, batch: Batch, corrupted: Tensor) -> Tensor:
        """The loss of every token, padding too, float32 [T]."""
        logits = self.logits(batch, corrupted)
        replaced = (corrupted != batch.input_ids).flatten().to(logits.dtype)
        return binary_cross_entropy_with_logits(logits, replaced, reduction="none")

    def logits(self, batch: Batch, corrupted: Tensor) -> Tensor:
        """float32 [T] of the flattened batch; above 0 = replaced."""
        logits = self.discriminator(**model_inputs(batch, corrupted)).logits
        assert logits is not None
        return logits.to(accumulator(logits.dtype)).flatten()

    def observe_discriminator(self, batch: Batch, corrupted: Tensor) -> dict[str, Tensor]:
        logits, replaced = self.logits(batch, corrupted), (corrupted != batch.input_ids).flatten()
        losses = binary_cross_entropy_with_logits(
            logits, replaced.to(logits.dtype), reduction="none"
        )
        kept = real(batch)
        return {
            "rtd_loss": losses[self.judged(batch)],
            "rtd_logit": logits[kept],
            "replaced": replaced[kept],
        }


class ChosenTokenDetection(ReplacedTokenDetection):
    """`electra_15`: the same, scored at the chosen positions alone.

    Source: ELECTRA, section 3.4.
    """

    def judged(self, batch: Batch) -> Tensor:
        return batch.positions

    def scored(self, batch: Batch) -> int:
        return len(batch.positions)


class ReplaceMLM(Pair):
    """`replace_mlm`: a masked language model that reads the generator's samples, not [MASK].

    Source: ELECTRA, section 3.4.
    """

    name = "replace_mlm_loss"

    def discriminate(self, batch: Batch, corrupted: Tensor) -> Tensor:
        losses, _ = token_losses(self.discriminator, batch, corrupted)
        return losses if batch.weights is None else losses * batch.weights

    def counts(self, batch: Batch) -> dict[str, float]:
        counts = super().counts(batch)
        return {**counts, self.name: batch.chosen} if self.name in counts else counts

    def observe_discriminator(self, batch: Batch, corrupted: Tensor) -> dict[str, Tensor]:
        losses, guesses = token_losses(self.discriminator, batch, corrupted, read=guess_token)
        assert guesses is not None
        return {self.name: losses, "replace_mlm_accuracy": guesses == batch.targets}


class AllTokensMLM(Pair):
    """`all_tokens_mlm`: the original of every real token is predicted, by copying or by choice.

    p(v) = D 1[input = v] + (1 - D) softmax(v), D = sigmoid(w h). Source: ELECTRA, section 3.4.
    """

    name = "all_tokens_mlm_loss"

    def __init__(self, config: Config, **options: Any):
        super().__init__(config, **options)
        self.gate = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.normal_(self.gate.weight, std=config.initializer_range)

    def networks(self) -> dict[str, list[nn.Module]]:
        networks = super().networks()
        return {**networks, "discriminator": [self.discriminator, self.gate]}

    def discriminate(self, batch: Batch, corrupted: Tensor) -> Tensor:
        losses, gate, _, inputs, targets = self._predict(batch, corrupted)
        return copy_cross_entropy(losses, gate, inputs == targets)

    def _predict(
        self, batch: Batch, corrupted: Tensor, read: Reader | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """-log softmax of the originals, gates, what `read` found, inputs and originals: [n] of
        the real tokens."""
        kept = real(batch)
        inputs, targets = corrupted.flatten()[kept], batch.input_ids.flatten()[kept]
        states = self.discriminator.backbone(**model_inputs(batch, corrupted))[-1]
        hidden = token_rows(states, batch)[kept]
        losses, found = vocabulary_losses(self.discriminator, hidden, targets, read)
        return losses, self.gate(hidden).squeeze(-1), found, inputs, targets

    def observe_discriminator(self, batch: Batch, corrupted: Tensor) -> dict[str, Tensor]:
        own = corrupted.flatten()[real(batch)]

        def read(logits: Tensor, rows: slice) -> Tensor:
            """The likeliest token, its log-probability and the input's."""
            log_probs = logits.log_softmax(-1)
            best, token = log_probs.max(-1)
            copied = log_probs.gather(1, own[rows, None]).squeeze(1)
            return torch.stack([token.to(best.dtype), best, copied], -1)

        losses, gate, found, inputs, targets = self._predict(batch, corrupted, read)
        assert found is not None
        token, best, copied = found.unbind(-1)
        copy = gate.float().sigmoid()
        copies = copy + (1 - copy) * copied.exp() >= (1 - copy) * best.exp()
        right = torch.where(copies, inputs, token.long()) == targets
        return {
            self.name: copy_cross_entropy(losses, gate, inputs == targets),
            "all_tokens_mlm_accuracy": right,
            "all_tokens_mlm_accuracy_replaced": right[inputs != targets],
        }
