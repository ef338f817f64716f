"""Rivals in replaced-token-detection pre-training: ours, and a loop over transformers' modules.

All train the same two networks, from the same weights, on batches of random tokens without padding.
A step is all that is done with a batch: masking, both networks, sampling, both losses, the backward
pass, clipping and AdamW, with dropout. The embeddings are tied.

python -m benchmarks.pretrainers RIVAL FAMILY BATCH LENGTH prints the MiB that a step takes beyond
what it finds: weights, gradients' places and the optimiser's state.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdeberta.attention import set_backend
from fastdeberta.pretraining.batches import Batch, Corruption
from fastdeberta.pretraining.examples import Rows
from fastdeberta.pretraining.objectives import OBJECTIVES
from fastdeberta.pretraining.pair import ReplacedTokenDetection
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.tying import untied
from fastdeberta.training.distributed import to_device
from fastdeberta.training.draws import Draws
from fastdeberta.training.optimizer import clip_gradients, make_optimizer, parameter_groups

from .cases import Shape
from .memory import peak

VOCABULARY, MASK, SPECIAL = 30522, 4, range(5)
MASKED = 0.15

# ELECTRA-small's discriminator and its generator of a quarter of the width; the same size with
# DeBERTaV3's attention, and a generator of half the layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "electra": {"discriminator": {"embedding_size": 128}, "generator_width": 0.25},
    "deberta-v2": {"generator_half_depth": True},
}


class Ours:
    """The package's objective, corruption and optimiser, as the trainer uses them."""

    def __init__(
        self,
        family: str,
        shape: Shape,
        device: str = "cpu",
        dtype: str = "fp32",
        backend: str = "auto",
    ):
        settings = FAMILIES[family]
        sizes = {
            "model_type": family,
            "hidden_size": shape.heads * shape.head_dim,
            "num_hidden_layers": 12,
            "num_attention_heads": shape.heads,
            "intermediate_size": 4 * shape.heads * shape.head_dim,
            **settings.get("discriminator", {}),
        }
        self.settings = PretrainSettings(**{**settings, "discriminator": sizes})
        generator, config = self.settings.configs(VOCABULARY, pad_token_id=0)
        torch.manual_seed(0)
        objective = OBJECTIVES["electra"](config, generator=generator, tie="embeddings")
        assert isinstance(objective, ReplacedTokenDetection)
        self.objective = objective.to(device).train()
        set_backend(self.objective, backend)
        groups = parameter_groups(self.objective.parameters(), 1e-4, self.settings.weight_decay)
        self.optimizer = make_optimizer(groups, self.settings)
        special = torch.zeros(VOCABULARY, dtype=torch.bool)
        special[list(SPECIAL)] = True
        self.corruption = Corruption(MASK, special, MASKED)
        self.device, self.bf16, self.steps = torch.device(device), dtype == "bf16", 0
        self.ids = random_ids(shape)

    def batch(self) -> Batch:
        count = len(self.ids)
        return self.corruption(Rows(self.ids), Draws(0, self.steps, 0, count, count))

    def step(self) -> None:
        batch = self.batch()
        self.steps += 1
        counts = self.objective.counts(batch)
        with _autocast(self.device, self.bf16):
            sums = self.objective(to_device(batch, self.device))
        mlm, rtd = (sums[name] / counts[name] for name in ("mlm_loss", "rtd_loss"))
        (mlm + self.settings.rtd_weight * rtd).backward()
        clip_gradients(self.optimizer, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self, batch: Batch) -> list[Tensor]:
        """Both mean losses on a batch, in evaluation mode, in float32."""
        self.objective.eval()
        with torch.no_grad():
            sums = self.objective(batch._replace(numbers=torch.zeros_like(batch.positions).float()))
            rtd = self.objective.discriminate(batch, corrupted(batch)).mean()
        self.objective.train()
        return [sums["mlm_loss"] / batch.chosen, rtd]


class ReplacedTokenModel(nn.Module):
    """transformers' DeBERTaV3 encoder under the head that transformers lacks."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        x = self.head.LayerNorm(states + states[:, :1])
        logits = self.head.classifier(self.head.act(self.head.dense(x))).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())


class Peer:
    """A plain loop over transformers' modules, from the weights of `ours`.

    Args:
        gather: put the generator's head on the masked tokens alone, as its user would have to
            write; transformers' own models put it on all of them.
    """

    def __init__(self, ours: Ours, gather: bool = False):
        from transformers import AutoModelForMaskedLM, DebertaV2Model, ElectraForPreTraining

        with tempfile.TemporaryDirectory() as directory:
            for name, model in ours.objective.models().items():
                untied(model).save_pretrained(Path(directory) / name)
            generator, discriminator = (Path(directory) / name for name in ours.objective.models())
            self.generator = AutoModelForMaskedLM.from_pretrained(generator)
            self.electra = ours.settings.discriminator["model_type"] == "electra"
            if self.electra:
                self.discriminator = ElectraForPreTraining.from_pretrained(discriminator)
                encoders = self.generator.electra, self.discriminator.electra
            else:
                encoder = DebertaV2Model.from_pretrained(discriminator)
                head = untied(ours.objective.discriminator).head
                self.discriminator = ReplacedTokenModel(encoder, head)
                encoders = self.generator.deberta, encoder
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            if hasattr(encoders[0].embeddings, name):
                setattr(encoders[1].embeddings, name, getattr(encoders[0].embeddings, name))
        self.encoder, self.gather = encoders[0], gather
        self.networks = nn.ModuleList([self.generator, self.discriminator]).to(ours.device).train()
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.01
        )
        self.ids, self.device, self.bf16 = ours.ids.to(ours.device), ours.device, ours.bf16
        self.mask = torch.ones_like(self.ids)
        self.rtd_weight = ours.settings.rtd_weight

    def step(self) -> None:
        chosen = (torch.rand(self.ids.shape, device=self.device) < MASKED) & (self.ids > MASK)
        with _autocast(self.device, self.bf16):
            mlm, logits = self.propose(self.ids.masked_fill(chosen, MASK), chosen)
            with torch.no_grad():
                noise = torch.rand_like(logits, dtype=torch.float32).clamp_(min=1e-9)
                samples = (logits.float() - noise.log().neg().log()).argmax(-1)
                replaced = self.ids.masked_scatter(chosen, samples)
            rtd = self.judge(replaced)
        (mlm + self.rtd_weight * rtd).backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def propose(self, masked: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss, and its logits at the chosen tokens [N, vocab]."""
        if not self.gather:
            labels = self.ids.masked_fill(~chosen, -100)
            output = self.generator(masked, attention_mask=self.mask, labels=labels)
            return output.loss, output.logits[chosen]
        hidden = self.encoder(masked, attention_mask=self.mask).last_hidden_state[chosen]
        if self.electra:
            logits = self.generator.generator_lm_head(self.generator.generator_predictions(hidden))
        else:
            table = self.encoder.embeddings.word_embeddings
            logits = self.generator.lm_predictions(hidden, table)
        return nn.functional.cross_entropy(logits, self.ids[chosen]), logits

    def judge(self, replaced: Tensor) -> Tensor:
        """The discriminator's loss."""
        labels = (replaced != self.ids).long()
        output = self.discriminator(replaced, attention_mask=self.mask, labels=labels)
        return output.loss if self.electra else output

    def losses(self, batch: Batch) -> list[Tensor]:
        """As `Ours.losses`."""
        self.networks.eval()
        chosen = torch.zeros_like(self.ids, dtype=torch.bool)
        chosen.view(-1)[batch.positions] = True
        with torch.no_grad():
            losses = [self.propose(batch.inputs, chosen)[0], self.judge(corrupted(batch))]
        self.networks.train()
        return losses


RIVALS: dict[str, Callable[[Ours], Peer]] = {
    "transformers, plain loop": Peer,
    "transformers, head on masked tokens": partial(Peer, gather=True),
}


def corrupted(batch: Batch) -> Tensor:
    """A batch whose chosen tokens are others: each the one before it."""
    ids = batch.input_ids.flatten()
    return ids.index_copy(0, batch.positions, ids.roll(1)[batch.positions]).view_as(batch.input_ids)


def random_ids(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.length)
    return torch.randint(len(SPECIAL), VOCABULARY, size, generator=generator)


def _autocast(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def main(rival: str, family: str, batch: str, length: str) -> None:
    ours = Ours(family, Shape(int(batch), 16, heads=4))
    trained = RIVALS[rival](ours) if rival in RIVALS else ours
    trained.step()  # What a first step loads and keeps is not a step's memory.
    ours.ids = random_ids(Shape(int(batch), int(length)))
    if isinstance(trained, Peer):
        trained.ids, trained.mask = ours.ids, torch.ones_like(ours.ids)
    print(peak(trained.step))


if __name__ == "__main__":
    main(*sys.argv[1:])
