"""The generator-discriminator pair, what the two share, and their joint loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import Config, Model
from .corruption import Masked, choose_positions, sample, substitute

TIES = ("none", "embeddings", "gdes")

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class DeltaEmbedding(nn.Module):
    """GDES: a table that is another's, without gradient, plus a learned difference.

    The difference starts at zero and is named `_weight`, as in microsoft/DeBERTa's checkpoints.

    Source: DeBERTaV3, section 3.3.
    """

    def __init__(self, base: nn.Embedding):
        super().__init__()
        self._base = [base]  # In a list: the table is the generator's parameter, not ours.
        self._weight = nn.Parameter(torch.zeros_like(base.weight))
        self.num_embeddings = base.num_embeddings

    @property
    def weight(self) -> Tensor:
        """The sum, [num_embeddings, size]; gradients reach the difference only."""
        return self._base[0].weight.detach() + self._weight

    def forward(self, ids: Tensor) -> Tensor:
        shared = nn.functional.embedding(ids, self._base[0].weight.detach())
        return shared + nn.functional.embedding(ids, self._weight)


class PairOutput(NamedTuple):
    """One step of the pair, all that losses and evaluations need.

    mlm_logits: [B, K, vocab]. masked: the chosen positions. samples: int64 [B, K].
    rtd_logits: [B, L]. replaced: bool [B, L]. scored: bool [B, L], the real tokens.
    """

    mlm_logits: Tensor
    masked: Masked
    samples: Tensor
    rtd_logits: Tensor
    replaced: Tensor
    scored: Tensor


class Losses(NamedTuple):
    """Sums and counts, so that means over any number of batches can be formed exactly."""

    mlm_sum: Tensor
    mlm_count: Tensor
    rtd_sum: Tensor
    rtd_count: Tensor

    def total(self, rtd_weight: float) -> Tensor:
        """L_MLM + rtd_weight * L_Disc."""
        return self.mlm_sum / self.mlm_count + rtd_weight * self.rtd_sum / self.rtd_count


class Pair(nn.Module):
    """A masked language model that proposes tokens, and a discriminator that finds them.

    Args:
        generator, discriminator: their configs. Unless tie is "none", both must have the same
            vocabulary and embedding_size; a narrower generator projects the shared tables.
        tie: "none"; "embeddings", one set of token, position and type tables; or "gdes", the
            discriminator's tables are the generator's, without gradient, plus a difference.
        mask_id, special_ids: the tokenizer's [MASK], and every token that is never masked.
        mask_fraction: fraction of tokens to mask. temperature: of the generator's samples.

    Raises:
        ValueError: unknown tie, or configs that cannot be tied so.

    Source: ELECTRA, section 3; GDES: DeBERTaV3, section 3.3.
    """

    special: Tensor

    def __init__(
        self,
        generator: Config,
        discriminator: Config,
        tie: str = "embeddings",
        *,
        mask_id: int,
        special_ids: list[int],
        mask_fraction: float = 0.15,
        temperature: float = 1.0,
    ):
        super().__init__()
        if tie not in TIES:
            raise ValueError(f"tie must be one of {', '.join(TIES)}; got {tie!r}")
        if not 0 < mask_fraction < 1:
            raise ValueError(f"mask_fraction must be in (0, 1), got {mask_fraction}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.generator = Model(generator, "mlm")
        self.discriminator = Model(discriminator, "rtd")
        self.tie = tie
        self.mask_id, self.mask_fraction, self.temperature = mask_id, mask_fraction, temperature
        special = torch.zeros(generator.vocab_size, dtype=torch.bool)
        special[special_ids] = True
        self.register_buffer("special", special, persistent=False)
        if tie != "none":
            self._tie()

    def _tie(self) -> None:
        ours, theirs = self.generator.backbone.embeddings, self.discriminator.backbone.embeddings
        for name in _TABLES:
            table, other = getattr(ours, name), getattr(theirs, name)
            if table is None or other is None:
                continue
            if table.weight.shape != other.weight.shape:
                raise ValueError(
                    f"tie={self.tie!r} needs {name} of one shape: the generator has "
                    f"{list(table.weight.shape)}, the discriminator {list(other.weight.shape)}; "
                    "give both the discriminator's vocab_size and embedding_size"
                )
            setattr(theirs, name, table if self.tie == "embeddings" else DeltaEmbedding(table))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PairOutput:
        """Masks, proposes, samples and discriminates: steps 1 to 6 of ELECTRA.

        Args:
            input_ids: int64 [B, L]. attention_mask: [B, L], nonzero = real; None: all are.
        """
        maskable = ~self.special[input_ids]
        if attention_mask is not None:
            maskable &= attention_mask.bool()
        masked = choose_positions(input_ids, maskable, self.mask_fraction)
        inputs = substitute(input_ids, masked, self.mask_id)
        backbone = self.generator.backbone
        hidden = backbone(inputs, attention_mask)[-1]
        # Gather first: the product with the vocabulary runs on the chosen positions only.
        chosen = hidden.gather(1, masked.positions.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        assert self.generator.head is not None
        mlm_logits = self.generator.head(chosen, backbone.embeddings.word_embeddings.weight)
        samples = sample(mlm_logits, self.temperature)
        corrupted = substitute(input_ids, masked, samples)
        rtd_logits = self.discriminator(corrupted, attention_mask).logits
        assert rtd_logits is not None
        scored = torch.ones_like(maskable) if attention_mask is None else attention_mask.bool()
        replaced = corrupted != input_ids
        return PairOutput(mlm_logits, masked, samples, rtd_logits, replaced, scored)

    def losses(self, output: PairOutput) -> Losses:
        """The two losses of one batch as sums and counts (ELECTRA, section 3.1)."""
        chosen = output.masked.chosen.float()
        mlm = nn.functional.cross_entropy(
            output.mlm_logits.float().flatten(0, 1),
            output.masked.original.flatten(),
            reduction="none",
        )
        scored = output.scored.float()
        rtd = nn.functional.binary_cross_entropy_with_logits(
            output.rtd_logits.float(), output.replaced.float(), reduction="none"
        )
        return Losses(
            (mlm * chosen.flatten()).sum(), chosen.sum(), (rtd * scored).sum(), scored.sum()
        )

    def export_discriminator(self) -> Model:
        """The discriminator on its own, GDES tables folded into one."""
        model = Model(self.discriminator.config, "rtd")
        state = dict(self.discriminator.state_dict())
        embeddings = self.discriminator.backbone.embeddings
        for name in _TABLES:
            part = getattr(embeddings, name)
            if isinstance(part, DeltaEmbedding):
                prefix = f"backbone.embeddings.{name}."
                state.pop(prefix + "_weight")
                state[prefix + "weight"] = part.weight.detach()
        model.load_state_dict(state)
        return model
