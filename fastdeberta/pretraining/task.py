"""The task of pre-training: any objective, its data and scores; the run from text to models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import tokenizer as tokenizers
from ..files import write_atomically
from ..models import Config
from ..training.accounting import training_flops
from ..training.distributed import Ranks, to_device
from ..training.draws import Draws
from ..training.optimizer import parameter_groups
from ..training.reporting import Progress
from ..training.trainer import Trainer
from .batches import (
    CAUSAL,
    DISCRIMINATOR,
    GENERATOR,
    POLICY,
    Batch,
    Corruption,
    RowSource,
    causal,
    token_counts,
)
from .combinations import SINGLE
from .corpus import Corpus, baselines, load_corpus, starts_word
from .objective import Objective
from .objectives import ADVERSARIAL, OBJECTIVES
from .pair import Pair
from .scores import scores
from .settings import PretrainSettings
from .tying import copy_encoder, untied

_EVALUATED_TOKENS = 1 << 14  # at a time


class Pretraining:
    """The task that `Trainer` runs: an objective, its data and its scores.

    Every weight of a loss is 1, but for replaced token detection's: rtd_weight.

    Source: ELECTRA, section 3; DeBERTa, sections 3 and 4; DeBERTaV3, section 3.
    """

    title = "pre-training"

    def __init__(self, settings: PretrainSettings, corpus: Corpus):
        settings.check()
        self.settings, self.corpus = settings, corpus
        self.rows = len(corpus.train)
        size = corpus.tokenizer.get_vocab_size()
        special = {t: tokenizers.special_id(corpus.tokenizer, t) for t in tokenizers.SPECIAL_TOKENS}
        generator, config = settings.configs(size, special[tokenizers.PAD])
        self.corruption = _corruption(settings, corpus, size, special)
        torch.manual_seed(settings.seed)
        options: dict[str, Any] = {}
        if settings.objective not in SINGLE:
            options = {
                "generator": generator if settings.generator_type == "network" else None,
                "tie": settings.tie,
                "temperature": settings.temperature,
                "sampling": settings.sampling,
            }
            if settings.algorithm == "two_stage":
                options["same_size"] = "algorithm='two_stage'"
        registry = ADVERSARIAL if settings.algorithm == "adversarial" else OBJECTIVES
        self.objective: Objective = registry[settings.objective](config, **options)
        self.model: nn.Module = self.objective

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Each network's parameters; shared ones are the generator's.

        No loss of one network reaches the other's own parameters, and clipping, learning rate,
        schedule and decay are each group's: so one optimiser steps both as two would.
        """
        settings, seen = self.settings, set[int]()
        groups = []
        for network, modules in self.objective.networks().items():
            own = [p for module in modules for p in module.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            rate, decay = settings.learning_rate, settings.weight_decay
            extra: dict[str, Any] = {}
            if network == "generator":
                rate = settings.generator_learning_rate or rate
                if settings.generator_weight_decay is not None:
                    decay = settings.generator_weight_decay
                for key in ("warmup_steps", "schedule", "max_grad_norm"):
                    value = getattr(settings, f"generator_{key}")
                    if value is not None:
                        extra[key] = value
            if settings.algorithm == "two_stage":
                first, steps = settings.first_stage, settings.steps
                start, end = (0, first) if network == "generator" else (first, steps)
                extra |= {"first_step": start, "steps": end - start}
            groups += [group | extra for group in parameter_groups(own, rate, decay, network)]
        return groups

    def begin(self, step: int) -> None:
        """two_stage: the discriminator's encoder starts as the generator's."""
        if self.settings.algorithm == "two_stage" and step == self.settings.first_stage:
            assert isinstance(self.objective, Pair) and self.objective.generator is not None
            copy_encoder(self.objective.generator, self.objective.discriminator)

    def batch(self, rows: Tensor, draws: Draws) -> Batch:
        return self._batch(self.corpus.train, rows, draws, self._phase(draws.step))

    def _batch(self, source: RowSource, rows: Tensor, draws: Draws, phase: str) -> Batch:
        read = source[rows]
        if phase == CAUSAL:
            return causal(read, phase)
        return self.corruption(read, draws, phase, source.row_lengths(rows))

    def _phase(self, step: int) -> str:
        settings = self.settings
        if settings.algorithm == "two_stage":
            return GENERATOR if step < settings.first_stage else DISCRIMINATOR
        if settings.algorithm == "adversarial":
            return POLICY if step >= settings.warm_start_steps else ""
        return CAUSAL if settings.objective == "mlm+ar" and step % 2 else ""

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.objective.counts(batch)

    def weights(self, step: int) -> dict[str, float]:
        """Of all losses that train in this step; a loss left out is only logged."""
        phase = self._phase(step)
        if not isinstance(self.objective, Pair):
            return {"ar_loss" if phase == CAUSAL else "mlm_loss": 1.0}
        name = self.objective.name
        weights = {"mlm_loss": 1.0, name: self.settings.rtd_weight if name == "rtd_loss" else 1.0}
        if phase == GENERATOR:
            del weights[name]
        if phase in (DISCRIMINATOR, POLICY) or self.objective.generator is None:
            del weights["mlm_loss"]
        if self.settings.algorithm == "adversarial":
            weights |= {"baseline_loss": 1.0} | ({"policy_loss": 1.0} if phase == POLICY else {})
        return weights

    def tokens(self, batch: Batch) -> int:
        return batch.tokens

    def compute(self, batch: Batch) -> float:
        """See `training_flops`; a frozen generator's forward pass is half of its training."""
        lengths, repeats = batch.lengths().unique(return_counts=True)
        sequences = [
            (n, count) for n, count in zip(lengths.tolist(), repeats.tolist(), strict=True) if n > 0
        ]
        chosen = len(batch.positions) / max(1, batch.tokens)

        def flops(config: Config, head: str, fraction: float) -> float:
            if config.emd:  # The mask decoder's passes stand for the last layer.
                layers = config.num_hidden_layers - 1 + config.emd_passes
                config = replace(config, num_hidden_layers=layers)
            return sum(training_flops(config, n, count, head, fraction) for n, count in sequences)

        total = 0.0
        for name, model in self.objective.models().items():
            head = "rtd" if model.head_name == "rtd" else "mlm"
            every = name == "discriminator" and self.settings.objective == "all_tokens_mlm"
            if name == "discriminator" and batch.phase == GENERATOR:
                continue
            part = flops(model.config, head, 1.0 if every else chosen)
            frozen = name == "generator" and batch.phase == DISCRIMINATOR
            total += part / 2 if frozen else part
        return total

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out text, corrupted in the same way every time; see `scores.scores`.

        mlm_*: of the generator, or of the only network, at the chosen positions. rtd_*: of the
        discriminator. replace_mlm_*, all_tokens_mlm_*, ar_*: of those objectives.
        """
        device = next(self.objective.parameters()).device
        observed: dict[str, list[Tensor]] = {}
        for batch in self._held_out():
            for name, values in self.objective.observe(to_device(batch, device)).items():
                observed.setdefault(name, []).append(values.float().cpu())
        joined = {name: torch.cat(values) for name, values in observed.items()}
        if "replaced" in joined:
            joined["replaced"] = joined["replaced"].bool()
        return scores(joined)

    def _held_out(self) -> Iterator[Batch]:
        settings, rows = self.settings, self.corpus.held_out
        size = max(1, _EVALUATED_TOKENS // settings.sequence_length)
        phases = ("", CAUSAL) if settings.objective == "mlm+ar" else ("",)
        for number, part in enumerate(torch.arange(len(rows)).split(size)):
            for phase in phases:
                # Steps below zero: no training step has their numbers.
                draws = Draws(settings.seed, -1 - number, 0, len(part), len(part))
                yield self._batch(rows, part, draws, phase)

    def export(self, directory: Path) -> None:
        """Writes every model into its own folder of `directory`, each with the tokenizer."""
        for name, model in self.objective.models().items():
            (directory / name).mkdir(parents=True, exist_ok=True)
            untied(model).save_pretrained(directory / name)
            tokenizers.save(self.corpus.tokenizer, directory / name)

    def parameters(self) -> dict[str, dict[str, int]]:
        """How many parameters each exported model has, with and without its tables."""
        return {
            name: {
                "total": model.num_parameters(),
                "without_embeddings": model.num_parameters(False),
            }
            for name, model in (
                (name, untied(model)) for name, model in self.objective.models().items()
            )
        }


def _corruption(
    settings: PretrainSettings, corpus: Corpus, vocab_size: int, special: dict[str, int]
) -> Corruption:
    ids = sorted(set(special.values()) - {special[tokenizers.UNK]})
    never = torch.zeros(vocab_size, dtype=torch.bool)
    never[ids] = True
    whole_words = settings.max_ngram > 1 if settings.whole_words is None else settings.whole_words
    proposals = None
    if settings.generator_type == "unigram":
        proposals = token_counts(corpus.train, vocab_size, ids).cumsum(0)
    elif settings.generator_type == "uniform":
        proposals = (~never).double().cumsum(0)
    mask_token_fraction, random_token_fraction = settings.mask_split
    return Corruption(
        special[tokenizers.MASK],
        never,
        settings.mask_fraction,
        settings.mask_replacement,
        settings.max_ngram,
        starts_word(corpus.tokenizer) if whole_words else None,
        mask_token_fraction,
        random_token_fraction,
        proposals,
    )


def pretrain(settings: PretrainSettings, progress: Progress | None = None) -> dict[str, Any]:
    """From text to models in `settings.output`; resumes by itself.

    Returns:
        The final scores, as written to metrics.json.

    Raises:
        FileNotFoundError, ValueError: bad settings or data. Interrupted, Diverged: see Trainer.
    """
    with Ranks(settings.device).main_first():
        corpus = load_corpus(settings)
    task = Pretraining(settings, corpus)
    trainer = Trainer(task, settings, progress)
    result = trainer.run()
    if not trainer.main:
        return result
    output = Path(settings.output)
    task.export(output)
    specials = [tokenizers.special_id(task.corpus.tokenizer, t) for t in tokenizers.SPECIAL_TOKENS]
    result = {
        **result,
        "baseline": baselines(task.corpus, specials),
        "parameters": task.parameters(),
    }
    write_atomically(output / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result
